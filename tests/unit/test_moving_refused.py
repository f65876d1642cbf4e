"""VMs that cannot move, or not at once: the source goes, a disk refuses, a user is not root."""

import errno
import os
import subprocess

import pytest
from qubes_storage import markers
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import GID, LIB, USER
from tests.unit.test_build import kill_at, steps
from tests.unit.test_files import as_user
from tests.unit.test_image import mount
from tests.unit.test_moving import content

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
SHARED = 12345  # a group that is not that of the directories
APPVMS = f"{LIB}/appvms"
OLD, NEW = f"{APPVMS}/work", "/mnt/foo/appvms/work"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount or be another user")


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.add_pools()
    made.connect().create_vm("work", klass="StandaloneVM")
    made.path(f"{OLD}/private.img").write_bytes(b"data".ljust(512))
    return made


def change(machine, name, **attrs):
    """Write other attributes of a VM into the registry."""
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    for _, given in machine.elements:
        if given["name"] == name:
            given.update(attrs)
    machine.write_registry()


def holds(machine, place):
    """The VM is whole in a place, and in no other."""
    system = machine.connect()
    assert machine.path(f"{place}/private.img").read_bytes().startswith(b"data")
    assert system.vm_info("work")["dir_path"] == place
    assert system.vm_diff("work") == {}
    found = os.listdir(machine.path(OLD).parent) + os.listdir(machine.path(NEW).parent)
    assert found == ["work"]


def test_a_name_that_was_never_a_vms_is_not_taken_for_one_that_was_renamed(machine):
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="VM none: is not in qubes.xml"):
        machine.connect().rename_vm("none", "work")
    assert machine.tree() == before


def test_a_template_of_a_package_keeps_its_name(machine):
    change(machine, "fedora-23", installed_by_rpm="True")
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="installed by RPM, which .*; clone it instead"):
        machine.connect().rename_vm("fedora-23", "f24")
    assert machine.tree() == before


@pytest.mark.parametrize("verb", ["rename_vm", "migrate_vm"])
def test_a_vm_whose_removal_died_is_whole_again_and_moves(machine, verb):
    machine.path(OLD).rename(machine.path(f"{LIB}/appvms/.work.removing"))
    system = machine.connect()
    if verb == "migrate_vm":
        system.migrate_vm("work", "foo")
        holds(machine, NEW)
    else:
        system.rename_vm("work", "play")
        system.rename_vm("play", "work")
        holds(machine, OLD)


def test_a_vm_that_goes_while_it_is_to_move_stays_in_the_registry_as_it_was(machine, monkeypatch):
    text, away = machine.xml, machine.path("/mnt/away")
    symlink = os.symlink

    def go(target, name, **kwargs):
        symlink(target, name, **kwargs)
        if name == ".work.moving":
            machine.path(OLD).rename(away)

    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", go)
        with pytest.raises(StoragePoolException, match="cannot be made in pool foo .*No such file"):
            machine.connect().migrate_vm("work", "foo")
    assert machine.xml == text
    away.rename(machine.path(OLD))
    holds(machine, OLD)


def pipe(place):
    (place / "apps").mkdir()
    os.mkfifo(place / "apps/pipe")


def twice(place):
    os.link(place / "private.img", place.parent / "other")


def deep(place):
    for _ in range(70):
        place /= "deep"
    place.mkdir(parents=True)


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (pipe, "no file, directory or link; take it away"),
        (twice, "private.img has a name elsewhere too"),
        (deep, "deep lies more than 64 directories deep"),
    ],
)
def test_what_cannot_move_is_told_beforehand(machine, plant, why):
    plant(machine.path(OLD))
    system, before = machine.connect(), (content(machine, APPVMS), machine.xml)
    for call in (
        lambda: system.vm_diff("work", pool="foo", migrate=True),
        lambda: system.migrate_vm("work", "foo"),
        lambda: system.migrate_vm("work", "foo", keep=True),
    ):
        with pytest.raises(StoragePoolException, match=f"VM work: .*{why}"):
            call()
        assert (content(machine, APPVMS), machine.xml) == before
        assert os.listdir(machine.path("/mnt/foo/appvms")) == []


def test_a_disk_that_refuses_a_second_name_leaves_the_vm_where_it_was(machine, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fail)
        with pytest.raises(StoragePoolException, match="Input/output error; nothing was left"):
            machine.connect().migrate_vm("work", "foo")
    holds(machine, OLD)


@root_only
def test_what_a_member_of_the_group_moves_becomes_their_own_and_stays_the_groups(machine):
    kept = machine.path(f"{OLD}/private.img")
    os.chown(kept, 0, SHARED)
    kept.chmod(0o640)
    with as_user(USER, GID + 1, GID, SHARED):
        machine.connect().migrate_vm("work", "foo", keep=True)
    found = machine.path(f"{NEW}/private.img").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (USER, SHARED, 0o640)
    assert found.st_mtime_ns == kept.stat().st_mtime_ns
    assert machine.connect().vm_info("work")["dir_path"] == NEW


@root_only
def test_a_vm_whose_old_place_cannot_be_emptied_has_moved_and_is_mended_later(machine, monkeypatch):
    (machine.path(OLD) / "apps").mkdir()
    (machine.path(OLD) / "apps/menu").write_text("menu")
    left = machine.path(f"{LIB}/appvms/.work.removing")
    leave = markers.Origin.leave

    def occupied(*args):  # somebody mounts a disk there while it is copied
        mount("tmpfs", machine.path(f"{OLD}/apps"))
        leave(*args)

    monkeypatch.setattr(markers.Origin, "leave", occupied)
    try:
        with pytest.raises(StoragePoolException, match="could not be deleted: .* mount point"):
            machine.connect().migrate_vm("work", "foo")
        assert os.readlink(left.parent / ".work.moving") == NEW
    finally:
        place = left if left.exists() else machine.path(OLD)
        subprocess.run(["umount", place / "apps"], check=True)
        monkeypatch.undo()
    assert "unfinished" in machine.connect().set_vm("work")
    holds(machine, NEW)
    assert machine.path(f"{NEW}/apps/menu").read_text() == "menu"


def test_rules_that_are_nowhere_are_none(machine):
    change(machine, "work", firewall_conf=f"{LIB}/appvms/gone/firewall.xml")
    machine.connect().migrate_vm("work", "foo")
    holds(machine, NEW)
    assert not machine.path(f"{NEW}/firewall.xml").exists()


def test_rules_that_are_no_file_are_named(machine):
    rules = f"{LIB}/servicevms/other/firewall.xml"
    change(machine, "work", firewall_conf=rules)
    machine.mkdir(rules)
    with pytest.raises(StoragePoolException, match=f"VM work: {rules}: .*not a regular file"):
        machine.connect().migrate_vm("work", "foo")
    holds(machine, OLD)


def test_the_mark_of_a_move_to_a_disk_that_is_away_goes(machine):
    machine.path(f"{LIB}/appvms/.work.moving").symlink_to("/mnt/away/appvms/work")
    assert "unfinished" in machine.connect().set_vm("work")
    holds(machine, OLD)


def test_an_old_copy_that_no_run_finishes_is_told_beforehand(machine):
    """The disk was away when the move was finished, and then came back with its mark."""
    system = machine.connect()
    system.migrate_vm("work", "foo", keep=True)
    machine.path(f"{LIB}/appvms/.work.moving").symlink_to(NEW)
    before = machine.tree()
    for verb in (system.vm_diff, system.set_vm):
        with pytest.raises(StoragePoolException, match=f"{OLD} is there, and the regi.*; move it"):
            verb("work", pool="default", migrate=True)
    assert machine.tree() == before
    machine.path(OLD).rename(machine.path("/mnt/old"))
    changes = system.vm_diff("work", pool="default", migrate=True)
    assert system.set_vm("work", pool="default", migrate=True) == changes
    holds(machine, OLD)


def test_a_vm_moves_back_wherever_its_move_died(scratch):
    for number in steps(2):
        machine = scratch(CONF)
        machine.add_pools()
        machine.connect().create_vm("work", klass="StandaloneVM")
        machine.path(f"{OLD}/private.img").write_bytes(b"data".ljust(512))
        through = kill_at(number, lambda: machine.connect().migrate_vm("work", "foo"))  # noqa: B023
        system = machine.connect()
        back = {"pool": "default", "migrate": True}
        changes = system.vm_diff("work", **back)
        assert system.set_vm("work", **back) == changes
        holds(machine, OLD)
        if through:
            break


@root_only
@pytest.mark.parametrize("keep", [False, True])
def test_a_disk_that_is_mounted_read_only_is_told_beforehand(machine, keep):
    system, place = machine.connect(), machine.mkdir("/mnt/ro")
    mount("tmpfs", place)
    try:
        system.add_pool("ro", dir_path="/mnt/ro/q")
        system.migrate_vm("work", "ro")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        match = "VM work: /mnt/ro/q/appvms/work is on a disk that is mounted read-only, .*; mount"
        for call in (
            lambda: system.vm_diff("work", pool="foo", migrate=True),
            lambda: system.migrate_vm("work", "foo", keep),
            lambda: system.rename_vm("work", "play"),
        ):
            with pytest.raises(StoragePoolException, match=match):
                call()
        system.clone_vm("work", "play", "foo")
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_old_place_whose_disk_goes_meanwhile_goes_all_the_same(machine):
    system, away = machine.connect(), machine.path("/mnt/away")
    system.migrate_vm("work", "foo")
    save = type(system).save_registry

    def unmount_and_save(self, registry):
        machine.path("/mnt/foo").rename(away)
        save(self, registry)

    system.save_registry = unmount_and_save.__get__(system)
    system.migrate_vm("work", "default")
    assert os.listdir(away / "appvms") == []
    away.rename(machine.path("/mnt/foo"))
    holds(machine, OLD)


def test_an_old_place_whose_disk_is_away_hinders_nobody(machine, monkeypatch):
    """The run died once the VM was in its new pool, and then the disk of the old one went."""
    sync, away = os.fsync, machine.path("/mnt/away")

    def fail(fd):
        if os.readlink(f"/proc/self/fd/{fd}") == str(machine.path(LIB)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    system = machine.connect()
    system.migrate_vm("work", "foo")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(StoragePoolException, match="it is done, but"):
            system.migrate_vm("work", "default")
    machine.path("/mnt/foo").rename(away)
    assert "unfinished" in system.set_vm("work")
    assert machine.path(f"{OLD}/private.img").read_bytes().startswith(b"data")
    assert os.listdir(machine.path(OLD).parent) == ["work"]
    assert (away / "appvms/work/private.img").exists()


def test_a_vm_does_not_move_to_where_it_is(scratch):
    machine = scratch(f"{CONF}[bar]\ndriver=xen\ndir_path=/mnt/foo\n")
    machine.add_pools()
    system = machine.connect()
    system.create_vm("work", pool="foo")
    before = machine.tree()
    for verb in (lambda: system.vm_diff("work", pool="bar", migrate=True),
                 lambda: system.migrate_vm("work", "bar")):  # fmt: skip
        with pytest.raises(StoragePoolException, match="bar: .* is the directory of pool foo too"):
            verb()
    assert machine.tree() == before
