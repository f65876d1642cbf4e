"""
``create_on_disk``: the exact tree that a new VM gets, as R3.2 makes it.

Ours throughout (``ours`` of a case names what is not as recorded): modes are 2770 and 0660 whatever
the umask; NAME.conf is not made, since R3.2 writes it anew at every start; the rules of the
firewall lie in the VM's own directory, in whichever pool; and what fails leaves nothing.
"""

import os
import re

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.cases import cases
from tests.r32.machine import GIB, KERNEL, KLASSES, LIB, XML, element, run

_HVM = {"kernel": "", "memory": "512", "services": "{'meminfo-writer': False}"}


def prepare(machine, case):
    """What stands before a case; the id tells what is broken."""
    name, given = case["id"], case["input"]
    template = f"{LIB}/vm-templates/fedora-23"
    machine.add_pools()
    pool = {None: LIB, "default": LIB, "foo": f"{LIB}/foo", "bar": "/mnt/bar"}[given.get("tpool")]
    if given.get("hvmt"):
        machine.add_template(
            element(
                "QubesTemplateHVm", "hvm-t", 2, **_HVM, pool_name=given.get("tpool", "default")
            ),
            pool,
            20 * GIB,
            marked=False,
        )
    elif "tpool" in given:
        machine.add_template(element("QubesTemplateVm", "t2", 2, pool_name=given["tpool"]), pool)
    if "existing_dir" in name:
        machine.mkdir(f"{LIB}/appvms/vm1")
    elif "private_missing" in name:
        machine.path(f"{template}/private.img").unlink()
    elif "root_missing" in name:
        machine.path(f"{template}/root.img").unlink()
    elif "small_private" in name:
        machine.image(f"{template}/private.img", 1024**2, "PRIV:fedora-23")
    elif "big_root_20g" in name:
        machine.image(f"{template}/root.img", 20 * GIB, "ROOT:fedora-23")
    elif "kernel_modules_missing" in name:
        machine.path(f"{LIB}/vm-kernels/{KERNEL}/modules.img").unlink()
    elif name == "no_permission":
        os.chmod(machine.path(f"{LIB}/appvms"), 0o750)
    machine.write_registry()


def declared(case):
    """The arguments of ``create_vm`` that say what a case does."""
    given = case["input"]
    templated = given.get("tmpl", True)
    klass = KLASSES[given["cls"]][not templated]
    template = "hvm-t" if given.get("hvmt") else "t2" if "tpool" in given else "fedora-23"
    found = {"klass": klass, "pool": given.get("pool")}
    if templated or given.get("source") == "template":
        found["template"] = template
    if not templated and klass in ("NetVM", "ProxyVM"):
        found["standalone"] = True
    if "label" in given.get("kw", {}):
        found["label"] = re.search(r"'0x\w+', '(\w+)'", given["kw"]["label"])[1]
    if "root_img_size" in case["id"]:
        found["volumes"] = {"root": 3 * GIB}
    return found


def expected(case):
    """``(whether it is refused, {path: entry})``: what was recorded, by our rules."""
    observed, ours = case["observed"]["result"], case.get("ours", {})
    if ours.get("refused", "exception" in observed):
        return True, {}
    tree = {}
    for entry in ours["created"] if "created" in ours else observed["created"]:
        if os.path.basename(entry["path"]) in ours.get("not_made", ()):
            continue
        keys = {"type", "target", "size", "blocks_zero", "head"} & set(entry)
        tree[entry["path"]] = {key: entry[key] for key in keys}
        if entry["type"] != "link":
            tree[entry["path"]]["mode"] = ours["modes"][entry["type"]]
    return False, tree


@pytest.mark.parametrize("case", cases("E_create_on_disk"))
def test_a_new_vm_gets_the_recorded_tree(scratch, case):
    given = case["input"]
    machine = scratch(given["conf"])
    prepare(machine, case)
    refused, tree = expected(case)
    before, text = machine.tree(but=[XML]), machine.xml
    name = (given.get("kw") or {}).get("name", "vm1") or "disp1"

    result, error, umask = run(
        lambda: machine.connect().create_vm(name, **declared(case)), given["user"], given["umask"]
    )

    assert umask == given["umask"]
    after = machine.tree(but=[XML])
    assert {path: after.get(path) for path in before} == before  # nothing else is touched
    made = {path: entry for path, entry in after.items() if path not in before}
    if refused:
        if case["id"] != "no_permission" or os.geteuid() == 0:
            assert isinstance(error, StoragePoolException), error
            assert made == {}
            assert machine.xml == text
        return
    assert error is None
    assert "created" in result
    assert {
        path: {k: entry.get(k) for k in tree.get(path, ())} for path, entry in made.items()
    } == (tree)
    check_registered(machine, case, declared(case))


def check_registered(machine, case, wanted):
    """
    What we say of the VM is what R3.2 said of it, and it is as declared.

    Recorded sizes of ``vm`` are what R3.2 asks for by default; those on disk are in the tree.
    """
    system = machine.connect()
    info = system.vm_info("vm1")
    volumes = info["volumes"]
    observed = case["observed"]["result"].get("vm")
    if observed:
        template = system.vm_info(info["template"]) if info["template"] else None
        root = volumes["root"] if "root" in volumes else template["volumes"]["root"]
        assert observed["dir_path"] == observed["vmdir"] == info["dir_path"]
        assert observed["private_img"] == volumes["private"]["path"]
        assert observed["volatile_img"] == volumes["volatile"]["path"]
        assert observed["root_img"] == root["path"]
        assert observed["rootcow_img"] == volumes.get("root-cow", {}).get("path")
        assert observed["uuid_set"] is ("uuid" in machine.entries()["vm1"].attrs)
    assert machine.entries()["vm1"].attrs["firewall_conf"] == "firewall.xml"
    assert system.vm_diff("vm1", **wanted) == {}
