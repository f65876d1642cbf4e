"""
Old images, kept beside an image and named and dated as R4's file-reflink names them:
``private.img.3@2026-11-24T16:00:00Z`` is the third kept, last written at that time (UTC).

Each is made beside and renamed, so a crash leaves none that is half a revision.
"""

import contextlib
import os
import re
import time

from qubes_storage import files, image, owning
from qubes_storage.exc import InvalidInput

_NAME = re.compile(r"(.+\.img)\.([1-9]\d*)@(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)", re.ASCII)
_LAST = 253402300799  # the last second of the year 9999: no later one has such a date
_KEPT = "kept"  # in the directory in which a revert makes an image: the revision that it keeps


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
    revision = _keep(pool, fd, name, fd if source_fd is None else source_fd)
    _drop_old(fd, name, pool.revisions_to_keep)
    return revision


def _keep(pool, fd, name, source_fd, foretell=None):
    with _copied(pool, source_fd, name, fd, f".{name}.revision.new", dated=True) as (new, found):
        before = listed(fd, name)
        number = int(before[-1].split("@")[0]) + 1 if before else 1
        written = min(max(found.st_mtime, 0), _LAST)
        revision = f"{number}@{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(written))}"
        if foretell:
            foretell(revision)
        os.rename(name, f"{name}.{revision}", src_dir_fd=new, dst_dir_fd=fd)
    return revision


def _drop_old(fd, name, keep):
    for old in listed(fd, name)[:-keep]:
        os.unlink(f"{name}.{old}", dir_fd=fd)
    os.fsync(fd)


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
    """
    Have an image be as in a revision and of its own size; what it holds becomes a revision, also
    where the pool keeps none. None goes before the image is as it was asked for.
    """
    size = os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
    old = f"{name}.{revision}"
    with _copied(pool, fd, old, fd, f".{name}.new") as (new, _):
        pool.resize_image(files.at(new, old), size)

        def foretell(kept):
            os.symlink(kept, _KEPT, dir_fd=new)
            os.fsync(new)
            os.fsync(fd)

        try:
            _keep(pool, fd, name, fd, foretell)
            os.rename(old, name, src_dir_fd=new, dst_dir_fd=fd)
        except BaseException:
            take_back(fd, name)
            raise
    _drop_old(fd, name, max(pool.revisions_to_keep, 1))


def take_back(fd, name):
    """
    A revert of an image did not come to its end: the revision that it kept goes, else the newest
    one would be what was to be left. Where the image is replaced already it stays.
    """
    with files.closing(files.open_subdir(fd, f".{name}.new")) as new:
        entries = os.listdir(new)
        if _KEPT not in entries or not any(is_one(entry) for entry in entries):
            return
        kept = os.path.basename(os.readlink(_KEPT, dir_fd=new))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}.{kept}", dir_fd=fd)
        os.fsync(fd)


@contextlib.contextmanager
def _copied(pool, source_fd, name, fd, place, dated=False):
    """
    ``(open directory, stat of the image)``: a copy of an image, with its times if it is ``dated``,
    in a directory of its own in ``fd``, to be renamed out of it.
    """
    with owning.workshop(fd, place) as new:
        with files.closing(image.open_image(files.at(source_fd, name))) as source:
            found = os.fstat(source)
            pool.clone_image(source, files.at(new, name))
        with files.closing(image.open_image(files.at(new, name), os.O_RDWR)) as made:
            owning.own(made, owning.FILE_MODE)
            if dated:
                os.utime(made, ns=(found.st_atime_ns, found.st_mtime_ns))
            os.fsync(made)
        yield new, found
