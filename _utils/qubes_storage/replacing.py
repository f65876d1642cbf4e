"""Files replaced whole: whoever reads one sees the old or the new, and never a part."""

import contextlib
import os
import stat

from qubes_storage import files, owning


class Unsynced(OSError):
    """A file is replaced, but perhaps not on the disk; ``fd`` is what the call was to return."""

    fd = None


def replace(dir_fd, name, data, mode=None, before_rename=None):
    """
    Replace a file whole: written beside, synced, renamed, the directory synced.

    Where that last step fails the file is replaced all the same, and :py:class:`Unsynced` tells so.

    Owner, group and, unless ``mode`` is given, mode of an existing file are kept; a new one is 0660
    and of group qubes. The name beside is always the same, so what a dead run left is written over.
    ``before_rename`` gets the handle of the new file, which stays open and is returned if it
    returns True.
    """
    new = f".{name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new, dir_fd=dir_fd)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        old = files.exists(dir_fd, name)
        if old and stat.S_ISREG(old.st_mode):
            _own_as(fd, old, mode)
        else:
            owning.own(fd, owning.FILE_MODE)
        written = 0
        while written < len(data):
            written += os.write(fd, data[written:])
        os.fsync(fd)
        keep = before_rename(fd) if before_rename else False
        os.rename(new, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=dir_fd)
        os.close(fd)
        raise
    if not keep:
        os.close(fd)
        fd = None
    try:
        os.fsync(dir_fd)
    except OSError as err:
        unsynced = Unsynced(err.errno, err.strerror, name)
        unsynced.fd = fd
        raise unsynced from err
    except BaseException:
        if keep:
            os.close(fd)  # and with it a lock that nobody would drop
        raise
    return fd


def _own_as(fd, old, mode):
    mine = os.fstat(fd)
    if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            if mine.st_gid != old.st_gid:
                os.fchown(fd, -1, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode) if mode is None else mode)
