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
        return found and _agreed(found, marker, place)

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
        fd = open_beside(root, self.path) if left is None else os.dup(left)
        if fd is None:
            return
        name = os.path.basename(self.path)
        with files.closing(fd):
            marked = read(fd, moving(name)) == self.place
            if marked and not self.keep and self.is_old(fd, name):
                os.rename(name, removing(name), src_dir_fd=fd, dst_dir_fd=fd)
            if not self.keep and self.is_old(fd, removing(name)):
                os.fsync(fd)  # also for a dead run that has renamed it
                trees.remove_tree(fd, removing(name))
            if marked:
                os.unlink(moving(name), dir_fd=fd)
            os.fsync(fd)

    def is_old(self, fd, name):
        """Whether NAME is the directory that the VM leaves."""
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
        return _agreed(found, marker, place)

    def write(self, marker):
        """Say it in ``.NAME.creating``."""
        text = f"{self.changed}:{self.inode}:{len(self.path)}:{self.path}{self.place}"
        os.symlink(text, _TAKEN, dir_fd=marker)

    def is_still(self, found, image_):
        """Whether a file of that stat is the one that became the image of that other stat."""
        if os.path.samestat(found, image_):
            return True
        return (self.changed, self.inode) == (str(found.st_mtime_ns), str(found.st_ino))


def _agreed(found, marker, place):
    """What a marker says, if it is that of the VM in ``place``; its pool may lie elsewhere now."""
    name = os.path.basename(place)
    if not same_path(found.place, place):
        with files.closing(files.open_subdir(marker, "..")) as beside:
            if os.path.basename(found.place) != name or not made(marker, beside, name):
                told = f"{creating(name)} is that of {found.place}: rename it back"
                raise OSError(errno.EPERM, told)
    return found


def same_path(path, other):
    """Whether two texts are the same path."""
    return os.path.normpath(path) == os.path.normpath(other)


def made(marker, fd, name):
    """
    The lstat of what an open ``.NAME.creating`` has since the directory NAME beside it was whole,
    or None where NAME is another, or is not there.
    """
    return files.exists(marker, image.identity(fd, name)) if files.exists(fd, name) else None


def open_beside(root, path):
    """
    A handle of the directory that a VM's directory is in, or None where it is away; the pool's may
    be a link, and none below it.
    """
    pool, subdir = os.path.split(os.path.dirname(path))
    try:
        return files.open_inside(root, pool, subdir)
    except OSError:
        return None
