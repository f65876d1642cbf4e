"""The docstring is the manual: sys.doc shows each function with a line to paste."""

import ast
import inspect

import pytest

from tests.conftest import TREE


def exported(module):
    """The functions of an execution module, by the names that users type."""
    tree = ast.parse((TREE / "_modules" / f"{module}.py").read_text(encoding="utf-8"))
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    return [f"{module}.{name.rstrip('_')}" for name in names if not name.startswith("_")]


FUNCTIONS = [*exported("qubes_pool"), *exported("qubes_vm")]


def test_every_verb_of_the_interface_is_there():
    pool = {"list", "info", "drivers", "diff", "add", "set", "remove", "orphans"}
    assert {f"qubes_pool.{verb}" for verb in pool} <= set(FUNCTIONS)
    vm = {"list", "info", "diff", "create", "set", "remove"}
    vm |= {"clone", "rename", "resize", "migrate", "verify", "commit", "reset"}
    assert {f"qubes_vm.{verb}" for verb in vm} <= set(FUNCTIONS)


@pytest.fixture(scope="module")
def docs(session_loaders):
    """What ``qubesctl sys.doc`` shows."""
    return session_loaders.modules.sys.doc("qubes_pool", "qubes_vm")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_help_shows_its_own_line_and_every_argument(loaders, docs, function):
    doc = docs[function]
    assert "CLI Example:" in doc
    assert f"qubesctl {function}" in doc
    told = {
        word.rstrip(",") for line in doc.splitlines() for word in line.split(" : ")[0].split(", ")
    }
    told = {word.strip() for word in told}
    for argument in inspect.signature(loaders.modules[function]).parameters:
        assert argument in told, f"{argument} is not told of"
