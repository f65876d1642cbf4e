"""
Whose files and directories are, and who may open them: made closed to others, opened up at last.
"""

import contextlib
import errno
import grp
import os
import stat

from qubes_storage.opening import open_image
from qubes_storage.trees import clear, closing, exists, open_subdir, remove, rename_new

DIR_MODE = 0o2770
FILE_MODE = 0o660
PRIVATE_MODE = 0o2700  # what is made in such a directory has its group
GROUP = "qubes"
_ACCESS_LISTS = ("system.posix_acl_access", "system.posix_acl_default")


def qubes_gid():
    """The id of group ``qubes``, or None where there is none."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def group_for(dir_fd):
    """The group of what is made in an open directory: ``qubes``, else that of the directory."""
    gid = qubes_gid()
    return os.fstat(dir_fd).st_gid if gid is None else gid


def own(fd, mode, gid=None):
    """
    Give an open file the group ``qubes``, where it exists and the caller may, and then its mode.

    Files come into being closed to everyone else and are opened up here, so no umask and no moment
    lets others in; an access list that the directory handed down goes first. What was someone
    else's becomes the caller's.
    """
    gid = qubes_gid() if gid is None else gid
    found = os.fstat(fd)
    for name in os.listxattr(fd):
        if name in _ACCESS_LISTS:
            os.removexattr(fd, name)
    if found.st_uid != os.geteuid():
        with contextlib.suppress(PermissionError):
            os.fchown(fd, os.geteuid(), -1)
    if gid is not None and found.st_gid != gid:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, -1, gid)
    os.fchmod(fd, mode)


def make_dir(dir_fd, name, mode=DIR_MODE):
    """Make a directory and return a handle of it: of the one that was made, and of no other."""
    os.mkdir(name, 0o700, dir_fd=dir_fd)
    with contextlib.ExitStack() as undo:
        undo.callback(_rmdir, dir_fd, name)
        try:
            fd = open_subdir(dir_fd, name)
        except PermissionError:  # an umask that shuts out the owner too
            with closing(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)) as made:
                os.chmod(f"/proc/self/fd/{made}", 0o700)
            fd = open_subdir(dir_fd, name)
        undo.callback(os.close, fd)
        if not is_private(fd) or os.listdir(fd):
            raise OSError(errno.EBUSY, f"{name} was taken away while it was made", name)
        own(fd, mode, group_for(dir_fd))
        undo.pop_all()
    return fd


def _rmdir(dir_fd, name):
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=dir_fd)


def beside(name):
    """What a directory is called until it has its mode and group."""
    return f".{name}.new"


def place_dir(dir_fd, name, mode=DIR_MODE):
    """
    Make a directory that has its mode and group from the moment it has its name; returns a handle.
    """
    new = beside(name)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(new, dir_fd=dir_fd)  # a dead run's, with nothing in it
    fd = make_dir(dir_fd, new, mode)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        undo.callback(_rmdir, dir_fd, new)
        os.fsync(fd)
        rename_new(dir_fd, dir_fd, new, name)
        os.fsync(dir_fd)
        undo.pop_all()
    return fd


def is_private(fd):
    """Whether an open directory belongs to root or the caller, and is closed to all others."""
    found = os.fstat(fd)
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o077


def is_roots(pin):
    """Whether a pinned file belongs to root or the caller, and others cannot write to it."""
    found = os.fstat(pin)
    groups = (0, os.getegid(), qubes_gid())
    never = stat.S_IWOTH if found.st_gid in groups else stat.S_IWOTH | stat.S_IWGRP
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & never:
        return False
    if not found.st_mode & stat.S_IWGRP:  # which is what an access list allows at most
        return True
    return not set(_ACCESS_LISTS) & set(os.listxattr(f"/proc/self/fd/{pin}"))


def is_workshop(dir_fd, name):
    """Whether something is such a directory as :py:func:`workshop` makes."""
    try:
        with closing(open_subdir(dir_fd, name)) as fd:
            return is_private(fd)
    except OSError:
        return False


@contextlib.contextmanager
def workshop(dir_fd, name):
    """
    An open directory NAME in which things are made that nobody else may reach until they are
    renamed out of it. What a dead run left in its place goes; afterwards it is gone.
    """
    if exists(dir_fd, name) and not is_workshop(dir_fd, name):
        raise OSError(errno.EEXIST, f"{name} is in the way: move it away", name)
    clear(dir_fd, name)
    with closing(make_dir(dir_fd, name, PRIVATE_MODE)) as fd:
        try:
            yield fd
        finally:
            with contextlib.suppress(OSError):  # what cannot go now goes with the next run
                with closing(open_subdir(fd, ".")) as again:  # as btrfs lists it now
                    for entry in sorted(os.listdir(again)):
                        remove(again, entry)
                clear(dir_fd, name)
            os.fsync(dir_fd)


def finish(path):
    """Give a new file its group and mode, and bring it to the disk."""
    fd = open_image(path, os.O_RDWR)
    try:
        own(fd, FILE_MODE)
        os.fsync(fd)
    finally:
        os.close(fd)
