"""
Killed, or interrupted, at each step that changes a file: nothing is lost, and the next run of the
state mends.
"""

import pytest

from tests.torture.operations import walked
from tests.torture.walking import Walk, need, take

pytestmark = pytest.mark.usefixtures("tracing")
PART = {
    "xen": ("pool set", "rename", "import near"),
    "reflink": ("pool remove", "migrate to another driver", "revert root"),
    "btrfs": ("clone", "resize", "change", "remove"),
}
CTRL_C = {
    "xen": ("pool add", "pool remove", "migrate elsewhere"),
    "reflink": ("remove",),
    "btrfs": ("create AppVM",),
}


@walked(PART)
def test_killed_anywhere_the_next_run_finishes_or_undoes_it(world, operation, figures):
    walk = Walk(world, operation)

    def check(call):
        walk.kill(call)
        walk.check_whole()
        walk.check_converges()

    count = take((f"killed at {call}", lambda call=call: check(call)) for call in walk.calls)
    assert count >= 5
    figures["operations killed at each step"] += 1
    figures["steps killed"] += count


@walked(CTRL_C)
def test_interrupted_anywhere_it_is_undone_or_finished(world, operation, figures):
    walk = Walk(world, operation)

    def check(call):
        ending = walk.interrupt(call)
        need(isinstance(ending.error, KeyboardInterrupt), ending)
        walk.check_whole()
        walk.check_converges()

    count = take((f"Ctrl-C at {call}", lambda call=call: check(call)) for call in walk.calls)
    assert count >= 5
    figures["operations interrupted at each step"] += 1
    figures["steps interrupted"] += count
