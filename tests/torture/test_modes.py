"""
Images and directories are open to nobody but their owner and group, at no moment, whatever the
umask.

Each operation is stopped before each call that changes a file, and all that is in the pools is
looked at; and no file comes into being with a mode that lets others in.
"""

import os
import re
import stat

import pytest

from tests.r32.machine import GID
from tests.torture import strace
from tests.torture.operations import of_driver
from tests.torture.planting import POOLS
from tests.torture.watching import CHANGING, watch

pytestmark = pytest.mark.usefixtures("tracing")
DIR_MODE, FILE_MODE = 0o2770, 0o660
MAKES = {"mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2, "open": 2, "openat": 3, "creat": 1}


@pytest.fixture(scope="module")
def world(shared_world):
    return shared_world


def below(place, open_to=stat.S_IRWXO):
    """``(path, lstat, reached)`` of all below a directory; ``reached`` is whether others get in."""
    try:
        entries = sorted(os.listdir(place))
    except FileNotFoundError:
        return
    for name in entries:
        path = f"{place}/{name}"
        found = os.lstat(path)
        yield path, found, bool(open_to)
        if stat.S_ISDIR(found.st_mode):
            yield from below(path, open_to & found.st_mode & stat.S_IXOTH)


def pools(world):
    """The same of all pools, as if the directories of the pools themselves were open."""
    for pool in POOLS:
        for subdir in ("appvms", "servicevms", "vm-templates"):
            place = f"{world.machine.root}{pool}/{subdir}"
            yield from below(place)


def open_ones(world):
    """``{path: mode}`` of what others may do anything with, but for what was so from the start."""
    found = {}
    for path, there, reached in pools(world):
        mode = there.st_mode
        if stat.S_ISLNK(mode) or path.endswith(".desktop") or not mode & stat.S_IRWXO:
            continue
        if reached or stat.S_ISREG(mode):
            found[path] = oct(mode)
    return found


def walk(world, operation, umask):
    """Run an operation; ``(ending, {call: what was open before it}, number of calls)``."""
    found = {}
    calls = 0

    def run():
        os.umask(umask)
        return operation.run(world.connect(), world)

    def decide(pid, args, name):
        nonlocal calls
        calls += 1
        wrong = open_ones(world)
        if wrong:
            found[f"{calls} {name}"] = wrong
        return 0

    return watch(run, CHANGING, decide), found, calls


def wrong_in_the_end(world, before):
    """What is new and has no right owner, group or mode; what moved has kept them."""
    known = {inode for _, inode in before}
    for path, found, _ in pools(world):
        name = path.rsplit("/", 1)[1]
        if (path, found.st_ino) in before or stat.S_ISLNK(found.st_mode):
            continue
        if found.st_ino in known or name.endswith((".desktop", ".conf")):
            continue
        right = DIR_MODE if stat.S_ISDIR(found.st_mode) else FILE_MODE
        owner = (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))
        if owner != (0, GID, right):
            yield f"{path} is of {owner[0]}:{owner[1]}, mode {owner[2]:04o}"


@pytest.mark.parametrize("umask", [0, 0o777], ids=["umask 0", "umask 777"])
def test_nothing_is_ever_open_to_others(world, umask, everything, figures):
    operations = of_driver(world.driver)
    total = 0
    for operation in operations if everything else operations[2 if umask else 1 :: 9]:
        world.restore()
        assert not open_ones(world)
        before = {(path, found.st_ino) for path, found, _ in pools(world)}
        ending, found, calls = walk(world, operation, umask)
        assert not ending.error, (operation, ending.traceback)
        assert not found, operation
        assert not open_ones(world)
        assert not list(wrong_in_the_end(world, before)), operation
        total += calls
    figures[f"calls before which modes were looked at, {world.driver}"] += total
    assert total > 100


def test_nothing_comes_into_being_with_a_mode_for_others(world, everything):
    made = 0
    for operation in of_driver(world.driver)[:: 1 if everything else 7]:
        world.restore()
        for call in strace.record(lambda: operation.run(world.connect(), world), world.place):  # noqa: B023
            at = MAKES.get(call.name)
            if at is None or len(call.args) <= at:
                continue
            mode = call.args[at]
            assert re.fullmatch(r"0[0-7]+", mode), call
            assert not int(mode, 8) & 0o077, f"{operation}: {call} {mode}"
            made += 1
    assert made
