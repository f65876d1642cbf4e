"""Old images where none are kept, none can be, or a VM is not as its driver would have made it."""

import os
import subprocess
import sys

import pytest
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException

from tests.unit.test_drivers import IMG, disk, pool_with_vm, read, write
from tests.unit.test_undoing import kill_when

__all__ = ["disk"]
CLAIMS = """
from qubes_storage.drivers import xen

class Pool(xen.Pool):
    def revisions(self, fd, name):
        return ["1@2026-11-24T16:00:00Z"]
"""
PLAIN = """
import os
import qubes_storage
from qubes_storage import files

class Pool(qubes_storage.Pool):
    can_revisions = True

    def __init__(self, name, *, dir_path: str, revisions_to_keep: int = 2):
        super().__init__(name, dir_path=dir_path)
        self.revisions_to_keep = revisions_to_keep

    def snapshot(self, fd, names):
        for name in names:
            kept = files.at(fd, f"{name}.one")
            with open(files.at(fd, name), "rb") as old, open(kept, "wb") as new:
                new.write(old.read(4096))
                new.truncate(os.fstat(old.fileno()).st_size)
        os.mkdir("one.img.one", dir_fd=fd)
        return dict.fromkeys(names, "one")

    def revisions(self, fd, name):
        return ["one"]

    def revert(self, fd, name, revision):
        os.rename(name, f"{name}.{revision}2", src_dir_fd=fd, dst_dir_fd=fd)
        os.rename(f"{name}.{revision}", name, src_dir_fd=fd, dst_dir_fd=fd)

    def owns(self, name):
        return ".img.one" in name
"""


def test_fewer_than_no_revisions_cannot_be_kept(scratch):
    system = scratch().connect()
    with pytest.raises(InvalidInput, match="pool ssd: revisions_to_keep -1 is below 0"):
        system.add_pool("ssd", driver="reflink", dir_path="/mnt/ssd", revisions_to_keep="-1")
    assert "ssd" not in system.list_pools()


def test_a_driver_without_revisions_reverts_nothing(scratch, tmp_path, monkeypatch):
    machine = scratch()
    system = machine.connect()
    path = tmp_path / "claims_of_tests.py"
    path.write_text(CLAIMS)
    path.chmod(0o644)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        system.add_pool("odd", **{"class": "claims_of_tests.Pool", "dir_path": "/mnt/odd"})
        for name, pool in (("work", "default"), ("play", "odd")):
            system.create_vm(name, klass="StandaloneVM", pool=pool)
        before = machine.tree()
        with pytest.raises(NotSupported, match="pool default: its driver keeps no revisions"):
            system.revert("work")
        with pytest.raises(StoragePoolException, match="pool odd: its driver cannot revert"):
            system.revert("play")
        assert machine.tree() == before
    finally:
        sys.modules.pop("claims_of_tests", None)


@pytest.mark.parametrize(("kind", "driver"), [("xfs", "reflink"), ("btrfs", "btrfs")])
def test_nothing_is_kept_where_no_revisions_are_to_be(disk, kind, driver):
    machine = disk(kind)
    system = pool_with_vm(machine, driver)
    write(machine, IMG, "one")
    system.reset_vm("work")
    kept = system.revisions("work")
    system.set_pool("ssd", revisions_to_keep="0")
    write(machine, IMG, "two")
    assert "revisions" not in system.reset_vm("work")
    system.clone_vm("fedora-23", "fedora-24", "ssd")
    assert set(system.commit_vm("fedora-24")) == {"root-cow"}
    assert system.revert("work") == {"revision": {"old": None, "new": kept[0]}}
    assert read(machine, IMG) == "one"
    (left,) = system.revisions("work")
    assert left.startswith("2@")
    assert (machine.path(IMG).parent / f"private.img.{left}").read_bytes().startswith(b"two")


def test_a_vm_that_is_no_subvolume_keeps_its_images_one_by_one(disk):
    """As one has it that was copied into the pool by hand."""
    machine = disk("btrfs")
    system = pool_with_vm(machine, "btrfs")
    vmdir = machine.path(IMG).parent
    made = vmdir.rename(machine.path("/mnt/ssd/made"))
    subprocess.run(["cp", "-a", "--reflink=always", made, vmdir], check=True)
    write(machine, IMG, "one")
    assert set(system.reset_vm("work")["revisions"]["new"]) == {"root.img", "private.img"}
    write(machine, IMG, "two")
    system.revert("work")
    assert read(machine, IMG) == "one"
    assert not [name for name in os.listdir(vmdir) if name.startswith(".")]


def test_a_revert_that_dies_keeps_the_revision_that_was_asked_for(disk, monkeypatch):
    """The pool keeps one revision, so what is in the image would take its place."""
    machine = disk("xfs")
    system = pool_with_vm(machine, "reflink")
    write(machine, IMG, "new")
    system.reset_vm("work")
    (asked,) = system.revisions("work")
    write(machine, IMG, "now")
    rename = os.rename

    def dies(old, new, **kwargs):
        if new == "private.img":
            raise KeyboardInterrupt
        rename(old, new, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            system.revert("work")
    assert read(machine, IMG) == "now"
    assert asked in system.revisions("work")
    system.revert("work", revision=asked)
    assert read(machine, IMG) == "new"
    assert len(system.revisions("work")) == 1


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize(("kind", "driver"), [("xfs", "reflink"), ("btrfs", "btrfs")])
def test_a_revert_that_was_killed_and_is_run_again_brings_back_the_same(
    disk, kind, driver, between
):
    """What the dead run kept is the newest revision, and the pool keeps no other."""
    machine = disk(kind)
    system = pool_with_vm(machine, driver)
    write(machine, IMG, "old")
    system.reset_vm("work")
    (asked,) = system.revisions("work")
    write(machine, IMG, "bad")

    kept = machine.path(IMG).parent.glob
    kill_when(lambda: len(list(kept("private.img.*"))) == 2, lambda: system.revert("work"))
    assert len(system.revisions("work")) == 2
    if between:
        system.set_vm("work", label="green")
        assert system.revisions("work") == [asked]
    changes = system.revert("work")
    assert changes["revision"] == {"old": None, "new": asked}
    assert ("unfinished" in changes) is not between
    assert read(machine, IMG) == "old"
    (kept,) = system.revisions("work")
    assert read(machine, f"{IMG}.{kept}") == "bad"


def test_a_reset_that_fails_keeps_all_revisions(disk):
    machine = disk("xfs")
    system = pool_with_vm(machine)
    system.create_vm("app", template="fedora-23", pool="ssd")
    system.reset_vm("app")
    kept = system.revisions("app")
    machine.write("/mnt/ssd/qubes/appvms/app/.volatile.img.new", b"")
    with pytest.raises(StoragePoolException, match="appvms/app: .*in the way: move it away"):
        system.reset_vm("app")
    assert system.revisions("app") == kept


def test_what_a_driver_keeps_and_brings_back_gets_mode_and_size(scratch, tmp_path, monkeypatch):
    """As docs/drivers.md has it, the core sets them; a driver that copies need do no more."""
    machine = scratch()
    system = machine.connect()
    path = tmp_path / "plain_of_tests.py"
    path.write_text(PLAIN)
    path.chmod(0o644)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        system.add_pool("odd", **{"class": "plain_of_tests.Pool", "dir_path": "/mnt/odd"})
        system.create_vm("work", klass="StandaloneVM", template="fedora-23", pool="odd")
        img = "/mnt/odd/appvms/work/private.img"
        write(machine, img, "one")
        gid = machine.path(img).stat().st_gid
        assert set(system.reset_vm("work")["revisions"]["new"]) == {"root.img", "private.img"}
        write(machine, img, "two")
        system.resize_vm("work", "private", "3GiB")
        machine.path(img).chmod(0o600)
        assert system.revert("work") == {"revision": {"old": None, "new": "one"}}
        assert read(machine, img) == "one"
        assert machine.path(img).stat().st_size == 3 * 1024**3
        for name in ("root.img.one", "private.img.one2", "private.img"):
            found = machine.path(img).with_name(name).stat()
            assert (found.st_mode & 0o7777, found.st_gid) == (0o660, gid)
        assert system.verify_vm("work") == []
    finally:
        sys.modules.pop("plain_of_tests", None)


def test_an_image_that_goes_before_it_is_reverted_is_told(disk, monkeypatch):
    machine = disk("xfs")
    system = pool_with_vm(machine)
    system.reset_vm("work")
    plan, calls = system._plan_revert, []

    def late(*args):
        found = plan(*args)
        calls.append(args)
        if len(calls) == 2:
            machine.path(IMG).rename(machine.path("/mnt/ssd/away"))
        return found

    monkeypatch.setattr(system, "_plan_revert", late)
    with pytest.raises(StoragePoolException, match="VM work: .*appvms/work: No such file or dir"):
        system.revert("work")
    assert [n for n in os.listdir(machine.path(IMG).parent) if n.startswith("private.img.1@")]


TPL = "/mnt/ssd/qubes/vm-templates/tpl"


@pytest.fixture
def template(disk):
    """``(machine, system)``: a template whose VMs see old blocks, and a revision of its root."""
    machine = disk("xfs")
    system = machine.connect()
    system.add_pool("ssd", driver="reflink", dir_path="/mnt/ssd/qubes")
    system.clone_vm("fedora-23", "tpl", "ssd")
    system.commit_vm("tpl")
    write(machine, f"{TPL}/root-cow.img", "old blocks")
    return machine, system


@pytest.mark.parametrize("there", [True, False])
def test_a_revert_that_fails_keeps_what_the_vms_of_a_template_see(template, there):
    """Its revision has a name elsewhere too, as a backup by hard links has it."""
    machine, system = template
    if not there:
        machine.path(f"{TPL}/root-cow.img").unlink()
    (revision,) = system.revisions("tpl", "root")
    os.link(machine.path(f"{TPL}/root.img.{revision}"), machine.path("/mnt/ssd/backup"))
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="has a name elsewhere too"):
        system.revert("tpl", "root")
    assert machine.tree() == before
    machine.path("/mnt/ssd/backup").unlink()
    system.revert("tpl", "root")
    assert read(machine, f"{TPL}/root-cow.img", 10) == "\0" * 10
    assert not [name for name in os.listdir(machine.path(TPL)) if name.startswith(".")]


def test_a_revert_that_is_interrupted_once_the_root_is_replaced_begins_anew(template, monkeypatch):
    machine, system = template
    rename = os.rename

    def dies(old, new, **kwargs):
        rename(old, new, **kwargs)
        if new == "root.img":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            system.revert("tpl", "root")
    assert read(machine, f"{TPL}/root-cow.img", 10) == "\0" * 10
    assert len(system.revisions("tpl", "root")) == 2
