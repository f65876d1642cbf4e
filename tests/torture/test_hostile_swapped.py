"""
Whatever takes the place of something between one system call and the next, nothing outside is
touched.

Each operation is stopped before each call that names something in a pool which somebody else could
rename; that is exchanged for a link, another file's second name, a directory or a pipe, or the
directory around it for a link, and the operation goes on.
"""

import itertools
import os

import pytest

from tests.torture.operations import of_driver
from tests.torture.planting import POOLS, Intruder
from tests.torture.test_hostile_planted import problems
from tests.torture.watching import NAMED, paths, watch

pytestmark = pytest.mark.usefixtures("tracing")
# What is put there, and whether in place of what is named or of the directory around it.
SWAPS = (
    ("link", False), ("hard link", False), ("full directory", False), ("pipe", False),
    ("link", True), ("full directory", True),
)  # fmt: skip


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
    for turn, operation in enumerate(of_driver(world.driver)[:: 1 if everything else 4]):
        for kind, around in SWAPS if everything else SWAPS[turn % len(SWAPS) :][:1]:
            for number in itertools.count(1, 1 if everything else 23):
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
