"""Copies of whole VMs over the Admin API, on each release, that die at every step."""

import json
import os
import threading
from pathlib import Path

import pytest
from qubes_storage import StoragePoolException
from qubes_storage.adminapi import Client

from tests.r4.machine import RELEASES, forget, killed_at, machine, writes

GIB = 1024**3
DATA = {"private": "the work of years", "root": "a system"}
JOURNAL = "var/lib/qubes/storage-copies/copy.json"
CLONE = {"clone_from": "work", "pool": "btrfs"}
ALONE = {"klass": "StandaloneVM", "template": "fedora", "pool": "btrfs"}

pytestmark = pytest.mark.usefixtures("qubesadmin")


def furnish(daemon, system):
    for vm in ("work", "fedora"):
        for volume in ("private", "root"):
            if daemon.vms[vm].volumes[volume].save:
                daemon.vms[vm].volumes[volume].data = DATA[volume]
    forget(daemon, system)


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    with machine(request.param, tmp_path) as (daemon, system):
        furnish(daemon, system)
        yield daemon, system


def content(daemon, name="copy"):
    """``{volume: what it holds}`` of those that a VM keeps, or None."""
    vm = daemon.vms.get(name)
    return vm and {v.name: v.data for v in vm.volumes.values() if v.save}


def check_made(daemon, system, declared):
    """See that a copy is whole, may be started, and has no journal."""
    made = daemon.vms["copy"]
    assert {v: made.volumes[v].data for v in content(daemon)} == {
        v: DATA[v] for v in content(daemon)
    }
    assert {v.pool.name for v in made.volumes.values() if v.save} == {"btrfs"}
    assert made.features == {}
    assert not (Path(system.root) / JOURNAL).exists()
    forget(daemon, system)
    assert system.vm_diff("copy", **declared) == {}
    assert system.verify_vm("copy") == []
    assert not writes(daemon)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("declared", [CLONE, ALONE], ids=["clone_from", "template"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_copy_that_is_killed_anywhere_is_made_by_the_next_run(release, declared, after, tmp_path):
    kinds, number, killed = set(), 0, True
    while killed:
        number += 1
        root = tmp_path / str(number)
        root.mkdir()
        with machine(release, root) as (daemon, system):
            furnish(daemon, system)
            killed = killed_at(
                number, lambda s=system: s.create_vm("copy", **declared), after, files=True
            )
            forget(daemon, system)
            pending = system.pending_copy("copy")
            if "copy" in daemon.vms:
                assert bool(system.verify_vm("copy")) is bool(pending)
            try:
                told = system.vm_diff("copy", **declared)
            except StoragePoolException as err:
                # What was copied last may have been put there by who started it since.
                assert release == "4.2" and "something may have been put into it" in str(err)
                assert next(iter(content(daemon).values()))
                kinds.add("not known")
                assert not writes(daemon)
                system.remove_vm("copy", purge=True)
                told = system.vm_diff("copy", **declared)
            forget(daemon, system)
            kinds.add(frozenset({"created", "unfinished"} & set(told)))
            assert ("unfinished" in told) is ((Path(system.root) / JOURNAL).exists())
            if told:
                assert content(daemon) is None or "unfinished" in told
                verb = system.set_vm if "created" not in told else system.create_vm
                assert verb("copy", **declared) == told
            check_made(daemon, system, declared)
            assert (
                content(daemon, "work" if declared is CLONE else "fedora").items() <= DATA.items()
            )
    assert kinds >= {
        frozenset(), frozenset({"created", "unfinished"}), frozenset({"unfinished"})
    }  # fmt: skip
    # Before R4.3 one moment is not known; what is noted after it is.
    assert ("not known" in kinds) is (release == "4.2")


def cut_off(system, step, declared=CLONE):
    """
    A copy that was killed: ``hollow`` after the VM was made, ``copied`` once its last volume was,
    ``whole`` once that was noted.
    """
    made = 0

    def keep(name, unlink=os.unlink, **kwargs):
        if name.endswith(".json"):  # the journal is not to go
            os._exit(9)
        unlink(name, **kwargs)

    def die(client, data, method, send=Client._send):
        nonlocal made
        answer = send(client, data, method)
        made += method == "admin.vm.volume.CloneTo"
        if step == "hollow" and ".Create" in method:
            os._exit(9)
        if made == (1 if declared is CLONE else 2):
            if step == "copied":
                os._exit(9)
            os.unlink = keep
        return answer

    pid = os.fork()
    if not pid:
        Client._send = die
        system.create_vm("copy", **declared)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    system.refresh()
    return (Path(system.root) / JOURNAL).read_text()


def test_what_a_dead_copy_left_is_mended_by_every_verb_that_declares_it(there):
    daemon, system = there
    for verb in (
        lambda: system.set_vm("copy", **CLONE),
        lambda: system.create_vm("copy", **CLONE, create_only=True),
        lambda: system.clone_vm("work", "copy", "btrfs"),
    ):
        cut_off(system, "hollow")
        changes = verb()
        assert changes["unfinished"]["old"] == f"/{JOURNAL}"
        assert changes["created"] == {"old": None, "new": "copy"}
        check_made(daemon, system, CLONE)
        system.remove_vm("copy", purge=True)


def test_who_does_not_declare_the_copy_is_told_of_it(there):
    daemon, system = there
    cut_off(system, "hollow")
    daemon.log.clear()
    for verb in (
        lambda: system.vm_diff("copy"),
        lambda: system.set_vm("copy", label="green", create_only=True),
        lambda: system.vm_diff("copy", klass="StandaloneVM"),
        lambda: system.vm_diff("copy", template="fedora"),
        lambda: system.resize_vm("copy", "private", "9GiB"),
        lambda: system.migrate_vm("copy", "ssd"),
    ):
        with pytest.raises(
            StoragePoolException, match=r"copy of work was cut off.*declare clone_f"
        ):
            verb()
    with pytest.raises(StoragePoolException, match="have it copied again first") as err:
        system.clone_vm("copy", "second")
    assert err.value.waits_for == [("VM", "copy")]
    assert not writes(daemon)


def test_a_whole_copy_is_finished_by_whatever_changes_it(there):
    daemon, system = there
    for verb in (
        lambda: system.set_vm("copy", create_only=True),
        lambda: system.set_vm("copy", label="green"),
        lambda: system.resize_vm("copy", "private", "9GiB"),
        lambda: system.migrate_vm("copy", "ssd"),
        lambda: system.create_vm("copy", **CLONE),
    ):
        cut_off(system, "whole")
        assert verb()["unfinished"] == {"old": f"/{JOURNAL}", "new": None}
        assert daemon.vms["copy"].volumes["private"].data == DATA["private"]
        assert daemon.vms["copy"].features == {}
        assert not (Path(system.root) / JOURNAL).exists()
        system.remove_vm("copy", purge=True)


@pytest.mark.parametrize("step", ["hollow", "copied", "whole"])
def test_what_a_dead_copy_left_can_be_removed(there, step):
    daemon, system = there
    cut_off(system, step)
    changes = system.vm_remove_diff("copy", purge=True)
    assert {"removed", "deleted", "unfinished"} == set(changes)
    assert system.remove_vm("copy", purge=True) == changes
    assert "copy" not in daemon.vms
    assert system.vm_remove_diff("copy", purge=True) == {}


def test_a_journal_without_its_vm_is_told_and_goes(there):
    daemon, system = there
    for verb in (
        lambda: system.remove_vm("copy"),
        lambda: system.create_vm("copy", label="red"),
    ):
        cut_off(system, "hollow")
        del daemon.vms["copy"]
        system.refresh()
        assert verb()["unfinished"]["old"] == f"/{JOURNAL}"
        assert not (Path(system.root) / JOURNAL).exists()
    assert content(daemon) == {"private": ""}
    assert system.vm_diff("copy", label="red") == {}


def test_removing_what_another_removes_first_is_no_change(there):
    daemon, system = there
    cut_off(system, "hollow")

    def first(call):
        if call.method == "admin.vm.Remove":
            daemon.vms.pop("copy", None)

    daemon.before = first
    assert system.remove_vm("copy", purge=True) == {}
    assert not (Path(system.root) / JOURNAL).exists()


@pytest.mark.parametrize("declared", [CLONE, ALONE], ids=["clone_from", "template"])
@pytest.mark.parametrize("step", ["hollow", "copied"])
def test_a_vm_that_someone_made_and_filled_meanwhile_is_not_removed(there, step, declared):
    daemon, system = there
    cut_off(system, step, declared)
    del daemon.vms["copy"]
    daemon.add_vm("copy", "StandaloneVM")
    for volume in ("private", "root"):
        daemon.vms["copy"].volumes[volume].data = "of someone else"
    forget(daemon, system)
    if step == "hollow":  # nobody noted what was made
        for verb in (system.vm_diff, system.create_vm, system.set_vm):
            with pytest.raises(StoragePoolException, match="something may have been put into it"):
                verb("copy", **declared)
        (Path(system.root) / JOURNAL).unlink()
    assert system.vm_diff("copy", clone_from="work") == {}
    with pytest.raises(StoragePoolException, match="is there already"):
        system.create_vm("copy", clone_from="work")
    assert not writes(daemon)
    assert set(content(daemon).values()) == {"of someone else"}


@pytest.mark.parametrize("change", ["filled", "running", "allowed", "named"])
def test_a_copy_that_someone_used_before_it_was_whole_is_not_removed(there, change):
    daemon, system = there
    cut_off(system, "copied" if change == "allowed" else "hollow")
    copy = daemon.vms["copy"]
    why = "delete that file to keep the VM"
    if change == "running":
        copy.running = True
        why = "is Running; shut it down"
    elif change == "filled":
        copy.volumes["private"].data = "one day's work"
    elif change == "named":
        daemon.vms["vault"].set["netvm"] = "copy"
        why = "is named by vault's netvm"
    else:
        copy.features.pop("prohibit-start", None)
    forget(daemon, system)
    for verb in (system.vm_diff, system.create_vm, system.set_vm):
        with pytest.raises(StoragePoolException, match=why):
            verb("copy", **CLONE)
    assert not writes(daemon)


def at_call(daemon, method, number, act):
    """Have something happen before the daemon is asked that for that time."""
    seen = []

    def before(call):
        if (call.method, call.dest) == (method, "dom0"):
            seen.append(call)
            if len(seen) == number:
                act()

    daemon.before = before


def test_a_vm_that_is_filled_between_the_plan_and_the_removal_is_not_removed(there):
    daemon, system = there
    cut_off(system, "hollow")
    private = daemon.vms["copy"].volumes["private"]
    at_call(daemon, "admin.vm.List", 2, lambda: setattr(private, "data", "one day's work"))
    with pytest.raises(StoragePoolException, match="something may have been put into it"):
        system.create_vm("copy", **CLONE)
    assert content(daemon) == {"private": "one day's work"}


def test_a_vm_that_someone_makes_between_the_plan_and_the_copy_is_left_alone(there):
    daemon, system = there
    at_call(daemon, "admin.vm.List", 2, lambda: daemon.add_vm("copy"))
    with pytest.raises(StoragePoolException, match="is there already; someone else made it"):
        system.create_vm("copy", **CLONE)
    assert not writes(daemon)
    assert not (Path(system.root) / JOURNAL).exists()


@pytest.mark.parametrize("step", ["hollow", "whole"])
def test_what_another_run_has_mended_by_then_is_left_alone(there, step):
    daemon, system = there
    cut_off(system, step)

    def mend():
        (Path(system.root) / JOURNAL).unlink()
        daemon.vms["copy"].volumes["private"].data = DATA["private"]

    at_call(daemon, "admin.pool.UsageDetails" if step == "hollow" else "admin.label.List", 1, mend)
    if step == "whole":
        assert "unfinished" in system.set_vm("copy", label="green")
    else:
        with pytest.raises(StoragePoolException, match="is there already; someone else made it"):
            system.create_vm("copy", **CLONE)
    assert content(daemon) == {"private": DATA["private"]}


def test_a_copy_waits_for_another_one(there):
    daemon, system = there
    thread = threading.Thread(target=lambda: system.create_vm("copy", **CLONE))
    with system.copies.locked("other"):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not writes(daemon)
    thread.join()
    check_made(daemon, system, CLONE)


def test_a_copy_that_fails_leaves_nothing(there):
    daemon, system = there
    fault = b"2\0StoragePoolException\0\0no space left\0"
    for method in ("CloneTo", "CloneFrom"):
        daemon.before = lambda call, method=method: fault if method in call.method else None
        with pytest.raises(
            StoragePoolException, match=r"not be cloned from work: .*no space left$"
        ):
            system.create_vm("copy", **CLONE)
        assert "copy" not in daemon.vms
        assert not (Path(system.root) / JOURNAL).exists()


@pytest.mark.parametrize("method", ["feature.Set", "volume.CloneTo"])
def test_a_copy_that_is_started_before_it_is_whole_is_none(there, method):
    daemon, system = there
    daemon.vms["work"].features["a-feature"] = "1"
    forget(daemon, system)

    def start(call, answer):
        if call.method == f"admin.vm.{method}":
            daemon.vms["copy"].running = True
            daemon.vms["copy"].features.pop("prohibit-start", None)
        return answer

    daemon.after = start
    with pytest.raises(StoragePoolException, match=r"could not be clon.*; what is there of it can"):
        system.create_vm("copy", **CLONE)
    daemon.after = None
    daemon.vms["copy"].running = False
    daemon.vms["copy"].volumes["private"].data = "one day's work"
    forget(daemon, system)
    assert "was cut off" in system.verify_vm("copy")[0]
    with pytest.raises(StoragePoolException, match="something may have been put into it"):
        system.create_vm("copy", **CLONE)
    assert not writes(daemon)


def test_what_qubesadmin_could_not_take_away_goes_with_the_next_run(there):
    daemon, system = there
    kernel = daemon.globals.set.pop("default_kernel")  # the daemon answers nothing, and makes it
    with pytest.raises(StoragePoolException, match=r"could not be cloned.*copy is declared again$"):
        system.create_vm("copy", **CLONE)
    daemon.globals.set["default_kernel"] = kernel
    system.refresh()
    assert set(system.vm_diff("copy", **CLONE)) >= {"created", "unfinished"}
    system.create_vm("copy", **CLONE)
    check_made(daemon, system, CLONE)


def test_a_copy_that_is_not_to_be_started_is_not_afterwards(there):
    daemon, system = there
    daemon.vms["work"].features["prohibit-start"] = "it is an archive"
    forget(daemon, system)
    system.create_vm("copy", **CLONE)
    assert daemon.vms["copy"].features == {"prohibit-start": "it is an archive"}


def test_a_copy_lies_where_its_source_does_unless_it_is_declared(there):
    daemon, system = there
    volumes = {"volatile": {"pool": "btrfs"}}
    system.create_vm("copy", clone_from="work", volumes=volumes)
    pools = {v.name: v.pool.name for v in daemon.vms["copy"].volumes.values()}
    assert (pools["private"], pools["volatile"]) == ("ssd", "btrfs")
    system.set_pool("ssd", min_free="900TiB")
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match=r"pool ssd: .*min_free keeps 900"):
            verb("second", clone_from="work")


def test_a_vm_that_runs_is_copied_where_its_driver_can(there):
    daemon, system = there
    for vm in ("work", "vault"):
        daemon.vms[vm].running = True
    forget(daemon, system)
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match=r"vault is running, .* driver file"):
            verb("copy", clone_from="vault", pool="btrfs")
    assert not writes(daemon)
    system.create_vm("copy", **CLONE)
    check_made(daemon, system, CLONE)


def test_a_standalone_is_no_copy_of_a_vm_without_a_root_of_its_own(there):
    daemon, system = there
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match=r"work has no root volume of its own"):
            verb("copy", klass="StandaloneVM", template="work")
    assert not writes(daemon)


@pytest.mark.parametrize("text", ["{half", "[]"])
def test_a_journal_of_a_copy_that_cannot_be_read_stops_everything_about_its_vm(there, text):
    daemon, system = there
    system.create_vm("copy", **CLONE)
    (Path(system.root) / JOURNAL).write_text(text)
    forget(daemon, system)
    for verb in (
        lambda: system.vm_diff("copy"),
        lambda: system.remove_vm("copy", purge=True),
        lambda: system.verify_vm("copy"),
    ):
        with pytest.raises(StoragePoolException, match="the journal of its copy, cannot be read"):
            verb()
    (Path(system.root) / JOURNAL).write_text(json.dumps({}))
    with pytest.raises(StoragePoolException, match="something may have been put into it"):
        system.vm_diff("copy", **CLONE)
    assert not writes(daemon)


def test_a_vm_that_is_no_copy_has_none_to_finish(there):
    daemon, system = there
    system.finish_copy("work")  # another run has finished it
    assert not writes(daemon)
