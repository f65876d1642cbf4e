"""
The power goes at any moment: whatever of a run has reached the disk, the next one mends it.

Each operation is recorded once. A model of the disk takes its steps, and each state that these may
leave, in whatever order they get there, is laid out as real files and run from.
"""

import copy
import os

import pytest

from tests.torture import disk_calls, disk_states, disk_tree, strace
from tests.torture.operations import EVERYTHING, walked
from tests.torture.walking import Walk, hold, need, problems_of

pytestmark = pytest.mark.usefixtures("tracing")
_CI = {
    "xen": ("pool add", "rename template"),
    "reflink": ("change", "revert"),
    "btrfs": ("remove",),
}


class Cuts:
    """One operation, and the states of the disk that have been looked at."""

    def __init__(self, world, operation):
        self.world, self.live = world, world.place / "live"
        self.walk = Walk(world, operation)
        world.restore()
        self.tree = disk_tree.Tree(self.live, world.machine.root)
        self.calls = strace.record(self.walk.act, world.place)
        self.seen = set()

    def played(self, calls):
        """A model of its own that has taken the steps of some calls."""
        tree = copy.deepcopy(self.tree)
        disk_calls.replay(tree, calls)
        return tree

    def check_model(self, disk):
        """The model comes to what the kernel made."""
        real = disk_tree.Tree(self.live, self.world.machine.root).disk
        made, found = disk_tree.listing(disk, disk.now), disk_tree.listing(real, real.before)
        paths = sorted(p for p in {*made, *found} if made.get(p) != found.get(p))
        need(not paths, "the model differs:", [(p, made.get(p), found.get(p)) for p in paths[:5]])

    def problems(self, disk, title, figures, since=None):
        """What is wrong once the power went, in each state that the steps of a disk may leave."""
        choices, states = disk_states.states(disk, since=since or 0)
        figures["power cuts: choices of what has reached the disk"] += choices
        new = []
        for state in states:
            key = hash(frozenset(disk_tree.listing(disk, state.facts).items())), state.ended
            if key not in self.seen:
                self.seen.add(key)
                new.append(
                    (f"{title}, power cut {state.text}", self.check(disk, state, since is not None))
                )
        figures["power cuts: states of the disk that the next run began from"] += len(new)
        ending = strace.run(lambda: self._quietly(new))  # a child, for what it does to itself
        if ending.error:
            raise ending.error
        return ending.value

    def _quietly(self, steps):
        os.fsync = lambda fd: None  # nothing is to get anywhere from here, and there are many
        return problems_of(steps)[1]

    def check(self, disk, state, mended=False):
        """What is on the disk is whole, and the next run of the same state makes it so."""

        def check():
            disk_tree.lay_out(disk, state.facts, self.live)
            self.walk.check_whole()
            changes = self.walk.act()
            if state.ended and not self.walk.operation.verb:
                # Who finds an image as large as declared syncs nothing: a dead run has grown it.
                may = {"unfinished", "volumes"} if mended else {"unfinished"}
                need(set(changes) <= may, "what was done is lost:", changes)
            self.walk.check_converges()

        return check

    def mended(self, figures):
        """
        What is wrong once the power went while a run mended what a kill at a call had left: at any,
        or in CI at those before which most is not sure. A verb would be done twice.
        """
        found = []
        for number, call in enumerate(self.calls):
            if not EVERYTHING and call.name != "fsync":
                continue
            tree = self.played(self.calls[:number])
            tree.follow(disk_tree.lay_out(tree.disk, tree.disk.now, self.live))
            calls = strace.record(self.walk.act, self.world.place)
            if not calls:
                continue  # all was done, so nothing is added to what may be on the disk by now
            disk_calls.replay(tree, calls)
            self.check_model(tree.disk)
            figures["power cuts: calls of recorded runs"] += len(calls)
            title = f"{self.world.driver}: {self.walk.operation} killed at {call}, run again"
            found += self.problems(tree.disk, title, figures, number)
        return found


@walked(_CI)
def test_whatever_has_reached_the_disk_the_next_run_mends_it(world, operation, figures):
    cuts = Cuts(world, operation)
    disk = cuts.played(cuts.calls).disk
    cuts.check_model(disk)
    figures["power cuts: operations"] += 1
    figures["power cuts: calls of recorded runs"] += len(cuts.calls)
    figures["power cuts: steps to the disk"] += len(disk.steps)
    figures["power cuts: syncs"] += len(disk.sure)
    problems = cuts.problems(disk, str(operation), figures)
    if not operation.verb and (EVERYTHING or operation.name == "rename template"):
        problems += cuts.mended(figures)
    hold(problems)
