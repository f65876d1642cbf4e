"""
Killed, or interrupted, at each step that changes a file: nothing is lost, and the next run of the
state mends.
"""

import pytest

from tests.torture.operations import walked
from tests.torture.walking import Walk, take

pytestmark = pytest.mark.usefixtures("tracing")
PART = {
    "xen": ("pool set", "rename"),
    "reflink": ("pool remove", "revert root"),
    "btrfs": ("clone", "remove"),
}
CTRL_C = {
    "xen": ("pool add",),
    "reflink": ("remove",),
    "btrfs": ("create AppVM",),
}


@walked(PART)
def test_killed_anywhere_the_next_run_finishes_or_undoes_it(world, operation, figures):
    stop_at_each_step(Walk(world, operation), Walk.kill, "killed", figures)


@walked(CTRL_C)
def test_interrupted_anywhere_it_is_undone_or_finished(world, operation, figures):
    stop_at_each_step(Walk(world, operation), Walk.interrupt, "interrupted", figures)


def stop_at_each_step(walk, stop, how, figures):
    """See that the next run of an operation mends what is left of one that was stopped."""

    def check(call):
        stop(walk, call)
        walk.check_whole()
        walk.check_converges()

    count = take((f"{how} at {call}", lambda call=call: check(call)) for call in walk.calls)
    assert count >= 5
    figures[f"operations {how} at each step"] += 1
    figures[f"steps {how}"] += count
