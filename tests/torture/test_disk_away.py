"""
The disk of the pools is unmounted in the middle of a run, which goes on to its end.

It is unmounted lazily: what is open there goes on working, and a path leads to the bare mount
point. Its pools are guarded by ``require_mount``.
"""

import itertools

import pytest
from qubes_storage.exc import StoragePoolException

from tests.torture import strace
from tests.torture.operations import EVERYTHING, walked
from tests.torture.small import CLEAR
from tests.torture.walking import Walk, need, take

pytestmark = pytest.mark.usefixtures("tracing")
PART = {
    "xen": ("pool add", "pool remove", "rename", "import and grow"),
    "reflink": ("migrate elsewhere", "remove"),
    "btrfs": ("migrate near", "commit"),
}


def steps(calls):
    """``(call, whether the state runs once more before the disk is back)``: all, or a dozen."""
    found = list(itertools.product(calls, (False, True)))
    return found[:: 1 if EVERYTHING else len(found) // 12 | 1]  # odd: some of either


def check_error(ending):
    """An error is one of ours, and tells what it is about, where, and the cure."""
    clear = isinstance(ending.error, StoragePoolException) and CLEAR.search(str(ending.error))
    need(clear or not ending.error, "no clear error:", ending.traceback)


@walked(PART)
def test_unmounted_anywhere_nothing_is_lost_or_made_beneath(world, operation, figures):
    walk = Walk(world, operation)

    def check(call, again):
        world.restore()
        endings = [strace.at(walk.act, call, lambda _: world.detach() or 0)]
        if again:
            endings.append(strace.run(walk.act))
        made = world.attach()
        need(not made, "made in the bare mount point:", *made)
        walk.check_whole()
        for ending in endings:
            check_error(ending)
        walk.check_converges()

    count = take(
        (f"unmounted at {call}, {again=}", lambda step=(call, again): check(*step))
        for call, again in steps(walk.calls)
    )
    assert count >= 5
    figures["runs whose disk was unmounted in the middle"] += count
