"""
A run that died anywhere is finished or undone by the next one.

A child makes the call and kills itself before its n-th filesystem event, for every n until it gets
through; then the same call is made again.
"""

import itertools
import os
import shutil
import signal
import sys

import pytest
from qubes_storage import build, image, registry
from qubes_storage.exc import StoragePoolException
from qubes_storage.vm import KERNEL_FILES

from tests.r32.machine import LIB, element
from tests.unit.test_drivers import disk

__all__ = ["disk"]

EVENTS = ("open", "os.", "fcntl.", "ctypes.dlsym")
VMDIR = f"{LIB}/appvms/work"


def kill_at(number, function):
    """Make a call in a child that dies before its n-th event; whether it got through."""
    child = os.fork()
    if not child:
        left = itertools.count(number, -1)

        def hook(event, _):
            if event.startswith(EVENTS) and next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            function()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def names(machine):
    """What lies in the VM directories, and beside qubes.xml."""
    found = []
    for place in (LIB, f"{LIB}/appvms", f"{LIB}/vm-templates"):
        found += [os.path.join(place, name) for name in os.listdir(machine.path(place))]
    return {name for name in found if "/." in name or "appvms/" in name}


def check_whole(machine):
    """The VM is there, whole, and nothing else is."""
    system = machine.connect()
    assert names(machine) == {VMDIR}
    assert system.vm_diff("work", **DECLARED) == {}
    assert sorted(os.listdir(machine.path(VMDIR))) == [
        "icon.png", "kernels", "private.img", "root.img", "volatile.img",
    ]  # fmt: skip
    assert sorted(os.listdir(machine.path(f"{VMDIR}/kernels"))) == sorted(KERNEL_FILES)
    modes = {entry.get("mode") for path, entry in machine.tree().items() if VMDIR in path}
    assert modes == {None, "2770", "0660"}
    with open(machine.path(f"{VMDIR}/private.img"), "rb") as file:
        assert file.readline() == b"PRIV:fedora-23\n"


DECLARED = {"klass": "StandaloneVM", "template": "fedora-23"}


def present(system):
    """What the state does: diff, then create, set or nothing; returns the changes."""
    changes = system.vm_diff("work", **DECLARED)
    if changes:
        (system.create_vm if "created" in changes else system.set_vm)("work", **DECLARED)
    return changes


def steps(stride=5):
    """Where to die: each step for the main verbs, some of them for what is alike."""
    return itertools.count(1, stride)


def test_a_create_that_died_anywhere_is_mended_by_the_next(scratch):
    died = 0
    for number in steps(2):
        machine = scratch()
        text = machine.xml
        through = kill_at(number, lambda: machine.connect().create_vm("work", **DECLARED))  # noqa: B023
        registry.loads(machine.xml)
        registered = "work" in machine.connect().list_vms()
        assert registered or machine.xml == text
        changes = present(machine.connect())
        assert through or registered or "created" in changes
        assert set(changes) <= {"created", "klass", "template", "label", "pool", "unfinished"}
        check_whole(machine)
        assert present(machine.connect()) == {}
        if through:
            break
        died += 1
    assert died > 50


@pytest.mark.parametrize("verb", ["create", "clone", "rename"])
def test_what_a_dead_create_left_goes_when_the_name_is_given_elsewhere(scratch, verb):
    machine = scratch("[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n")
    machine.add_pools()
    system = machine.connect()
    system.create_vm("old", pool="default", **DECLARED)
    left = machine.path("/mnt/foo/appvms/.work.creating")
    for number in steps(20):
        assert not kill_at(number, lambda: system.create_vm("work", pool="foo", **DECLARED))
        if left.exists():
            break
    if verb == "rename":
        assert system.rename_vm("old", "work")["unfinished"]["old"] == [
            "/mnt/foo/appvms/.work.creating"
        ]
    else:
        declared = DECLARED if verb == "create" else {"clone_from": "old"}
        changes = system.vm_diff("work", **declared)
        assert changes["unfinished"]["old"] == ["/mnt/foo/appvms/.work.creating"]
        assert system.create_vm("work", **declared) == changes
    assert not left.exists()
    assert system.list_vms()["work"]["pool"] == "default"
    assert system.vm_diff("work") == {}


def test_a_remove_that_died_anywhere_is_finished_by_the_next(scratch):
    died = 0
    for number in steps(3):
        machine = scratch()
        machine.connect().create_vm("work", **DECLARED)
        through = kill_at(number, lambda: machine.connect().remove_vm("work", purge=True))  # noqa: B023
        registry.loads(machine.xml)
        machine.connect().remove_vm("work", purge=True)
        assert "work" not in machine.connect().list_vms()
        assert names(machine) == set()
        assert machine.connect().remove_vm("work", purge=True) == {}
        if through:
            break
        died += 1
    assert died > 10


def test_a_remove_that_died_can_be_undone_by_declaring_the_vm_again(scratch):
    for number in steps():
        machine = scratch()
        machine.connect().create_vm("work", **DECLARED)
        through = kill_at(number, lambda: machine.connect().remove_vm("work", purge=True))  # noqa: B023
        present(machine.connect())
        check_whole(machine)
        assert present(machine.connect()) == {}
        if through:
            break


def test_a_create_that_died_is_taken_away_by_a_remove(scratch):
    for number in steps():
        machine = scratch()
        through = kill_at(number, lambda: machine.connect().create_vm("work", **DECLARED))  # noqa: B023
        machine.connect().remove_vm("work", purge=True)
        assert names(machine) == set()
        assert "work" not in machine.connect().list_vms()
        if through:
            break


@pytest.mark.parametrize("content", [None, "precious"])
def test_a_foreign_directory_put_there_after_the_death_is_never_deleted(scratch, content):
    taken = 0
    for number in steps():
        machine = scratch()
        through = kill_at(number, lambda: machine.connect().create_vm("work", **DECLARED))  # noqa: B023
        place = machine.path(VMDIR)
        if through or "work" in machine.connect().list_vms():
            break
        if place.exists():
            continue
        place.mkdir()
        if content:
            (place / content).write_text(content)
        inode = place.stat().st_ino
        with pytest.raises(StoragePoolException, match="left alone"):
            machine.connect().create_vm("work", **DECLARED)
        assert place.stat().st_ino == inode
        assert os.listdir(place) == ([content] if content else [])
        machine.connect().remove_vm("work", purge=True)
        assert place.stat().st_ino == inode
        taken += 1
    assert taken > 10


def test_a_body_that_fails_leaves_nothing_and_keeps_what_is_removed(scratch):
    machine = scratch()
    system = machine.connect()
    text = machine.xml
    plan = system.plan("work", **DECLARED)[1]
    with pytest.raises(RuntimeError), build.built(plan):
        assert machine.path(VMDIR).is_dir()
        raise RuntimeError
    assert names(machine) == set()
    assert machine.xml == text
    system.create_vm("work", **DECLARED)
    vm = system.get_vm("work")
    with pytest.raises(RuntimeError), build.removed(system.pool_of(vm), vm):
        assert not machine.path(VMDIR).exists()
        raise RuntimeError
    check_whole(machine)


def test_a_link_in_the_place_of_a_vm_is_taken_for_nothing_of_ours(scratch):
    machine = scratch()
    machine.mkdir("/mnt/elsewhere")
    machine.image("/mnt/elsewhere/private.img", 4096, "mine")
    machine.path(VMDIR).symlink_to("/mnt/elsewhere")
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="left alone"):
        machine.connect().create_vm("work", **DECLARED)
    assert machine.tree() == before
    machine.elements.append(element("QubesAppVm", "work", 2, template_qid="1"))
    machine.write_registry()
    for verb in ("remove_vm", "vm_remove_diff"):
        with pytest.raises(StoragePoolException, match="work is no directory that can be opened"):
            getattr(machine.connect(), verb)("work", purge=True)
    assert machine.path(VMDIR).is_symlink()
    assert image.measure(os.open(machine.path("/mnt/elsewhere"), os.O_RDONLY), "private.img")


def test_images_that_a_dead_removal_set_aside_still_need_purge(scratch):
    machine = scratch()
    system = machine.connect()
    system.create_vm("work", **DECLARED)
    os.rename(machine.path(VMDIR), machine.path(f"{LIB}/appvms/.work.removing"))
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="purge"):
        system.remove_vm("work")
    assert machine.tree() == before
    assert set(system.remove_vm("work", purge=True)) == {"removed", "deleted", "unfinished"}
    assert names(machine) == set()


def test_a_registry_that_a_dead_run_did_not_rename_is_taken_away(scratch):
    machine = scratch()
    machine.write(f"{LIB}/.qubes.xml.new", b"<Qub", 0o660)
    with machine.connect().locked():
        assert names(machine) == set()


def test_a_directory_that_a_user_restored_in_the_place_of_a_dead_run_s_stays(disk):
    """ext4 gives it the number of the inode that was deleted."""
    machine = disk("ext4")
    system = machine.connect()
    system.add_pool("ssd", dir_path="/mnt/ssd/qubes")
    place = machine.path("/mnt/ssd/qubes/appvms/work")
    child = os.fork()
    if not child:
        system.save_registry = lambda registry: os.kill(os.getpid(), signal.SIGKILL)
        system.create_vm("work", pool="ssd", **DECLARED)
    os.waitpid(child, 0)
    number = place.stat().st_ino
    shutil.rmtree(place)
    place.mkdir()
    assert place.stat().st_ino == number
    (place / "private.img").write_text("restored")
    with pytest.raises(StoragePoolException, match="left alone"):
        system.create_vm("work", pool="ssd", **DECLARED)
    assert (place / "private.img").read_text() == "restored"
