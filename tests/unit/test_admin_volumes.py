"""R4: what the daemon tells of volumes is read as it means it, and a move keeps what is set."""

import pytest
from qubes_storage import NotSupported, StoragePoolException

from tests.r4.machine import forget, machine, writes

GIB = 1024**3


def tell(daemon, volume, old, new):
    """Have the daemon tell something else of a volume of work."""

    def after(call, answer):
        asked = (call.method, call.dest, call.arg) == ("admin.vm.volume.Info", "work", volume)
        return answer.replace(old, new) if asked else answer

    daemon.after = after


def test_a_volume_follows_the_encryption_of_the_pool_that_it_moves_to(there):
    system = there[1]
    place = {"driver": "file-reflink", "dir_path": "/mnt/btrfs/safe"}
    system.add_pool("safe", **place, ephemeral_volatile=True)
    system.create_vm("fresh", pool="safe")
    assert system.volume("fresh", "volatile").ephemeral is True
    system.migrate_vm("work", "safe")
    assert system.volume("work", "volatile").ephemeral is True
    system.migrate_vm("work", "btrfs")  # and never loses it
    assert system.volume("work", "volatile").ephemeral is True


def test_encryption_that_somebody_has_taken_away_stays_away(there):
    daemon, system = there
    for name in ("one", "two"):
        place = {"driver": "file-reflink", "dir_path": f"/mnt/btrfs/{name}"}
        system.add_pool(name, **place, ephemeral_volatile=True)
    system.create_vm("fresh", pool="one")
    daemon.vms["fresh"].volumes["volatile"].set_ephemeral = False
    forget(*there)
    system.migrate_vm("fresh", "two")
    assert system.volume("fresh", "volatile").ephemeral is False


@pytest.mark.parametrize(
    ("word", "means"), [("yes", True), ("1", True), ("no", False), ("", False)]
)
def test_a_truth_value_is_read_however_the_pool_has_it(there, word, means):
    tell(there[0], "volatile", b"ephemeral=False", f"ephemeral={word}".encode())
    assert there[1].volume("work", "volatile").ephemeral is means


def test_a_volume_of_an_exbibyte_hides_no_other(there):
    daemon, system = there
    daemon.vms["work"].volumes["private"].size = 2**60
    forget(*there)
    assert system.vm_info("work")["volumes"]["private"]["size"] == 2**60
    assert {"work", "vault"} <= {*system.list_vms()}
    assert system.report()["ssd"]["provisioned"] >= 2**60


def test_an_image_is_looked_for_under_its_own_name(there):
    daemon, system = there
    name = "a-dirty" if daemon.release == "4.2" else "a-dirty.img"  # R4.2 takes no dot
    system.create_vm(name, pool="ssd")
    assert system.verify_vm(name) == []


@pytest.mark.parametrize(("vm", "volume"), [("work", "private"), ("fedora", "root")])
def test_a_volume_that_is_read_only_cannot_grow(there, vm, volume):
    daemon, system = there
    daemon.vms[vm].volumes[volume].rw = False
    forget(*there)
    for call in (system.vm_diff, system.set_vm):
        with pytest.raises(StoragePoolException, match=f"volume {volume} is read-only .* rw True"):
            call(vm, volumes={volume: "50GiB"})
    assert system.vm_diff(vm, volumes={volume: "1GiB"}) == {}
    assert not writes(daemon)


def test_settings_of_a_snapshot_move_along(there):
    daemon, system = there
    daemon.vms["work"].volumes["root"].rw = False
    forget(*there)
    system.migrate_vm("work", "btrfs")
    assert system.volume("work", "root").rw is False


def test_revisions_that_this_release_lets_nobody_set_are_those_of_the_new_pool(tmp_path):
    with machine("4.2", tmp_path) as (_, system):
        place = {"driver": "file-reflink", "dir_path": "/mnt/btrfs/neg"}
        system.add_pool("neg", **place, revisions_to_keep=-1)
        system.create_vm("new", pool="neg")
        system.migrate_vm("new", "btrfs")
        assert system.volume("new", "private").revisions_to_keep == "2"


@pytest.mark.parametrize("migrate", [False, True])
def test_the_pool_of_a_disposable_is_given_when_it_is_created(there, migrate):
    daemon, system = there
    daemon.vms["work"].set["template_for_dispvms"] = "True"
    daemon.add_vm("disp", "DispVM", template="work")
    forget(*there)
    with pytest.raises(NotSupported, match="has no volumes of its own to move; declare pool: v"):
        system.vm_diff("disp", pool="btrfs", migrate=migrate)


def test_a_pool_that_a_remotevm_keeps_is_told_before(tmp_path):
    with machine("4.3", tmp_path) as (daemon, system):
        daemon.create("RemoteVM", "", "name=far label=red", False)
        forget(daemon, system)
        with pytest.raises(StoragePoolException, match=r"while there is a RemoteVM \(far\)") as err:
            system.pool_remove_diff("btrfs")
        assert err.value.waits_for == [("use of", "far", "btrfs")]
        assert not writes(daemon)
