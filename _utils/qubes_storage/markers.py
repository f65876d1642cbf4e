"""
What stands at either place while a VM moves, so that the next run finishes or undoes it.

``.OLD.moving``, a link beside the directory it leaves, names the directory it goes to. There,
``.NEW.creating/.from`` names the directory it leaves, its inode number, and whether it is kept.
Until the registry switches, the old directory is the VM; from then on the new one is. Each is whole
all the while. Links are read as texts and never followed.

Who may write a pool can leave such names there too, or rename those that are. So a
``.NEW.creating`` counts only if it is closed to all but root or the caller, and says that it is of
that VM; what ``.OLD.moving`` says counts only as far as such a one agrees.
"""

import contextlib
import errno
import os
from dataclasses import dataclass

from qubes_storage import files, image, owning, trees

_FROM, _TAKEN = ".from", ".taken"  # no VM has such a name


def creating(name):
    """The marker of a VM that is being made."""
    return f".{name}.creating"


def removing(name):
    """What a VM's directory is called while it is deleted."""
    return f".{name}.removing"


def moving(name):
    """The marker of a VM that moves away."""
    return f".{name}.moving"


def read(dir_fd, name):
    """The text of a link, or None where there is none."""
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError:
        return None


@contextlib.contextmanager
def opened(dir_fd, name):
    """A handle of ``.NAME.creating``; one that somebody else may have made is refused."""
    with files.closing(files.open_subdir(dir_fd, creating(name))) as fd:
        if not owning.is_private(fd):
            raise OSError(errno.EPERM, f"{creating(name)} was not made by root: delete it")
        yield fd


@dataclass
class Origin:
    """The directory that a VM leaves, and its new place."""

    path: str
    inode: str
    keep: bool
    place: str

    @classmethod
    def read(cls, marker):
        """What an open ``.NEW.creating`` says, or None."""
        text = read(marker, _FROM)
        if not text or text.count(":") < 3:
            return None
        inode, kept, length, rest = text.split(":", 3)
        return cls(rest[: int(length)], inode, kept == "keep", rest[int(length) :])

    @classmethod
    def of(cls, marker, place):
        """The same, of a marker that has to be that of the VM in ``place``."""
        found = cls.read(marker)
        return found and _agreed(found, place)

    def write(self, marker):
        """Say it in ``.NEW.creating``."""
        kept = "keep" if self.keep else "go"
        text = f"{self.inode}:{kept}:{len(self.path)}:{self.path}{self.place}"
        os.symlink(text, _FROM, dir_fd=marker)

    def leave(self, root, left=None):
        """
        Delete the old directory, unless it is kept; one whose disk is away stays there.

        ``left`` is the directory that it is in, if that is open: its path may lead there no more.
        """
        fd = _open(root, self.path) if left is None else os.dup(left)
        if fd is None:
            return
        name = os.path.basename(self.path)
        with files.closing(fd):
            marked = read(fd, moving(name)) == self.place
            if marked and not self.keep and self._is_old(fd, name):
                os.rename(name, removing(name), src_dir_fd=fd, dst_dir_fd=fd)
                os.fsync(fd)
            if not self.keep and self._is_old(fd, removing(name)):
                trees.remove_tree(fd, removing(name))
            if marked:
                os.unlink(moving(name), dir_fd=fd)
            os.fsync(fd)

    def _is_old(self, fd, name):
        found = files.exists(fd, name)
        return found is not None and image.identity(fd, name) == self.inode


@dataclass
class Taken:
    """
    A file of the caller's that becomes an image and goes: its path, when it was last changed (ns),
    its inode number, and the place of the VM. The number of its device may be another next time.
    """

    path: str
    changed: str
    inode: str
    place: str

    @classmethod
    def of(cls, marker, place):
        """What an open ``.NAME.creating`` says, which has to be that of the VM in ``place``."""
        text = read(marker, _TAKEN)
        if not text or text.count(":") < 3:
            return None
        changed, inode, length, rest = text.split(":", 3)
        found = cls(rest[: int(length)], changed, inode, rest[int(length) :])
        return _agreed(found, place)

    def write(self, marker):
        """Say it in ``.NAME.creating``."""
        text = f"{self.changed}:{self.inode}:{len(self.path)}:{self.path}{self.place}"
        os.symlink(text, _TAKEN, dir_fd=marker)

    def is_still(self, found, image_):
        """Whether a file of that stat is the one that became the image of that other stat."""
        if os.path.samestat(found, image_):
            return True
        return (self.changed, self.inode) == (str(found.st_mtime_ns), str(found.st_ino))


def _agreed(found, place):
    if found.place != place:
        mark = creating(os.path.basename(place))
        raise OSError(errno.EPERM, f"{mark} is that of {found.place}: rename it back")
    return found


def undo(root, fd, name, place):
    """
    Take away what a dead run made of NAME in ``place``, which its inode number tells, and its
    markers.
    """
    with opened(fd, name) as marker:
        origin = Origin.of(marker, place)
        there = files.exists(fd, name)
        if there and files.exists(marker, image.identity(fd, name)):
            os.rename(name, name, src_dir_fd=fd, dst_dir_fd=marker)
            os.fsync(fd)  # out of its place on the disk too, before anything of it goes
    trees.remove_tree(fd, creating(name))
    old = _open(root, origin.path) if origin else None
    if old is not None:
        mark = moving(os.path.basename(origin.path))
        with files.closing(old):
            if read(old, mark) == origin.place:
                os.unlink(mark, dir_fd=old)


def mend_moving(root, fd, name, path, registered):
    """
    A run died while NAME moved away: undo it while the registry has it here, else finish it.

    A place whose disk is away is left alone; a new move there mends it.
    """
    place = read(fd, moving(name))
    new = _open(root, place) if place else None
    if new is not None:
        with files.closing(new):
            _mend_place(root, new, place, path, registered)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(moving(name), dir_fd=fd)


def _open(root, path):
    """
    A handle of the directory that a VM's directory is in, or None where it is away; the pool's may
    be a link, and none below it.
    """
    pool, subdir = os.path.split(os.path.dirname(path))
    try:
        return files.open_inside(root, pool, subdir)
    except OSError:
        return None


def _mend_place(root, new, place, path, registered):
    name = os.path.basename(place)
    try:
        with opened(new, name) as marker:
            origin = Origin.of(marker, place)
            empty = not os.listdir(marker)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # there is none, or it is none of ours
    if empty:
        os.rmdir(creating(name), dir_fd=new)
    if origin is None or origin.path != path:
        return  # it is of another run, or was
    if registered or not files.exists(new, name):
        undo(root, new, name, place)
    else:
        origin.leave(root)
        trees.remove_tree(new, creating(name))
