"""
What test=True says is what the run does, on machines in any state, whatever is declared.

A failure names the number of its machine, from which all follows that befalls it and is asked of
it; ``FORETOLD=NUMBER`` takes that machine alone.
"""

import collections
import os
import random
import re

import pytest

from tests.r4.machine import RELEASES
from tests.r4.machine import machine as r4_machine
from tests.torture.befalling import Local, Remote
from tests.torture.walking import hold, need, problems_of
from tests.unit.conftest import qubesadmin  # noqa: F401

pytestmark = pytest.mark.usefixtures("tracing")
STEPS = 8  # states that are called on one machine
# What only the writing finds: how large a file the filesystem, or a volume the daemon, takes.
FOUND_BY_WRITING = re.compile(r"File too large|: volume \w+ is .*, not 900\.0 TiB: qubesd answered")


def foretell(there, salted):
    """Call a state with test=True, without, and once more; returns how it went."""
    function, name, declared = there.declare()

    def call(**kwargs):
        return salted.call(function, name, **kwargs, **declared)

    def holds(what, found):
        need(found, function, name, declared, what, *(f"\n  {ret}" for ret in said))

    said = []
    salted.look_anew()
    before = there.stamps()
    said.append(told := call(test=True))
    holds("test=True writes", there.stamps() == before)
    said.append(done := call())
    after = there.stamps()
    if not done["result"] and FOUND_BY_WRITING.search(done["comment"]):
        foretold = done["changes"].items() <= told["changes"].items()
        holds("is not foretold", told["result"] is None and foretold)
        return "found by writing"
    said.append(again := call())
    holds("a second run writes", there.stamps() == after)
    if done["result"] and done["changes"]:
        comment = re.sub(" (was|were) ", " would be ", done["comment"], count=1)
        holds("is not foretold", told == {**done, "result": None, "comment": comment})
        holds("a second run does it again", (again["result"], again["changes"]) == (True, {}))
        return "done"
    holds("what does nothing writes", after == before)
    holds("claims changes", not done["changes"])
    holds("is not foretold", told == done)
    holds("a second run says something else", again == done)
    return "nothing to do" if done["result"] else "refused"


def walk(number, there, salted):
    """Have things befall a machine, and call states on it; returns how each went."""
    befallen, ends = [], []
    try:
        for _ in range(STEPS):
            if there.random.random() < 0.4:
                befallen.append(there.accident())
            ends.append(foretell(there, salted))
    except AssertionError as err:
        raise AssertionError(f"FORETOLD={number}: {err}\n  after {befallen}") from err
    return ends


def walk_all(count, check, figures):
    """``check`` machines, or the chosen one."""
    chosen = os.environ.get("FORETOLD")
    ended = collections.Counter()
    hold(
        problems_of(
            (f"machine {number}", lambda number=number: ended.update(check(number)))
            for number in ([int(chosen)] if chosen else range(count))
        )[1]
    )
    figures.update({f"runs foretold by test=True: {end}": n for end, n in ended.items()})
    assert chosen or (ended["done"] and ended["nothing to do"] and ended["refused"])


def test_whatever_is_declared_is_foretold(world, salted, figures, everything):
    salted.on(world.machine.root)

    def check(number):
        world.restore()
        chance = random.Random(f"{world.driver} {number}")
        return walk(number, Local(chance, world, salted), salted)

    walk_all(200 if everything else 5, check, figures)


@pytest.mark.usefixtures("qubesadmin")
@pytest.mark.parametrize("release", RELEASES)
def test_whatever_is_declared_is_foretold_on_r4(release, tmp_path, salted_r4, figures, everything):
    def check(number):
        with r4_machine(release, tmp_path / str(number)) as (daemon, _):
            salted_r4.on(daemon.root)
            chance = random.Random(f"{release} {number}")
            return walk(number, Remote(chance, daemon, salted_r4), salted_r4)

    walk_all(100 if everything else 3, check, figures)
