"""Moves that keep the name, on each release, killed at every call."""

import json
import threading
from pathlib import Path

import pytest
from qubes_storage import NotSupported, StoragePoolException

from tests.r4.machine import RELEASES, forget, killed_at, machine, writes

GIB = 1024**3
DATA = "the work of years"
JOURNAL = "var/lib/qubes/storage-moves/work.json"


def furnish(daemon):
    """Give the VM all that a VM can have, and others that name it."""
    work = daemon.vms["work"]
    work.set.update(
        memory="512", include_in_backups="False", template_for_dispvms="True",
        provides_network="True", label="blue", default_dispvm="work",
    )  # fmt: skip
    work.tags["mine"] = None
    work.features.update({"a-feature": "1", "empty": ""})
    work.firewall = "action=accept dst4=10.0.0.1\naction=drop\n"
    work.devices = {"pci": {"dom0+00_1f.2": "required=yes"}}
    if daemon.release != "4.2":
        work.notes = "do not touch"
    private = work.volumes["private"]
    private.size = 3 * GIB
    private.revisions_to_keep = "4"
    daemon.add_vm("disp", "DispVM", template="work")
    private.rw = False
    work.volumes["volatile"].size = 11 * GIB
    work.volumes["volatile"].set_ephemeral = True
    daemon.vms["vault"].set["netvm"] = "work"
    daemon.globals.set["default_dispvm"] = "work"


def furniture(daemon, name="work"):
    """What has to be the same after a move."""
    vm = daemon.vms[name]
    new = {"qid", "uuid"}
    return {
        "klass": vm.klass,
        "set": {k: v for k, v in vm.set.items() if k not in new},
        "tags": sorted(vm.tags),
        "features": dict(vm.features),
        "firewall": vm.firewall,
        "notes": vm.notes,
        "devices": vm.devices,
        "volumes": {
            v.name: (v.size, v.data, v.save and v.revisions_to_keep, v.rw, v.ephemeral)
            for v in vm.volumes.values()
            if v.name in ("private", "volatile")
        },
        "users": [
            daemon.vms["disp"].set["template"],
            daemon.vms["vault"].set["netvm"],
            daemon.globals.set["default_dispvm"],
        ],
        "others": sorted(daemon.vms),
    }


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    with machine(request.param, tmp_path) as (daemon, system):
        furnish(daemon)
        forget(daemon, system)
        yield daemon, system


def whole_copies(daemon):
    """The VMs that hold all of what the moving VM held."""
    return [
        name
        for name, vm in daemon.vms.items()
        for volume in vm.volumes.values()
        if volume.name == "private" and volume.data == DATA
    ]


def test_a_move_keeps_name_data_and_all_that_the_vm_had(there):
    daemon, system = there
    before = furniture(daemon)
    changes = system.vm_diff("work", pool="btrfs", migrate=True)
    assert not writes(daemon)
    assert not (Path(system.root) / JOURNAL).exists()
    assert changes == {"pool": {"old": "ssd", "new": "btrfs"}}
    assert system.migrate_vm("work", "btrfs") == changes
    assert furniture(daemon) == before
    volumes = daemon.vms["work"].volumes
    assert [volumes[v].pool.name for v in ("private", "volatile")] == ["btrfs", "btrfs"]
    assert not (Path(system.root) / JOURNAL).exists()
    assert system.verify_vm("work") == []
    forget(daemon, system)
    assert system.migrate_vm("work", "btrfs") == {}
    assert not writes(daemon)


def test_one_whole_copy_is_there_at_every_call_and_the_journal_with_it(there):
    daemon, system = there
    journal = Path(system.root) / JOURNAL
    fewest, steps = [], set()

    def look(call):
        if call.writes:
            assert journal.exists()
            steps.add(json.loads(journal.read_text())["step"])
        fewest.append(len(whole_copies(daemon)))

    daemon.before = look
    system.migrate_vm("work", "btrfs")
    assert min(fewest) == 1
    assert steps == {"copy", "switch", "remove", "recreate", "restore", "clean", "finish"}


def test_the_vm_cannot_be_started_meanwhile_where_the_release_can_do_that(there):
    daemon, system = there
    told = []

    def look(call):
        if call.method in ("admin.vm.volume.CloneTo", "admin.vm.Remove"):
            told.append([vm.features.get("prohibit-start") for vm in daemon.vms.values()])

    daemon.before = look
    system.migrate_vm("work", "btrfs")
    assert any(any(features) for features in told) is (daemon.release != "4.2")
    daemon.before = None
    assert daemon.run(daemon.parse(b"admin.vm.Start+ dom0 name work\0")) == ""


def test_a_template_moves_with_root_and_private_and_its_vms_stay_on_it(there):
    daemon, system = there
    root = daemon.vms["fedora"].volumes["root"]
    root.data = "a system"
    system.migrate_vm("fedora", "ssd")
    fedora = daemon.vms["fedora"]
    assert [fedora.volumes[v].pool.name for v in ("root", "private")] == ["ssd", "ssd"]
    assert fedora.volumes["root"].data == "a system"
    assert daemon.vms["work"].set["template"] == "fedora"
    assert daemon.vms["work"].volumes["root"].source is fedora.volumes["root"]
    assert daemon.globals.set["default_template"] == "fedora"


def test_one_volume_can_move_alone(there):
    daemon, system = there
    daemon.add_vm("alone", "StandaloneVM", pool="ssd")
    system.refresh()
    declared = {"pool": "ssd", "volumes": {"private": {"pool": "btrfs"}}, "migrate": True}
    assert system.set_vm("alone", **declared) == {"pool": {"old": "ssd", "new": "btrfs"}}
    volumes = daemon.vms["alone"].volumes
    assert [volumes[v].pool.name for v in ("root", "private")] == ["ssd", "btrfs"]
    system.refresh()
    assert system.vm_diff("alone", **declared) == {}


def test_the_pool_that_a_vm_moves_to_has_to_have_room_for_it_and_not_the_one_it_leaves(there):
    daemon, system = there
    daemon.vms["work"].volumes["private"].rw = True
    declared = {"pool": "btrfs", "migrate": True, "volumes": {"private": "30GiB"}}
    system.set_pool("btrfs", min_free="300GiB")
    with pytest.raises(StoragePoolException, match=r"pool btrfs: .* min_free keeps 300\.0 GiB"):
        system.set_vm("work", **declared)
    system.set_pool("btrfs", options={"min_free": None})
    system.set_pool("ssd", min_free="300GiB")
    planned = system.vm_diff("work", **declared)
    assert set(planned) == {"pool", "volumes"}
    assert system.set_vm("work", **declared) == planned
    private = daemon.vms["work"].volumes["private"]
    assert (private.pool.name, private.size) == ("btrfs", 30 * GIB)
    system.refresh()
    assert system.vm_diff("work", **declared) == {}


def test_a_volume_that_the_new_pool_rounds_up_moves(there):
    daemon, system = there
    daemon.vms["work"].volumes["private"].size = 20 * 1000**3
    place = {"volume_group": "qubes_dom0", "thin_pool": "vm-pool"}
    daemon.thin_pools["qubes_dom0/vm-pool"] = {"data_size": 256 * GIB, "data_usage": GIB}
    daemon.add_pool("thin", "lvm_thin", **place)
    system.refresh()
    assert system.migrate_vm("work", "thin") == {"pool": {"old": "ssd", "new": "thin"}}
    private = daemon.vms["work"].volumes["private"]
    assert (private.data, private.size) == (DATA, 4769 * 4 * 1024**2)
    assert whole_copies(daemon) == ["work"]


def test_what_cannot_move_is_refused_before_anything_is_written(there):
    daemon, system = there
    with pytest.raises(NotSupported, match="no volumes of its own"):
        system.vm_plan("disp", volumes={"volatile": {"pool": "btrfs"}}, migrate=True)
    with pytest.raises(StoragePoolException, match="no pool nosuch"):
        system.migrate_vm("work", "nosuch")
    with pytest.raises(StoragePoolException, match="is not there"):
        system.migrate_vm("nosuch", "btrfs")
    daemon.usage["btrfs"] = {"data_size": GIB, "data_usage": GIB}
    with pytest.raises(StoragePoolException, match="are needed"):
        system.migrate_vm("work", "btrfs")
    daemon.usage.clear()
    daemon.vms["vault"].running = True
    with pytest.raises(StoragePoolException, match=r"named by VMs that are not halted \(vault\)"):
        system.migrate_vm("work", "btrfs")
    daemon.vms["work"].running = True
    with pytest.raises(StoragePoolException, match="is Running, and only a halted VM"):
        system.migrate_vm("work", "btrfs")
    assert not writes(daemon)
    assert not (Path(system.root) / JOURNAL).exists()


@pytest.mark.parametrize(("release", "after"), list(zip(RELEASES, (True, False, True))))
def test_a_move_that_was_killed_at_any_call_is_finished_by_the_next(release, after, tmp_path):
    number, killed, resumed = 0, True, 0
    while killed:
        number += 1
        root = tmp_path / str(number)
        with machine(release, root) as (daemon, system):
            furnish(daemon)
            before = furniture(daemon)
            killed = killed_at(number, lambda s=system: s.migrate_vm("work", "btrfs"), after)
            assert whole_copies(daemon)
            system.refresh()
            pending = system.pending_move("work") is not None
            if pending:
                resumed += 1
                with pytest.raises(StoragePoolException, match="was cut off"):
                    system.vm_diff("work")
                with pytest.raises(StoragePoolException, match="was cut off"):
                    system.vm_remove_diff("work", purge=True)
                changes = system.vm_diff("work", pool="btrfs", migrate=True)
                assert set(changes) == {"unfinished"}
                assert "was cut off" in system.verify_vm("work")[0]
            system.migrate_vm("work", "btrfs")
            assert furniture(daemon) == before, number
            assert daemon.vms["work"].volumes["private"].pool.name == "btrfs"
            assert system.pending_move("work") is None
            assert system.vm_diff("work", pool="btrfs", migrate=True) == {}
    assert resumed >= 30


def test_a_resumed_move_can_be_killed_again(there):
    daemon, system = there
    before = furniture(daemon)
    kills = 0
    # Each run goes on from where the last one was, until one comes through.
    while killed_at(13, lambda: system.migrate_vm("work", "btrfs"), True):
        kills += 1
        assert whole_copies(daemon)
    assert kills >= 2
    system.refresh()
    assert system.pending_move("work") is None
    assert furniture(daemon) == before


@pytest.mark.parametrize("method", ["CreateInPool.AppVM", "volume.CloneFrom", "volume.CloneTo"])
def test_a_copy_that_fails_is_undone(there, method):
    daemon, system = there
    before = furniture(daemon)
    fault = b"2\0StoragePoolException\0\0no space left\0"
    daemon.before = lambda call: fault if call.method.endswith(method) else None
    with pytest.raises(StoragePoolException, match=r"no space left; the move was undone"):
        system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before
    assert daemon.vms["work"].volumes["private"].pool.name == "ssd"
    assert system.pending_move("work") is None


@pytest.mark.parametrize("number", range(1, 3))
def test_a_copy_without_an_answer_is_no_copy(there, number):
    daemon, system = there
    daemon.vms["work"].volumes["private"].size = 2 * GIB  # as a new one has: no size tells
    seen = []

    def nothing(call):
        if call.method == "admin.vm.volume.CloneTo":
            seen.append(call)
            if len(seen) == number:
                return b"\0"  # not even an answer: see after
        return None

    daemon.before = nothing
    daemon.after = lambda call, answer: b"" if answer == b"\0" else answer
    with pytest.raises(StoragePoolException, match="answered nothing") as err:
        system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon)
    assert ("was undone" in str(err.value)) is (number == 1)
    daemon.before = daemon.after = None
    assert system.migrate_vm("work", "btrfs") is not None
    assert whole_copies(daemon) == ["work"]


@pytest.mark.parametrize("started", ["work", "work-mv1"])
def test_a_vm_that_is_started_in_the_middle_stops_the_move_and_loses_nothing(there, started):
    daemon, system = there
    before = furniture(daemon)

    def start(call):
        if call.method == "admin.vm.volume.CloneTo":
            daemon.vms[started].running = True  # as 4.2 lets anyone do

    daemon.before = start
    with pytest.raises(StoragePoolException, match=r"is Running, it was started during its move"):
        system.migrate_vm("work", "btrfs")
    daemon.before = None
    daemon.vms[started].running = False
    if system.pending_move("work"):
        system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before


def test_a_vm_that_ran_only_while_it_was_copied_stops_the_move(there):
    daemon, system = there

    def ran(call, answer):
        if call.method == "admin.vm.property.Set":
            daemon.vms["work"].running = True
        if call.method == "admin.vm.volume.CloneTo":
            daemon.vms["work"].running = False
        return answer

    daemon.after = ran
    with pytest.raises(StoragePoolException, match=r"was started during its move; .*was undone"):
        system.migrate_vm("work", "btrfs")
    assert daemon.vms["work"].volumes["private"].pool.name == "ssd"


def test_the_new_vm_that_is_started_before_it_is_whole_gets_its_data_all_the_same(there):
    daemon, system = there
    before = furniture(daemon)

    def start(call):
        if call.method == "admin.vm.volume.CloneTo" and call.dest == "work":
            for volume in daemon.vms["work"].volumes.values():
                volume.start()
            daemon.vms["work"].running = True

    daemon.before = start
    with pytest.raises(
        StoragePoolException, match=r"was started.*a whole copy of work is in work-m"
    ):
        system.migrate_vm("work", "btrfs")
    daemon.before = None
    daemon.handle(b"admin.vm.Kill+ dom0 name work\0")
    assert whole_copies(daemon) == ["work-mv1"]  # what was copied into a running VM is lost
    system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before


def test_a_copy_that_someone_spoils_is_not_relied_on(there):
    daemon, system = there

    def spoil(call):
        if call.method == "admin.vm.property.Set" and call.dest == "vault":
            daemon.vms["work-mv1"].volumes["private"].size = GIB

    daemon.before = spoil
    with pytest.raises(StoragePoolException, match=r"no whole copy; the move was undone"):
        system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon) == ["work"]


def test_a_copy_that_is_smaller_is_none(there):
    daemon, system = there

    def spoil(call, answer):
        if call.method == "admin.vm.volume.CloneTo":
            daemon.vms["work-mv1"].volumes["private"].size = GIB
        return answer

    daemon.after = spoil
    with pytest.raises(StoragePoolException, match=r"is smaller than it; the move was undone"):
        system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon) == ["work"]


def test_the_copy_stays_until_the_new_vm_is_whole(there):
    daemon, system = there

    def spoil(call):
        if call.method == "admin.vm.property.Set" and call.payload == b"work":
            daemon.vms["work"].volumes["private"].size = GIB

    daemon.before = spoil
    with pytest.raises(StoragePoolException, match=r"VM work: its volume private is no whole copy"):
        system.migrate_vm("work", "btrfs")
    assert "work-mv1" in whole_copies(daemon)


def test_a_vm_that_was_used_and_grown_before_the_move_was_finished_is_left_as_it_is(there):
    daemon, system = there
    number = 27 if daemon.release == "4.2" else 32  # after all was given back
    assert killed_at(number, lambda: system.migrate_vm("work", "btrfs"), True)
    private = daemon.vms["work"].volumes["private"]
    private.size, private.data = 5 * GIB, "and one more day"
    system.refresh()
    system.migrate_vm("work", "btrfs")
    assert (private.size, private.data) == (5 * GIB, "and one more day")
    assert daemon.vms["work"].volumes["private"] is private


def test_a_move_that_had_not_removed_anything_is_begun_anew_with_what_changed_since(there):
    daemon, system = there
    assert killed_at(7, lambda: system.migrate_vm("work", "btrfs"), True)
    work = daemon.vms["work"]
    work.set["memory"] = "777"
    work.volumes["private"].data = "and one more day"
    work.volumes["private"].size = 4 * GIB
    system.refresh()
    system.migrate_vm("work", "btrfs")
    moved = daemon.vms["work"]
    assert moved.set["memory"] == "777"
    private = moved.volumes["private"]
    assert (private.data, private.size) == ("and one more day", 4 * GIB)
    assert "work-mv1" not in daemon.vms


def test_who_names_the_temporary_vm_meanwhile_goes_back_with_the_others(there):
    daemon, system = there

    def point(call):
        if call.method == "admin.vm.firewall.Set":
            daemon.vms["fedora"].set["netvm"] = "work-mv1"

    daemon.before = point
    system.migrate_vm("work", "btrfs")
    assert daemon.vms["fedora"].set["netvm"] == "work"
    assert "work-mv1" not in daemon.vms


def test_a_vm_that_someone_else_made_in_its_place_is_not_removed(there):
    daemon, system = there

    def take(call):
        if call.method == "admin.vm.CreateInPool.AppVM" and b"name=work " in call.payload:
            daemon.before = None
            daemon.add_vm("work", "StandaloneVM")
            daemon.vms["work"].volumes["private"].data = "of someone else"

    daemon.before = take
    with pytest.raises(StoragePoolException, match="someone else created it meanwhile"):
        system.migrate_vm("work", "btrfs")
    with pytest.raises(StoragePoolException, match="is not of this move; rename or remove it"):
        system.migrate_vm("work", "btrfs")
    assert daemon.vms["work"].volumes["private"].data == "of someone else"
    del daemon.vms["work"]
    system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon) == ["work"]


def test_a_vm_that_someone_else_makes_in_its_place_meanwhile_is_not_removed(there):
    daemon, system = there
    daemon.vms["vault"].set["netvm"] = "work"  # so that there is a step before the removal

    def replace(call):
        if call.method == "admin.vm.property.Set" and call.arg == "netvm":
            daemon.before = None
            del daemon.vms["work"]
            daemon.add_vm("work", pool="ssd")

    daemon.before = replace
    with pytest.raises(StoragePoolException, match="someone else made another one of that name"):
        system.migrate_vm("work", "btrfs")
    assert daemon.vms["work"].volumes["private"].pool.name == "ssd"
    assert daemon.vms["work-mv1"].volumes["private"].data == DATA


def test_a_name_that_someone_else_took_meanwhile_is_not_touched(there):
    daemon, system = there

    def take(call):
        if call.method == "admin.vm.Remove" and call.dest == "work":
            daemon.before = None
            daemon.vms["work"].name = "gone"
            removed = daemon.vms.pop("work")
            for volume in removed.volumes.values():
                volume.image(False)
            daemon.add_vm("work", "StandaloneVM")
            daemon.vms["work"].volumes["private"].data = "of someone else"
            return b"0\0"
        return None

    daemon.before = take
    with pytest.raises(StoragePoolException, match="was not removed"):
        system.migrate_vm("work", "btrfs")
    assert len(whole_copies(daemon)) == 1
    with pytest.raises(StoragePoolException, match="someone else made another one"):
        system.migrate_vm("work", "btrfs")
    assert daemon.vms["work"].volumes["private"].data == "of someone else"
    del daemon.vms["work"]
    system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon) == ["work"]


def test_what_could_not_be_given_back_is_named(there):
    daemon, system = there

    def refuse(call):
        if call.method == "admin.vm.property.Set" and call.arg == "memory":
            return b"2\0QubesValueError\0\0no\0"
        return None

    daemon.before = refuse
    with pytest.raises(StoragePoolException, match=r"is moved, but.*memory is None, not '512'"):
        system.migrate_vm("work", "btrfs")
    assert daemon.vms["work"].volumes["private"].pool.name == "btrfs"
    assert system.pending_move("work") is None


def test_a_daemon_that_stops_in_the_middle_is_said_and_the_move_goes_on_later(there):
    daemon, system = there
    before = furniture(daemon)
    stopped = []

    def stop(call, answer):
        if stopped or call.method == "admin.vm.Remove":
            stopped.append(call)
            return answer[:1]
        return answer

    daemon.after = stop
    with pytest.raises(StoragePoolException, match=r"cut off.*run qubes_vm.migrate work btrfs"):
        system.migrate_vm("work", "btrfs")
    assert whole_copies(daemon)
    daemon.after = None
    system.refresh()
    system.migrate_vm("work", "btrfs")
    assert furniture(daemon) == before


@pytest.mark.parametrize("name", ["vault", "work"])
def test_of_two_moves_at_once_the_second_waits(there, name):
    daemon, system = there
    daemon.vms["vault"].set.pop("netvm")
    second = threading.Thread(target=system.migrate_vm, args=(name, "btrfs"))
    copies = []

    def begin(call):
        if call.method == "admin.vm.volume.CloneTo":
            copies.append(call.dest)
            if len(copies) == 1:
                second.start()
                second.join(0.2)
                assert second.is_alive()

    daemon.before = begin
    system.migrate_vm("work", "btrfs")
    second.join()
    assert copies == [f"{vm}{end}" for vm in dict.fromkeys(["work", name]) for end in ("-mv1", "")]
    assert {daemon.vms[vm].volumes["private"].pool.name for vm in ("work", name)} == {"btrfs"}


def test_a_move_that_was_waited_for_and_cut_off_is_finished_first(there):
    daemon, system = there
    daemon.after = lambda call, answer: answer[:1] if "work" not in daemon.vms else answer
    with pytest.raises(StoragePoolException, match="was cut off"):
        system.migrate_vm("work", "btrfs")
    daemon.after = None
    with pytest.raises(StoragePoolException, match="its move to pool btrfs was cut off"):
        system.move("work", {"private": "btrfs"})
    system.migrate_vm("work", "btrfs")
    daemon.log.clear()
    system.resume_move("work")
    system.move("work", {"private": "btrfs"})
    assert whole_copies(daemon) == ["work"] and not writes(daemon)


@pytest.mark.parametrize("text", ["{half", '["a list"]'])
def test_a_journal_that_cannot_be_read_stops_everything_about_its_vm(there, text):
    daemon, system = there
    journal = Path(system.root) / JOURNAL
    journal.parent.mkdir(parents=True)
    journal.write_text(text)
    for verb in (
        lambda: system.vm_diff("work"),
        lambda: system.remove_vm("work", purge=True),
        lambda: system.migrate_vm("work", "btrfs"),
    ):
        with pytest.raises(StoragePoolException, match="cannot be read"):
            verb()
    assert not writes(daemon)


def test_what_dom0_names_is_not_removed_and_moves_with_its_name(there):
    daemon, system = there
    daemon.vms["dom0"].set["default_dispvm"] = "vault"
    daemon.vms["vault"].set["template_for_dispvms"] = "True"
    system.refresh()
    with pytest.raises(StoragePoolException, match="is named by dom0's default_dispvm;"):
        system.vm_remove_diff("vault", purge=True)
    system.migrate_vm("vault", "btrfs")
    assert daemon.vms["dom0"].set["default_dispvm"] == "vault"
    assert daemon.vms["vault"].volumes["private"].pool.name == "btrfs"


def test_what_a_package_installed_is_neither_removed_nor_moved(there):
    daemon, system = there
    daemon.add_vm("debian", "TemplateVM")
    daemon.vms["debian"].set["installed_by_rpm"] = "True"
    forget(daemon, system)
    for verb in (
        lambda: system.vm_remove_diff("debian", purge=True),
        lambda: system.vm_diff("debian", pool="btrfs", migrate=True),
    ):
        with pytest.raises(StoragePoolException, match="debian: a package installed it"):
            verb()
    daemon.vms["debian"].set["installed_by_rpm"] = "False"
    forget(daemon, system)
    system.migrate_vm("debian", "btrfs")
    assert "removed" in system.remove_vm("debian", purge=True)
