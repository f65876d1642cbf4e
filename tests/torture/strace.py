"""
A function run in a child of this process: recorded by strace, killed or failed at one call.

The child is forked from the warm process and watched from outside, so a run is short, and every run
from the same files makes the same calls in the same order.
"""

import contextlib
import errno
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import traceback
from dataclasses import dataclass, field

from tests.torture import seccomp
from tests.torture.calls import CALLS, Fd, changes_files, parse, paths


@dataclass
class Call:
    """One system call: the ``number``-th of its name in its run, counted from 1."""

    name: str
    number: int
    args: list  # texts as bytes, descriptors as Fd(number, path), anything else as strace shows it
    result: object  # what it returned: a number, an Fd, or None for a call that did not return
    error: str = None  # the errno of one that failed, by name
    paths: list = field(default_factory=list)  # absolute, of what it names, in the order of args

    def __str__(self):
        shown = " ".join(os.fsdecode(path) for path in self.paths)
        return f"{self.name} {self.number} {shown}"


@dataclass
class Ending:
    """How a child ended: killed, or with what the function returned or raised."""

    killed: bool = False
    value: object = None
    error: BaseException = None
    traceback: str = ""


def missing():
    """Why nothing can be traced here, or None."""
    if not shutil.which("strace"):
        return "strace is not installed"
    if seccomp.missing():
        return seccomp.missing()
    try:
        _traced(os.getpid)
        interrupt(os.sync, Call("sync", 1, [], 0))
    except OSError as err:
        return f"a child cannot be traced: {err}"
    return None


def record(function, folder):
    """
    The file-changing calls that a function makes on what lies below ``folder``, in order.

    Raises what the function raises.
    """
    ending, calls = _traced(function)
    if ending.error:
        raise ending.error
    below = os.fsencode(os.path.realpath(folder)) + b"/"
    return [
        call
        for call in calls
        if changes_files(call) and (not call.paths or any(_in(p, below) for p in call.paths))
    ]


def _in(path, below):
    return (path + b"/").startswith(below)


def _traced(function):
    """``(ending, calls)`` of a run under strace."""
    with tempfile.NamedTemporaryFile(prefix="strace-") as log, contextlib.ExitStack() as stack:
        child = _Child(function)
        trace = ",".join(f"?{name}" for name in (*CALLS, "dup"))
        command = [
            "strace", "-f", "-y", "-xx", "-s", str(1 << 24), "-e", f"trace={trace}",
            "-e", "signal=none", "-o", log.name, "-p", str(child.pid),
        ]  # fmt: skip
        try:
            strace = subprocess.Popen(command, stderr=subprocess.PIPE)
            stack.enter_context(strace)
            told = strace.stderr.readline().decode()  # it has stopped the child by then
            if "attached" not in told:
                raise OSError(told.strip())
        except BaseException:
            os.kill(child.pid, signal.SIGKILL)
            child.end()
            raise
        child.go()
        ending = child.end()
        strace.stderr.read()
        strace.wait()
        counted, calls = {}, []
        for name, args, result, error, named in parse(log.read().splitlines()):
            counted[name] = counted.get(name, 0) + 1
            calls.append(Call(name, counted[name], args, result, error, named))
    return ending, calls


def answered(function, ask, decide):
    """
    Run a function in a child whose calls wait for an answer: ``ask(socket)`` has it ask before
    some, ``decide(pid, args, name)`` answers. Returns the :py:class:`Ending`.
    """
    parent, child_end = socket.socketpair()
    with parent:
        child = _Child(function, lambda: ask(child_end))
        child_end.close()
        try:
            child.go()
            seccomp.answer(parent, decide)
        except BaseException:
            os.kill(child.pid, signal.SIGKILL)
            raise
        finally:
            ending = child.end()
    if isinstance(ending.error, OSError) and "seccomp" in str(ending.error):
        raise ending.error
    return ending


def interrupt(function, call, error=None):
    """
    Run a function whose ``call`` is never made: the child is killed when it comes to it, or the
    call fails with ``error``, the name of an errno. Returns the :py:class:`Ending`.
    """

    def stop(pid):
        if error:
            return getattr(errno, error)
        os.kill(pid, signal.SIGKILL)
        return None

    ending = at(function, call, stop)
    if not error and not ending.killed:
        raise AssertionError(f"not killed at {call}: {ending}")
    return ending


def at(function, call, act):
    """
    Run a function, and ``act(pid)`` when it comes to a ``call``, which waits meanwhile; it returns
    what :py:func:`seccomp.answer` is to do. Returns the :py:class:`Ending`.
    """
    left = call.number
    reached = []

    def decide(pid, args, _):
        nonlocal left
        left -= 1
        if left:
            return 0
        reached.append([_plain(seccomp.text(pid, args[at])) for at in _texts(call)])
        return act(pid)

    ending = answered(function, lambda end: seccomp.ask_before(call.name, end), decide)
    expected = [_plain(call.args[at]) for at in _texts(call)]
    if reached != [expected]:
        raise AssertionError(f"the run did not come to {call}, but to {reached}: {ending}")
    return ending


def interrupt_on(function, call, error, disk):
    """
    The same for a call that fails, and each one after it that changes something on its disk fails
    too; ``disk(path)`` tells one from another, and None for what is on none.
    """
    names = [name for name in CALLS if name in seccomp.NUMBERS]
    failing = {disk(path) for path in written(call)} - {None}
    left = call.number

    def decide(pid, args, name):
        nonlocal left
        if not seccomp.counts(name, args):
            return 0
        if left:
            left -= name == call.name
            return 0 if left else getattr(errno, error)
        if seccomp.looks(name, args):
            return 0
        named = _written(name, _paths_of(pid, name, args))
        on_it = failing & {disk(path) for path in named}
        return getattr(errno, error) if on_it else 0

    ending = answered(function, lambda end: seccomp.ask_before_any(names, end), decide)
    assert not left, f"the run did not come to {call}: {ending}"
    return ending


def written(call):
    """The paths at which a call changes something."""
    return _written(call.name, call.paths)


def _written(name, named):
    """Those of a call's paths that it changes something at."""
    first = {"copy_file_range": 1, "splice": 1}.get(name, 0)
    return named[first : 1 if name == "sendfile" else None]


def _paths_of(pid, name, args):
    """The paths that a waiting child's call names."""
    handles = {int(n): os.readlink(b"/proc/%d/fd/%d" % (pid, int(n))) for n in _fds(pid)}
    cwd = Fd(None, os.readlink(b"/proc/%d/cwd" % pid))
    shown = list(args)
    for place in CALLS[name]:
        handle, at = (place, None) if isinstance(place, int) else place
        if handle is not None:
            number = args[handle] & 0xFFFFFFFF
            shown[handle] = Fd(number, handles[number]) if number in handles else cwd
        if at is not None:
            shown[at] = seccomp.text(pid, args[at]) if args[at] else None
    return list(paths(name, shown, handles))


def _fds(pid):
    return os.listdir(f"/proc/{pid}/fd")


def _texts(call):
    """Which arguments are texts to know a call by; written data is none."""
    named = not all(isinstance(place, int) for place in CALLS[call.name])
    return [at for at, arg in enumerate(call.args) if isinstance(arg, bytes)] if named else []


def _plain(name):
    """A name without numbers, for those of inodes differ from run to run."""
    return re.sub(rb"\d+", b"N", name)


def run(function):
    """Run a function in a child that nobody watches."""
    child = _Child(function)
    child.go()
    return child.end()


class _Child:
    """A forked child that waits for its go, makes ready, runs, and tells how it ended."""

    def __init__(self, function, ready=None):
        self._start, self._report = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._run(function, ready)
        os.close(self._start[0])
        os.close(self._report[1])

    def _run(self, function, ready):
        try:
            os.close(self._start[1])
            os.read(self._start[0], 1)
            ending = Ending()
            try:
                if ready:
                    ready()
                ending.value = function()
            except BaseException as err:
                ending = Ending(error=err, traceback=traceback.format_exc())
            with open(self._report[1], "wb") as file:
                file.write(pickle.dumps(ending))
        finally:
            os._exit(0)

    def go(self):
        os.write(self._start[1], b"!")

    def end(self):
        with open(self._report[0], "rb") as file:
            data = file.read()
        os.close(self._start[1])
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            return Ending(killed=True)
        return pickle.loads(data)
