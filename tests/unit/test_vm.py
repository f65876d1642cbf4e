"""A VM as its element in qubes.xml has it: what it starts with, its kernel, and where it lies."""

import pytest
from qubes_storage.exc import InvalidInput

from tests.r32.machine import GIB, KERNEL, LIB, XML, element


def test_memory_processors_and_internal_are_written_as_r32_reads_them(scratch):
    machine = scratch()
    system = machine.connect()
    system.create_vm("work", memory=" 0800", vcpus=4, internal="yes")
    attrs = machine.entries()["work"].attrs
    assert (attrs["memory"], attrs["vcpus"], attrs["internal"]) == ("800", "4", "True")
    system.create_vm("other", internal=False)
    attrs = machine.entries()["other"].attrs
    assert (attrs["memory"], attrs["vcpus"], attrs["internal"]) == ("400", "2", "False")


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ({"memory": -1}, "memory -1 is less than 0; take more"),
        ({"vcpus": "-1"}, "vcpus -1 is less than 0; take more"),
        ({"memory": "much"}, "memory: 'much' is not a whole number"),
        ({"internal": "perhaps"}, "internal: 'perhaps' is neither true nor false"),
    ],
)
def test_what_r32_could_not_read_again_is_refused(scratch, declared, why):
    machine = scratch()
    before = machine.tree()
    with pytest.raises(InvalidInput, match=f"VM work: {why}"):
        machine.connect().create_vm("work", **declared)
    assert machine.tree() == before


@pytest.mark.parametrize("name", ["../work", ".", "..", "a/b"])
def test_a_name_in_the_registry_that_leads_out_of_its_pool_is_not_followed(scratch, name):
    machine = scratch()
    machine.elements.append(element("QubesAppVm", name, 7, template_qid="1"))
    machine.write_registry()
    system = machine.connect()
    for verb in (system.vm_info, system.disks, lambda name: system.resize_vm(name, "private", GIB)):
        with pytest.raises(InvalidInput, match="leads out of its pool; mend it in qubes.xml"):
            verb(name)
    before = machine.tree(but=[LIB, XML])
    assert set(system.remove_vm(name, purge=True)) == {"removed"}
    assert machine.tree(but=[LIB, XML]) == before


def test_a_kernel_that_is_not_there_is_no_disk(scratch):
    machine = scratch()
    for name, qid, kernel in (("work", 7, KERNEL), ("other", 8, "9.9.9")):
        attrs = {"template_qid": "1", "kernel": kernel, "uses_default_kernel": "False"}
        machine.elements.append(element("QubesAppVm", name, qid, **attrs))
    machine.write_registry()
    system = machine.connect()
    assert f"{LIB}/vm-kernels/{KERNEL}/modules.img" in system.disks("work")["otherdevs"]
    assert system.disks("other")["otherdevs"] == ""
