"""An image's life through Salt's loader: clone, import, move, rename, grow, check, make anew."""

import os

import pytest
import salt.payload
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.functional.conftest import snapshot

GIB = 1024**3
APPVMS = "var/lib/qubes/appvms"


@pytest.fixture
def pools(states):
    """The default pool, a second one, a template, and the VM ``work`` in the default pool."""
    states.qubes_pool.present("default")
    states.qubes_pool.present("ssd", dir_path="/opt/qubes-vm")
    states.qubes_vm.present("fedora-23", klass="TemplateVM")
    states.qubes_vm.present("work", label="green", volumes={"private": "3GiB"})


def present(states, name, testmode, **declared):
    """Declare a VM in a mode; then the other mode says the same, and once done nothing is left."""
    told = states.qubes_vm.present(name, test=True, **declared)
    ret = states.qubes_vm.present(name, test=testmode, **declared)
    assert ret.result is (None if testmode else True), ret.comment
    assert ret.changes == told.changes
    if not testmode:
        again = states.qubes_vm.present(name, **declared)
        assert (again.result, again.changes) == (True, {})
    return ret


def test_clone_from_says_the_same_in_test_mode(states, modules, root, pools, testmode):
    before = snapshot(root)
    ret = present(states, "play", testmode, clone_from="work", pool="ssd")
    assert {key: entry["new"] for key, entry in ret.changes.items()} == {
        "created": "play",
        "klass": "AppVM",
        "template": "fedora-23",
        "label": "green",
        "pool": "ssd",
        "clone_from": "work",
    }
    assert (snapshot(root) == before) is testmode
    if not testmode:
        assert modules.qubes_vm.info("play")["volumes"]["private"]["size"] == 3 * GIB
        assert modules.qubes_vm.verify("play") == []


def test_a_clone_waits_for_its_source_in_test_mode(states, pools, testmode):
    ret = states.qubes_vm.present("play", clone_from="later", test=testmode)
    assert ret.result is (None if testmode else False)
    assert "later" in ret.comment


def test_migrate_moves_a_vm_and_says_the_same_in_test_mode(states, modules, root, pools, testmode):
    refused = states.qubes_vm.present("work", pool="ssd", test=testmode)
    assert (refused.result, refused.changes) == (False, {})
    assert "migrate: true" in refused.comment
    before = snapshot(root)
    ret = present(states, "work", testmode, pool="ssd", migrate=True)
    assert ret.changes == {"pool": {"old": "default", "new": "ssd"}}
    assert (snapshot(root) == before) is testmode
    assert (root / APPVMS / "work").exists() is testmode
    assert modules.qubes_vm.info("work")["pool"] == ("default" if testmode else "ssd")


def test_a_vm_moves_and_grows_and_changes_in_one_statement(states, modules, pools, testmode):
    declared = {"pool": "ssd", "migrate": True, "label": "blue", "volumes": {"private": "4GiB"}}
    ret = present(states, "work", testmode, **declared)
    assert set(ret.changes) == {"pool", "label", "volumes"}
    if not testmode:
        info = modules.qubes_vm.info("work")
        assert (info["pool"], info["label"]) == ("ssd", "blue")
        assert info["volumes"]["private"]["size"] == 4 * GIB


def test_what_cannot_move_is_refused_in_both_modes(states, root, pools, testmode):
    (root / "opt/qubes-vm/appvms/work").mkdir()
    before = snapshot(root)
    ret = states.qubes_vm.present("work", pool="ssd", migrate=True, test=testmode)
    assert (ret.result, ret.changes) == (False, {})
    assert "left alone" in ret.comment
    assert snapshot(root) == before


@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from"])
def test_a_root_image_is_brought_in(states, modules, root, tmp_path, pools, testmode, word):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\0" * 4096)
    before = snapshot(root)
    told = states.qubes_vm.present("new", klass="HVM", test=True, **{word: str(disk)})
    ret = states.qubes_vm.present("new", klass="HVM", test=testmode, **{word: str(disk)})
    assert ret.changes == told.changes
    assert ret.changes[word] == {"old": None, "new": str(disk)}
    assert (snapshot(root) == before) is testmode
    assert disk.exists() is (testmode or word == "root_copy_from")
    if not testmode:
        assert states.qubes_vm.present("new", klass="HVM", **{word: str(disk)}).changes == {}
        assert modules.qubes_vm.info("new")["volumes"]["root"]["size"] == 4096


def test_each_function_does_its_work_and_tells_what_it_changed(modules, root, pools):
    vm = modules.qubes_vm
    assert vm.clone("work", "play", pool="ssd")["created"] == {"old": None, "new": "play"}
    assert vm.rename("play", "game") == {"name": {"old": "play", "new": "game"}}
    assert vm.migrate("game", "default") == {"pool": {"old": "ssd", "new": "default"}}
    assert vm.migrate("game", "default") == {}
    sizes = {"old": {"private": 3 * GIB}, "new": {"private": 5 * GIB}}
    assert vm.resize("game", "private", "5GiB") == {"volumes": sizes}
    assert vm.resize("game", "private", "5GiB") == {}
    assert vm.reset("game")["volatile"]["old"] is None  # a clone has none till it starts
    assert vm.verify("game") == []
    assert vm.commit("fedora-23")["root-cow"]["new"] == 10 * GIB
    assert (root / "var/lib/qubes/vm-templates/fedora-23/root-cow.img.old").exists()
    assert modules.qubes_pool.orphans() == []
    assert sorted(os.listdir(root / APPVMS)) == ["game", "work"]
    vm.migrate("game", "ssd", keep=True)
    assert [row["path"] for row in modules.qubes_pool.orphans()] == [f"/{APPVMS}/game"]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda vm: vm.resize("work", "private", "1GiB"), CommandExecutionError, "3.0 GiB"),
        (lambda vm: vm.resize("work", "root", "20GiB"), SaltInvocationError, "fedora-23"),
        (lambda vm: vm.resize("work", "volatile", "20GiB"), SaltInvocationError, "volatile"),
        (lambda vm: vm.rename("work", "1bad"), SaltInvocationError, "not a name"),
        (lambda vm: vm.rename("work", "fedora-23"), CommandExecutionError, "already"),
        (lambda vm: vm.clone("nope", "x"), CommandExecutionError, "VM x: nope"),
        (lambda vm: vm.migrate("work", "nope"), CommandExecutionError, "pool nope: unknown"),
        (lambda vm: vm.commit("work"), SaltInvocationError, "only a template"),
        (lambda vm: vm.verify("nope"), CommandExecutionError, "not in qubes.xml"),
    ],
)
def test_what_cannot_be_is_an_error_and_changes_nothing(modules, root, pools, call, error, match):
    before = snapshot(root)
    with pytest.raises(error, match=match):
        call(modules.qubes_vm)
    assert snapshot(root) == before


def test_a_file_name_that_is_no_utf_8_is_told_escaped(states, modules, root, pools):
    here = os.fsencode(root / APPVMS)
    os.makedirs(here + b"/\xff\xfe/x")
    with open(here + b"/work/bad\xff.img", "w"):
        pass
    shown = f"/{APPVMS}/work/bad\\xff.img"
    kept = states.qubes_vm.absent("work")
    gone = states.qubes_vm.absent("work", purge=True, test=True)
    orphans, problems = modules.qubes_pool.orphans(), modules.qubes_vm.verify("work")
    assert shown in kept.comment
    assert shown in gone.changes["deleted"]["old"]
    assert [orphan["path"] for orphan in orphans] == [f"/{APPVMS}/\\xff\\xfe"]
    assert problems == [f"{shown}: has no business here; move it away"]
    salt.payload.dumps([kept.raw, gone.raw, orphans, problems])
    assert states.qubes_vm.absent("work", purge=True).result is True
    assert not os.path.exists(here + b"/work")
