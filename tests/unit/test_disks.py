"""What libvirt is told of leads to no file outside of the pools."""

import os

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import KERNEL, LIB, element


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


@pytest.mark.parametrize(
    ("attrs", "default"),
    [
        ({}, True),
        ({"uses_default_kernel": "true", "kernel": "gone"}, True),
        ({"uses_default_kernel": None, "kernel": "gone"}, True),
        ({"uses_default_kernel": "False", "kernel": KERNEL}, True),
        ({"uses_default_kernel": "false", "kernel": "none"}, False),
        ({"uses_default_kernel": "0", "kernel": None}, False),
    ],
)
def test_the_kernel_is_the_one_that_r32_reads(scratch, attrs, default):
    machine = scratch()
    machine.elements.append(element("QubesAppVm", "app", 5, template_qid="1", **attrs))
    found = machine.elements[-1][1]
    for key in [key for key, value in attrs.items() if value is None]:
        del found[key]
    machine.write_registry()
    machine.mkdir(f"{LIB}/appvms/app")
    machine.image(f"{LIB}/appvms/app/private.img", 4096)
    system = machine.connect()
    assert (f"{LIB}/vm-kernels/{KERNEL}/modules.img" in system.disks("app")["otherdevs"]) == default
    assert not any("kernel" in told for told in system.verify_vm("app"))


@pytest.mark.parametrize("value", ["True", "true", "1"])
def test_a_vm_that_a_package_installed_is_not_renamed_however_that_is_written(scratch, value):
    machine = scratch()
    machine.connect().create_vm("work")
    text = machine.xml.replace(b'name="work"', b'name="work" x="y"')
    head, tail = text.split(b'x="y"')
    old, new = b'installed_by_rpm="False"', f'installed_by_rpm="{value}"'.encode()
    machine.path(f"{LIB}/qubes.xml").write_bytes(
        head[: head.rindex(old)] + new + head[head.rindex(old) + len(old) :] + tail
    )
    with pytest.raises(StoragePoolException, match="installed by RPM"):
        machine.connect().rename_vm("work", "new")


@pytest.mark.parametrize(
    ("drive", "kind", "read_only"),
    [("disk:dom0:/a", "disk", False), ("hd::/a", "disk", False), ("cdrom::/a", "cdrom", True)],
)
def test_a_drive_is_written_as_r32_reads_one(scratch, drive, kind, read_only):
    machine = scratch()
    machine.elements.append(element("QubesHVm", "hvm", 5, drive=drive, template_qid="none"))
    machine.write_registry()
    found = machine.connect().disks("hvm")["otherdevs"]
    assert f"device='{kind}'" in found
    assert "<source dev='/a'/>" in found
    assert ("<readonly/>" in found) is read_only
    assert "backenddomain" not in found
