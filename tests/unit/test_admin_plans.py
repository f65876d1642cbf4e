"""What may be declared over the Admin API, beside what the daemon has already."""

import shutil
from pathlib import Path

import pytest
from qubes_storage import InvalidInput, StoragePoolException

from tests.r4.machine import forget, machine, writes
from tests.r4.model import DRIVERS, REQUIRED

GIB = 1024**3


def test_two_pools_over_one_thin_pool_are_refused(there):
    daemon, system = there
    place = {"volume_group": "qubes_dom0", "thin_pool": "vm-pool"}
    system.add_pool("thin", "lvm_thin", **place)
    forget(daemon, system)
    with pytest.raises(StoragePoolException, match="qubes_dom0/vm-pool is that of pool thin too"):
        system.add_pool("more", "lvm_thin", **place)
    assert not writes(daemon)


def test_a_pool_around_another_ones_directory_is_refused(there):
    daemon, system = there
    (Path(system.root) / "mnt/outer/appvms").mkdir(parents=True)
    system.add_pool("inner", "file", dir_path="/mnt/outer/appvms/inner")
    forget(daemon, system)
    with pytest.raises(
        StoragePoolException, match="/mnt/outer has in its VM directories the directory of pool in"
    ):
        system.add_pool("outer", "file", dir_path="/mnt/outer")
    assert not writes(daemon)


def test_pools_of_a_driver_that_has_no_place_are_not_in_each_others_way(there, monkeypatch):
    """As a package may bring one to the daemon."""
    _, system = there
    monkeypatch.setitem(DRIVERS, "remote", ("revisions_to_keep",))
    monkeypatch.setitem(REQUIRED, "remote", ())
    for name in ("first", "second"):
        assert set(system.add_pool(name, "remote")) == {"created", "driver"}
        assert system.pool_info(name)["problems"] == []


def test_a_value_that_is_none_in_the_daemon_is_shown_and_can_be_mended(there):
    daemon, system = there
    daemon.pools["ssd"].options["revisions_to_keep"] = "abc"
    problems = system.pool_info("ssd")["problems"]
    assert ["revisions_to_keep" in problem for problem in problems] == [True]
    changes = {"revisions_to_keep": {"old": "abc", "new": "2"}}
    assert system.pool_diff("ssd", revisions_to_keep=2) == changes
    assert system.set_pool("ssd", revisions_to_keep=2) == changes
    assert system.pool_info("ssd")["problems"] == []


def test_purge_removes_only_what_is_empty(there):
    _, system = there
    place = Path(system.root) / "mnt/btrfs/qubes"
    kept = place / "vm-templates/of-somebody"
    kept.mkdir()
    changes = system.remove_pool("btrfs", purge=True)
    assert changes["directories"] == {"old": ["/mnt/btrfs/qubes/appvms"], "new": []}
    assert kept.is_dir()
    assert not (place / "appvms").exists()


def test_purge_leaves_a_directory_with_a_file_of_someone_else(there):
    _, system = there
    place = Path(system.root) / "mnt/btrfs/qubes"
    (place / "README").write_text("mine")
    paths = [f"/mnt/btrfs/qubes/{end}" for end in ("appvms", "vm-templates")]
    assert system.remove_pool("btrfs", purge=True)["directories"]["old"] == paths
    assert [path.name for path in place.iterdir()] == ["README"]


def test_purge_of_a_pool_whose_disk_is_away_removes_the_pool_alone(there):
    daemon, system = there
    shutil.rmtree(Path(system.root) / "mnt/btrfs/qubes")
    assert set(system.remove_pool("btrfs", purge=True)) == {"removed"}
    assert "btrfs" not in daemon.pools


def test_a_pool_whose_disk_has_to_be_mounted_is_not_purged_without(there):
    daemon, system = there
    system.save_guards("btrfs", {"require_mount": "/mnt/btrfs"})
    with pytest.raises(StoragePoolException, match="pool btrfs: /mnt/btrfs is not mounted"):
        system.remove_pool("btrfs", purge=True)
    assert set(system.remove_pool("btrfs")) == {"removed", "require_mount"}
    assert "btrfs" not in daemon.pools


def test_guards_that_a_pool_of_that_name_left_are_not_written_again(there):
    _, system = there
    conf = Path(system.root) / "etc/qubes/storage-guards.conf"
    conf.parent.mkdir(parents=True, exist_ok=True)
    conf.write_text("[new]\nmin_free = 1GiB\n")
    before = conf.stat()
    system.add_pool("new", "file", dir_path="/mnt/new", min_free="1GiB")
    assert system.pool_info("new")["min_free"] == "1GiB"
    assert (conf.stat().st_ino, conf.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_default_pool_that_is_not_declared_is_kept(there):
    _, system = there
    assert system.default_pools_diff(default_pool=None, default_pool_root=None) == {}


@pytest.mark.parametrize(
    ("name", "declared", "why"),
    [
        ("new", {"clone_from": "work", "klass": "StandaloneVM"}, "of class AppVM, not Standalone"),
        ("new", {"klass": "DispVM"}, "a DispVM needs template, a disposable template"),
        ("work", {"volumes": {"root": "20GiB"}}, "root volume is a snapshot of its template's"),
        ("new", {"volumes": {"kernel": {"size": 1}}}, "no option 'size'; it takes pool$"),
    ],
)
def test_what_cannot_be_declared_of_a_vm_is_refused(there, name, declared, why):
    daemon, system = there
    for verb in (system.vm_diff, system.create_vm if name == "new" else system.set_vm):
        with pytest.raises(InvalidInput, match=why):
            verb(name, **declared)
    assert not writes(daemon)


def test_an_appvm_without_any_template_waits_for_one(there):
    daemon, system = there
    del daemon.globals.set["default_template"]
    with pytest.raises(StoragePoolException, match="the system has no default one") as err:
        system.create_vm("new")
    assert err.value.waits_for == [("VM", None)]
    assert "new" not in daemon.vms


def test_a_disposable_that_keeps_nothing_goes_without_purge(there):
    daemon, system = there
    daemon.vms["work"].set["template_for_dispvms"] = "True"
    daemon.add_vm("disp", "DispVM", template="work")
    assert system.remove_vm("disp") == {"removed": {"old": "disp", "new": None}}
    assert "disp" not in daemon.vms


def test_a_volume_that_a_vm_has_not_is_named_with_those_that_it_has(there):
    _, system = there
    with pytest.raises(InvalidInput, match="it has volumes root, private, volatile"):
        system.revisions("work", "modules")


def test_nothing_of_a_remotevm_can_be_declared(tmp_path):
    with machine("4.3", tmp_path) as (daemon, system):
        daemon.create("RemoteVM", "", "name=far label=red", False)
        with pytest.raises(InvalidInput, match="a RemoteVM has no volumes; declare other VMs"):
            system.vm_diff("far", label="green")
