"""R3.2's registry of VMs, qubes.xml: loaded once a version, locked as R3.2 does, saved whole."""

import contextlib
import fcntl
import os
import struct
import threading

from qubes_storage import files, owning, replacing
from qubes_storage.collection import MAX_ID, PATH, Entry, Registry, empty, loads, with_dom0
from qubes_storage.exc import StoragePoolException
from qubes_storage.opening import open_image

__all__ = [
    "MAX_ID",
    "PATH",
    "Entry",
    "Registry",
    "empty",
    "load",
    "loads",
    "lock",
    "others_work",
    "save",
    "with_dom0",
]

_FLOCK = "@hhqqi0q"  # struct flock
_cache = {}
_locks = {}
_guard = threading.Lock()


def load(root):
    """What qubes.xml says now, with no lock taken, or None where there is none."""
    stamp = files.stamp(root, PATH)
    cached = _cache.get(root)
    if cached and stamp and cached[0] == stamp:
        return cached[1]
    held = _held(root)
    with held.handles:
        stamp = files.stamp(root, PATH)  # anew: it may have been saved since
        found = None if held.fd is None else os.fstat(held.fd)
        if found and (stamp is None or stamp[:2] == (found.st_dev, found.st_ino)):
            # Closing another descriptor of the file would drop our lock: read through this one.
            stamp, data = files.stamp_of(found), os.pread(held.fd, found.st_size, 0)
        else:  # no lock is held, or a save was interrupted once it had replaced the file
            data = files.read(root, PATH)
    if data is None:
        return None
    registry = with_dom0(loads(data))
    with _guard:
        cached = _cache.get(root)
        if cached and cached[0] == stamp:  # another thread read it, too
            return cached[1]
        # The stamp is never younger than the data: if it is older, the next load reads again.
        _cache[root] = (stamp, registry)
    return registry


class _Lock:
    def __init__(self):
        self.mutex = threading.RLock()
        self.handles = threading.RLock()  # while the file is opened or closed
        self.depth = 0
        self.fd = None
        self.dir_fd = None
        self.name = None
        self.unsynced = None  # why what was saved last may not be on the disk


def _held(root):
    with _guard:
        return _locks.setdefault((os.getpid(), root), _Lock())


def others_work(root):
    """Whether another thread or process holds the lock; asked without taking it."""
    held = _held(root)
    if not held.mutex.acquire(blocking=False):
        return True
    try:
        if held.depth:
            return False
        with files.locate(root, PATH) as (dir_fd, name):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        with files.closing(fd):
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False
    finally:
        held.mutex.release()


@contextlib.contextmanager
def lock(root):
    """
    Hold R3.2's one lock, ``lockf(LOCK_EX)`` on qubes.xml, and yield what the file says.

    It is opened again if it was replaced meanwhile, kept across a save, and made if there is none.
    It nests; there is one handle of the file in a process.
    """
    held = _held(root)
    with held.mutex:
        if not held.depth:
            _acquire(root, held)
        held.depth += 1
        try:
            yield load(root)
        finally:
            held.depth -= 1
            if not held.depth:
                _release(held)


def _acquire(root, held):
    os.close(files.open_root(root))
    os.close(files.make_dirs(root, os.path.dirname(PATH), owning.DIR_MODE))
    try:
        with files.locate(root, PATH) as (dir_fd, name):
            held.dir_fd, held.name = os.dup(dir_fd), name
        while held.fd is None:
            fd = _open(held)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                with held.handles:
                    fcntl.lockf(fd, fcntl.LOCK_EX)  # a thread that read meanwhile has dropped it
                    now = files.exists(held.dir_fd, held.name)
                    mine = os.fstat(fd)
                    if now and (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
                        held.fd = fd
            finally:
                if held.fd is None:
                    os.close(fd)
        with contextlib.suppress(OSError):  # what a dead run did not get to rename
            os.unlink(f".{held.name}.new", dir_fd=held.dir_fd)
    except OSError as err:
        _release(held)
        raise StoragePoolException(
            f"{PATH}: cannot be locked: {err.strerror}; run as root or as a member of group"
            f" {owning.GROUP}, and have a file there or nothing"
        ) from err
    except BaseException:
        _release(held)
        raise


def _open(held):
    while True:
        try:
            return open_image(files.at(held.dir_fd, held.name), os.O_RDWR, anywhere=True)
        except FileNotFoundError:
            _make(held)


def _make(held):
    """Make qubes.xml whole and link it into place, so that nobody ever sees half of one."""
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=held.dir_fd)
    try:
        owning.own(fd, owning.FILE_MODE)
        os.write(fd, empty().dumps())
        os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(f"/proc/self/fd/{fd}", held.name, dst_dir_fd=held.dir_fd, follow_symlinks=True)
    finally:
        os.close(fd)


def _release(held):
    with held.handles:
        for fd in (held.fd, held.dir_fd):
            if fd is not None:
                os.close(fd)
        held.fd = held.dir_fd = None


def save(root, registry):
    """
    Replace qubes.xml under the lock, which goes over to the new file as in R3.2.

    Raises :py:class:`replacing.Unsynced` once it is replaced but may not be on the disk.
    """
    held = _locks[(os.getpid(), root)]
    data = registry.dumps()

    def take_over(fd):
        fcntl.lockf(fd, fcntl.LOCK_EX)
        return True

    held.unsynced = None
    with held.handles:
        try:
            fd = replacing.replace(held.dir_fd, held.name, data, owning.FILE_MODE, take_over)
        except replacing.Unsynced as err:
            fd, held.unsynced = err.fd, err
        except OSError as err:
            raise StoragePoolException(
                f"{PATH}: cannot be saved: {err.strerror}; it is as it was: mend it and try again"
            ) from err
        os.close(held.fd)
        held.fd = fd
        with _guard:
            _cache[root] = (files.stamp_of(os.fstat(fd)), registry)
    if held.unsynced:
        raise held.unsynced


def sync(root):
    """Have what qubes.xml says be what the disk says, too; the lock is held."""
    held = _held(root)
    os.fsync(held.dir_fd)
    held.unsynced = None


def is_synced(root):
    """Whether what was saved last is on the disk, so that what it no longer names may go."""
    return _held(root).unsynced is None
