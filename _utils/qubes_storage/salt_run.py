"""What Salt tells a state in test mode of those before it in the run, and what it answers then."""

import copy
import functools
import os

from qubes_storage import adminapi, guards
from qubes_storage.admin.pool_plan import PLACE
from qubes_storage.declared import Declared
from qubes_storage.vm import KLASSES

_STATES = {"pool": ("qubes_pool", "qvm-pool"), "VM": ("qubes_vm",), "path": ("file", "mount")}


_POOLS = tuple(f"{state}_|-" for state in _STATES["pool"])


def handed_over(state):
    """What a state hands over in test mode, else None; ``state`` is its module's ``globals()``."""
    adminapi.forget_before(*_done_by_others(state.get("__running__") or {}))
    if not state["__opts__"]["test"]:
        return None
    return state.get("__lowstate__"), state.get("__running__")


def _done_by_others(returns):
    """
    ``(whether the run begins, a number)`` that changes when others than the states of this process
    have done something; one that runs in parallel is another process.
    """
    mine = tuple(f"{state}_|-" for kind in ("pool", "VM") for state in _STATES[kind])
    others = sum(not tag.startswith(mine) for tag in returns)
    return others == len(returns), others + sum("__parallel__" in ret for ret in returns.values())


def not_done(ret, err):
    """What a state returns of an error: in test mode maybe what states before it will mend."""
    waits = getattr(err.__cause__, "waits", False)
    return {**ret, "result": None if waits else False, "comment": str(err)}


class Run:
    """The states of a run that come before one, and would change something."""

    def __init__(self, lowstate, returns):
        self.alone = not lowstate  # a single state, run on its own: nothing tells what else will be
        self._lowstate = lowstate or ()
        self._returns = returns or {}

    def __len__(self):
        return len(self._returns)

    def of(self, kind, name=None):
        """``[(name, function, tag)]`` of those of pools, VMs or paths, or of that of one name."""
        starts = tuple(f"{state}_|-" for state in _STATES[kind])
        part = "_|-" if name is None else f"_|-{name}_|-"
        found = []
        for tag in self._returns:
            if tag.startswith(starts) and part in tag and self._returns[tag]["result"] is None:
                *_, its, function = tag.split("_|-")
                if name in (None, its) and function != "default":
                    found.append((its, function, tag))
        return found

    def given(self, tag):
        """The arguments of one."""
        words = ("state", "__id__", "name", "fun")
        found = (
            low for low in self._lowstate if "_|-".join(str(low[word]) for word in words) == tag
        )
        return next(found, {})

    def vms(self):
        """The names of the VMs that will be there."""
        last = {name: function for name, function, _ in self.of("VM")}
        return {name for name, function in last.items() if function == "present"}

    def goes(self, name):
        """The tag of the state that removes a VM, if none makes it again."""
        found = self.of("VM", name)
        return found[-1][2] if found and found[-1][1] == "absent" else None

    def is_after(self, tag, other):
        """Whether one state comes after another."""
        order = list(self._returns)
        return order.index(tag) > order.index(other)

    def changed(self, tag):
        """The changes of one state, ``{}`` where it waits itself."""
        return self._returns[tag]["changes"]

    def changes(self, name):
        """What of a VM they change, by name; what waits itself may change anything."""
        return {key for *_, tag in self.of("VM", name) for key in self.changed(tag) or ("any",)}

    def taken(self):
        """``[(VM, path, tag)]`` of the files that become images of VMs, and go."""
        found = [(name, self.given(tag), tag) for name, _, tag in self.of("VM")]
        return [
            (name, str(given["root_move_from"]), tag)
            for name, given, tag in found
            if given.get("root_move_from")
        ]

    def brings_back(self, path, tag):
        """Whether a file that one takes comes again after that; what is still there looks done."""
        order = list(self._returns)
        return any(
            each.startswith("file_|-")
            and not each.endswith("_|-absent")
            and self._returns[each]["result"] is not False
            and os.path.realpath(each.split("_|-")[2]) == path
            for each in order[order.index(tag) + 1 :]
        )

    def purges(self):
        """``[(pool, function, tag)]`` of those that remove a pool with its directories."""
        return [each for each in self.of("pool") if each[1] == "absent" and self._purge(each[2])]

    def _purge(self, tag):
        return "directories" in self.changed(tag) or self.given(tag).get("purge")

    def paths(self):
        """``of("path")`` in order, and what finds absent what those before it will make."""
        found = {tag: (name, function, tag) for name, function, tag in self.of("path")}
        for tag, ret in self._returns.items():
            if tag.startswith("file_|-") and tag.endswith("_|-absent") and ret["result"]:
                found[tag] = (*tag.split("_|-")[2:], tag)
        return [found[tag] for tag in self._returns if tag in found]

    @property
    def others(self):
        """Whether others than states of pools and VMs would change something."""
        mine = tuple(f"{state}_|-" for kind in ("pool", "VM") for state in _STATES[kind])
        done = (tag for tag, ret in self._returns.items() if ret["result"] is None)
        return not all(tag.startswith(mine) for tag in done)

    def declared(self, name):
        """What they declare of a VM that will be there; what is known of its changes over that."""
        found = {}
        for _, function, tag in self.of("VM", name):
            changes = self._returns[tag]["changes"] if function == "present" else {}
            new = {key: changes[key]["new"] for key in ("klass", "template") if key in changes}
            found.update({**self.given(tag), **new} if function == "present" else {})
        return {key: value for key, value in found.items() if value is not None}

    def driver(self, pool):
        """The driver of a pool that they make."""
        options = self.pools[pool][0]
        if "driver" in options:
            return options["driver"]
        low = self.given(next(tag for *_, tag in self.of("pool", pool)))
        given = copy.deepcopy(low.get("options"))
        return Declared(pool, low.get("driver"), given, None, None, {}).options.get("driver")

    def defaults(self, keys):
        """``[{property: pool}]`` of the default pools that each state sets."""
        found = []
        for tag, ret in self._returns.items():
            if tag.startswith(_POOLS) and tag.endswith("_|-default") and ret["result"] is None:
                new = {key: each["new"] for key, each in ret["changes"].items()}
                low = {} if new else self.given(tag)  # it waits itself
                found.append(new or {key: low[key] for key in keys if low.get(key) is not None})
        return found

    def leaves(self, name, key, used):
        """Whether a VM goes, or has another ``key`` than ``used`` then."""
        return any(
            function == "absent" or self.given(tag).get(key) not in (None, used)
            for _, function, tag in self.of("VM", name)
        )

    def comes(self, name, key, used):
        """Whether the ``key`` of a VM becomes ``used``; a copy does not use its template."""
        is_copy = key == "template" and not KLASSES[self.klass(name)].based_on
        return not is_copy and self.told(name, key) == used

    def klass(self, name):
        """The class of a VM that they make."""
        return self.told(name, "klass") or "AppVM"

    def told(self, name, key):
        """What is told of the ``key`` that a VM gets, or None."""
        for _, function, tag in reversed(self.of("VM", name)):
            if function == "absent":
                return None
            changes = self.changed(tag)
            value = changes.get(key, {}).get("new") if changes else self.given(tag).get(key)
            if value is not None:
                return value
        return None

    @functools.cached_property
    def pools(self):
        """``{pool: (options, guards)}`` that they set, None for a pool that goes."""
        return {
            name: self._options(tag) if function == "present" else None
            for name, function, tag in self.of("pool")
        }

    def _options(self, tag):
        changes = self._returns[tag]["changes"]
        options = {key: changes[key]["new"] for key in changes}
        if not changes:  # it waits itself: where it will lie is all that is told of it
            low = self.given(tag)
            given = copy.deepcopy(low.get("options"))  # which thaws what Salt has frozen
            place = {key: low[key] for key in PLACE if key in low}
            declared = Declared(low["name"], None, given, None, None, place).options
            options = {key: declared[key] for key in PLACE if key in declared}
        for key in ("created", "directories"):
            options.pop(key, None)
        return options, {key: options.pop(key) for key in guards.NAMES if key in options}
