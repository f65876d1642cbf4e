"""What is mounted where, as the kernel's tables have it."""

import os
import re

_TABLE = "/proc/self/mountinfo"
_ESCAPED = re.compile(rb"\\(\d{3})")  # a character of a path


def filesystem(fd):
    """The type of the filesystem that an open file lies on."""
    found = os.fstat(fd).st_dev
    device = b"%d:%d" % (os.major(found), os.minor(found))
    real = _slashed(os.fsencode(os.readlink(f"/proc/self/fd/{fd}")))
    best = (b"", b"")
    for number, point, kind in _mounts():
        if number == device:
            return kind.decode()
        # btrfs shows another device number for each subvolume: the longest mount point it is
        if real.startswith(_slashed(point)) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1].decode()


def is_point(path):
    """Whether something is mounted at a path that has no links in it."""
    return any(point == os.fsencode(path) for _, point, _ in _mounts())


def inside(path):
    """The mount points at and below a path that has no links in it."""
    top = os.fsencode(path)
    found = {point for _, point, _ in _mounts()}
    return sorted(os.fsdecode(p) for p in found if p == top or p.startswith(_slashed(top)))


def _mounts():
    """``(device, mount point, type)`` of each, as bytes."""
    with open(_TABLE, "rb") as table:
        for line in table:
            fields = line.split(b" ")
            point = _ESCAPED.sub(lambda char: bytes([int(char[1], 8)]), fields[4])
            yield fields[2], point, fields[fields.index(b"-") + 1]


def _slashed(path):
    return path.rstrip(b"/") + b"/"


def mount_of(fd):
    """What tells the mount that an open file is on from others."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as told:
        return next(line for line in told if line.startswith("mnt_id:"))
