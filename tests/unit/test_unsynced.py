"""What the disk did not take: nothing goes that is still named; what is half there is mended."""

import errno
import os

import pytest
from qubes_storage import image, markers
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import LIB

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
OLD = f"{LIB}/appvms/work"


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.add_pools()
    made.connect().create_vm("work", klass="StandaloneVM")
    made.path(f"{OLD}/private.img").write_bytes(b"data".ljust(512))
    return made


@pytest.fixture
def failing(machine, monkeypatch):
    """The sync of the registry's directory fails."""
    sync = os.fsync

    def fail(fd):
        if os.readlink(f"/proc/self/fd/{fd}") == str(machine.path(LIB)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        yield patched


def test_a_vm_that_moved_is_left_in_both_places_until_the_registry_is_on_the_disk(machine, failing):
    system, new = machine.connect(), machine.path("/mnt/foo/appvms/work/private.img")
    with pytest.raises(StoragePoolException, match="it is done, but .*qubes.xml may not be on"):
        system.migrate_vm("work", "foo")
    assert machine.path(f"{OLD}/private.img").read_bytes() == new.read_bytes()
    with pytest.raises(StoragePoolException, match="cannot be mended: Input/output error"):
        system.set_vm("work")
    assert machine.path(OLD).exists()
    failing.undo()
    assert "unfinished" in system.set_vm("work")
    assert not machine.path(OLD).exists()
    assert new.read_bytes().startswith(b"data")
    assert system.vm_diff("work", pool="foo") == {}


def test_what_goes_wrong_because_of_that_tells_it_too(machine, failing):
    system = machine.connect()
    told = "name elsewhere too.*; before that, .*qubes.xml may not have come to the disk: Input"
    with pytest.raises(StoragePoolException, match=told):
        system.set_vm("work", pool="foo", migrate=True, volumes={"private": "3GiB"})
    failing.undo()
    left = system.set_vm("work", pool="foo", migrate=True, volumes={"private": "3GiB"})
    assert set(left) == {"unfinished", "volumes"}


def test_a_vm_that_is_removed_is_deleted_once_the_registry_is_on_the_disk(machine, failing):
    system, left = machine.connect(), machine.path(f"{LIB}/appvms/.work.removing/private.img")
    with pytest.raises(StoragePoolException, match="it is done, but .*qubes.xml may not be on"):
        system.remove_vm("work", purge=True)
    assert left.read_bytes().startswith(b"data")
    failing.undo()
    assert "unfinished" in system.remove_vm("work", purge=True)
    assert not left.parent.exists()
    assert system.remove_vm("work", purge=True) == {}


def test_a_move_is_made_again_where_only_the_marker_at_its_new_place_is_left(machine):
    marker = machine.path(f"{LIB}/appvms/.job.creating")
    marker.mkdir(0o700)
    fd = os.open(marker.parent, os.O_RDONLY)
    inode = image.identity(fd, "work")
    os.close(fd)
    fd = os.open(marker, os.O_RDONLY)
    markers.Origin(OLD, inode, False, f"{LIB}/appvms/job").write(fd)
    os.close(fd)
    machine.connect().rename_vm("work", "job")
    assert os.listdir(marker.parent) == ["job"]
    assert machine.path(f"{LIB}/appvms/job/private.img").read_bytes().startswith(b"data")
