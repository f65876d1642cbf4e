"""Each step that changes a file fails instead: the error tells all, and nothing is half done."""

import pytest

from tests.torture.operations import OPERATIONS, of_driver
from tests.torture.walking import ERRORS, Walk, problems_of

pytestmark = pytest.mark.usefixtures("tracing")
# What CI walks, with one error a step, each in its turn; ``make torture`` walks all with each.
PART = {
    "xen": ("pool add", "create AppVM"),
    "reflink": ("pool set", "clone template"),
    "btrfs": ("rename template",),
}


def test_what_fails_anywhere_says_so_and_leaves_all_as_it_was(world, everything, figures):
    problems = []
    chosen = [OPERATIONS[name] for name in PART[world.driver]]
    for operation in of_driver(world.driver) if everything else chosen:
        walk = Walk(world, operation)

        def steps(walk=walk):
            for number, call in enumerate(walk.calls):
                for error in ERRORS if everything else (ERRORS[number % len(ERRORS)],):

                    def check(call=call, error=error):
                        ending = walk.fail(call, error)
                        walk.check_whole()
                        walk.check_failed(ending, call)
                        walk.check_converges()

                    yield f"{world.driver}: {walk.operation}: {error} at {call}", check

        count, found = problems_of(steps())
        assert count >= 5
        figures["operations failed at each step"] += 1
        figures["faults injected"] += count
        problems += found
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:40]])
