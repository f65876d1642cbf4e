"""Pools that others wrote: of a class that is none of ours, with values or a group gone wrong."""

import grp

import pytest
from qubes_storage.exc import InvalidInput

CONF = """\
[default]
driver=xen
[foreign]
class=io.StringIO
[ref]
driver=reflink
dir_path=/mnt/ref
setup_check=false
revisions_to_keep=many
"""


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.add_pools()
    return made


def test_a_class_that_is_no_pool_of_ours_is_a_problem_and_can_be_declared(machine):
    system = machine.connect()
    problems = system.pool_info("foreign")["problems"]
    assert "class io.StringIO is no qubes_storage.Pool: it can hold no VM here" in problems
    before = machine.tree()
    assert system.pool_diff("foreign", **{"class": "io.StringIO"}) == {}
    assert machine.tree() == before
    changes = system.set_pool("foreign", min_free="1GiB")
    assert changes == {"min_free": {"old": None, "new": "1GiB"}}
    assert system.set_pool("foreign", min_free="1GiB") == {}


def test_a_value_that_somebody_wrote_wrong_is_mended(machine):
    system = machine.connect()
    assert any("revisions_to_keep" in p for p in system.pool_info("ref")["problems"])
    assert system.set_pool("ref", revisions_to_keep=3) == {
        "revisions_to_keep": {"old": "many", "new": "3"}
    }
    assert system.pool_diff("ref", revisions_to_keep=3) == {}


def test_a_driver_says_itself_what_it_does_not_take(machine):
    before = machine.tree()
    with pytest.raises(InvalidInput, match="^pool ref: revisions_to_keep -1 is below 0$"):
        machine.connect().set_pool("ref", revisions_to_keep=-1)
    assert machine.tree() == before


def test_directories_of_another_group_are_a_problem(machine, monkeypatch):
    there = machine.path("/var/lib/qubes/appvms").stat().st_gid
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", there + 1, [])))
    problems = machine.connect().pool_info("default")["problems"]
    assert "/var/lib/qubes/appvms is not of group qubes: chgrp it" in problems
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", there, [])))
    assert not [p for p in machine.connect().pool_info("default")["problems"] if "chgrp" in p]
