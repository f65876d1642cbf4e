"""
Each pair of operations, the second one run after a kill in the first: nothing is lost.

``STATES=4 make torture`` has each pair begin from only so many of the states that kills leave,
other ones for each pair of the same first.
"""

import os

import pytest

from tests.torture.operations import EVERYTHING, OPERATIONS, of_driver, walked
from tests.torture.pairing import check_pair, states
from tests.torture.walking import Walk, take

pytestmark = pytest.mark.usefixtures("tracing")
PART = {"xen": ("remove",), "reflink": ("revert",), "btrfs": ("resize root",)}
SECONDS = {
    "xen": ("clone", "rename", "remove, keep"),
    "reflink": ("migrate near", "commit", "remove"),
    "btrfs": ("rename template", "create copy"),
}


def turn(things, count, number):
    """So many of all, evenly spread, the next ones with each number."""
    step = -(-len(things) // count)
    return things[number % step :: step]


@walked(PART)
def test_after_a_kill_in_one_operation_another_loses_nothing(world, operation, figures):
    first = Walk(world, operation)
    left = states(first)
    at_a_time = int(os.environ.get("STATES", len(left)))
    names = SECONDS[world.driver]
    seconds = of_driver(world.driver) if EVERYTHING else [OPERATIONS[name] for name in names]
    walks = [Walk(world, second) for second in seconds]
    count = take(
        (
            f"killed at {call}, then {second.operation}",
            lambda second=second, call=call: check_pair(first, second, call),
        )
        for number, second in enumerate(walks)
        for call in turn(left, at_a_time, number)
    )
    figures["distinct states that kills leave"] += len(left)
    figures["pairs of operations"] += len(walks)
    figures["second runs after a kill"] += count
