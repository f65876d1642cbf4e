"""Names in directories: looked at, renamed, measured and deleted by handles, no link followed."""

import contextlib
import ctypes
import errno
import os
import stat

from qubes_storage import image, mounts

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_MAX_DEPTH = 128  # of what is deleted
MAX_COPIED = 64  # of what is copied, so that a copy can be deleted


def open_subdir(dir_fd, name):
    """A handle of a directory in ``dir_fd``; a link in its place is an error, never followed."""
    return os.open(name, _DIR, dir_fd=dir_fd)


@contextlib.contextmanager
def closing(fd):
    """``with closing(open_dir(...)) as fd``"""
    try:
        yield fd
    finally:
        os.close(fd)


def exists(dir_fd, name):
    """The lstat of ``name`` in a directory, or None."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        return None


def remove_tree(dir_fd, name, depth=0):
    """
    Delete a directory and what is in it; links are deleted, never followed, and what is mounted
    there is refused.
    """
    if image.destroy_subvolume(dir_fd, name):
        return
    check_depth(depth, name)
    with closing(open_subdir(dir_fd, name)) as fd:
        if mounts.mount_of(fd) != mounts.mount_of(dir_fd):
            raise OSError(errno.EBUSY, f"{name} is a mount point: unmount it", name)
        for entry in sorted(os.listdir(fd)):
            remove(fd, entry, depth + 1)
    os.rmdir(name, dir_fd=dir_fd)


def remove(dir_fd, name, depth=0):
    """Delete a file, a link, or a directory and what is in it."""
    if stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        remove_tree(dir_fd, name, depth)
    else:
        os.unlink(name, dir_fd=dir_fd)


def clear(dir_fd, name):
    """Delete what is in the place of something that is to be made, if anything is."""
    with contextlib.suppress(FileNotFoundError):
        remove(dir_fd, name)


def check_depth(depth, name, most=_MAX_DEPTH):
    """Refuse directories in directories that go on for ever."""
    if depth > most:
        raise OSError(errno.ELOOP, f"{name} lies more than {most} directories deep", name)


def tree_size(dir_fd, name, depth=0):
    """The allocated bytes of a file or directory, links not followed; none of what is gone."""
    found = exists(dir_fd, name)
    size = found.st_blocks * 512 if found else 0
    if found and stat.S_ISDIR(found.st_mode) and depth <= _MAX_DEPTH:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(FileNotFoundError, NotADirectoryError))
            fd = stack.enter_context(closing(open_subdir(dir_fd, name)))
            size += sum(tree_size(fd, entry, depth + 1) for entry in os.listdir(fd))
    return size


def rename_new(from_fd, to_fd, name, new_name=None):
    """
    Move ``name`` from one directory to another; raises FileExistsError rather than replace one.

    A rename alone would replace an empty directory of somebody else's.
    """
    new_name = new_name or name
    with contextlib.suppress(AttributeError):  # a C library without it
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        texts = os.fsencode(name), os.fsencode(new_name)
        if not renameat2(from_fd, texts[0], to_fd, texts[1], _RENAME_NOREPLACE):
            return
        err = ctypes.get_errno()
        if err not in (errno.EINVAL, errno.ENOSYS):  # a filesystem without it
            raise OSError(err, os.strerror(err), new_name)
    if exists(to_fd, new_name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name)
    os.rename(name, new_name, src_dir_fd=from_fd, dst_dir_fd=to_fd)
