"""Each step that changes a file fails instead: the error tells all, and nothing is half done."""

import pytest

from tests.torture.operations import EVERYTHING, walked
from tests.torture.walking import ERRORS, Walk, take

pytestmark = pytest.mark.usefixtures("tracing")
# With one error a step, each in its turn; ``make torture`` walks all with each.
PART = {
    "xen": ("pool add", "create AppVM", "change"),
    "reflink": ("pool set", "clone template", "commit"),
    "btrfs": ("rename template",),
}
ON = {
    "xen": ("migrate elsewhere",),
    "reflink": ("resize",),
    "btrfs": ("create copy",),
}


@walked(PART)
def test_what_fails_anywhere_says_so_and_leaves_all_as_it_was(world, operation, figures):
    walk = Walk(world, operation)

    def check(call, error):
        ending = walk.fail(call, error)
        walk.check_whole()
        walk.check_failed(ending, call)
        walk.check_converges()

    count = take(
        (f"{error} at {call}", lambda call=call, error=error: check(call, error))
        for number, call in enumerate(walk.calls)
        for error in (ERRORS if EVERYTHING else (ERRORS[number % len(ERRORS)],))
    )
    assert count >= 5
    figures["operations failed at each step"] += 1
    figures["faults injected"] += count


@walked(ON)
def test_a_disk_that_fails_from_any_step_on_loses_nothing(world, operation, figures):
    walk = Walk(world, operation)

    def check(call, error):
        ending = walk.fail_on(call, error)
        walk.check_whole()
        walk.check_told(ending, call)
        walk.check_converges()

    count = take(
        (f"{error} from {call} on", lambda call=call, error=error: check(call, error))
        for number, call in enumerate(walk.calls)
        for error in (ERRORS[number % len(ERRORS)],)
    )
    assert count >= 5
    figures["operations on a disk that fails from a step on"] += 1
    figures["steps from which it failed"] += count
