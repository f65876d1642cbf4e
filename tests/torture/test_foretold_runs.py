"""
What test=True says of each state of a run is what the run does, whatever the others do before it.

A failure names its number; ``FORETOLD=NUMBER`` makes the runs up to that one alone.
"""

import os
import random

from tests.torture.walking import need

POOLS, VMS = ["a", "b", "c", "d"], ["w1", "w2", "w3", "w4", "t1", "t2"]
PLACES = [f"/opt/{name}" for name in ("a", "b", "c", "d", "a/x", "c/y", "d/appvms")]
# By this the SLS has them: pools, templates, other VMs; what goes the other way round.
ORDER = [
    ("qubes_pool.present", ""), ("qubes_vm.present", "t"), ("qubes_vm.present", "w"),
    ("qubes_vm.absent", "w"), ("qubes_vm.absent", "t"), ("qubes_pool.absent", ""),
]  # fmt: skip


class Declaring:
    """Runs by chance: a state for each of some pools and VMs."""

    def __init__(self, number):
        self.random = random.Random(number)

    def some(self, **choices):
        """Some of what can be declared: ``word=(how often, values)``."""
        return {
            word: self.random.choice(values)
            for word, (often, values) in choices.items()
            if self.random.random() < often
        }

    def states(self):
        """``[(function, name, arguments)]``, mostly in the order of the SLS."""
        names = self.random.sample([*POOLS, *VMS], self.random.randint(2, 7))
        found = [self._pool(name) if name in POOLS else self._vm(name) for name in names]
        if self.random.random() < 0.8:
            found.sort(key=lambda state: ORDER.index((state[0], state[1][0].strip("abcd"))))
        return found

    def _pool(self, name):
        if self.random.random() < 0.3:
            return "qubes_pool.absent", name, self.some(purge=(0.5, [True]))
        options = self.some(dir_path=(0.7, PLACES), min_free=(0.2, ["1MiB", "2MiB"]))
        return "qubes_pool.present", name, {"options": options} if len(options) > 1 else options

    def _vm(self, name):
        if self.random.random() < 0.3:
            return "qubes_vm.absent", name, self.some(purge=(0.8, [True]))
        origin = self.some(template=(0.3, ["t1", "t2"])) or self.some(
            clone_from=(0.15, ["w1", "w2", "t1"])
        )
        declared = self.some(
            klass=(0.4, ["AppVM", "StandaloneVM", "HVM", "NetVM"]),
            pool=(0.5, ["default", *POOLS]),
            migrate=(0.6, [True]),
            label=(0.3, ["red", "blue"]),
            volumes=(0.2, [{"private": "3GiB"}, {"private": "4GiB"}]),
        )
        if name.startswith("t"):
            declared["klass"] = "TemplateVM"
        return "qubes_vm.present", name, {**declared, **origin}


def foretell(number, run, states):
    """Make a run in test mode, for real, and once more; returns how each state went."""
    told, done, again = run(*states, test=True), run(*states), run(*states)
    for function, name, arguments in states:
        said, ret = told[name], done[name]
        result = None if ret["changes"] else ret["result"]
        if said["result"] is None and " waits for " in said["comment"]:
            holds = ret["result"] is True and not said["changes"]
        else:
            holds = (said["result"], said["changes"]) == (result, ret["changes"])
        need(holds, number, function, name, arguments, f"\n  {said}\n  {ret}\n  in {states}")
        yield "waited" if "waits for" in said["comment"] else str(result)
    if all(ret["result"] for ret in done.values()):
        assert [ret["changes"] for ret in again.values()] == [{}] * len(states), (number, states)


def test_each_state_of_a_run_is_foretold(run, root, figures, everything):
    chosen = os.environ.get("FORETOLD")
    run(("qubes_pool.present", "default", {}))
    for number in range(int(chosen) + 1 if chosen else 2000 if everything else 40):
        for end in foretell(number, run, Declaring(number).states()):
            figures[f"states of runs foretold by test=True: {end}"] += 1
    assert figures["states of runs foretold by test=True: waited"]
