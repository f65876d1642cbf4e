"""Each pair of operations, the second one run after a kill in the first: nothing is lost."""

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


@walked(PART)
def test_after_a_kill_in_one_operation_another_loses_nothing(world, operation, figures):
    first = Walk(world, operation)
    left = states(first)
    names = SECONDS[world.driver]
    seconds = of_driver(world.driver) if EVERYTHING else [OPERATIONS[name] for name in names]
    walks = [Walk(world, second) for second in seconds]
    count = take(
        (
            f"killed at {call}, then {second.operation}",
            lambda second=second, call=call: check_pair(first, second, call),
        )
        for second in walks
        for call in left
    )
    figures["distinct states that kills leave"] += len(left)
    figures["pairs of operations"] += len(walks)
    figures["second runs after a kill"] += count
