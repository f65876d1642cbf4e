"""What a new VM needs: what is declared of it wrongly, what is not there, what is its user's."""

import contextlib
import os
import subprocess

import pytest
import qubes_storage
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException

from tests.r32.machine import GIB, KERNEL, LIB, element

CONF = """\
[default]
driver=xen
[odd]
driver=xen
dir_path=/mnt/odd
colour=blue
[foreign]
class=io.StringIO
"""
VMDIR = f"{LIB}/appvms/work"


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.connect().create_vm("work", label="green")
    return made


def refused(machine, call, match, kind=StoragePoolException):
    """A call is refused, and changes nothing; the error."""
    before = machine.tree()
    with pytest.raises(kind, match=match) as err:
        call()
    assert machine.tree() == before
    return err.value


def test_a_volume_has_a_size_and_no_other_option(machine):
    system = machine.connect()
    declared = {"private": {"size": "3GiB", "colour": "blue"}}
    refused(
        machine,
        lambda: system.create_vm("vm", volumes=declared),
        "volume private has no option 'colour'; it takes size",
        InvalidInput,
    )


def test_a_volume_that_declares_nothing_has_its_usual_size(machine):
    system = machine.connect()
    assert "volumes" not in system.create_vm("vm", volumes={"private": {}})
    assert system.vm_info("vm")["volumes"]["private"]["size"] == 2 * GIB
    assert system.vm_diff("vm", volumes={"private": {}}) == {}


def test_an_image_is_of_whole_sectors_whatever_is_declared(machine):
    system = machine.connect()
    system.create_vm("vm", volumes={"private": "5001MB"})
    assert system.vm_info("vm")["volumes"]["private"]["size"] == 5_001_000_448
    assert system.vm_diff("vm", volumes={"private": "5001MB"}) == {}
    changes = system.resize_vm("vm", "private", 6_000_000_001)
    assert changes["volumes"]["new"] == {"private": 6_000_000_512}
    assert system.resize_vm("vm", "private", 6_000_000_001) == {}
    assert system.verify_vm("vm") == []


def test_an_image_of_whole_sectors_is_never_more_than_a_file_can_hold(machine):
    system = machine.connect()
    assert system.vm_diff("vm", volumes={"private": 2**63 - 1})["volumes"]["new"] == {
        "private": 2**63 - 512
    }
    with contextlib.suppress(StoragePoolException):  # not every filesystem has such files
        system.create_vm("vm", volumes={"private": 2**63 - 1})


def test_create_only_leaves_a_vm_that_is_there_as_it_is(machine):
    system = machine.connect()
    before = machine.tree()
    declared = {"create_only": True, "label": "blue", "klass": "StandaloneVM", "pool": "nope"}
    assert system.vm_diff("work", **declared) == {}
    assert machine.tree() == before


def test_without_a_default_template_one_is_to_be_declared(scratch):
    machine = scratch(template=False)
    system = machine.connect()
    err = refused(machine, lambda: system.create_vm("vm"), "has no default one; declare template")
    assert err.waits_for == [("VM", None)]


def test_an_element_without_a_qid_is_no_default_template(scratch):
    machine = scratch(template=False)
    machine.elements.append(("QubesTemplateVm", {"name": "broken"}))
    machine.write_registry()
    call = lambda: machine.connect().create_vm("work")  # noqa: E731
    refused(machine, call, "no template is declared and the system has no default one")


def test_a_kernel_that_is_not_there_is_named_file_by_file(machine):
    machine.path(f"{LIB}/vm-kernels/{KERNEL}").rename(machine.path("/mnt/kernel"))
    system = machine.connect()
    refused(
        machine,
        lambda: system.create_vm("vm", klass="StandaloneVM", template="fedora-23"),
        f"{KERNEL}/vmlinuz: No such file.*{KERNEL}/initramfs: No such file.*; install that kernel",
    )


def test_a_kernel_that_lies_elsewhere_too_is_told_beforehand(machine):
    kernel = machine.path(f"{LIB}/vm-kernels/{KERNEL}/modules.img")
    os.link(kernel, machine.path("/mnt/modules.copy"))
    system = machine.connect()
    for verb in (system.vm_diff, system.create_vm):
        refused(
            machine,
            lambda: verb("vm", klass="TemplateVM"),  # noqa: B023
            f"{KERNEL}/modules.img: modules.img has a name elsewhere too: put a copy in its place",
        )


def test_a_pool_that_cannot_be_is_told_and_is_not_waited_for(machine):
    system = machine.connect()
    for call in (
        lambda: system.create_vm("vm", pool="odd"),
        lambda: system.clone_vm("work", "vm", "odd"),
    ):
        err = refused(machine, call, "pool odd: driver xen takes no option colour", InvalidInput)
        assert not err.waits_for


def test_a_pool_of_a_class_that_is_none_of_ours_holds_no_vm(machine):
    system = machine.connect()
    cure = "pool foreign: its class is no qubes_storage.Pool.*derive it from"
    for call in (
        lambda: system.create_vm("vm", pool="foreign"),
        lambda: system.clone_vm("work", "vm", "foreign"),
    ):
        refused(machine, call, cure, NotSupported)


def test_an_icon_of_the_users_own_is_cloned_and_survives_another_label(machine):
    icon = machine.path(f"{VMDIR}/icon.png")
    icon.unlink()
    icon.write_bytes(b"mine")
    system = machine.connect()
    system.clone_vm("work", "copy")
    assert machine.path(f"{LIB}/appvms/copy/icon.png").read_bytes() == b"mine"
    assert system.set_vm("work", label="blue") == {"label": {"old": "green", "new": "blue"}}
    assert icon.read_bytes() == b"mine"
    assert system.vm_diff("work", label="blue") == {}


def test_what_is_declared_of_a_dispvm_does_not_befall_the_vm_whose_directory_it_shares(machine):
    machine.connect().create_vm("fedora-23-dvm")
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    machine.elements.append(element("QubesDisposableVm", "disp1", 77, template_qid="1"))
    machine.write_registry()
    system = machine.connect()
    for declared in ({"label": "blue"}, {"volumes": {"private": "3GiB"}}):
        for verb in (system.vm_diff, system.set_vm):
            refused(machine, lambda: verb("disp1", **declared), "is a DispVM", InvalidInput)  # noqa: B023
    declared = {"label": "red", "pool": "default", "volumes": {"private": "1GiB"}}
    assert system.vm_diff("disp1", **declared) == system.set_vm("disp1", **declared) == {}


def test_a_label_needs_no_directory_where_a_run_died_in_a_removal(machine):
    machine.elements.append(element("QubesAppVm", "gone", 3, template_qid="1"))
    machine.write_registry()
    machine.mkdir(f"{LIB}/appvms/.gone.removing")
    machine.image(f"{LIB}/appvms/.gone.removing/private.img", GIB)
    system = machine.connect()
    assert set(system.set_vm("gone", label="blue")) == {"label", "unfinished"}
    assert os.readlink(machine.path(f"{LIB}/appvms/gone/icon.png")).endswith("appvm-blue.png")


def test_an_image_that_lies_elsewhere_too_is_told_before_it_is_to_grow(machine):
    system = machine.connect()
    system.create_vm("t", klass="TemplateVM")
    for name, volume, filename in (
        ("work", "private", "appvms/work/private.img"),
        ("t", "root", "vm-templates/t/root-cow.img"),
    ):
        os.link(machine.path(f"{LIB}/{filename}"), machine.path(f"/mnt/{volume}"))
        declared = {"volumes": {volume: "30GiB"}}
        for verb in (system.vm_diff, system.set_vm):
            refused(
                machine,
                lambda: verb(name, **declared),  # noqa: B023
                f"VM {name}: .*: {os.path.basename(filename)} has a name elsewhere too",
            )
        machine.path(f"/mnt/{volume}").unlink()
        assert set(system.set_vm(name, **declared)) == {"volumes"}


def test_growing_mends_first_what_a_dead_run_left(machine):
    marker = machine.path(f"{LIB}/appvms/.work.creating")
    marker.mkdir(0o700)
    changes = machine.connect().resize_vm("work", "private", "3GiB")
    assert set(changes) == {"unfinished", "volumes"}
    assert not marker.exists()
    assert machine.path(f"{VMDIR}/private.img").stat().st_size == 3 * GIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can attach a loop")
@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from"])
def test_an_image_in_use_is_not_imported(machine, word):
    machine.image("/mnt/disk.raw", GIB, "in use")
    path = str(machine.path("/mnt/disk.raw"))
    done = subprocess.run(
        ["losetup", "--find", "--show", path], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        system = machine.connect()
        refused(
            machine,
            lambda: system.create_vm("vm", klass="StandaloneVM", **{word: path}),
            f"{word} {path} is in use by {device}; detach it first",
        )
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_template_without_a_number_is_told(scratch):
    machine = scratch()
    machine.elements[1][1].pop("qid")
    machine.write_registry()
    system = machine.connect()
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match="fedora-23 has no qid in qubes.xml; mend"):
            verb("new", template="fedora-23")


def test_a_volatile_image_is_no_larger_than_a_file_can_be(scratch):
    system = scratch().connect()
    with contextlib.suppress(StoragePoolException):  # where a filesystem holds less than tmpfs
        system.create_vm("new", klass="TemplateHVM", volumes={"root": "8589934591GiB"})
        assert system.vm_info("new")["volumes"]["volatile"]["size"] == 2**63 - 512


def test_who_grows_a_vm_that_is_not_there_makes_nothing(root):
    with pytest.raises(StoragePoolException, match="VM work: is not in qubes.xml"):
        qubes_storage.connect(str(root)).resize_vm("work", "private", "3GiB")
    assert not os.listdir(root / "var/lib/qubes")


@pytest.mark.parametrize("klass", ["StandaloneVM", "NetVM"])
def test_the_root_of_an_hvm_is_none_for_a_class_with_a_kernel_of_dom0(machine, klass):
    system = machine.connect()
    system.create_vm("windows", klass="TemplateHVM")
    before = machine.tree()
    with pytest.raises(InvalidInput, match="windows is of class TemplateHVM, whose root has a sys"):
        system.create_vm("new", klass=klass, template="windows", standalone=True)
    assert machine.tree() == before
    assert system.create_vm("new", klass="HVM", template="fedora-23", standalone=True)


def test_volatile_is_as_large_as_r32_makes_it_whatever_the_root(scratch):
    machine = scratch()
    machine.image(f"{LIB}/vm-templates/fedora-23/root.img", 20 * 1024**3, "x")
    system = machine.connect()
    system.create_vm("work")
    system.create_vm("own", klass="StandaloneVM", template="fedora-23")
    system.reset_vm("work")
    for name in ("work", "own"):
        assert system.vm_info(name)["volumes"]["volatile"]["size"] == 12348030976


@pytest.mark.parametrize(
    ("attrs", "klass", "after"),
    [
        ({"default_template": "99"}, "TemplateVM", {"default_template": "4"}),
        ({"default_fw_netvm": "99", "clockvm": "99"}, "NetVM", {"default_fw_netvm": "4"}),
        ({"default_netvm": "99", "default_fw_netvm": "2"}, "ProxyVM", {"default_netvm": "99"}),
        ({"default_netvm": "99", "default_fw_netvm": "8"}, "ProxyVM", {"default_netvm": "4"}),
        ({"default_netvm": "3", "clockvm": None}, "NetVM", {"clockvm": "2"}),
        ({"default_netvm": "99", "clockvm": None}, "NetVM", {"clockvm": "4"}),
        ({"default_netvm": "3", "clockvm": "None"}, "NetVM", {"clockvm": "4"}),
        ({"default_netvm": "9", "clockvm": None}, "NetVM", {"clockvm": "9"}),  # a circle
    ],
)
def test_a_default_that_names_no_vm_is_none(scratch, attrs, klass, after):
    """As R3.2 loads the collection, and saves it with the next VM."""
    machine = scratch()
    machine.elements += [
        element("QubesNetVm", "sys-net", 2, netid="1", template_qid="1"),
        element("QubesProxyVm", "firewall", 3, netid="2", netvm_qid="2", template_qid="1"),
        element("QubesProxyVm", "odd", 9, netid="3", netvm_qid="9", template_qid="1"),
    ]
    for name in ("sys-net", "firewall"):
        machine.mkdir(f"{LIB}/servicevms/{name}")
    for key, value in attrs.items():
        machine.attrs[key] = value
        if value is None:
            del machine.attrs[key]
    machine.write_registry()
    machine.connect().create_vm("new", klass=klass)
    found = machine.connect().registry().attrs
    assert {key: found[key] for key in after} == after


def test_a_netvm_without_a_netid_has_the_one_that_r32_gives_it(scratch):
    machine = scratch()
    machine.elements += [
        element("QubesNetVm", "sys-net", 2, template_qid="1"),
        element("QubesProxyVm", "firewall", 3, netid="2", template_qid="1"),
    ]
    for name in ("sys-net", "firewall"):
        machine.mkdir(f"{LIB}/servicevms/{name}")
    machine.write_registry()
    machine.connect().create_vm("new", klass="NetVM")
    assert machine.entries()["new"].attrs["netid"] == "3"


@pytest.mark.parametrize("klass", [None, "AdminVM", "AppVM"])
def test_dom0_is_refused_whatever_class_is_declared(machine, klass):
    with pytest.raises(InvalidInput, match="VM dom0: is not made of images; declare other VMs"):
        machine.connect().vm_diff("dom0", klass=klass)
