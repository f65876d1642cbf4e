"""Each pair of operations, the second one run after a kill in the first: nothing is lost."""

import itertools

import pytest

from tests.torture.operations import OPERATIONS, of_driver
from tests.torture.pairing import check_pair, states
from tests.torture.walking import Walk, problems_of

pytestmark = pytest.mark.usefixtures("tracing")
# ``{driver: (first, seconds)}`` of what CI walks; ``make torture`` walks every pair.
PART = {
    "xen": ("remove", ("clone", "rename", "remove, keep")),
    "reflink": ("revert", ("migrate near", "commit", "remove")),
    "btrfs": ("resize root", ("rename template", "create copy")),
}


def test_after_a_kill_in_one_operation_another_loses_nothing(world, everything, figures):
    problems = []
    names = [each.name for each in of_driver(world.driver)]
    first, seconds = PART[world.driver]
    firsts, seconds = (names, names) if everything else ([first], seconds)
    walks = {name: Walk(world, OPERATIONS[name]) for name in {*firsts, *seconds}}
    left = {}
    for one, other in itertools.product(firsts, seconds):
        if one not in left:
            left[one] = states(walks[one])
            figures["distinct states that kills leave"] += len(left[one])

        def steps(one=one, other=other):
            for call in left[one]:

                def check(call=call):
                    check_pair(walks[one], walks[other], call)

                yield f"{world.driver}: {one} killed at {call}, then {other}", check

        count, found = problems_of(steps())
        figures["pairs of operations"] += 1
        figures["second runs after a kill"] += count
        problems += found
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:40]])
