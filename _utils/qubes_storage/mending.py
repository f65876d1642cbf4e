"""
What a dead run left of a VM, finished or undone by the next one that changes the VM.

``.NAME.creating`` beside a VM's directory: its making is undone if the registry does not know NAME,
else finished. ``.NAME.removing``: it is renamed back if the registry still knows NAME, else deleted
on. A VM that moves leaves the markers of :py:mod:`markers`, one at either place. In a VM's own
directory there may be those in which something was made that was to be renamed out of them.
"""

import contextlib
import errno
import os
import re
import stat

from qubes_storage import files, markers, owning, registry, revisions, trees, undoing
from qubes_storage.exc import OutOfStep, StoragePoolException
from qubes_storage.markers import creating, moving, removing
from qubes_storage.vm import IMAGES

_MARKED = re.compile(r"\.(.+)\.(?:creating|removing|moving)", re.DOTALL)
SNAPSHOT = ".snapshot"  # of a VM's directory in itself, while images of one moment are kept
_WORKSHOPS = {SNAPSHOT} | {
    f".{name}{end}" for name in (*IMAGES.values(), "icon.png") for end in (".new", ".revision.new")
}
_ASIDE = f".{IMAGES['root-cow']}.old"  # a second name of that image, while a commit keeps it


def unfinished(pool, vm, registered=True):
    """The paths of what a dead run left of a VM in a pool; what others work at is not dead."""
    try:
        with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
            names = [mark(vm.dirname) for mark in (creating, removing, moving)]
            found = [name for name in names if files.exists(fd, name)]
            inside = _workshops(fd, vm.dirname) if registered else []
    except StoragePoolException:
        return []
    found += [os.path.join(vm.dirname, name) for name in inside]
    if found and registry.others_work(pool.root):
        return []
    return [os.path.join(pool.dir_path, vm.klass.subdir, name) for name in found]


def marked(pool, subdir):
    """The names of the VMs of which something is left in a directory of a pool."""
    try:
        with files.closing(pool.open_subdir(subdir)) as fd:
            found = [_MARKED.fullmatch(name) for name in sorted(os.listdir(fd))]
    except (OSError, StoragePoolException):
        return []
    return [match[1] for match in found if match]


def _workshops(fd, name):
    """Where in a VM's directory, if it is one, something was made."""
    try:
        with files.closing(files.open_subdir(fd, name)) as vmdir:
            found = sorted(_WORKSHOPS.intersection(os.listdir(vmdir)))
            found = [each for each in found if owning.is_workshop(vmdir, each)]
            return [_ASIDE, *found] if files.exists(vmdir, _ASIDE) else found
    except OSError:
        return []


def left_behind(pool, vm):
    """What an error about a VM's files says besides, if a dead run left some of them."""
    paths = ", ".join(unfinished(pool, vm))
    return paths and f"; {paths} is left by a run that died: qubes_vm.set {vm.name} mends it"


def is_there(pool, vm, dead=True):
    """
    Whether something is in the place of a VM's directory, be it a link, or with ``dead`` what a
    dead run was removing; raises where that cannot be told.
    """
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        names = (vm.dirname, removing(vm.dirname)) if dead else (vm.dirname,)
        return any(files.exists(fd, name) is not None for name in names)


def open_vm(pool, vm):
    """A handle of a VM's directory, also of one that a dead run was removing, or None."""
    fd = pool.open_vm(vm)
    if fd is None:
        try:
            with files.closing(pool.open_subdir(vm.klass.subdir)) as subdir:
                return files.open_subdir(subdir, removing(vm.dirname))
        except (OSError, StoragePoolException):
            return None
    return fd


def check(pool, vm, registered):
    """Raise what :py:func:`mend` would of markers that no run has made."""
    with _opened(pool, vm) as fd:
        name, place = vm.dirname, pool.vmdir(vm)
        if files.exists(fd, creating(name)):
            with markers.opened(fd, name) as marker:
                markers.Origin.of(marker, place)
                markers.Taken.of(marker, place)
            if not registered:
                undoing.check_undo(pool.root, fd, name, place)
        found = files.exists(fd, moving(name))
        if found and stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, f"{moving(name)} is a directory: move it away")
        if found:
            undoing.check_moving(pool.root, fd, name, place, registered)
        if registered and files.exists(fd, removing(name)):
            _check_removing(fd, name, place)


def _check_removing(fd, name, place):
    """Refuse a link in place of a directory that is to be put back, and two that have images."""
    if not files.exists(fd, name):
        os.close(files.open_subdir(fd, removing(name)))
        return
    try:
        left = files.open_subdir(fd, removing(name))
    except NotADirectoryError:
        return
    with files.closing(left):
        if any(files.exists(left, IMAGES[volume]) for volume in ("root", "private")):
            other = os.path.join(os.path.dirname(place), removing(name))
            raise OSError(
                errno.EEXIST,
                f"{place} and {other}, which a removal that died left, both have images: move away"
                " the one that is not needed",
            )


def mend(pool, vm, registered):
    """Finish or undo what a dead run left of a VM."""
    with _opened(pool, vm) as fd:
        _mend(pool, vm, registered, fd)


@contextlib.contextmanager
def _opened(pool, vm):
    """A handle of the directory where a VM lies, or will."""
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        try:
            yield fd
        except OSError as err:
            place = os.path.dirname(pool.vmdir(vm))
            raise OutOfStep(
                f"VM {vm.name}: {place}: what a dead run left cannot be mended: {err.strerror};"
                " mend that and try again"
            ) from err


def _mend(pool, vm, registered, fd):
    name = vm.dirname
    if any(files.exists(fd, mark(name)) for mark in (creating, moving, removing)):
        _mend_marked(pool, vm, registered, fd)
    left = _workshops(fd, name) if registered else []
    if left:
        with files.closing(files.open_subdir(fd, name)) as vmdir:
            os.fsync(vmdir)  # what the dead run has renamed out of them
            for each in left:
                if each.endswith(".img.new") and owning.is_workshop(vmdir, each):
                    revisions.take_back(vmdir, each[1 : -len(".new")])
                trees.remove(vmdir, each)
            os.fsync(vmdir)


def _mend_marked(pool, vm, registered, fd):
    name, place = vm.dirname, pool.vmdir(vm)
    os.fsync(fd)  # the dead run may not have come to either
    registry.sync(pool.root)
    if files.exists(fd, creating(name)):
        if registered:
            finish(pool.root, fd, name, place)
        else:
            undoing.undo(pool.root, fd, name, place)
    if files.exists(fd, moving(name)):
        undoing.mend_moving(pool.root, fd, name, place, registered)
    if files.exists(fd, removing(name)):
        if registered:
            _check_removing(fd, name, place)
        if registered and not files.exists(fd, name):
            os.rename(removing(name), name, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            trees.remove(fd, removing(name))
    os.fsync(fd)


def finish(root, fd, name, place, left=None):
    """
    A VM is made and registered: what it came from goes, and then the marker.

    ``left`` is the directory that this is in, if that is open.
    """
    with markers.opened(fd, name) as marker:
        origin = markers.Origin.of(marker, place)
        if origin:
            origin.leave(root, left)
        taken = markers.Taken.of(marker, place)
    if taken:
        with files.closing(files.open_subdir(fd, name)) as vmdir:
            _remove_outside(taken, files.exists(vmdir, "root.img"), left)
            # A file that was linked has kept its mode till now.
            owning.finish(files.at(vmdir, "root.img"))
    trees.remove_tree(fd, creating(name))


def _remove_outside(taken, root, left):
    """Delete a file of the caller's if it is still the one that became a root image."""
    name = os.path.basename(taken.path)
    try:
        fd = files.open_outside(taken.path) if left is None else os.dup(left)
    except (FileNotFoundError, NotADirectoryError):
        return
    with files.closing(fd):
        found = files.exists(fd, name)
        if found and root and taken.is_still(found, root):
            try:
                os.unlink(name, dir_fd=fd)
            except OSError as err:
                raise OSError(err.errno, f"{taken.path}: {err.strerror}") from err
        os.fsync(fd)  # gone from the disk before the marker goes
