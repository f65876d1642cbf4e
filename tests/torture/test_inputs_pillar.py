"""
A pillar of a wrong shape: each part of it replaced by each wrong kind of value.

The SLS renders all the same, and what is wrong is a state that fails and says so. What is right
beside it is as declared already, so nothing at all may be written.
"""

# ruff: noqa: F811, for the machine of another test is asked for here
import copy
import shutil

import pytest

from tests.conftest import TREE
from tests.torture.test_inputs_salt import root, watched  # noqa: F401

WRONG = [
    "text", [1], {"a": 1}, {1: {2: 3}}, 1, True, "", [{"a": "b"}], {"a": {"b": "c"}}, {"../x": {}},
]  # fmt: skip
MORE = [
    0, -1, 1.5, False, "a\nb", "é", "a: b", "{{ x }}", "{% x %}", "'", '"', "\0", "x" * 5000, [],
    {}, [[]], [None], {None: None}, {True: {}}, {"": {}}, {"a b": None}, {"name": "x"},
    {"require": 1},
    {"absent": "no"}, {"absent": 1, "purge": "no"}, {"ssd": {"absent": {}}}, {"[a]": {}},
    {"é": []}, {"work": {"absent": "off", "purge": "no"}},
    {"work": {"volumes": {"private": {"size": []}}}},
]  # fmt: skip
PILLAR = {
    "pools": {
        "ssd": {"driver": "xen", "dir_path": "/mnt/ssd"},
        "gone": {"absent": True, "purge": False},
    },
    "vms": {
        "work": {
            "klass": "AppVM",
            "template": "fedora-23",
            "label": "red",
            "pool": "ssd",
            "volumes": {"private": {"size": "2GiB"}},
            "migrate": False,
            "create_only": False,
        },
        "away": {"absent": True, "purge": False},
    },
    "default_pools": {},
}


def parts(value, path=()):
    """The path of each part of a pillar."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from parts(inner, (*path, key))


def replaced(path, value):
    """The pillar with something else in one place."""
    if not path:
        return value
    found = copy.deepcopy(PILLAR)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


@pytest.fixture
def apply(modules, minion_config):
    """``apply(pillar)``: what a run of qubes_storage.sls returns."""
    base = minion_config["file_roots"]["base"][0]
    shutil.copy(TREE / "qubes_storage.sls", base)
    return lambda pillar, test: modules.state.sls(
        "qubes_storage", pillar={"qubes_storage": pillar}, test=test
    )


def test_the_pillar_itself_is_as_declared(apply, root, testmode):
    before = watched(root)
    ret = apply(PILLAR, testmode)
    assert [state.result for state in ret] == [True] * 4
    assert watched(root) == before


@pytest.mark.parametrize("path", parts(PILLAR), ids="-".join)
def test_a_wrong_part_is_a_state_that_fails_and_nothing_is_written(
    path, apply, root, everything, figures
):
    before, failed = watched(root), 0
    for value in WRONG + MORE if everything else WRONG[:1]:
        if value == {} and path[:1] == ("vms",) and len(path) == 2:
            continue  # a VM as it comes
        if value == 0 and path[-1:] == ("absent",):
            continue  # it is not to be absent
        for test in (False, True) if everything else (False,):
            figures["pillars of a wrong shape"] += 1
            ret = apply(replaced(path, value), test)
            case = f"{'/'.join(path)}: {value!r:.200}"
            assert not ret.errors, (case, ret.errors)
            failed += any(state.result is False for state in ret)
            for state in ret:
                assert state.comment and "Traceback" not in state.comment, case
                assert "An exception" not in state.comment, case
            assert watched(root) == before, case
    assert failed or path == ("default_pools",)
