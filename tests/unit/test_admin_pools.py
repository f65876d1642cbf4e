"""Pools over the Admin API, on each release."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from qubes_storage import InvalidInput, NotSupported, StoragePoolException

from tests.r4.machine import forget, machine, writes

GIB = 1024**3


def test_list_and_drivers_are_the_daemons(there):
    _, system = there
    found = system.list_drivers()
    assert list(found) == [
        "callback", "file", "file-reflink", "linux-kernel", "lvm_thin", "zfs"
    ]  # fmt: skip
    assert found["file-reflink"]["options"]["dir_path"] == {"type": "str"}
    assert found["file-reflink"]["options"]["revisions_to_keep"] == {"type": "int"}
    assert {driver["from"] for driver in found.values()} == {system.client.path}
    assert system.list_pools()["ssd"] == {
        "driver": "file-reflink",
        "dir_path": "/mnt/ssd/qubes",
        "revisions_to_keep": "1",
        "ephemeral_volatile": "False",
    }


def test_add_shows_the_same_in_diff_and_changes_nothing_the_second_time(there):
    daemon, system = there
    declared = {
        "driver": "lvm_thin",
        "options": [{"volume_group": "qubes_dom0"}, {"thin_pool": "vm-pool"}],
        "revisions_to_keep": 2,
        "min_free": "20GiB",
    }
    changes = system.pool_diff("foo", **declared)
    assert not writes(daemon)
    assert system.pool_info("foo") is None
    assert system.add_pool("foo", **declared) == changes
    assert set(changes) == {
        "created", "driver", "volume_group", "thin_pool", "revisions_to_keep", "min_free"
    }  # fmt: skip
    assert changes["min_free"] == {"old": None, "new": "20GiB"}
    assert writes(daemon) == ["admin.pool.Add"]
    forget(daemon, system)
    assert system.pool_diff("foo", **declared) == {}
    assert system.set_pool("foo", **declared) == {}
    assert not writes(daemon)
    with pytest.raises(StoragePoolException, match="is there already"):
        system.add_pool("foo", **declared)


def test_info_tells_data_and_metadata_and_who_lives_there(there):
    daemon, system = there
    system.add_pool("thin", "lvm_thin", volume_group="qubes_dom0", thin_pool="vm-pool")
    info = system.pool_info("thin")
    assert (info["size"], info["used"], info["free"]) == (100 * GIB, 40 * GIB, 60 * GIB)
    assert (info["metadata_size"], info["metadata_used"]) == (GIB, GIB // 10)
    assert info["problems"] == [] and info["vms"] == [] and info["provisioned"] == 0
    daemon.add_vm("inside", pool="thin")
    system.refresh()
    info = system.pool_info("thin")
    assert info["vms"] == ["inside"]
    assert info["provisioned"] == 12 * GIB
    assert system.pool_info("linux-kernel")["size"] is None


def test_metadata_over_90_percent_refuses_to_make_and_to_grow(there):
    daemon, system = there
    system.add_pool("thin", "lvm_thin", volume_group="qubes_dom0", thin_pool="vm-pool")
    system.create_vm("inside", pool="thin")
    daemon.thin_pools["qubes_dom0/vm-pool"]["metadata_usage"] = GIB * 91 // 100 + 1
    forget(daemon, system)
    for verb in (
        lambda: system.create_vm("more", pool="thin"),
        lambda: system.set_vm("inside", volumes={"private": "3GiB"}),
        lambda: system.resize_vm("inside", "private", "3GiB"),
        lambda: system.migrate_vm("vault", "thin"),
    ):
        with pytest.raises(StoragePoolException, match=r"metadata is 91 % full.*lvextend"):
            verb()
    assert not writes(daemon)
    assert "91 %" in system.pool_info("thin")["problems"][0]
    assert "91 %" in system.verify_vm("inside")[0]


def test_a_guard_that_somebody_wrote_wrong_is_a_problem_once(there):
    _, system = there
    system.set_pool("ssd", min_free="1GiB")
    path = Path(system.root) / "etc/qubes/storage-guards.conf"
    path.write_text(path.read_text().replace("min_free = 1GiB", "require_mount=mnt/ssd"))
    (problem,) = system.pool_info("ssd")["problems"]
    assert problem.startswith("pool ssd: /etc/qubes/storage-guards.conf: require_mount")


def test_what_can_be_set_is_set_and_the_rest_is_told_with_its_cure(there):
    daemon, system = there
    changes = system.pool_diff("ssd", revisions_to_keep=3, ephemeral_volatile=True)
    assert changes == {
        "revisions_to_keep": {"old": "1", "new": "3"},
        "ephemeral_volatile": {"old": "False", "new": "True"},
    }
    assert system.set_pool("ssd", revisions_to_keep=3, ephemeral_volatile="on") is not None
    assert daemon.pools["ssd"].options["revisions_to_keep"] == "3"
    assert daemon.pools["ssd"].options["ephemeral_volatile"] == "True"
    assert system.pool_diff("ssd", ephemeral_volatile="yes", setup_check=False) == {}
    forget(daemon, system)
    for config in ({"dir_path": "/mnt/ssd/other"}, {"driver": "file"}):
        with pytest.raises(StoragePoolException, match="cannot change it later; declare"):
            system.pool_diff("ssd", **config)
        with pytest.raises(StoragePoolException, match="add it again"):
            system.set_pool("ssd", **config)
    with pytest.raises(NotSupported, match="declare the value"):
        system.set_pool("ssd", options={"revisions_to_keep": None})
    assert not writes(daemon)


def test_a_path_compares_as_a_path(there):
    _, system = there
    assert system.pool_diff("ssd", dir_path="/mnt/ssd/./qubes/") == {}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"driver": "file", "dir_path": "/mnt/ssd/qubes"}, "directory of pool ssd too"),
        ({"driver": "file", "dir_path": "/mnt/ssd/qubes/appvms/x"}, "VM directories of pool ssd"),
        ({"driver": "file", "dir_path": "/nonexistent/deep"}, "parent of its dir_path, is not"),
        ({"driver": "file", "dir_path": "relative"}, "not an absolute path"),
        ({"driver": "file", "dir_path": "/mnt/a\nb"}, "new line"),
        ({"driver": "file"}, "needs dir_path"),
        ({"driver": "lvm_thin", "volume_group": "x"}, "needs thin_pool"),
        ({"driver": "file-reflink", "dir_path": "/mnt/n", "revisions_to_keep": "abc"}, "whole"),
        ({"driver": "file", "dir_path": "/mnt/n", "revisions_to_keep": 2}, "can keep"),
        ({"driver": "file", "dir_path": "/mnt/n", "ephemeral_volatile": "maybe"}, "neither"),
        ({"driver": "file", "dir_path": "/mnt/n", "foo": "bar"}, "takes dir_path"),
        ({"driver": "nosuch", "dir_path": "/mnt/n"}, "has no driver 'nosuch'; it has callback"),
        ({"dir_path": "/mnt/n"}, "has no driver; declare one of"),
        ({"driver": "file", "dir_path": "/mnt/n", "require_mount": "/mnt/n"}, "is not mounted"),
    ],
)
def test_what_the_daemon_would_take_or_drop_in_silence_is_refused(there, config, why):
    daemon, system = there
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match=why):
            verb("new", **config)
    assert not writes(daemon)
    assert not (Path(system.root) / "etc/qubes/storage-guards.conf").exists()


@pytest.mark.parametrize("name", ["a b", "a/b", "", "é", "a\n", 17, None])
def test_a_name_that_the_daemon_drops_is_refused(there, name):
    daemon, system = there
    with pytest.raises(InvalidInput, match="letters, digits|not a text|is empty"):
        system.add_pool(name, "file", dir_path="/mnt/new")
    assert not daemon.log


@pytest.mark.parametrize("config", [{"driver": "xen"}, {"class": "qubes.storage.xen.XenPool"}])
def test_the_words_of_r32_are_refused_with_those_of_r4(there, config):
    _, system = there
    for name in ("ssd", "new"):
        with pytest.raises(NotSupported, match=r"backend admin.*file-reflink.*lvm_thin"):
            system.pool_diff(name, **config)


def test_a_pool_that_the_daemon_would_not_make_leaves_no_guard(there):
    _, system = there
    (Path(system.root) / "srv").mkdir()
    with pytest.raises(
        StoragePoolException, match=r"was not added: qubesd says Storage.*btrfs or xfs"
    ):
        system.add_pool("new", "file-reflink", dir_path="/srv/x", min_free="1GiB")
    assert system.pool_info("new") is None
    assert system.guards("new") == {}


def test_an_add_without_an_answer_that_made_the_pool_is_no_error(there):
    daemon, system = there
    daemon.after = lambda call, answer: b"" if call.writes else answer
    assert "created" in system.add_pool("new", "file", dir_path="/mnt/new")
    assert "new" in daemon.pools


def test_a_pool_that_someone_else_added_meanwhile_is_told_apart(there):
    daemon, system = there

    def first(call):
        if call.method == "admin.pool.Add":
            daemon.before = None
            daemon.add_pool("new", "file", dir_path="/mnt/other")

    daemon.before = first
    with pytest.raises(StoragePoolException, match="dir_path is /mnt/other, not /mnt/new"):
        system.add_pool("new", "file", dir_path="/mnt/new")


def test_remove_needs_an_unused_pool_and_leaves_the_disk_alone(there):
    daemon, system = there
    with pytest.raises(StoragePoolException, match=r"VMs lie in it \(work\)"):
        system.remove_pool("ssd")
    system.set_default_pools(default_pool_volatile="btrfs")
    with pytest.raises(StoragePoolException, match=r"is the default_pool_vol.*qubes_pool.default"):
        system.remove_pool("btrfs")
    system.set_default_pools(default_pool_volatile="ssd")
    system.set_pool("btrfs", min_free="1GiB")
    forget(daemon, system)
    changes = system.pool_remove_diff("btrfs", purge=True)
    assert not writes(daemon)
    paths = [f"/mnt/btrfs/qubes/{end}" for end in ("appvms", "vm-templates")]
    assert changes["directories"]["old"] == [*paths, "/mnt/btrfs/qubes"]
    assert system.remove_pool("btrfs", purge=True) == changes
    assert changes["min_free"] == {"old": "1GiB", "new": None}
    assert "btrfs" not in daemon.pools
    assert not os.path.exists(f"{system.root}/mnt/btrfs/qubes")
    assert system.guards("btrfs") == {}
    assert system.remove_pool("btrfs") == {}


def test_remove_without_purge_keeps_directories(there):
    _, system = there
    assert set(system.remove_pool("btrfs")) == {"removed"}
    assert os.path.isdir(f"{system.root}/mnt/btrfs/qubes/appvms")


@pytest.mark.parametrize("place", ["", "/vm-templates"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_directory_that_a_disk_is_mounted_on_stays(there, place):
    _, system = there
    path = f"{system.root}/mnt/ssd/new"
    os.makedirs(path + place)
    subprocess.run(["mount", "-t", "tmpfs", "disk", path + place], check=True)
    try:
        system.add_pool("new", "file", dir_path="/mnt/ssd/new")
        changes = system.pool_remove_diff("new", purge=True)
        subdirs = ["/mnt/ssd/new/appvms", "/mnt/ssd/new/vm-templates"]
        assert changes["directories"]["old"] == [
            sub for sub in subdirs if not sub.endswith(place or "x")
        ]
        assert system.remove_pool("new", purge=True) == changes
        assert os.listdir(path) == ([place[1:]] if place else [])
    finally:
        subprocess.run(["umount", path + place], check=True)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_directory_that_is_a_link_stays(there, end):
    _, system = there
    os.mkdir(f"{system.root}/mnt/ssd/there")
    os.symlink("there", f"{system.root}/mnt/ssd/new")
    system.add_pool("new", "file", dir_path=f"/mnt/ssd/new{end}")
    changes = system.pool_remove_diff("new", purge=True)
    subdirs = ["/mnt/ssd/new/appvms", "/mnt/ssd/new/vm-templates"]
    assert changes["directories"]["old"] == subdirs
    assert system.remove_pool("new", purge=True) == changes
    assert os.listdir(f"{system.root}/mnt/ssd/new") == []


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_directory_that_is_used_once_the_pool_is_gone_is_told(there, is_gone):
    daemon, system = there
    appvms = f"{system.root}/mnt/btrfs/qubes/appvms"

    def use(call, answer):
        if call.method == "admin.pool.Remove":
            os.rmdir(appvms) if is_gone else os.mkdir(f"{appvms}/new")
        return answer

    daemon.after = use
    if is_gone:
        assert "directories" in system.remove_pool("btrfs", purge=True)
        assert not os.path.exists(f"{system.root}/mnt/btrfs/qubes")
        return
    with pytest.raises(StoragePoolException, match=r"it is done, but .*/appvms could not be cl"):
        system.remove_pool("btrfs", purge=True)
    assert "btrfs" not in daemon.pools
    assert os.listdir(appvms) == ["new"]


def test_guards_that_cannot_be_taken_away_are_told_once_the_pool_is_gone(there, monkeypatch):
    daemon, system = there
    system.set_pool("btrfs", min_free="1GiB")
    rename = os.rename

    def fail(new, name, **kwargs):
        if name == "storage-guards.conf":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(new, name, **kwargs)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(
        StoragePoolException, match=r"it is done, but /etc/qubes/.* could no"
    ) as err:
        system.remove_pool("btrfs", purge=True)
    assert set(err.value.not_done) == {"min_free", "require_mount"}
    assert "btrfs" not in daemon.pools
    assert not os.path.exists(f"{system.root}/mnt/btrfs/qubes")
    monkeypatch.undo()
    left = {"min_free": {"old": "1GiB", "new": None}}
    assert system.pool_remove_diff("btrfs", purge=True) == left
    assert system.remove_pool("btrfs") == left
    assert system.remove_pool("btrfs", purge=True) == {}


def guarded(system):
    """Give a pool guards, and the system a directory to save them in."""
    os.makedirs(f"{system.root}/mnt/btrfs/old")
    system.add_pool("old", "file-reflink", dir_path="/mnt/btrfs/old/pool", min_free="1MiB")


def killed(system, patch):
    """A removal of that pool that is killed where ``patch()`` says."""
    if os.fork() == 0:
        try:
            patch()
            system.remove_pool("old", purge=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    system.refresh()


def leftovers(system):
    """What there still is of that pool."""
    journals = system.path("/var/lib/qubes/storage-removals")
    return (
        system.guards("old"),
        os.listdir(system.path("/mnt/btrfs/old")),
        os.listdir(journals) if os.path.exists(journals) else [],
    )


@pytest.mark.parametrize("step", ["remove", "rmdir", "guards", "journal"])
def test_a_removal_that_was_killed_is_finished_by_the_next(there, step):
    daemon, system = there
    guarded(system)

    def die(*_, **__):
        os._exit(9)

    def patch():
        if step in ("remove", "rmdir"):
            rmdir, last = os.rmdir, "appvms" if step == "remove" else "pool"
            os.rmdir = lambda path, **at: die() if path.endswith(last) else rmdir(path, **at)
        elif step == "guards":
            system.save_guards = die
        else:
            save = system.save_guards
            system.save_guards = lambda name: (save(name), os._exit(9))

    killed(system, patch)
    assert "old" not in daemon.pools
    told = system.pool_remove_diff("old", purge=True)
    left = {"remove": {"min_free", "directories"}, "rmdir": {"min_free", "directories"}}
    assert set(told) == {**left, "guards": {"min_free"}, "journal": set()}[step]
    assert system.remove_pool("old", purge=True) == told
    assert leftovers(system)[:2] == ({}, [])
    assert system.pool_remove_diff("old", purge=True) == {}


def test_directories_that_became_another_pools_stay(there):
    system = there[1]
    guarded(system)
    killed(system, lambda: setattr(system, "_clear_pool", lambda *_: os._exit(9)))
    system.add_pool("other", "file-reflink", dir_path="/mnt/btrfs/old/pool")
    assert set(system.remove_pool("old", purge=True)) == {"min_free"}
    assert os.path.isdir(system.path("/mnt/btrfs/old/pool/appvms"))


def test_a_pool_that_was_added_again_keeps_its_directories(there):
    system = there[1]
    guarded(system)
    killed(system, lambda: setattr(system, "_clear_pool", lambda *_: os._exit(9)))
    system.add_pool("old", "file-reflink", dir_path="/mnt/btrfs/old/pool")
    assert leftovers(system) == ({}, ["pool"], [])
    assert set(system.remove_pool("old")) == {"removed"}
    assert system.remove_pool("old", purge=True) == {}
    assert os.path.isdir(system.path("/mnt/btrfs/old/pool/appvms"))


def test_directories_that_are_no_more_or_no_directories_are_not_told_of(there):
    _, system = there
    path = f"{system.root}/mnt/btrfs/qubes"
    os.rmdir(f"{path}/appvms")
    os.symlink("/nowhere", f"{path}/appvms")
    changes = system.pool_remove_diff("btrfs", purge=True)
    assert changes["directories"]["old"] == ["/mnt/btrfs/qubes/vm-templates"]
    os.rename(path, path + "-away")
    assert set(system.pool_remove_diff("btrfs", purge=True)) == {"removed"}


def test_a_remotevm_that_stops_every_removal_is_named(tmp_path):
    with machine("4.3", tmp_path) as (daemon, system):
        daemon.create("RemoteVM", "", "name=far label=red", False)
        with pytest.raises(StoragePoolException, match=r"no pool at all .* RemoteVM \(far\)"):
            system.remove_pool("btrfs")


def test_guards_are_kept_read_and_changed(there):
    daemon, system = there
    system.set_pool("ssd", min_free="300GiB")
    assert not writes(daemon)
    assert system.pool_info("ssd")["min_free"] == "300GiB"
    assert system.pool_diff("ssd", min_free="300 GiB") == {}
    with pytest.raises(StoragePoolException, match=r"min_free keeps 300\.0 GiB"):
        system.create_vm("new", pool="ssd")
    assert system.set_pool("ssd", options={"min_free": None}) == {
        "min_free": {"old": "300GiB", "new": None}
    }
    system.create_vm("new", pool="ssd")


def test_default_pools_are_read_and_set(there):
    daemon, system = there
    assert system.default_pools()["default_pool"] == "varlibqubes"
    changes = system.default_pools_diff(default_pool="ssd", default_pool_volatile="btrfs")
    assert not writes(daemon)
    assert changes == {
        "default_pool": {"old": "varlibqubes", "new": "ssd"},
        "default_pool_volatile": {"old": "varlibqubes", "new": "btrfs"},
    }
    assert system.set_default_pools(default_pool="ssd", default_pool_volatile="btrfs") == changes
    assert system.default_pools()["default_pool_root"] == "ssd"
    forget(daemon, system)
    assert system.set_default_pools(default_pool="ssd", default_pool_volatile="btrfs") == {}
    assert not writes(daemon)
    with pytest.raises(StoragePoolException, match="no pool nosuch") as err:
        system.default_pools_diff(default_pool="nosuch")
    assert err.value.waits_for == [("pool", "nosuch")]
    with pytest.raises(InvalidInput, match="linux-kernel"):
        system.default_pools_diff(default_pool_kernel="ssd")
    with pytest.raises(InvalidInput, match="no property"):
        system.default_pools_diff(default_pol="ssd")
    del daemon.globals.table["default_pool_volatile"]
    forget(daemon, system)
    with pytest.raises(NotSupported, match="has no default_pool_volatile; leave it out"):
        system.default_pools_diff(default_pool_root=None, default_pool_volatile="nosuch")


def test_a_pool_that_vanishes_while_it_is_read_is_no_pool(there):
    daemon, system = there

    def gone(call):
        if call.method == "admin.pool.Info" and call.arg == "btrfs":
            daemon.pools.pop("btrfs", None)

    daemon.before = gone
    assert "btrfs" not in system.list_pools()


def test_values_are_sent_in_the_daemons_form(there):
    daemon, system = there
    options = {"ephemeral_volatile": "yes", "revisions_to_keep": " 2", "setup_check": "on"}
    system.add_pool("new", "file-reflink", dir_path="/mnt/new", options=options)
    assert daemon.pools["new"].options["ephemeral_volatile"] == "True"
    assert daemon.pools["new"].options["revisions_to_keep"] == "2"
    system.set_pool("new", ephemeral_volatile="no", revisions_to_keep="03")
    assert daemon.pools["new"].options["ephemeral_volatile"] == "False"
    assert daemon.pools["new"].options["revisions_to_keep"] == "3"
    assert system.pool_diff("new", ephemeral_volatile=False, revisions_to_keep=3) == {}


def test_what_is_false_already_is_not_sent(there):
    """R4.2 would keep the text False, which is true to it."""
    daemon, system = there
    declared = {"dir_path": "/mnt/new", "ephemeral_volatile": False}
    system.add_pool("new", "file-reflink", **declared)
    added = [call.payload for call in daemon.log if call.method == "admin.pool.Add"]
    assert added == [b"name=new\ndir_path=/mnt/new\n"]
    assert system.pool_diff("new", **declared) == {}


def test_a_default_that_follows_another_stays_where_it_is_declared_to(there):
    _, system = there
    declared = {"default_pool": "ssd", "default_pool_root": "varlibqubes"}
    changes = system.default_pools_diff(**declared, default_pool_private="ssd")
    assert changes == {
        "default_pool": {"old": "varlibqubes", "new": "ssd"},
        "default_pool_root": {"old": None, "new": "varlibqubes"},
    }
    assert system.set_default_pools(**declared) == changes
    assert system.default_pools()["default_pool_root"] == "varlibqubes"
    assert system.default_pools()["default_pool_private"] == "ssd"
    assert system.set_default_pools(**declared) == {}


def test_guards_that_cannot_be_read_are_told_before_a_pool_is_added(there):
    daemon, system = there
    path = Path(system.root) / "etc/qubes/storage-guards.conf"
    path.parent.mkdir(parents=True)
    path.write_text("[ssd")
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match="storage-guards.conf cannot be read"):
            verb("new", driver="file", dir_path="/mnt/new")
    assert not writes(daemon)


def test_what_cannot_be_taken_away_is_told_before_a_pool_is_added(there):
    daemon, system = there
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(NotSupported, match="cannot take revisions_to_keep .its default. away"):
            verb("new", "file", {"revisions_to_keep": None}, dir_path="/mnt/new")
    assert not writes(daemon)
