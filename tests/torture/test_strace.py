"""The harness itself: every change of a file is seen, and is what a kill or a failure stops."""

import fcntl
import os
import shutil

import pytest

from tests.torture import strace

pytestmark = pytest.mark.usefixtures("tracing")


def work(place):
    """One call of each of many kinds, by handle and by path."""
    fd = os.open(place, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.mkdir("a", dir_fd=fd)
    nameless = os.open(".", os.O_TMPFILE | os.O_RDWR, dir_fd=fd)
    os.write(nameless, b'line\n\0 <">,({')
    os.fsync(nameless)
    os.link(f"/proc/self/fd/{nameless}", "b", dst_dir_fd=fd, follow_symlinks=True)
    again = os.dup(fd)
    with open(f"/proc/self/fd/{again}/c", "wb", buffering=0) as file:
        file.write(b"c")
    os.fchmod(nameless, 0o600)
    os.utime(nameless, ns=(1, 2))
    os.truncate(place / "b", 3)
    os.rename("c", "d", src_dir_fd=fd, dst_dir_fd=fd)
    os.symlink("text", "e", dir_fd=fd)
    with open(place / "e2", "wb") as file, open(place / "b", "rb") as source:
        os.sendfile(file.fileno(), source.fileno(), 0, 3)
    os.unlink("d", dir_fd=fd)
    os.rmdir(place / "a")
    os.sync()
    return os.listdir(place)


NAMES = [
    "flock", "mkdirat", "openat", "write", "fsync", "linkat", "openat", "write", "fchmod",
    "utimensat", "truncate", "renameat", "symlinkat", "openat", "sendfile", "unlinkat", "rmdir",
    "sync",
]  # fmt: skip


def fresh(place):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def tree(place):
    return {p.name: p.is_file() and not p.is_symlink() and p.read_bytes() for p in place.iterdir()}


def test_calls_are_recorded_with_paths_and_data(tmp_path):
    place = tmp_path / "place"
    fresh(place)
    calls = strace.record(lambda: work(place), place)
    assert [call.name for call in calls] == NAMES
    by_name = {call.name: call for call in calls}
    assert by_name["renameat"].paths == [os.fsencode(place / "c"), os.fsencode(place / "d")]
    assert by_name["linkat"].paths[1] == os.fsencode(place / "b")
    assert calls[3].args[1] == b'line\n\0 <">,({'
    assert calls[6].paths == [os.fsencode(place / "c")]
    assert calls[7].result == 1
    assert calls[3].paths == calls[4].paths == calls[8].paths  # the file that had no name yet
    fresh(place)
    assert strace.record(lambda: work(place), tmp_path / "else") == [by_name["sync"]]


def test_a_run_is_killed_before_the_call_and_fails_at_it(tmp_path):
    place = tmp_path / "place"
    fresh(place)
    calls = strace.record(lambda: work(place), place)
    seen = []
    for call in calls:
        fresh(place)
        assert strace.interrupt(lambda: work(place), call).killed
        seen.append(tree(place))
    assert [sorted(state) for state in seen[:4]] == [[], [], ["a"], ["a"]]
    assert seen[6] == {"a": False, "b": b'line\n\0 <">,({'}
    assert seen[7]["c"] == b""
    assert [("d" in state, "a" in state) for state in seen[-3:]] == [
        (True, True), (False, True), (False, False),
    ]  # fmt: skip
    for call in calls:
        fresh(place)
        ending = strace.interrupt(lambda: work(place), call, "ENOSPC")
        if call.name == "sync":  # which never tells
            assert ending.value
        else:
            assert ending.error.errno == 28
            assert "work(place)" in ending.traceback


def test_a_run_that_is_not_interrupted_tells_what_it_returned_or_raised(tmp_path):
    place = tmp_path / "place"
    fresh(place)
    assert sorted(strace.run(lambda: work(place)).value) == ["b", "e", "e2"]
    assert isinstance(strace.run(lambda: os.mkdir(place)).error, FileExistsError)
    with pytest.raises(ZeroDivisionError):
        strace.record(lambda: 1 // 0, place)
    with pytest.raises(AssertionError, match="did not come to"):
        strace.interrupt(lambda: None, strace.Call("fsync", 1, [], 0))
