"""
Images opened where others may write: never a link, a pipe or a device, nor a file that lies
elsewhere too, for what is written to it would be written there.
"""

import contextlib
import errno
import os
import stat


@contextlib.contextmanager
def pinned(path, also=None, anywhere=False):
    """
    ``(handle, lstat)`` of an image that can only be looked at, linked or opened again by
    :py:func:`reopen`: whatever takes its name meanwhile, it stays the same file.

    A link, a pipe, a device and a file that has a name elsewhere too are refused, and not opened.
    ``also`` is an open directory in which it may have names besides its own; ``anywhere`` lets it
    have them anywhere.
    """
    name = os.path.basename(path)
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"{name} is not a regular file: put one in its place", path)
        now = os.stat(path, follow_symlinks=False)  # its name may have gone before it was counted
        same = (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino)
        links = max(now.st_nlink, found.st_nlink)
        if not anywhere and (not same or links > _names(found, path, also)):
            raise OSError(
                errno.EMLINK, f"{name} has a name elsewhere too: put a copy in its place", path
            )
        yield fd, found
    finally:
        os.close(fd)


def _names(found, path, also):
    """How many names a file has in its own directory and in ``also``."""
    if found.st_nlink == 1:
        return 1
    count = 0
    for place in (os.path.dirname(path), *(() if also is None else (also,))):
        with os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    there = entry.stat(follow_symlinks=False)
                    count += (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)
    return count


def reopen(pin, flags=os.O_RDONLY):
    """A handle of a pinned file."""
    return os.open(f"/proc/self/fd/{pin}", flags | os.O_NONBLOCK | os.O_CLOEXEC)


def open_image(path, flags=os.O_RDONLY, anywhere=False):
    """A handle of an image; what :py:func:`pinned` refuses is refused."""
    with pinned(path, anywhere=anywhere) as (pin, _):
        return reopen(pin, flags)
