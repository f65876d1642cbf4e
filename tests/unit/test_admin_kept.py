"""What a move over the Admin API keeps, and what it says where the daemon would not give it."""

from pathlib import Path

import pytest
from qubes_storage import StoragePoolException

from tests.r4.machine import RELEASES, forget, machine, writes
from tests.unit.test_admin_migrate import DATA, JOURNAL, furnish, furniture, whole_copies

NO = b"2\0StoragePoolException\0\0not today\0"


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    with machine(request.param, tmp_path) as (daemon, system):
        furnish(daemon)
        forget(daemon, system)
        yield daemon, system


def refuse(daemon, method, arg=None):
    daemon.before = lambda call: NO if (call.method, arg and call.arg) == (method, arg) else None


def test_a_pool_that_cannot_keep_as_many_revisions_gives_what_it_has(there):
    daemon, system = there
    assert daemon.vms["work"].volumes["private"].revisions_to_keep == "4"
    assert system.migrate_vm("work", "varlibqubes") == {
        "pool": {"old": "ssd", "new": "varlibqubes"}
    }
    private = daemon.vms["work"].volumes["private"]
    assert (private.data, private.revisions_to_keep) == (DATA, "1")
    assert system.verify_vm("work") == []


def test_the_volume_that_keeps_nothing_can_move_alone(there):
    daemon, system = there
    declared = {"volumes": {"volatile": {"pool": "btrfs"}}, "migrate": True}
    daemon.vms["work"].volumes["volatile"].data = "what nobody needs"
    daemon.usage["btrfs"] = {"data_size": 1, "data_usage": 1}  # it is full, and nothing is copied
    assert system.set_vm("work", **declared) == {"pool": {"old": "ssd", "new": "btrfs"}}
    volumes = daemon.vms["work"].volumes
    assert [volumes[v].pool.name for v in ("private", "volatile")] == ["ssd", "btrfs"]
    assert volumes["private"].data == DATA
    system.refresh()
    assert system.vm_diff("work", **declared) == {}


def test_a_kernel_of_another_pool_stays_there(there):
    daemon, system = there
    (Path(system.root) / "var/lib/qubes/own-kernels").mkdir()
    daemon.add_pool("kernels", "linux-kernel", dir_path="/var/lib/qubes/own-kernels")
    system.create_vm("other", pool="ssd", volumes={"kernel": {"pool": "kernels"}})
    system.migrate_vm("other", "btrfs")
    volumes = daemon.vms["other"].volumes
    assert [volumes[v].pool.name for v in ("private", "kernel")] == ["btrfs", "kernels"]


def test_a_vm_that_was_not_to_be_started_is_not_to_be_started_afterwards(there):
    daemon, system = there
    daemon.vms["work"].features["prohibit-start"] = "it is an archive"
    before = furniture(daemon)
    system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before


def test_a_vm_that_named_it_and_goes_away_meanwhile_is_left_out(there):
    daemon, system = there

    def vanish(call):
        if call.method == "admin.vm.volume.CloneTo":
            daemon.vms.pop("vault", None)

    daemon.before = vanish
    system.migrate_vm("work", "btrfs")
    assert daemon.vms["disp"].set["template"] == "work"
    assert daemon.vms["work"].volumes["private"].data == DATA
    assert "vault" not in daemon.vms


@pytest.mark.parametrize(
    ("method", "arg", "why"),
    [
        ("admin.vm.feature.Set", "qubes-storage-move", "feature qubes-storage-move is not 'work'"),
        ("admin.property.Set", "default_dispvm", "default_dispvm: is work, not work-mv1"),
    ],
)
def test_what_is_refused_before_the_vm_is_removed_undoes_the_move(there, method, arg, why):
    daemon, system = there
    before = furniture(daemon)
    refuse(daemon, method, arg)
    with pytest.raises(StoragePoolException, match=f"{why}: .*not today; the move was undone"):
        system.migrate_vm("work", "btrfs")
    daemon.before = None
    assert furniture(daemon) == before
    assert daemon.vms["work"].volumes["private"].pool.name == "ssd"
    assert system.pending_move("work") is None


def test_rules_and_notes_that_could_not_be_given_back_are_shown(there):
    daemon, system = there
    refused = ("admin.vm.firewall.Set", "admin.vm.notes.Set")
    daemon.before = lambda call: NO if call.method in refused else None
    with pytest.raises(StoragePoolException, match="is moved, but not all is as it was") as err:
        system.migrate_vm("work", "btrfs")
    assert r"firewall: not 'action=accept dst4=10.0.0.1\naction=drop\n'" in str(err.value)
    assert ("notes: not 'do not touch'" in str(err.value)) is (daemon.release != "4.2")
    assert whole_copies(daemon) == ["work"]


def test_a_mark_that_stays_keeps_the_move_unfinished(there):
    daemon, system = there
    before = furniture(daemon)
    refuse(daemon, "admin.vm.feature.Remove")
    with pytest.raises(StoragePoolException, match="feature qubes-storage-move stays: .*not today"):
        system.migrate_vm("work", "btrfs")
    assert system.pending_move("work")["step"] == "finish"
    daemon.before = None
    system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before
    assert system.pending_move("work") is None


def test_create_finishes_a_move_that_left_no_vm_and_create_only_does_not(there):
    daemon, system = there
    before = furniture(daemon)
    daemon.after = lambda call, answer: answer[:1] if "work" not in daemon.vms else answer
    with pytest.raises(StoragePoolException, match="was cut off"):
        system.migrate_vm("work", "btrfs")
    daemon.after = None
    assert "work" not in daemon.vms
    forget(daemon, system)
    assert system.vm_diff("work", pool="btrfs", create_only=True) == {}
    assert not writes(daemon)
    with pytest.raises(StoragePoolException, match="its move to pool btrfs was cut off"):
        system.create_vm("work", pool="btrfs")
    assert set(system.create_vm("work", pool="btrfs", migrate=True)) == {"unfinished"}
    assert furniture(daemon) == before


@pytest.mark.parametrize("name", ["../work", "./../work"])
def test_a_name_that_is_none_leads_to_no_journal(there, name):
    _, system = there
    journals = (Path(system.root) / JOURNAL).parent
    journals.mkdir()
    outside = journals.parent / "work.json"
    outside.write_text("{half")
    assert system.vm_remove_diff(name) == {}
