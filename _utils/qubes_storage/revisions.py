"""
Old images, kept beside an image and named and dated as R4's file-reflink names them:
``private.img.3@2026-11-24T16:00:00Z`` is the third kept, last written at that time (UTC).

Each is made beside and renamed, so a crash leaves none that is half a revision.
"""

import contextlib
import os
import re
import time

from qubes_storage import files, image
from qubes_storage.exc import InvalidInput

_NAME = re.compile(r"(.+\.img)\.(\d+)@(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)")


def is_one(name):
    """Whether a file is a revision by its name."""
    return _NAME.fullmatch(name) is not None


def listed(fd, name):
    """``["N@DATE", ...]`` of an image in an open directory, the oldest first."""
    with files.closing(
        files.open_subdir(fd, ".")
    ) as again:  # btrfs lists what was there on opening
        entries = os.listdir(again)
    found = (_NAME.fullmatch(entry) for entry in entries)
    found = sorted((int(match[2]), match[3]) for match in found if match and match[1] == name)
    return [f"{number}@{date}" for number, date in found]


def add(pool, fd, name, source_fd=None):
    """
    Keep an image as a revision, by default as it is in ``fd``; returns the revision's name.

    Those that are more than the pool keeps go, the oldest first.
    """
    source_fd = fd if source_fd is None else source_fd
    new = f".{name}.revision.new"
    found = os.stat(name, dir_fd=source_fd, follow_symlinks=False)
    _copy(pool, source_fd, name, fd, new, found)
    before = listed(fd, name)
    number = int(before[-1].split("@")[0]) + 1 if before else 1
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.st_mtime))
    revision = f"{number}@{date}"
    os.rename(new, f"{name}.{revision}", src_dir_fd=fd, dst_dir_fd=fd)
    for old in [*before, revision][: -pool.revisions_to_keep]:
        os.unlink(f"{name}.{old}", dir_fd=fd)
    os.fsync(fd)
    return revision


def choose(found, revision, who):
    """The one of some revisions that is meant: ``N``, ``N@DATE``, or None for the newest."""
    if not found:
        raise InvalidInput(f"{who} has no revision yet; qubes_vm.reset and commit make one")
    if revision is None:
        return found[-1]
    for each in found:
        if str(revision) in (each, each.split("@")[0]):
            return each
    raise InvalidInput(f"{who} has no revision {revision!r}; it has {', '.join(found)}")


def revert(pool, fd, name, revision):
    """Have an image be as in a revision and of its own size; what it holds becomes a revision."""
    new = f".{name}.new"
    found = os.stat(name, dir_fd=fd, follow_symlinks=False)
    _copy(pool, fd, f"{name}.{revision}", fd, new)
    pool.resize_image(files.at(fd, new), found.st_size)
    if pool.revisions_to_keep:
        add(pool, fd, name)
    os.rename(new, name, src_dir_fd=fd, dst_dir_fd=fd)
    os.fsync(fd)


def _copy(pool, source_fd, name, fd, new, like=None):
    """Copy an image beside, over what a dead run left, synced; with the times of ``like``."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new, dir_fd=fd)
    path = files.at(fd, new)
    with files.closing(image.open_image(files.at(source_fd, name))) as source:
        pool.clone_image(source, path)
    with files.closing(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)) as made:
        files.own(made, files.FILE_MODE)
        if like:
            os.utime(made, ns=(like.st_atime_ns, like.st_mtime_ns))
        os.fsync(made)
