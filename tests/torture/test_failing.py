"""Each step that changes a file fails instead: the error tells all, and nothing is half done."""

import pytest

from tests.torture.operations import EVERYTHING, walked
from tests.torture.walking import ERRORS, Walk, take

pytestmark = pytest.mark.usefixtures("tracing")
# With one error a step, each in its turn; ``make torture`` walks all with each.
PART = {
    "xen": ("pool add", "create AppVM"),
    "reflink": ("pool set", "commit"),
    "btrfs": ("change",),
}
ON = {
    "xen": ("rename",),
    "reflink": ("resize",),
    "btrfs": ("remove",),
}


@walked(PART)
def test_what_fails_anywhere_says_so_and_leaves_all_as_it_was(world, operation, figures):
    walk, errors = Walk(world, operation), len(ERRORS) if EVERYTHING else 1
    figures["faults injected"] += fail_each_step(walk, Walk.fail, Walk.check_failed, errors)
    figures["operations failed at each step"] += 1


@walked(ON)
def test_a_disk_that_fails_from_any_step_on_loses_nothing(world, operation, figures):
    walk = Walk(world, operation)
    figures["steps from which it failed"] += fail_each_step(walk, Walk.fail_on, Walk.check_told)
    figures["operations on a disk that fails from a step on"] += 1


def fail_each_step(walk, fail, check_told, errors=1):
    """Have each step fail with some of the errors, each in its turn; returns how many did."""

    def check(call, error):
        ending = fail(walk, call, error)
        walk.check_whole()
        check_told(walk, ending, call)
        walk.check_converges()

    count = take(
        (f"{error}, {fail.__name__}, at {call}", lambda call=call, error=error: check(call, error))
        for number, call in enumerate(walk.calls)
        for error in (ERRORS * 2)[number % len(ERRORS) :][:errors]
    )
    assert count >= 5
    return count
