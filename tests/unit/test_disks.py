"""What libvirt is told of leads to no file outside of the pools."""

import os

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import LIB


@pytest.fixture
def machine(scratch):
    machine = scratch()
    system = machine.connect()
    system.create_vm("work")
    system.create_vm("alone", klass="StandaloneVM", template="fedora-23")
    system.create_vm("screen", klass="HVM")
    return machine


@pytest.mark.parametrize("image", ["root.img", "root-cow.img"])
def test_an_image_of_the_template_that_is_no_file(machine, image):
    path = f"{LIB}/vm-templates/fedora-23/{image}"
    machine.path(path).unlink()
    machine.path(path).symlink_to("/dev/vda")
    for name in ("work", "fedora-23"):
        with pytest.raises(StoragePoolException, match=f"VM fedora-23: {path} is no file; put th"):
            machine.connect().disks(name)
    assert "alone/root.img" in machine.connect().disks("alone")["rootdev"]


@pytest.mark.parametrize("target", ["/root", "/nowhere", "../vm-templates"])
@pytest.mark.parametrize("name", ["alone", "screen"])
def test_a_directory_of_a_vm_that_is_a_link(machine, name, target):
    there = machine.path(f"{LIB}/appvms/{name}")
    there.rename(f"{there}.x")
    os.symlink(target, there)
    with pytest.raises(StoragePoolException) as err:
        machine.connect().disks(name)
    assert str(err.value) == (
        f"VM {name}: {LIB}/appvms/{name}: cannot be opened: Not a directory; put its directory"
        " there, not a link, and run as root"
    )


def test_the_directories_of_a_pool_that_are_links(machine):
    there = machine.path(f"{LIB}/vm-templates")
    there.rename(f"{there}.x")
    os.symlink("vm-templates.x", there)
    with pytest.raises(StoragePoolException, match="VM fedora-23: .* cannot be opened"):
        machine.connect().disks("work")


def test_what_is_not_there_is_told_all_the_same(machine):
    machine.path(f"{LIB}/appvms/alone").rename(machine.path("/mnt/alone"))
    assert f"{LIB}/appvms/alone/root.img" in machine.connect().disks("alone")["rootdev"]
