"""
Files and directories below a root: opened without following links out of it.

Paths in storage.conf and qubes.xml are the machine's own; ``root`` is where the machine's ``/``
lies for us. Work goes through directory handles: a name below one is never followed if it is a
link, and :py:func:`at` makes a path of handle and name for what takes only paths.
"""

import contextlib
import errno
import os
import stat

from qubes_storage import mounts, owning
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.trees import closing, exists, open_subdir
from qubes_storage.values import is_xml

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_LINKS = 40
_LONGEST = 255  # bytes that a name has at most
_MAX_BYTES = 64 << 20  # of a file that is read whole


def at(dir_fd, name):
    """A path to ``name`` in an open directory, whatever happens to that directory's own path."""
    return f"/proc/self/fd/{dir_fd}/{name}"


def open_root(root):
    """A handle of the root; it has to be there, for a root that is missing is a disk away."""
    try:
        return os.open(root, _DIR)
    except OSError as err:
        raise StoragePoolException(
            f"root {root}: {err.strerror}; make or mount it, or correct qubes_storage.root"
        ) from err


def open_dir(root, path):
    """
    A handle of directory ``path`` below ``root``, links in it followed as the machine would.

    An absolute link starts again at the root and ``..`` stops there, so none leaves it. Raises
    OSError with ``path`` as its filename.
    """
    if root == "/":
        return os.open(path, _DIR)
    fds = [open_root(root)]
    try:
        todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                if len(fds) > 1:
                    os.close(fds.pop())
                continue
            try:
                fds.append(os.open(part, _DIR | os.O_NOFOLLOW, dir_fd=fds[-1]))
            except OSError as err:
                if err.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise OSError(err.errno, err.strerror, path) from err
                target = _link_target(part, fds[-1], path)
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from err
                if target.startswith("/"):
                    while len(fds) > 1:
                        os.close(fds.pop())
                todo.extend(p for p in reversed(target.split("/")) if p not in ("", "."))
        return fds.pop()
    finally:
        for fd in fds:
            os.close(fd)


def open_inside(root, path, *names):
    """A handle of a directory below ``path``: the last of ``names``, where no link is followed."""
    fd = open_dir(root, path)
    for name in names:
        with closing(fd):
            fd = open_subdir(fd, name)
    return fd


def open_outside(path):
    """A handle of the directory of a file of the caller's."""
    # The path had no links in it: one that is there now is of somebody who may write there.
    return open_inside("/", "/", *(part for part in path.split("/")[:-1] if part))


def _link_target(name, dir_fd, path):
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as err:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from err


def entries(dir_fd):
    """``(name, its lstat)`` of what a directory holds, in order; what goes meanwhile is not."""
    for name in sorted(os.listdir(dir_fd)):
        found = exists(dir_fd, name)
        if found:
            yield name, found


def make_dirs(root, path, mode=0o755):
    """
    A handle of a directory of the system's own layout, such as /etc/qubes, made if there is none.

    Its parents are made too, for they are the machine's own; ``mode`` is for the last one.
    """
    for _ in range(_MAX_LINKS):
        with contextlib.suppress(FileNotFoundError):
            return open_dir(root, path)
        parent, name = os.path.split(path.rstrip("/"))
        others = contextlib.suppress(FileExistsError, FileNotFoundError)  # they make it too
        with closing(make_dirs(root, parent)) as fd, others:
            os.close(owning.place_dir(fd, name, mode))
    raise FileNotFoundError(errno.ENOENT, "leads nowhere: take the link away", path)


def read(root, path):
    """
    The bytes of a file below root, links followed as :py:func:`open_dir` does, or None without one.

    Raises :py:class:`StoragePoolException` for what is no regular file, may not be read, or has
    more than 64 MiB.
    """
    try:
        with locate(root, path) as (dir_fd, name):
            return read_in(dir_fd, name, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise StoragePoolException(
            f"{path}: {err.strerror}; run as root or as a member of group {owning.GROUP}"
        ) from err


def read_in(dir_fd, name, path):
    """The bytes of a file in an open directory, a link not followed; ``path`` is for messages."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with closing(os.open(name, flags, dir_fd=dir_fd)) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StoragePoolException(f"{path}: is not a file; put a file in its place")
        data = bytearray()
        while part := os.read(fd, 1 << 20):
            data += part
            if len(data) > _MAX_BYTES:
                raise StoragePoolException(
                    f"{path}: has more than {_MAX_BYTES >> 20} MiB, which is none of Qubes' files;"
                    " put the right one in its place"
                )
        return bytes(data)


@contextlib.contextmanager
def locate(root, path):
    """
    ``(directory handle, name)`` of a file below root: where its last link points, if that is root's
    or the caller's, in a directory where nobody else can put one.
    """
    for _ in range(_MAX_LINKS):
        parent, name = os.path.split(path)
        with closing(open_dir(root, parent)) as fd:
            target = _own_link(fd, name, path)
            if target is None:
                yield fd, name
                return
        path = os.path.join(parent, target)
    raise StoragePoolException(f"{path}: too many links; put a file in its place")


def _own_link(dir_fd, name, path):
    """Where a link points, or None for what is no link; one of somebody else's is refused."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return None
    with closing(fd):
        found = os.fstat(fd)
        if not stat.S_ISLNK(found.st_mode):
            return None
        if found.st_uid not in (0, os.geteuid()):
            raise StoragePoolException(
                f"{path}: is a link that uid {found.st_uid} made; put the file in its place"
            )
        place = os.fstat(dir_fd)
        if place.st_uid not in (0, os.geteuid()) or place.st_mode & 0o022:
            raise StoragePoolException(
                f"{path}: is a link in a directory that others may write; put the file in its place"
            )
        return os.readlink("", dir_fd=fd)


def stamp(root, path):
    """What tells one version of a file from another: device, inode, size and time, or None."""
    try:
        if root == "/":
            found = os.stat(path)
        else:
            with locate(root, path) as (fd, name):
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except (OSError, StoragePoolException):
        return None
    return stamp_of(found)


def stamp_of(found):
    """The stamp of a file that was looked at."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_mount(root, path):
    """Whether something is mounted at ``path`` below root: the kernel's mount table decides."""
    try:
        with closing(open_dir(root, path)) as fd:
            real = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return mounts.is_point(real)


def check_dir_path(pool, path, option="dir_path"):
    """A path for a new pool: absolute, and with no ``..``, NUL or new line in it."""
    if not path.startswith("/") or os.path.normpath(path).strip("/") == "":
        raise InvalidInput(
            f"pool {pool}: {option} {path!r} is not an absolute path of a directory of its own;"
            " write one such as /mnt/ssd/qubes"
        )
    if ".." in path.split("/"):
        raise InvalidInput(f"pool {pool}: {option} {path!r} has '..' in it; write the path without")
    if any(char in path for char in "\n\r") or not is_xml(path):
        raise InvalidInput(
            f"pool {pool}: {option} {path!r} has a character that storage.conf or qubes.xml cannot"
            " hold; rename that directory"
        )
    last = path.rstrip("/").rpartition("/")[2]
    if len(os.fsencode(owning.beside(last))) > _LONGEST:
        raise InvalidInput(
            f"pool {pool}: the last name of {option} {path} is too long to be made beside its"
            f" place; take one of at most {_LONGEST - len(owning.beside(''))} bytes"
        )
    return path
