"""Pools that others wrote: of a class that is none of ours, with values or a group gone wrong."""

import grp
import sys
import types

import pytest
import qubes_storage
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException

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
    assert set(system.pool_notes("foreign")) <= set(problems)
    assert "can hold no VM here" in system.pool_notes("new", **{"class": "io.StringIO"})[-1]
    changes = system.set_pool("foreign", min_free="1GiB")
    assert changes == {"min_free": {"old": None, "new": "1GiB"}}
    assert system.set_pool("foreign", min_free="1GiB") == {}


@pytest.mark.parametrize("name", ["new", "foreign"])
def test_a_class_that_is_a_module_is_refused(machine, name):
    system = machine.connect()
    before = machine.tree()
    verb = system.set_pool if name == "foreign" else system.add_pool
    for declare in (system.pool_diff, verb):
        with pytest.raises(InvalidInput, match=f"pool {name}: class os.path is no class; write"):
            declare(name, **{"class": "os.path"})
    assert machine.tree() == before


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


LOOKING = {
    "list_pools": lambda system: system.list_pools(),
    "pool_info": lambda system: [system.pool_info(name) for name in system.list_pools()],
    "pool_diff": lambda system: system.pool_diff("more", dir_path="/mnt/more"),
    "pool_remove_diff": lambda system: system.pool_remove_diff("7", purge=True),
    "list_vms": lambda system: system.list_vms(),
    "vm_diff": lambda system: system.vm_diff("work"),
    "vm_remove_diff": lambda system: system.vm_remove_diff("fedora-23", purge=True),
    "verify_vm": lambda system: system.verify_vm("fedora-23"),
    "orphans": lambda system: system.orphans(),
    "report": lambda system: system.report(),
    "create_vm": lambda system: system.create_vm("work"),
    "exists": lambda system: [
        qubes_storage.pool_exists(name, system.root) for name in system.list_pools()
    ],
}


@pytest.mark.parametrize("verb", LOOKING)
def test_what_is_no_class_of_pools_is_never_called(scratch, tmp_path, verb):
    """Who may write storage.conf has no command run, no tree deleted and nothing ended by it."""
    precious = tmp_path / "precious/tree"
    precious.mkdir(parents=True)
    mark = tmp_path / "mark"
    calls = [
        (f"touch {mark}", "os.system"),
        (f"touch {mark}2", "subprocess.Popen\nshell = true"),
        (str(precious.parent), "shutil.rmtree"),
        ("7", "sys.exit"),
        ("8", "os.abort"),
        ("9", "builtins.range"),
    ]
    text = "".join(f"[{name}]\nclass = {klass}\n" for name, klass in calls)
    machine = scratch("[default]\ndriver=xen\n" + text)
    LOOKING[verb](machine.connect())
    for name, _ in calls:
        with pytest.raises(NotSupported, match="its class is no qubes_storage.Pool"):
            qubes_storage.get_pool(name, root=machine.root)
        machine.connect().set_pool(name, min_free="1GiB")
        assert machine.connect().remove_pool(name, purge=True)
    assert precious.is_dir()
    assert sorted(tmp_path.glob("mark*")) == []


def module(monkeypatch, text, name="theirs_of_tests"):
    """A module that is running, of which storage.conf can name classes."""
    made = types.ModuleType(name)
    exec(text, made.__dict__)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_only_r32_s_own_call_makes_a_class_for_a_vm_and_tells_what_it_refuses(scratch, monkeypatch):
    text = """
class Storage:
    def __init__(self, vm, **options):
        if "bad" in options:
            raise SystemExit("no")
        self.vm, self.options = vm, options
"""
    module(monkeypatch, text)
    conf = "[a]\nclass=theirs_of_tests.Storage\nx=1\n[b]\nclass=theirs_of_tests.Storage\nbad=1\n"
    machine = scratch("[default]\ndriver=xen\n" + conf)
    made = qubes_storage.get_pool("a", "a VM", machine.root)
    assert (made.vm, made.options) == ("a VM", {"x": "1"})
    with pytest.raises(StoragePoolException, match="pool b: class .* its options.*no; mend"):
        qubes_storage.get_pool("b", root=machine.root)
    with pytest.raises(NotSupported, match="pool a: its class is no qubes_storage.Pool"):
        machine.connect().get_pool("a")


def test_a_class_that_ends_the_program_is_a_problem_of_its_pool_alone(scratch, monkeypatch):
    text = """
import qubes_storage

class Pool(qubes_storage.Pool):
    def __init__(self, name, *, dir_path: str):
        raise SystemExit(3)
"""
    module(monkeypatch, text)
    conf = "[a]\nclass=venv.__main__.X\n[b]\nclass=theirs_of_tests.Pool\ndir_path=/mnt/b\n"
    machine = scratch("[default]\ndriver=xen\n" + conf)
    found = machine.connect().report()
    assert "class venv.__main__.X cannot be imported: SystemExit" in found["a"]["problems"][-1]
    assert "refuses its options: SystemExit: 3" in found["b"]["problems"][-1]
    assert found["default"]["problems"] == []
