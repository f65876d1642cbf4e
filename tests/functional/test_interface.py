"""The interface that others build on: what comes in which place; a new keyword comes last."""

import importlib.util
import inspect

import pytest
import qubes_storage

from tests.conftest import TREE

POOL = "name driver options require_mount min_free"
VM = "name klass template label pool volumes clone_from root_copy_from migrate"
STATES = {
    "qubes_pool.present": POOL,
    "qubes_pool.absent": "name purge",
    "qubes_vm.present": VM,
    "qubes_vm.absent": "name purge",
}
FUNCTIONS = {
    **dict.fromkeys(("qubes_pool.add", "qubes_pool.set", "qubes_pool.diff"), POOL),
    **dict.fromkeys(("qubes_pool.list", "qubes_pool.drivers", "qubes_pool.orphans"), ""),
    "qubes_pool.info": "name",
    "qubes_pool.remove": "name",
    **dict.fromkeys(("qubes_vm.create", "qubes_vm.set", "qubes_vm.diff"), VM),
    **dict.fromkeys(("qubes_vm.list", "qubes_vm.report"), ""),
    **dict.fromkeys(
        (f"qubes_vm.{v}" for v in ("info", "verify", "commit", "reset", "disks", "remove")), "name"
    ),
    "qubes_vm.clone": "name new_name pool",
    "qubes_vm.rename": "name new_name",
    "qubes_vm.resize": "name volume size",
    "qubes_vm.migrate": "name pool",
}


def check_begins(function, words):
    """See that a function's arguments begin with these, and that the others can be left out."""
    taken = inspect.signature(function).parameters.values()
    first, others = list(taken)[: len(words.split())], list(taken)[len(words.split()) :]
    assert " ".join(each.name for each in first) == words
    assert all(each.default is not each.empty or each.kind == each.VAR_KEYWORD for each in others)


@pytest.mark.parametrize("name", STATES)
def test_a_state_takes_its_arguments_in_this_order(name):
    module, function = name.split(".")
    path = TREE / "_states" / f"{module}.py"  # the loader has states behind a call of Salt's
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    check_begins(getattr(loaded, function), STATES[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_its_arguments_in_this_order(name, modules):
    check_begins(modules[name], FUNCTIONS[name])


def test_the_core_takes_its_arguments_in_this_order():
    check_begins(qubes_storage.connect, "root backend socket")
    check_begins(qubes_storage.loads, "text")


def test_a_function_and_the_core_read_what_is_given_by_place_alike(modules, root):
    modules.qubes_pool.add("default")
    declared = ("StandaloneVM", None, "blue", "default", {"private": "3GiB"}, None, None, False)
    changes = modules.qubes_vm.create("work", *declared)
    assert (changes["label"]["new"], changes["klass"]["new"]) == ("blue", "StandaloneVM")
    assert qubes_storage.connect(root).plan("work", *declared) == ({}, None)
