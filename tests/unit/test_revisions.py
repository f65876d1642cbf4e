"""Old images where none are kept, none can be, or a VM is not as its driver would have made it."""

import os
import subprocess
import sys

import pytest
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException

from tests.unit.test_drivers import IMG, disk, pool_with_vm, read, write

__all__ = ["disk"]
CLAIMS = """
from qubes_storage.drivers import xen

class Pool(xen.Pool):
    def revisions(self, fd, name):
        return ["1@2026-11-24T16:00:00Z"]
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
