"""
What a state that failed returns: its changes are those that the files tell, and test=True tells
the rest.
"""

import errno
import os

import pytest
from qubes_storage import StoragePoolException, conf, guards
from qubes_storage.pool import CONF
from qubes_storage.vm import IMAGES

from tests.r4.machine import RELEASES, machine
from tests.torture import strace
from tests.torture.operations import EVERYTHING, walked
from tests.torture.walking import ERRORS, Walk, need, take, vms

pytestmark = pytest.mark.usefixtures("tracing")
# With one error at each third step; ``make torture`` walks all with each.
PART = {
    "xen": ("pool remove", "remove"),
    "reflink": ("pool set", "migrate and change"),
    "btrfs": ("change",),
}
REFUSED = b"2\0QubesException\0\0no way\0"  # what the daemon may answer


class StateWalk(Walk):
    """A state of Salt's, called on one world over and over."""

    def __init__(self, world, operation, salted):
        self.state, self.salted = operation.run, salted
        salted.on(world.machine.root)
        super().__init__(world, operation)

    def call(self, test=False):
        """What the state returns."""
        asked = self.state.asked(self.world)
        return self.salted.call(self.state.function, self.state.name, test, **asked)

    def act(self):
        return self.call()["changes"]

    def check(self, call, error):
        """Have a call fail in a run of the state, and look at what it returns."""
        self.world.restore()
        ending = strace.interrupt(self.call, call, error)
        need(not ending.error, ending.traceback)
        ret, made = ending.value, self.made()
        need(ret["changes"] == made, "changes are", ret, "and the files tell", made)
        if not ret["result"]:
            need(os.strerror(getattr(errno, error)) in ret["comment"], "does not tell why:", ret)
            ending.error = StoragePoolException(ret["comment"])
        ending.value = ret["changes"]
        self.check_failed(ending, call)
        told = self.call(test=True)
        need(self.together(made, told["changes"]) == self.changes, ret, "leaves", told)

    def made(self):
        """Of the changes of a whole run, those that the files tell."""
        if self.state.function.startswith("qubes_pool"):
            is_made = self._is_made_of_pool
        else:
            is_made = self._is_made_of_vm
        made = {}
        for key, entry in self.changes.items():
            if key != "volumes" or "created" in self.changes:
                made.update({key: entry} if is_made(key, entry["new"]) else {})
                continue
            grown = [v for v, size in entry["new"].items() if self._size(v) >= size]
            if grown:
                made[key] = {side: {v: entry[side][v] for v in grown} for side in entry}
        return made

    def _is_made_of_pool(self, key, new):
        path, name = self.world.machine.path, self.state.name
        options = conf.loads(path(CONF).read_bytes()).get(name)
        if "created" in self.changes or key == "removed":
            return (options is None) == (key == "removed")
        kept = conf.loads(path(guards.PATH).read_bytes()).get(name, {})
        if key == "directories":
            gone = [d for d in self.changes[key]["old"] if not path(d).exists()]
            return gone == self.changes[key]["old"] and all(path(d).exists() for d in new)
        return {**(options or {}), **kept}.get(key) == new

    def _is_made_of_vm(self, key, new):
        there = vms(self.world)
        attrs = there.get(self.state.name)
        if "created" in self.changes or key == "removed":
            return (attrs is None) == (key == "removed")
        if key == "deleted":
            place = self.world.machine.path(self.registered[self.state.name]["dir_path"])
            return not place.exists() and not place.with_name(f".{place.name}.removing").exists()
        if key == "template":
            return attrs["template_qid"] == there[new]["qid"]
        return attrs[{"pool": "pool_name"}.get(key, key)] == new

    def together(self, made, left):
        """What was made and what is left to do; nothing is told twice."""
        both = {**made, **left}
        if both.pop("unfinished", None) and "deleted" in self.changes:  # the rest is to be deleted
            need("deleted" not in made, made, left)
            both["deleted"] = self.changes["deleted"]
        for key in {*made} & {*left}:
            need(key == "volumes", key, "is told twice:", made, left)
            both[key] = {side: {**made[key][side], **left[key][side]} for side in ("old", "new")}
        return both

    def _size(self, volume):
        place = self.world.machine.path(vms(self.world)[self.state.name]["dir_path"])
        return os.stat(place / IMAGES[volume]).st_size


@walked(PART, states=True)
def test_what_a_state_says_that_failed_anywhere_is_true(world, operation, salted, figures):
    walk = StateWalk(world, operation, salted)
    steps = list(enumerate(walk.calls))
    count = take(
        (f"{error} at {call}", lambda call=call, error=error: walk.check(call, error))
        for number, call in (steps if EVERYTHING else steps[::3])
        for error in (ERRORS if EVERYTHING else (ERRORS[number % len(ERRORS)],))
    )
    assert count >= 5
    figures["states failed at each step"] += 1
    figures["faults injected into states"] += count


@pytest.mark.parametrize("release", RELEASES)
def test_default_pools_of_which_some_are_set_are_told(release, root, salted_r4):
    pools = {"default_pool": "ssd", "default_pool_private": "btrfs", "default_pool_root": "btrfs"}

    def refuse(call):
        return call.method == "admin.property.Set" and call.arg == "default_pool_root" and REFUSED

    with machine(release, root) as (daemon, _):
        salted_r4.on(root)
        daemon.before = refuse
        ret = salted_r4.call("qubes_pool.default", "default pools", **pools)
        assert ret["result"] is False
        assert "no way" in ret["comment"]
        assert set(ret["changes"]) == {"default_pool", "default_pool_private"}
        told = salted_r4.call("qubes_pool.default", "default pools", test=True, **pools)
        assert set(told["changes"]) == {"default_pool_root"}


@pytest.mark.parametrize("release", RELEASES)
def test_a_pool_that_goes_without_its_directories_is_told(release, root, salted_r4):
    place = "/mnt/btrfs/qubes"

    def use(call, answer):
        if call.method == "admin.pool.Remove":
            os.mkdir(f"{root}{place}/appvms/new")
        return answer

    with machine(release, root) as (daemon, _):
        salted_r4.on(root)
        daemon.after = use
        ret = salted_r4.call("qubes_pool.absent", "btrfs", purge=True)
        assert ret["result"] is False
        assert f"it is done, but {place}/appvms could not be cleared" in ret["comment"]
        assert set(ret["changes"]) == {"removed"}
        for left in ({"directories": {"old": [f"{place}/vm-templates"], "new": []}}, {}):
            told = salted_r4.call("qubes_pool.absent", "btrfs", purge=True)
            assert (told["result"], told["changes"]) == (True, left)
