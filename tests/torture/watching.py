"""A child that is stopped before each of its calls, and what it is about to call."""

import os
import re
import signal

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
