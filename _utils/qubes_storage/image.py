"""Images: made, cloned and measured. The only file with ioctl, copy_file_range and sendfile."""

import contextlib
import errno
import fcntl
import os
import stat
import struct

from qubes_storage import mounts
from qubes_storage.exc import StoragePoolException
from qubes_storage.opening import open_image, pinned, reopen

__all__ = ["open_image", "pinned", "reopen"]
_FICLONE = 0x40049409
_SUBVOL_CREATE, _SNAP_DESTROY, _SNAP_CREATE_V2 = 0x5000940E, 0x5000940F, 0x50009417
_INO_LOOKUP, _FS_INFO = 0xD0009412, 0x8400941F
_GENERATION = 0x80087601  # FS_IOC_GETVERSION
_SUBVOLUME = 256  # the inode number of the directory that each subvolume of btrfs is
_LOOP_SET_CAPACITY = 0x4C07
_CHUNK = 1 << 30
_PIECE = 1 << 22
_WATCHED_CHUNK = 1 << 26
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Filesystems on which FICLONE shares blocks; asked when nothing may be written to try it out.
_SHARING = {"btrfs", "bcachefs", "ocfs2", "zfs"}
# xfs does if it was made so: its geometry (XFS_IOC_FSGEOMETRY_V4) has flags at that offset.
_XFS_GEOMETRY, _XFS_FLAGS, _XFS_REFLINK = 0x8070587C, 92, 1 << 20
watch = None  # called with (path, bytes copied, bytes to copy) while a copy goes on, if it is set
_NOT_HERE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EBADF}


def create(path, size):
    """Make a sparse image of ``size`` bytes; raises FileExistsError rather than touch one."""
    fd = _new(path)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _new(path):
    """A handle of a new file that only its owner may open, whatever the umask shuts out."""
    fd = os.open(path, _CREATE, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def clone(source_fd, path):
    """
    Make ``path`` a copy of an open image: blocks shared where the filesystem can (FICLONE), else
    copied in the kernel, holes left holes. Raises FileExistsError rather than touch an image.
    Returns whether blocks are shared.
    """
    fd = _new(path)
    try:
        try:
            fcntl.ioctl(fd, _FICLONE, source_fd)
        except OSError as err:
            if err.errno not in _NOT_HERE:
                raise
            _copy(source_fd, fd, path)
            return False
    finally:
        os.close(fd)
    return True


def _copy(source, target, path):
    found = os.fstat(source)
    size, data, copied = found.st_size, found.st_blocks * 512, 0
    chunk = _WATCHED_CHUNK if watch else _CHUNK
    os.ftruncate(target, size)  # first: xfs allocates ahead of writes past the end
    for start, stop in _data(source, size):
        offset = start
        while offset < stop:
            done = _copy_some(source, target, offset, min(stop - offset, chunk))
            if not done:
                raise OSError(errno.EIO, "the image got shorter while it was copied")
            offset += done
            copied += done
            if watch:
                watch(path, copied, data)


def _data(fd, size):
    """``(start, stop)`` of each part of a file that holds data."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return
            raise
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < stop:
            yield start, stop


def _copy_some(source, target, offset, count):
    try:
        return os.copy_file_range(source, target, count, offset, offset)
    except OSError as err:
        if err.errno not in _NOT_HERE:
            raise
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, source, offset, count)


def drop_cache(fd):
    """Have what is read of a synced file come from the disk, not from memory."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def check_same(source, target):
    """Compare two open files, holes as zeros; raises OSError where they differ."""
    size = os.fstat(source).st_size
    same = size == os.fstat(target).st_size
    for start, stop in _merged([*_data(source, size), *_data(target, size)]) if same else ():
        for offset in range(start, stop, _PIECE):
            count = min(_PIECE, stop - offset)
            same = same and os.pread(source, count, offset) == os.pread(target, count, offset)
    if not same:
        raise OSError(errno.EIO, "the copy differs from its source; is the disk sound?")


def _merged(parts):
    """The same parts in order, none of them overlapping."""
    last = 0
    for start, stop in sorted(parts):
        if stop > last:
            yield max(start, last), stop
            last = stop


def resize(path, size):
    """Grow an image to ``size`` bytes and sync it; the new part is a hole."""
    fd = open_image(path, os.O_RDWR)
    try:
        before = os.fstat(fd).st_size
        if size > before:
            os.ftruncate(fd, size)
        try:
            os.fsync(fd)  # also where a dead run has grown it
        except OSError:
            os.ftruncate(fd, before)  # nobody has been told of the new part
            raise
    finally:
        os.close(fd)


def measure(dir_fd, name):
    """``(size, allocated)`` of an image in bytes, or None where there is no regular file."""
    try:
        found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size, found.st_blocks * 512


def shares_blocks(fd):
    """Whether copies on the filesystem of an open directory share blocks; nothing is written."""
    kind = mounts.filesystem(fd)
    if kind != "xfs":
        return kind in _SHARING
    geometry = bytearray(_XFS_GEOMETRY >> 16 & 0x3FFF)
    with contextlib.suppress(OSError):  # one that does not answer counts as one that shares none
        fcntl.ioctl(fd, _XFS_GEOMETRY, geometry)
    return bool(struct.unpack_from("=I", geometry, _XFS_FLAGS)[0] & _XFS_REFLINK)


def can_share(fd):
    """Whether copies in an open directory share blocks, tried out; nothing is left behind."""
    with contextlib.ExitStack() as stack:
        one, other = (_nameless(fd, stack) for _ in range(2))
        os.write(one, bytes(4096))
        try:
            fcntl.ioctl(other, _FICLONE, one)
        except OSError as err:
            if err.errno not in _NOT_HERE:
                raise
            return False
    return True


def _nameless(dir_fd, stack):
    """A file in an open directory that is gone once it is closed."""
    try:
        fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    except OSError as err:
        if err.errno not in (*_NOT_HERE, errno.EISDIR):
            raise
        name = f".sharing-{os.getpid()}-{os.urandom(8).hex()}"
        fd = os.open(name, _CREATE, 0o600, dir_fd=dir_fd)
        os.unlink(name, dir_fd=dir_fd)
    stack.callback(os.close, fd)
    return fd


def used_by_loop(found):
    """The loop device over a file of that stat, by which a running VM uses it, or None."""
    return next(_loops(found), None)


def _loops(found):
    with contextlib.suppress(OSError):
        for name in os.listdir("/sys/block"):
            if not name.startswith("loop"):
                continue
            with contextlib.suppress(OSError):
                with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
                    there = os.stat(file.read().removesuffix(b"\n"))
                if (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino):
                    yield f"/dev/{name}"


def tell_loops(path):
    """Tell the loop devices over an image how large it has become."""
    with pinned(path) as (_, found):
        for device in _loops(found):
            with open(f"/sys/block/{os.path.basename(device)}/size", encoding="utf-8") as known:
                if int(known.read()) >= found.st_size // 512:
                    continue
            try:
                with open(device, "rb") as opened:
                    fcntl.ioctl(opened, _LOOP_SET_CAPACITY)
            except OSError as err:
                raise StoragePoolException(
                    f"{device}: does not know that its image has grown: {err.strerror}; tell it"
                    f" with losetup -c {device}"
                ) from err


def _btrfs(fd, call, *fields):
    """A call of btrfs on an open directory, with the fields of its argument; returns that."""
    size = call >> 16 & 0x3FFF
    argument = bytearray(struct.pack(*fields).ljust(size, b"\0"))
    fcntl.ioctl(fd, call, argument)
    return argument


def create_subvolume(dir_fd, name):
    """Make a subvolume in an open directory."""
    _btrfs(dir_fd, _SUBVOL_CREATE, "=q4088s", 0, os.fsencode(name))


def snapshot_subvolume(source_fd, dir_fd, name):
    """Make ``name`` in an open directory a snapshot of the open subvolume."""
    _btrfs(dir_fd, _SNAP_CREATE_V2, "=qQQ32s4040s", source_fd, 0, 0, b"", os.fsencode(name))


def destroy_subvolume(dir_fd, name):
    """Delete a subvolume with all that is in it, if it is one and may be; whether it went."""
    found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if found.st_ino != _SUBVOLUME or not stat.S_ISDIR(found.st_mode):
        return False
    try:
        _btrfs(dir_fd, _SNAP_DESTROY, "=q4088s", 0, os.fsencode(name))
    except OSError:
        return False  # no subvolume, or one that has others in it
    return True


def is_subvolume(fd):
    """Whether an open directory is a subvolume of btrfs."""
    return os.fstat(fd).st_ino == _SUBVOLUME and isinstance(device(fd), bytes)


def device(fd):
    """What files of one filesystem have in common: st_dev, on btrfs the filesystem's own id."""
    try:
        return bytes(_btrfs(fd, _FS_INFO, "=x")[16:32])
    except OSError:
        return os.fstat(fd).st_dev


def identity(dir_fd, name):
    """
    A text that tells a directory from any other that was or will be in its place.

    A number of an inode is given again, with another generation, where the filesystem tells it;
    subvolumes all have the same one, and a number of their own.
    """
    found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        return str(found.st_ino)
    fd = os.open(name, _READ | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        if is_subvolume(fd):
            number = struct.unpack_from("=Q", _btrfs(fd, _INO_LOOKUP, "=QQ", 0, _SUBVOLUME))[0]
        else:
            number = struct.unpack("=I", fcntl.ioctl(fd, _GENERATION, bytes(8))[:4])[0]
        return f"{found.st_ino}.{number}"
    except OSError:
        return str(found.st_ino)
    finally:
        os.close(fd)
