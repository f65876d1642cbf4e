"""A daemon that refuses, or says ok and does nothing: what came of a call is read, and told."""

import pytest
from qubes_storage import StoragePoolException, adminapi
from qubes_storage.exc import AlreadyThere

from tests.r4.machine import forget, machine, writes

GIB = 1024**3
NO = b"2\0StoragePoolException\0\0not today\0"


@pytest.fixture(params=[(b"0\0", "qubesd says ok"), (NO, "not today")], ids=["nothing", "refused"])
def answered(request, there):
    """``answered(method)``: such a call is answered and does nothing; gives what is told of it."""
    daemon, _ = there
    answer, told = request.param

    def use(method):
        daemon.before = lambda call: answer if call.method == method else None
        return told

    return use


def refused(daemon, method):
    daemon.before = lambda call: NO if call.method == method else None


def test_an_option_of_a_pool_that_was_not_set(there, answered):
    daemon, system = there
    told = answered("admin.pool.Set.revisions_to_keep")
    with pytest.raises(
        StoragePoolException, match=f"pool ssd: revisions_to_keep is 1, not 3 after.*{told}"
    ):
        system.set_pool("ssd", revisions_to_keep=3)
    assert daemon.pools["ssd"].options["revisions_to_keep"] == "1"


def test_a_pool_that_was_not_added_names_what_to_look_at(there, answered):
    daemon, system = there
    told = answered("admin.pool.Add")
    why = f"pool thin: was not added: .*{told}; look at volume_group qubes_dom0, thin_pool vm-pool$"
    with pytest.raises(StoragePoolException, match=why):
        system.add_pool("thin", "lvm_thin", volume_group="qubes_dom0", thin_pool="vm-pool")
    assert "thin" not in daemon.pools


def test_a_pool_that_was_not_removed_keeps_its_guards(there, answered):
    daemon, system = there
    system.set_pool("btrfs", min_free="1GiB")
    told = answered("admin.pool.Remove")
    with pytest.raises(
        StoragePoolException, match=rf"pool btrfs: was not removed: .*{told}; run again once"
    ):
        system.remove_pool("btrfs")
    assert "btrfs" in daemon.pools
    assert system.guards("btrfs") == {"min_free": "1GiB"}


def test_a_default_pool_that_was_not_set(there, answered):
    daemon, system = there
    told = answered("admin.property.Set")
    with pytest.raises(
        StoragePoolException, match=f"default_pool: is varlibqubes, not ssd, after.*{told}"
    ):
        system.set_default_pools(default_pool="ssd")
    assert "default_pool" not in daemon.globals.set


def test_revisions_and_sizes_of_a_volume_that_were_not_set(there, answered):
    daemon, system = there
    told = answered("admin.vm.volume.Set.revisions_to_keep")
    with pytest.raises(
        StoragePoolException, match=f"revisions_to_keep of volume private is 1, not 3: .*{told}"
    ):
        system.set_vm("work", volumes={"private": {"revisions_to_keep": 3}})
    told = answered("admin.vm.volume.Resize")
    with pytest.raises(
        StoragePoolException, match=rf"volume private is 2\.0 GiB, not 3\.0 GiB: .*{told}"
    ):
        system.set_vm("work", volumes={"private": "3GiB"})
    assert daemon.vms["work"].volumes["private"].size == 2 * GIB


@pytest.mark.parametrize(
    ("method", "declared", "what"),
    [
        ("Set.revisions_to_keep", {"revisions_to_keep": 3}, "revisions_to_keep of volume private"),
        ("Resize", {"size": "3GiB"}, "volume private"),
    ],
)
def test_a_vm_that_goes_away_under_the_change_is_said(there, method, declared, what):
    daemon, system = there

    def vanish(call):
        if call.method == f"admin.vm.volume.{method}":
            daemon.vms.pop("work", None)

    daemon.before = vanish
    with pytest.raises(StoragePoolException, match=f"VM work: {what} is gone with the VM, not 3"):
        system.set_vm("work", volumes={"private": declared})


def test_a_vm_that_goes_away_before_the_plan_is_not_made_anew(there, monkeypatch):
    """Where nothing that was read may be used again, as when each answer takes seconds."""
    daemon, system = there
    monkeypatch.setattr(adminapi, "KEEP", 0)

    def vanish(call, answer):
        if call.method == "admin.vm.List":
            daemon.vms.pop("work", None)
        return answer

    daemon.after = vanish
    with pytest.raises(StoragePoolException, match="VM work: was removed by someone else meanwh"):
        system.set_vm("work", label="green")
    assert not writes(daemon)


def test_a_revision_that_was_not_gone_back_to(there):
    daemon, system = there
    private = daemon.vms["work"].volumes["private"]
    private.commit("second")
    refused(daemon, "admin.vm.volume.Revert")
    with pytest.raises(StoragePoolException, match="was not reverted to 1: qubesd says.*not today"):
        system.revert("work")
    assert private.data == "second"


def test_what_is_there_and_cannot_be_read_is_not_taken_for_gone(there):
    daemon, system = there
    refused(daemon, "admin.pool.Info")
    with pytest.raises(StoragePoolException, match=r"admin.pool.Info of ssd: .*not today"):
        system.pool_diff("ssd", "file-reflink", dir_path="/mnt/ssd/qubes")
    refused(daemon, "admin.vm.volume.Info")
    with pytest.raises(StoragePoolException, match=r"volume.Info of private for VM work: .*not"):
        system.vm_info("work")
    assert not writes(daemon)


def test_a_pool_whose_usage_cannot_be_read_is_told_of_with_the_problem(there):
    daemon, system = there
    refused(daemon, "admin.pool.UsageDetails")
    info = system.pool_info("ssd")
    assert info["vms"] == ["work"]
    assert info["size"] is None
    assert ["not today" in problem for problem in info["problems"]] == [True]


def test_min_free_where_nobody_knows_what_is_free(there):
    daemon, system = there
    system.set_pool("linux-kernel", min_free="1GiB")
    forget(daemon, system)
    with pytest.raises(
        StoragePoolException, match="pool linux-kernel: qubesd does not tell what is free in it"
    ):
        system.create_vm("new", volumes={"kernel": {"pool": "linux-kernel"}})
    assert not writes(daemon)


def test_verify_names_a_pool_that_is_gone_and_nothing_of_a_vm_without_volumes(there):
    daemon, system = there
    del daemon.pools["ssd"]
    assert [line for line in system.verify_vm("work") if "ssd" in line] == [
        "VM work: volume private: its pool ssd is not there; add it again",
        "VM work: volume volatile: its pool ssd is not there; add it again",
    ]
    assert system.report().keys() == {"varlibqubes", "linux-kernel", "btrfs"}
    forget(daemon, system)
    assert system.verify_vm("dom0") == []
    assert {call.method for call in daemon.log} == {"admin.vm.List"}


def test_a_pool_just_as_declared_that_someone_else_added_first_is_theirs(tmp_path):
    """The later daemon says so; those before it break off, as they do once they have made it."""
    with machine("later", tmp_path) as (daemon, system):

        def first(call):
            if call.method == "admin.pool.Add":
                daemon.before = None
                daemon.add_pool("new", "file", dir_path="/mnt/new")

        daemon.before = first
        with pytest.raises(AlreadyThere, match="pool new: is there already; someone else added"):
            system.add_pool("new", "file", dir_path="/mnt/new")
        assert "new" in daemon.pools


def test_a_pool_that_cannot_be_read_is_none_only_if_it_is_in_no_list(there):
    daemon, system = there
    calls = []

    def before(call):
        if call.method == "admin.pool.Info" and call.arg == "btrfs":
            calls.append(call)
            return NO
        return None

    daemon.before = before
    with pytest.raises(StoragePoolException, match="btrfs"):
        system.pool_config("btrfs")
    assert len(calls) == 2


def test_a_vm_that_is_made_and_gone_before_it_is_looked_at_is_said(there):
    daemon, system = there

    def gone(call, answer):
        if call.method.startswith("admin.vm.Create"):
            daemon.vms.pop("new")
        return answer

    daemon.after = gone
    with pytest.raises(StoragePoolException, match="VM new: was removed by someone else"):
        system.create_vm("new")
    assert "new" not in daemon.vms
