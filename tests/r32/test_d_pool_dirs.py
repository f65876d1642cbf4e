"""
Where VMs of each class lie, and the directories that a pool gets.

R3.2 makes them when it looks at a pool, with modes that follow the umask; we make them when a pool
is added or set, with mode 2770, and looking makes nothing.
"""

import os

import pytest
from qubes_storage.exc import StoragePoolException
from qubes_storage.vm import ICONS

from tests.r32.cases import cases
from tests.r32.machine import KLASSES, LIB, element, run

_ENTRIES = {"vmdir": "dir_path", "private_img": "private", "volatile_img": "volatile"}
VMDIRS = [c for c in cases("D_pool_dirs") if "class" in c.values[0]["input"]]
DISPVM = [c for c in cases("D_pool_dirs") if c.id.startswith("dispvm")]
DIRS = [c for c in cases("D_pool_dirs") if "dir_path" in c.values[0]["input"]]


def test_every_case_is_run():
    assert len(VMDIRS) + len(DISPVM) + len(DIRS) == len(cases("D_pool_dirs"))


def look(machine, name="vm1"):
    """Everything we say of a VM; looking makes nothing."""
    before = machine.tree()
    system = machine.connect()
    info = system.vm_info(name)
    assert set(system.list_vms()) >= {"dom0", "fedora-23"}
    system.orphans()
    for pool in system.list_pools():
        assert system.pool_info(pool)["dir_path"]
    assert machine.tree() == before
    return info


@pytest.mark.parametrize("case", VMDIRS)
def test_a_vm_of_each_class_lies_where_r32_has_it(scratch, case):
    given, observed = case["input"], case["observed"]["result"]
    machine = scratch(given["conf"])
    template = "1" if given["template"] else "none"
    machine.elements.append(
        element(
            given["class"], "vm1", 2, pool_name=given["pool"], template_qid=template, label="red"
        )
    )
    machine.write_registry()
    info = look(machine)
    if "exception" in observed:
        assert {"vm": info, "reason": case["ours"]["reason"]} == case["ours"]
        return
    klass = KLASSES[given["class"]][not given["template"]]
    assert info["klass"] == klass
    assert info["dir_path"] == observed["vmdir"]
    paths = {volume: found["path"] for volume, found in info["volumes"].items()}
    template_root = f"{LIB}/vm-templates/fedora-23/root.img"
    assert paths["private"] == observed["private_img"]
    assert paths["volatile"] == observed["volatile_img"]
    assert paths.get("root", template_root) == observed["root_img"]
    assert paths.get("root-cow") == observed["rootcow_img"]


@pytest.mark.parametrize("case", VMDIRS)
def test_a_new_vm_of_each_class_starts_with_the_recorded_values(scratch, case):
    given, observed = case["input"], case["observed"]["result"]
    machine = scratch(given["conf"])
    machine.add_pools()
    klass = KLASSES.get(given["class"], (given["class"],) * 2)[not given["template"]]
    template = "fedora-23" if given["template"] else None
    standalone = not given["template"]

    def create():
        return machine.connect().create_vm(
            "vm1", klass=klass, template=template, pool=given["pool"], standalone=standalone
        )

    text = machine.xml
    error = run(create, given["user"], given["umask"])[1]
    if "exception" in observed or klass == "DispVM":
        assert isinstance(error, StoragePoolException)
        assert machine.xml == text
        return
    assert error is None
    attrs = machine.entries()["vm1"].attrs
    assert attrs["label"] == observed["label"]
    assert attrs["memory"] == str(observed["memory"])
    assert attrs["vcpus"] == str(observed["vcpus"])
    assert attrs["qid"] == str(observed["qid"])
    assert attrs.get("netid") == (str(observed["netid"]) if observed["netid"] else None)
    assert attrs["services"] == str(observed["services"])
    assert ("kernel" in attrs) is (observed["kernels_dir"] is not None)
    assert attrs["conf_file"] == os.path.basename(observed["conf_file"])
    assert attrs["dir_path"] == observed["vmdir"]
    there = machine.tree()
    for key in ("private_img", "volatile_img", "root_img", "rootcow_img"):
        assert observed[key] is None or there[observed[key]]["type"] == "file"
    assert there[observed["icon_path"]]["target"] == ICONS.format(observed["label"])


@pytest.mark.parametrize("case", DISPVM)
def test_a_dispvm_shares_the_saved_one_of_its_template_and_not_its_callers_pool(scratch, case):
    observed = case["observed"]["result"]
    machine = scratch(case["input"]["conf"])
    entry = element("QubesDisposableVm", observed["name"], 2, template_qid="1")
    entry[1].pop("pool_name")
    machine.elements.append(entry)
    machine.write_registry()
    info = look(machine, observed["name"])
    assert info["pool"] == observed["pool_name"]
    assert info["dir_path"] == observed["dir_path"] == observed["vmdir"]


def stand(machine, name, dir_path):
    """What stands before a case; the id tells what."""
    if name in ("dir_exists_with_appvms", "vmdir_already_exists"):
        machine.mkdir(f"{dir_path}/appvms")
    if name == "vmdir_already_exists":
        machine.mkdir(f"{dir_path}/appvms/vm1")
    elif name == "dir_is_file":
        machine.write(dir_path, b"")
    elif name == "servicevms_is_file":
        machine.mkdir(dir_path)
        machine.write(f"{dir_path}/servicevms", b"")
    elif name == "dir_symlink":
        machine.mkdir("/mnt/real", 0o755)
        machine.path(dir_path).symlink_to("/mnt/real")
    elif name == "dir_dangling_symlink":
        machine.path(dir_path).symlink_to("/mnt/nowhere")


@pytest.mark.parametrize("case", DIRS)
def test_setting_a_pool_makes_the_recorded_directories(scratch, case):
    given, observed = case["input"], case["observed"]["result"]
    ours = case.get("ours", {})
    machine = scratch(given["conf"])
    stand(machine, case["id"], given["dir_path"])
    look(machine, "fedora-23")
    before = machine.tree()

    error, umask = run(lambda: machine.connect().set_pool("foo"), given["user"], given["umask"])[1:]

    assert umask == given["umask"]
    after = machine.tree()
    made = {path: entry for path, entry in after.items() if path not in before}
    assert {path: after.get(path) for path in before} == before
    if ours.get("refused", "ok" not in observed["ret"]):
        assert isinstance(error, StoragePoolException), error
        assert made == {}
        info = machine.connect().pool_info("foo")
        assert any(given["dir_path"].rstrip("/") in problem for problem in info["problems"])
        return
    assert error is None
    assert {path: (entry["type"], entry["mode"]) for path, entry in made.items()} == {
        entry["path"]: (entry["type"], ours["modes"]["dir"]) for entry in observed["created"]
    }
    machine.elements.append(element("QubesAppVm", "vm1", 2, pool_name="foo", template_qid="1"))
    machine.write_registry()
    assert look(machine)["dir_path"] == observed["ret"]["ok"]
