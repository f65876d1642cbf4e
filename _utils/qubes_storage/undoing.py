"""
What a dead run made of a VM, taken away again: not where it may be all that there is of one.

A dead run has not registered what it made, so nobody has used it, unless an older qubes.xml was
put back or the VM was taken out of it. Then nothing is deleted, and an error names what there is.
"""

import contextlib
import errno
import os

from qubes_storage import files, markers, registry, trees
from qubes_storage.markers import Origin, Taken, creating, moving, open_beside

_DATA = ("root.img", "private.img")  # the others are made anew
_CURE = "put the qubes.xml back that has the VM, or move away what is not needed"
_NEITHER = "{} was copied to {}, and qubes.xml knows neither: " + _CURE


def undo(root, fd, name, place):
    """
    Take away what a dead run made of NAME in ``place``, which its inode number tells, and its
    markers.
    """
    with markers.opened(fd, name) as marker:
        origin = Origin.of(marker, place)
        _check(root, fd, name, place, marker)
        if markers.made(marker, fd, name):
            os.rename(name, name, src_dir_fd=fd, dst_dir_fd=marker)
    os.fsync(fd)  # out of its place on the disk too, before anything of it goes
    trees.remove_tree(fd, creating(name))
    os.fsync(fd)  # gone, and with it second names of the files, before the other marker goes
    old = open_beside(root, origin.path) if origin else None
    if old is not None:
        mark = moving(os.path.basename(origin.path))
        with files.closing(old):
            if markers.read(old, mark) == origin.place:
                os.unlink(mark, dir_fd=old)


def check_undo(root, fd, name, place):
    """Raise what :py:func:`undo` would before it takes anything away."""
    with markers.opened(fd, name) as marker:
        Origin.of(marker, place)
        _check(root, fd, name, place, marker)


def _check(root, fd, name, place, marker):
    made = markers.made(marker, fd, name)
    if not made:
        return
    origin, taken = Origin.of(marker, place), Taken.of(marker, place)
    if origin and not _is_known(root, origin.path):
        raise OSError(errno.EEXIST, _NEITHER.format(origin.path, place))
    with files.closing(files.open_subdir(fd, name)) as vmdir:
        for image in _DATA:
            found = files.exists(vmdir, image)
            # A copy has the time of its source, which may lie in the future; the kernel sets ctime.
            last = min(found.st_mtime_ns, found.st_ctime_ns) if found else 0
            if last > made.st_mtime_ns and found.st_nlink == 1:
                used = os.path.join(place, image)
                raise OSError(errno.EEXIST, f"{used} was used since a run made it: {_CURE}")
    if taken and not _is_there(taken.path):
        raise OSError(errno.EEXIST, f"{place} has all that there is of {taken.path}: {_CURE}")


def _is_known(root, path):
    """Whether the registry has the VM of a directory, which then lies nowhere else."""
    found = registry.load(root)
    return found is not None and os.path.basename(path) in found.by_name


def _is_there(path):
    try:
        with files.closing(files.open_outside(path)) as fd:
            return files.exists(fd, os.path.basename(path)) is not None
    except OSError:
        return False


def takes_away(root, fd, name, path):
    """Whether what is in the place of NAME, which is not registered, goes with the markers."""
    if files.exists(fd, creating(name)):
        with markers.opened(fd, name) as marker:
            if markers.made(marker, fd, name):
                return True
    place, new = _target(root, fd, name)
    if new is None:
        return False
    with files.closing(new):
        origin, _ = _origin(new, place, path)
        goes = origin is not None and not origin.keep and origin.is_old(fd, name)
        return goes and not _is_to_be_undone(root, fd, path, new, place, False)


def mend_moving(root, fd, name, path, registered):
    """
    A run died while NAME moved away: undo it while the registry has it here, else finish it.

    A place whose disk is away is left alone; a new move there mends it.
    """
    place, new = _target(root, fd, name)
    if new is not None:
        with files.closing(new):
            last = os.path.basename(place)
            origin, empty = _origin(new, place, path)
            if empty:
                os.rmdir(creating(last), dir_fd=new)
            if origin and _is_to_be_undone(root, fd, path, new, place, registered):
                undo(root, new, last, place)
            elif origin:  # else it is of another run, or was
                origin.leave(root)
                trees.remove_tree(new, creating(last))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(moving(name), dir_fd=fd)


def check_moving(root, fd, name, path, registered):
    """Raise what :py:func:`mend_moving` would before it takes anything away."""
    place, new = _target(root, fd, name)
    if new is not None:
        with files.closing(new):
            if _origin(new, place, path)[0]:
                _is_to_be_undone(root, fd, path, new, place, registered)


def _target(root, fd, name):
    """``(the directory that NAME moves to, a handle of the one that this is in)``, or Nones."""
    place = markers.read(fd, moving(name))
    return place, open_beside(root, place) if place else None


def _origin(new, place, path):
    """``(what the marker at a new place says if that is of PATH, whether the marker is empty)``"""
    try:
        with markers.opened(new, os.path.basename(place)) as marker:
            origin = Origin.of(marker, place)
            empty = not os.listdir(marker)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None, False  # there is none, or it is none of ours
    return (origin if origin and markers.same_path(origin.path, path) else None), empty


def _is_to_be_undone(root, fd, path, new, place, registered):
    """Whether a move is undone, and not finished; raises where neither may be."""
    name = os.path.basename(place)
    if registered or not files.exists(new, name):
        check_undo(root, new, name, place)
        return True
    if not _is_known(root, place) and files.exists(fd, os.path.basename(path)):
        raise OSError(errno.EEXIST, _NEITHER.format(path, place))
    return False
