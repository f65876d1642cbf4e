"""
What a new directory of a VM takes from another one: linked, shared or copied.

A move links what it can: both directories hold the same files until the old one goes, so there is a
whole copy at every moment. What was copied byte by byte is read back and compared.
"""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field

from qubes_storage import files, image, owning, trees
from qubes_storage.exc import StoragePoolException

_LINK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


@dataclass
class Take:
    """
    What is taken of a VM's directory: all of it, or ``names``, ``but`` for some; ``renamed`` is
    ``{old: new}``.

    ``link`` shares the files themselves. ``keep`` leaves modes, owners and times as they are, and
    compares what was copied; else they become those of new files.
    """

    pool: object
    vm: object
    names: tuple = None
    but: frozenset = frozenset()
    renamed: dict = field(default_factory=dict)
    link: bool = False
    keep: bool = False


def take(wanted, pool, target):
    """Take what is wanted into the open directory ``target`` of a pool."""
    with _opened(wanted) as fd:
        for name in _names(wanted, pool, fd):
            new = wanted.renamed.get(name, name)
            taken = new != name and files.exists(fd, new)  # which is another's then
            _take(wanted, pool, fd, name, target, name if taken else new)
        if wanted.keep:
            _dress(target, os.fstat(fd))


def check(wanted, pool):
    """Raise what :py:func:`take` would of what cannot be taken into a pool; nothing is written."""
    with _opened(wanted) as fd:
        for name in _names(wanted, pool, fd):
            _check(wanted, fd, name)


@contextlib.contextmanager
def _opened(wanted):
    fd = wanted.pool.open_vm(wanted.vm)
    if fd is None:
        path = wanted.pool.vmdir(wanted.vm)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    with files.closing(fd):
        yield fd


def _names(wanted, pool, fd):
    for name in sorted(os.listdir(fd)):
        if wanted.pool.owns(name) and not pool.owns(name):
            continue  # a revision is nothing to a driver that keeps none
        if name in wanted.but:
            continue
        if wanted.names is None or name in wanted.names:
            yield name


def _check(wanted, fd, name, depth=0):
    found = _look(wanted, fd, name, depth)
    if stat.S_ISDIR(found.st_mode):
        with files.closing(files.open_subdir(fd, name)) as source:
            for entry in sorted(os.listdir(source)):
                _check(wanted, source, entry, depth + 1)
    elif stat.S_ISREG(found.st_mode):
        with image.pinned(files.at(fd, name)):
            pass


def _look(wanted, fd, name, depth):
    """The lstat of what can be taken."""
    trees.check_depth(depth, name, trees.MAX_COPIED)
    found = os.stat(name, dir_fd=fd, follow_symlinks=False)
    if not any(kind(found.st_mode) for kind in (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)):
        path = os.path.join(wanted.pool.vmdir(wanted.vm), name)
        raise StoragePoolException(
            f"VM {wanted.vm.name}: {path} is no file, directory or link; take it away"
        )
    return found


def _take(wanted, pool, fd, name, target, new, depth=0):
    found = _look(wanted, fd, name, depth)
    if stat.S_ISLNK(found.st_mode):
        _take_link(fd, name, target, new)
    elif stat.S_ISDIR(found.st_mode):
        with (
            files.closing(files.open_subdir(fd, name)) as source,
            files.closing(owning.make_dir(target, new)) as made,
        ):
            for entry in sorted(os.listdir(source)):
                _take(wanted, pool, source, entry, made, entry, depth + 1)
            if wanted.keep:
                _dress(made, found)
            os.fsync(made)
    else:
        with image.pinned(files.at(fd, name), also=target) as (pin, _):
            if not (wanted.link and link(pin, new, target)):
                with files.closing(image.reopen(pin)) as source:
                    bring(source, pool, files.at(target, new), wanted.keep)


def _take_link(fd, name, target, new):
    # Owner and text are those of one link: that of root's counts, which others may exchange.
    with files.closing(os.open(name, _LINK, dir_fd=fd)) as pin:
        owner = os.fstat(pin).st_uid
        os.symlink(os.readlink("", dir_fd=pin), new, dir_fd=target)
    if owner != os.geteuid():
        with contextlib.suppress(PermissionError):
            os.chown(new, owner, -1, dir_fd=target, follow_symlinks=False)


def link(pin, new, target):
    """Give a pinned file a second name, if the kernel lets us; whether it did."""
    try:
        os.link(f"/proc/self/fd/{pin}", new, dst_dir_fd=target, follow_symlinks=True)
    except OSError as err:
        if err.errno not in _NO_LINK:
            raise
        return False
    return True


def bring(source, pool, path, keep):
    """Make ``path`` a copy of an open file, on the disk; with ``keep`` it is compared with it."""
    copy = pool.clone_image if path.endswith(".img") else image.clone
    shared = copy(source, path)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    with files.closing(fd):
        if keep:
            _dress(fd, os.fstat(source))
        else:
            owning.own(fd, owning.FILE_MODE)
        os.fsync(fd)
        if keep and not shared:
            image.drop_cache(fd)
            image.check_same(source, fd)


def _dress(fd, like):
    """Give an open file the owner, mode and times of another."""
    mine = os.fstat(fd)
    if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
        try:
            os.fchown(fd, like.st_uid, like.st_gid)
        except PermissionError:
            with contextlib.suppress(PermissionError):
                os.fchown(fd, -1, like.st_gid)
    os.fchmod(fd, stat.S_IMODE(like.st_mode))
    os.utime(fd, ns=(like.st_atime_ns, like.st_mtime_ns))
