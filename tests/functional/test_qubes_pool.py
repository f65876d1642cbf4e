"""States and functions of qubes_pool, through Salt's loader, on real files."""

import shutil

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.functional.conftest import snapshot


@pytest.fixture
def dir_path(root):
    """A directory for a pool, as the machine sees it; its parent is there."""
    return "/opt/qubes-vm"


def test_present_says_the_same_in_test_mode(states, modules, root, dir_path, testmode):
    ret = states.qubes_pool.present("ssd", dir_path=dir_path, test=testmode)
    assert ret.result is (None if testmode else True)
    assert set(ret.changes) == {"created", "dir_path", "driver"}
    assert ret.changes["dir_path"] == {"old": None, "new": dir_path}
    assert (root / "opt/qubes-vm/appvms").exists() is not testmode
    assert (modules.qubes_pool.info("ssd") is None) is testmode


def test_present_twice_changes_nothing(states, root, dir_path):
    states.qubes_pool.present("ssd", dir_path=dir_path, min_free="1MiB")
    before = snapshot(root)
    ret = states.qubes_pool.present("ssd", dir_path=dir_path, min_free="1024K")
    assert ret.result is True
    assert ret.changes == {}
    assert snapshot(root) == before


def test_test_mode_writes_nothing_at_all(states, root, dir_path):
    before = snapshot(root)
    states.qubes_pool.present("ssd", dir_path=dir_path, require_mount=None, test=True)
    states.qubes_pool.absent("ssd", test=True)
    assert snapshot(root) == before


def test_options_may_be_keywords_a_map_or_a_list_of_maps(states, modules, dir_path):
    wanted = {"driver": "xen", "dir_path": dir_path}
    assert states.qubes_pool.present("ssd", **wanted).changes
    assert states.qubes_pool.present("ssd", options=wanted).changes == {}
    assert (
        states.qubes_pool.present("ssd", options=[{k: v} for k, v in wanted.items()]).changes == {}
    )
    ret = states.qubes_pool.present("ssd", driver="xen", options=wanted)
    assert ret.result is False
    assert "driver is given twice" in ret.comment
    assert modules.qubes_pool.list()["ssd"] == wanted


def test_what_is_not_declared_is_kept(states, modules, dir_path):
    states.qubes_pool.present("ssd", dir_path=dir_path, min_free="1MiB")
    assert states.qubes_pool.present("ssd").changes == {}
    info = modules.qubes_pool.info("ssd")
    assert (info["dir_path"], info["min_free"]) == (dir_path, "1MiB")


def test_none_in_options_removes_a_guard(states, modules, dir_path, testmode):
    states.qubes_pool.present("ssd", dir_path=dir_path, min_free="1MiB")
    ret = states.qubes_pool.present("ssd", options={"min_free": None}, test=testmode)
    assert ret.changes == {"min_free": {"old": "1MiB", "new": None}}
    assert ("min_free" in modules.qubes_pool.info("ssd")) is testmode


def test_missing_directories_come_back(states, root, dir_path, testmode):
    states.qubes_pool.present("ssd", dir_path=dir_path)
    (root / "opt/qubes-vm/servicevms").rmdir()
    ret = states.qubes_pool.present("ssd", test=testmode)
    assert ret.changes == {"directories": {"old": [], "new": ["/opt/qubes-vm/servicevms"]}}
    assert (root / "opt/qubes-vm/servicevms").exists() is not testmode


def test_a_place_cannot_change_under_vms(states, testmode):
    states.qubes_pool.present("ssd", dir_path="/opt/a")
    states.qubes_vm.present("t", klass="TemplateVM", pool="ssd")
    ret = states.qubes_pool.present("ssd", dir_path="/opt/b", test=testmode)
    assert ret.result is False
    assert ret.changes == {}
    assert "(t)" in ret.comment
    assert "migrate or remove" in ret.comment


def test_a_parent_is_never_made_in_silence(states, root, testmode):
    before = snapshot(root)
    ret = states.qubes_pool.present("ssd", dir_path="/srv/pools/ssd", test=testmode)
    assert ret.result is False
    assert "/srv/pools" in ret.comment
    assert snapshot(root) == before


def test_the_comment_names_what_r32_cannot_load(states, dir_path, testmode):
    ret = states.qubes_pool.present("default", dir_path=dir_path, test=testmode)
    assert "R3.2's own tools fail on [default] with options (dir_path)" in ret.comment


def test_absent_says_the_same_in_test_mode(states, modules, root, dir_path, testmode):
    states.qubes_pool.present("ssd", dir_path=dir_path, min_free="1MiB")
    ret = states.qubes_pool.absent("ssd", purge=True, test=testmode)
    assert ret.result is (None if testmode else True)
    assert set(ret.changes) == {"removed", "min_free", "directories"}
    assert (root / "opt/qubes-vm").exists() is testmode
    assert ("ssd" in modules.qubes_pool.list()) is testmode
    ret = states.qubes_pool.absent("ssd", purge=True, test=testmode)
    assert bool(ret.changes) is testmode


def test_absent_without_purge_keeps_the_directories(states, root, dir_path):
    states.qubes_pool.present("ssd", dir_path=dir_path)
    states.qubes_pool.absent("ssd")
    assert (root / "opt/qubes-vm/appvms").is_dir()


def test_absent_refuses_while_vms_use_the_pool_and_names_them(states, dir_path, testmode):
    states.qubes_pool.present("ssd", dir_path=dir_path)
    states.qubes_vm.present("t", klass="TemplateVM", pool="ssd")
    ret = states.qubes_pool.absent("ssd", test=testmode)
    assert ret.result is False
    assert ret.changes == {}
    assert "VMs lie in it (t)" in ret.comment


def test_functions_tell_wrong_asking_from_what_cannot_be_done(modules):
    with pytest.raises(SaltInvocationError, match="pool '': the name is empty"):
        modules.qubes_pool.add("", dir_path="/opt/x")
    with pytest.raises(CommandExecutionError, match="unknown driver 'zfs'; there are"):
        modules.qubes_pool.add("ssd", driver="zfs", dir_path="/opt/x")
    with pytest.raises(CommandExecutionError, match="add it with qubes_pool.add"):
        modules.qubes_pool.set("ssd", dir_path="/opt/x")


def test_info_of_a_pool_that_is_not_there_is_none(modules):
    assert modules.qubes_pool.info("nope") is None
    xen = modules.qubes_pool.drivers()["xen"]
    assert xen["options"] == {"dir_path": {"type": "str"}}
    assert xen["from"].endswith("drivers/xen.py")


def test_orphans_are_listed_with_what_they_hold(modules, root):
    modules.qubes_pool.add("ssd", dir_path="/opt/qubes-vm")
    left = root / "opt/qubes-vm/appvms/left"
    left.mkdir()
    (left / "private.img").write_bytes(b"x" * 4096)
    rows = modules.qubes_pool.orphans()
    assert [(row["pool"], row["path"]) for row in rows] == [("ssd", "/opt/qubes-vm/appvms/left")]
    assert rows[0]["size"] >= 4096


def test_qvm_pool_is_an_alias_of_functions_and_states(loaders, dir_path):
    assert loaders.modules["qvm-pool.list"]() == {}
    ret = loaders.states["qvm-pool.present"]("ssd", dir_path=dir_path)
    assert ret.result is True
    assert "ssd" in loaders.modules["qvm-pool.list"]()


def test_a_directory_that_the_lock_makes_is_told_in_both_modes(states, root, testmode):
    states.qubes_pool.present("default")
    shutil.rmtree(root / "var/lib/qubes")
    ret = states.qubes_pool.present("default", test=testmode)
    top = "/var/lib/qubes"
    new = [top, *(f"{top}/{name}" for name in ("appvms", "servicevms", "vm-templates"))]
    assert {*ret.changes["directories"]["new"]} == {*new}
