"""Killed at each step that changes a file: nothing is lost, and the next run of the state mends."""

import pytest

from tests.torture.operations import OPERATIONS, of_driver
from tests.torture.walking import Walk, problems_of

pytestmark = pytest.mark.usefixtures("tracing")
# What CI walks, step by step; ``make torture`` walks all.
PART = {
    "xen": ("pool set", "rename", "import near"),
    "reflink": ("pool remove", "migrate to another driver", "revert root"),
    "btrfs": ("clone", "resize", "change", "remove"),
}


def test_killed_anywhere_the_next_run_finishes_or_undoes_it(world, everything, figures):
    problems = []
    chosen = [OPERATIONS[name] for name in PART[world.driver]]
    for operation in of_driver(world.driver) if everything else chosen:
        walk = Walk(world, operation)

        def steps(walk=walk):
            for call in walk.calls:

                def check(call=call):
                    walk.kill(call)
                    walk.check_whole()
                    walk.check_converges()

                yield f"{world.driver}: {walk.operation} killed at {call}", check

        count, found = problems_of(steps())
        assert count >= 5
        figures["operations killed at each step"] += 1
        figures["steps killed"] += count
        problems += found
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:40]])
