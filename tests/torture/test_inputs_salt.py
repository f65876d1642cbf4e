"""
What is asked for wrongly: each argument of each function and state, in each wrong kind of value.

Nothing but a clear error may come of it, for states ``result: False`` with a comment, and nothing
may be written.
"""

import datetime
import importlib.util
import inspect
import os

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.conftest import TREE

# Those before the first None are tried by CI; the others are more of their kinds.
WRONG = [
    0, 1.5, True, b"x", [1], {"a": 1}, {"private": []}, "", "a\0b", "a\nb", "../x", "é", "\ud800",
    None,
    -1, 1, 17, float("nan"), float("inf"), False, [], ["a"], [{}], {}, {1: 2}, {"a": None},
    {"size": {}}, {"private": {"size": None}}, (), set(), object(), datetime.date(2026, 11, 24),
    " ", "\0", "a\r", " a", "..", ".", "/", "a/b", "/etc", "[a]", "a ; b", "\udcff", "x" * 300,
    "%s", "{}", "none", "True", "12", "-f", "*", "10 Gib", "1e9", "9" * 30, "dom0", "lost+found",
]  # fmt: skip
_FLAG = [0, 1, True, False, "True"]
# What is right there after all, be it unwise.
RIGHT = {
    "min_free": [1, 17, "12"],
    "options": [[], {}, (), set(), 0, False, "", [{}], {"a": None}],
    "volumes": [{}],
    **dict.fromkeys(("purge", "keep", "migrate", "create_only", "absent"), _FLAG),
    "dir_path": ["/etc"],
    "pool name": ["..", ".", "/", "a/b", "../x", "/etc", "a ; b", "x" * 300, "%s", "{}", "-f", "*",
                  "10 Gib", "1e9", "lost+found", "dom0"],
}  # fmt: skip
NEW = {"name": "new", "driver": "xen", "dir_path": "/mnt/new"}
VM = {"name": "newvm", "template": "fedora-23", "pool": "ssd"}
CALLS = {
    "qubes_pool.info": [{"name": "ssd"}],
    "qubes_pool.diff": [NEW, {"name": "ssd"}, {"name": "spare", "absent": True}],
    "qubes_pool.add": [NEW],
    "qubes_pool.set": [{"name": "ssd"}],
    "qubes_pool.remove": [{"name": "spare"}],
    "qubes_pool.notes": [NEW],
    "qubes_pool.default_pools_diff": [{}],
    "qubes_pool.set_default_pools": [{}],
    "qubes_vm.info": [{"name": "work"}],
    "qubes_vm.diff": [VM, {"name": "work"}, {"name": "work", "absent": True}],
    "qubes_vm.create": [VM, {"name": "newvm", "klass": "StandaloneVM"}],
    "qubes_vm.set": [{"name": "work"}, {"name": "alone"}],
    "qubes_vm.clone": [{"name": "work", "new_name": "newvm"}],
    "qubes_vm.rename": [{"name": "work", "new_name": "newvm"}],
    "qubes_vm.resize": [{"name": "work", "volume": "private", "size": "3GiB"}],
    "qubes_vm.migrate": [{"name": "work", "pool": "spare"}],
    "qubes_vm.verify": [{"name": "work"}],
    "qubes_vm.commit": [{"name": "fedora-23"}],
    "qubes_vm.reset": [{"name": "work"}],
    "qubes_vm.remove": [{"name": "work"}],
    "qubes_vm.revisions": [{"name": "work"}],
    "qubes_vm.revert": [{"name": "work"}],
    "qubes_vm.disks": [{"name": "work"}],
}
STATES = {
    "qubes_pool.present": [NEW, {"name": "ssd"}],
    "qubes_pool.absent": [{"name": "spare"}],
    "qubes_pool.default": [{"name": "default pools"}],
    "qubes_vm.present": [VM, {"name": "work"}],
    "qubes_vm.absent": [{"name": "work"}],
}
READING = ("info", "notes", "verify", "disks")


@pytest.fixture
def root(scratch):
    """A machine with pools and VMs, so that there is something to break."""
    made = scratch()
    system = made.connect()
    for name in ("ssd", "spare"):
        system.add_pool(name, dir_path=f"/mnt/{name}")
    system.create_vm("work", pool="ssd")
    system.create_vm("alone", klass="StandaloneVM", pool="ssd")
    return made.root


def watched(place):
    """Everything below a directory that a write would change."""
    found = []
    for entry in os.scandir(place):
        there = entry.stat(follow_symlinks=False)
        found.append((entry.path, there.st_mode, there.st_size, there.st_mtime_ns, there.st_ino))
        if entry.is_dir(follow_symlinks=False):
            found += watched(entry.path)
    return sorted(found)


def signature_of(state):
    """What a state takes; the loader has it behind a call of Salt's."""
    module, name = state.split(".")
    spec = importlib.util.spec_from_file_location("state", TREE / "_states" / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return inspect.signature(getattr(loaded, name))


def wrong(function, kwargs, signature, everything):
    """``(word, value)`` of each argument in each wrong kind of value."""
    values = [value for value in WRONG if value is not None]
    values = values if everything else WRONG[: WRONG.index(None)]
    words = [word for word in signature.parameters if word != "config"]
    if "config" in signature.parameters:
        words += ["dir_path", "class", "nope"]
    if kwargs.get("absent"):
        words = ["name", "absent", "purge"]
    elif function.endswith(".diff"):
        words.remove("purge")  # which is for absent
    for word in words:
        is_pool = function.startswith("qubes_pool") and word == "name"
        right = RIGHT.get("pool name" if is_pool else word, ())
        for value in values:
            if not any(type(value) is type(good) and value == good for good in right):
                yield word, value


def test_every_function_is_walked(modules):
    there = {name for name in modules if name.startswith(("qubes_pool.", "qubes_vm."))}
    bare = {"qubes_pool.list", "qubes_pool.drivers", "qubes_pool.orphans", "qubes_vm.list"}
    never_refuses = {"qubes_vm.removal_order", "qubes_vm.report", "qubes_pool.default_pools"}
    assert there == {*CALLS, *bare, *never_refuses}


@pytest.mark.parametrize("function", CALLS)
def test_a_function_given_what_is_wrong_says_so_and_writes_nothing(
    function, root, modules, everything, figures
):
    before, refused = watched(root), 0
    signature = inspect.signature(modules[function])
    for kwargs in CALLS[function]:
        given = list(wrong(function, kwargs, signature, everything))
        for word, value in given if everything else given[::2]:
            case = f"{function}({word}={value!r:.80})"
            figures["wrong arguments given to functions and states"] += 1
            try:
                found = modules[function](**{**kwargs, word: value})
            except (CommandExecutionError, SaltInvocationError) as err:
                assert len(str(err)) > 10, case
                refused += 1
            else:
                assert not found or function.endswith(READING), (case, found)
            assert watched(root) == before, case
    assert refused > 2


@pytest.mark.parametrize("function", STATES)
def test_a_state_given_what_is_wrong_fails_and_writes_nothing(
    function, root, salted, testmode, everything, figures
):
    salted.on(root)
    before, failed = watched(root), 0
    signature = signature_of(function)
    for kwargs in STATES[function]:
        given = list(wrong(function, kwargs, signature, everything))
        for word, value in given if everything else given[::2]:
            if word == "name" and not isinstance(value, str):
                continue  # Salt itself takes no such name for a state
            case = f"{function}({word}={value!r:.80})"
            figures["wrong arguments given to functions and states"] += 1
            ret = salted.call(function, **{**kwargs, word: value}, test=testmode)
            assert ret["comment"] and not ret["changes"], (case, ret)
            failed += ret["result"] is False
            assert watched(root) == before, case
    assert failed or function == "qubes_pool.default"


@pytest.mark.parametrize("value", ["no", "false", "off", 0, None, False])
def test_what_says_no_purges_nothing(value, root, modules):
    before = watched(root)
    with pytest.raises(CommandExecutionError, match="purge"):
        modules.qubes_vm.remove("work", purge=value)
    assert watched(root) == before
