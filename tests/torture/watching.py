"""A child that is stopped before each of its calls, and what it is about to call."""

import os
import re
import signal
import sys

from tests.torture import seccomp, strace
from tests.torture.calls import CALLS

_LOOKS = {
    "stat": [(None, 0)], "lstat": [(None, 0)], "readlink": [(None, 0)], "access": [(None, 0)],
    "newfstatat": [(0, 1)], "readlinkat": [(0, 1)], "faccessat": [(0, 1)], "statx": [(0, 1)],
    "getdents64": [0],
}  # fmt: skip
NAMED = [
    name
    for name, places in {**CALLS, **_LOOKS}.items()
    if name in seccomp.NUMBERS and any(isinstance(place, tuple) for place in places)
]
CHANGING = [name for name in CALLS if name in seccomp.NUMBERS]
_HANDLE = re.compile(r"/proc/(?:self|\d+)/fd/(\d+)(/.*)?")
_AT_FDCWD = 0xFFFFFF9C


def watch(function, names, decide):
    """
    Run a function in a child; ``decide(pid, args, name)`` is called before each call of some names,
    and returns 0. Returns the :py:class:`strace.Ending`.
    """

    def ask(socket):
        signal.alarm(120)  # it waits for nothing for ever
        seccomp.ask_before_any(names, socket)

    return strace.answered(function, ask, decide)


def paths(pid, args, name):
    """The paths that a waiting child's call names, not those of its handles."""
    for place in {**CALLS, **_LOOKS}[name]:
        if isinstance(place, int):
            continue
        handle, at = place
        text = os.fsdecode(seccomp.text(pid, args[at])) if args[at] else ""
        if not text:
            continue
        base = "/"
        if handle is not None and args[handle] & 0xFFFFFFFF != _AT_FDCWD:
            base = os.readlink(f"/proc/{pid}/fd/{args[handle]}")
        path = os.path.join(base, text)
        match = _HANDLE.fullmatch(path)
        if match:
            path = os.readlink(f"/proc/{pid}/fd/{match[1]}") + (match[2] or "")
        yield os.path.normpath(path)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FLAGS = {"open": 1, "openat": 2}  # which argument they are
_LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW
# TCGETS, BTRFS_IOC_FS_INFO, BTRFS_IOC_INO_LOOKUP, XFS_IOC_FSGEOMETRY_V4
_ASKS = (0x5401, 0x8400941F, 0xD0009412, 0x8070587C)
_AUDITED = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "fcntl.flock",
    "fcntl.lockf",
}  # fmt: skip


def looked(function, folder):
    """
    ``(ending, calls, events)`` of a function that is to look and no more: the system calls that
    write, or take a lock, below a folder, and what Python says that it is about to do of the kind.
    """
    folder, calls = os.path.realpath(folder), []

    def decide(pid, args, name):
        if _writes(name, args[_FLAGS.get(name, 1)]):
            found = [*paths(pid, args, name), *_handles(pid, args, name)]
            calls.extend(f"{name} {path}" for path in found if f"{path}/".startswith(f"{folder}/"))
        return 0

    def run():
        events = []
        sys.addaudithook(lambda event, args: _heard(event, args) and events.append((event, *args)))
        return function(), [repr(event) for event in events]

    ending = watch(run, CHANGING, decide)
    ending.value, events = ending.value or (None, [])
    return ending, calls, events


def _writes(name, word):
    """Whether a call of a name writes or locks, by the argument that tells."""
    if name in _FLAGS:
        return bool(word & _WRITING)
    return {"fcntl": word in _LOCKS, "ioctl": word & 0xFFFFFFFF not in _ASKS}.get(name, True)


def _handles(pid, args, name):
    for place in CALLS[name]:
        if isinstance(place, int):
            yield os.readlink(f"/proc/{pid}/fd/{args[place]}")


def _heard(event, args):
    if event == "open":
        return bool(args[2] & _WRITING)
    return event in _AUDITED or (event == "fcntl.fcntl" and args[1] in _LOCKS)
