"""
Whatever takes the place of something between one system call and the next, nothing outside is
touched.

Each operation is stopped before each call that names something in a pool which somebody else could
rename; that is exchanged for a link, another file's second name, a directory or a pipe, or the
directory around it for a link, and the operation goes on.

There are about 170,000 such moments. ``STRIDE=31 make torture`` swaps at every 31st only, from
another first one for each operation and kind.
"""

import contextlib
import itertools
import os
import random
import signal
import time
import zlib

import pytest

from tests.r32.machine import LIB
from tests.torture.operations import of_driver
from tests.torture.planting import POOLS, Intruder
from tests.torture.test_hostile_planted import attempt, problems
from tests.torture.watching import NAMED, paths, watch

pytestmark = pytest.mark.usefixtures("tracing")
# What is put there, and whether in place of what is named or of the directory around it.
SWAPS = (
    ("link", False), ("hard link", False), ("full directory", False), ("pipe", False),
    ("link", True), ("full directory", True),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(shared_world):
    return shared_world


@pytest.fixture(scope="module")
def intruder(world):
    return Intruder(world)


def swap_at(number, kind, around, operation, intruder):
    """
    Run an operation and swap before the ``number``-th call that can be meddled with; returns its
    ending and what was swapped, None if it did not come so far.
    """
    world = intruder.world
    root = str(world.machine.root)
    count = itertools.count(1)
    swapped = []

    def decide(pid, args, name):
        if swapped:
            return 0
        for path in paths(pid, args, name):
            inside = path[len(root) :] if path.startswith(root) else ""
            inside = os.path.dirname(inside) if around else inside
            if not any(inside.startswith(f"{pool}/") for pool in POOLS):
                continue
            if kind == "hard link" and inside.endswith("/qubes.xml"):
                continue  # the registry is read whatever else it is called
            if intruder.can(inside) and next(count) == number:
                swapped.append(f"{name} {inside}")
                intruder.swap(inside, kind)
                return 0
        return 0

    ending = watch(lambda: operation.run(world.connect(), world), NAMED, decide)
    return ending, swapped


def test_nothing_outside_is_touched(world, intruder, everything, figures):
    swaps = 0
    wrong = []
    stride = int(os.environ.get("STRIDE") or (1 if everything else 197))
    for turn, operation in enumerate(of_driver(world.driver)[:: 1 if everything else 4]):
        for kind, around in SWAPS if everything else SWAPS[turn % len(SWAPS) :][:1]:
            first = 1 + zlib.crc32(f"{operation} {kind} {around}".encode()) % stride
            for number in itertools.count(first if everything else 1, stride):
                world.restore()
                ending, swapped = swap_at(number, kind, around, operation, intruder)
                if not swapped:
                    break
                swaps += 1
                what = f"{operation}: {kind} before {swapped[0]}"
                wrong += [f"{what}: {problem}" for problem in problems(ending, intruder)]
    figures[f"things swapped between two calls, {world.driver}"] += swaps
    assert not wrong, "\n".join(wrong)
    assert swaps


def meddle(intruder, seed):
    """Exchange things and put them back, for as long as the process lives."""
    choose = random.Random(seed)
    places = [f"/mnt/ssd/ssd/appvms/{name}" for name in ("work", "new", ".new.creating")]
    places += [f"{places[0]}/{name}" for name in ("private.img", "root.img", ".private.img.new")]
    places += ["/mnt/ssd/ssd/appvms", "/mnt/ssd/near/appvms/work", f"{LIB}/appvms/new"]
    while True:
        path, (kind, _) = choose.choice(places), choose.choice(SWAPS)
        with contextlib.suppress(OSError):
            if intruder.can(path) and intruder.swap(path, kind):
                time.sleep(choose.random() / 500)
                intruder.put_back(path)


def test_a_race_is_not_won(world, intruder, everything, figures):
    wrong = []
    runs = 0
    operations = [each for each in of_driver(world.driver) if {"work", "new"} & {*each.vms, "new"}]
    for seed in range(40 if everything else 1):
        for operation in operations[:: 1 if everything else 6]:
            world.restore()
            attacker = os.fork()
            if not attacker:
                try:
                    meddle(intruder, f"{operation} {seed}")
                finally:
                    os._exit(1)
            try:
                ending = attempt(world, operation)
            finally:
                os.kill(attacker, signal.SIGKILL)
                os.waitpid(attacker, 0)
            runs += 1
            wrong += [f"{operation}, {seed}: {each}" for each in problems(ending, intruder)]
    figures[f"operations raced, {world.driver}"] += runs
    assert not wrong, "\n".join(wrong)
