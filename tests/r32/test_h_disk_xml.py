"""
The ``<disk>`` elements of each class of VMs, byte for byte as R3.2 hands them to libvirt.

Recorded are those of the storage (``storage_params``) and those of the VM (``vm_params``), which is
what libvirt gets, and what we tell.
"""

import re
import shutil
import subprocess

import pytest
from qubes_storage.exc import InvalidInput, StoragePoolException

from tests.r32.cases import cases, load
from tests.r32.machine import GIB, KERNEL, LIB, element

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/var/lib/qubes/foo\n"
DIRS = {"default": LIB, "foo": f"{LIB}/foo"}
TAGS = {
    "appvm": "QubesAppVm",
    "netvm": "QubesNetVm",
    "proxyvm": "QubesProxyVm",
    "template": "QubesTemplateVm",
    "hvm": "QubesHVm",
    "hvm_tmpl": "QubesHVm",
    "hvmt": "QubesTemplateHVm",
    "dispvm": "QubesDisposableVm",
}
DEVICES = ("rootdev", "privatedev", "volatiledev", "otherdevs")
SETTER = next(case for case in load("H_disk_xml") if case["id"] == "hvm_drive_setter")
CASES = [case for case in cases("H_disk_xml") if case.id != SETTER["id"]]
_HVM = {"kernel": "", "uses_default_kernel": "False"}


@pytest.fixture
def prepared(scratch):
    """``prepared(case)``: the machine of a case, and the name of the VM it is about."""

    def prepare(case):
        given = case["input"]
        kind, pool = given.get("kind", "appvm"), given.get("pool", "foo")
        machine = scratch(CONF)
        machine.add_pools()
        if case["id"].endswith("no_modules_img"):
            machine.path(f"{LIB}/vm-kernels/{KERNEL}/modules.img").unlink()
        if kind == "admin":
            machine.elements[0][1]["pool_name"] = pool
            machine.write_registry()
            return machine, "dom0"
        template = 1
        if kind == "hvm_tmpl" or "template_pool" in given:
            template = 2
            tag, name = "QubesTemplateVm", "t2"
            if kind == "hvm_tmpl":
                tag, name = "QubesTemplateHVm", "ht"
            place = given.get("template_pool", "default")
            machine.add_template(element(tag, name, 2, pool_name=place), DIRS[place])
        if kind in ("hvm", "template", "hvmt"):
            template = "none"
        entry = element(TAGS[kind], "vm1", 9, pool_name=pool, template_qid=str(template))
        if kind.startswith("hvm"):
            entry[1].update(_HVM, drive=given.get("drive", "None"))
        if kind in ("template", "hvmt"):
            machine.add_template(entry, DIRS[pool], (10 if kind == "template" else 20) * GIB)
        else:
            machine.elements.append(entry)
        machine.write_registry()
        return machine, "vm1"

    return prepare


def expected(case):
    """The recorded elements, or what they would be had R3.2 not failed; None for a refusal."""
    result, ours = case["observed"]["result"], case.get("ours", {})
    if ours.get("refused"):
        return None
    if "drive" in ours:
        like = next(
            c for c in load("H_disk_xml") if c["input"].get("drive") == ours["drive"]["like"]
        )
        otherdevs = like["observed"]["result"]["vm_params"]["ok"]["otherdevs"]
        path = like["input"]["drive"].split(":")[-1]
        return {
            **result["storage_params"]["ok"],
            "volatiledev": "",
            "otherdevs": otherdevs.replace(path, ours["drive"]["path"]),
        }
    return {device: result["vm_params"]["ok"][device] for device in DEVICES}


@pytest.mark.parametrize("case", CASES)
def test_the_disks_of_a_vm_are_the_recorded_ones(prepared, case):
    machine, name = prepared(case)
    before = machine.tree()
    if expected(case) is None:
        with pytest.raises(InvalidInput, match=f"VM {name}: drive"):
            machine.connect().disks(name)
    else:
        assert machine.connect().disks(name) == expected(case)
    assert machine.tree() == before


@pytest.mark.parametrize("case", CASES)
def test_recorded_differences_are_those_of_the_class(case):
    """What the storage says differs from what libvirt gets as each class has it."""
    result, kind = case["observed"]["result"], case["input"].get("kind", "appvm")
    for device in DEVICES if "ok" in result["vm_params"] else ():
        of_storage, of_vm = (result[k]["ok"][device] for k in ("storage_params", "vm_params"))
        left_out = {"volatiledev": kind.startswith("hvm"), "privatedev": kind == "dispvm"}
        if left_out.get(device):
            assert of_storage and not of_vm
        elif device != "otherdevs" or "drive" not in case["input"]:
            assert of_storage == of_vm


@pytest.mark.parametrize("row", SETTER["observed"]["result"], ids=lambda row: repr(row["value"]))
def test_a_drive_is_taken_as_r32_takes_it(prepared, row):
    case = {"id": "drive", "input": {"kind": "hvm", "drive": str(row["value"])}}
    machine, name = prepared(case)
    if "exception" in row or row["value"] in SETTER["ours"]["refused"]:
        with pytest.raises(InvalidInput, match="cdrom:dom0:/iso/a.iso"):
            machine.connect().disks(name)
        return
    found = machine.connect().disks(name)
    stored = {"id": "drive", "input": {"kind": "hvm", "drive": str(row["stored"])}}
    assert found == prepared(stored)[0].connect().disks(name)
    path = (row["stored"] or "").split(":")[-1]
    assert bool(found["otherdevs"]) is bool(path)
    assert f"dev='{path}'" in found["otherdevs"] or not path


DOMAIN = """<domain type='xen'>
  <name>vm1</name><memory unit='MiB'>400</memory><vcpu>2</vcpu>
  <os><type arch='x86_64' machine='xenpv'>linux</type><kernel>/vmlinuz</kernel></os>
  <devices>
{}  </devices>
</domain>
"""


@pytest.mark.skipif(
    not shutil.which("virt-xml-validate") or not shutil.which("xmllint"),
    reason="needs Debian's libvirt-clients and libxml2-utils",
)
@pytest.mark.parametrize("case", [c for c in CASES if expected(c.values[0])])
def test_libvirt_finds_them_valid(prepared, tmp_path, case):
    machine, name = prepared(case)
    disks = "".join(machine.connect().disks(name).values())
    assert "<disk " in disks
    # Qubes' own scripts: libvirt's schema has none
    disks = re.sub(r" *<script path='block-(origin|snapshot)'/>\n", "", disks)
    path = tmp_path / "domain.xml"
    path.write_text(DOMAIN.format(disks))
    done = subprocess.run(
        ["virt-xml-validate", str(path), "domain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def with_vm(machine, tag, **attrs):
    """A VM, and what its disks are."""
    machine.elements.append(element(tag, "vm1", 9, **attrs))
    machine.write_registry()
    return machine.connect().disks("vm1")


def test_a_vm_with_kernels_of_its_own_may_write_to_its_modules(scratch):
    machine = scratch(CONF)
    own = machine.mkdir(f"{LIB}/appvms/vm1/kernels")
    (own / "modules.img").write_text("modules\n")
    found = with_vm(machine, "QubesAppVm", kernel="None", uses_default_kernel="False")
    assert f"<source dev='{LIB}/appvms/vm1/kernels/modules.img'/>" in found["otherdevs"]
    assert "readonly" not in found["otherdevs"]


def test_a_template_without_root_cow_is_used_alone(scratch):
    found = with_vm(scratch(CONF), "QubesTemplateVm")
    assert f"<source dev='{LIB}/vm-templates/vm1/root.img'/>" in found["rootdev"]
    assert "script" not in found["rootdev"]


def test_what_would_break_the_xml_is_escaped(scratch):
    found = with_vm(scratch(CONF), "QubesHVm", **_HVM, drive="hd:dom0:/a'&<b.img")
    assert "<source dev='/a&apos;&amp;&lt;b.img'/>" in found["otherdevs"]


@pytest.mark.parametrize(
    ("tag", "attrs", "message"),
    [
        ("QubesNetVm", {"template_qid": "77"}, "its template .qid 77. is not in qubes.xml"),
        ("QubesAppVm", {"template_qid": "77"}, "its template .qid 77. is not in qubes.xml"),
        (
            "QubesAppVm",
            {"kernel": "../../x", "uses_default_kernel": "False"},
            "kernel '../../x' leads out of",
        ),
        ("QubesAppVm", {"pool_name": "gone"}, "pool gone: unknown"),
    ],
)
def test_what_cannot_be_told_is_named(scratch, tag, attrs, message):
    with pytest.raises(StoragePoolException, match=message):
        with_vm(scratch(CONF), tag, **attrs)


def test_a_vm_that_is_not_there_is_named(scratch):
    with pytest.raises(StoragePoolException, match="VM nope: is not in qubes.xml"):
        scratch(CONF).connect().disks("nope")
