"""
The rules of the default pool, and of the paths that follow from a VM's pool.

R3.2 takes the default pool's directory from ``defaults["pool_config"]`` and fails when its section
says anything of its own; here the section overrides it. The keywords that R3.2's VM takes and
ignores are attributes in qubes.xml here, and ignored just so.
"""

import os
import re

import pytest
import qubes_storage
from qubes_storage.drivers import xen

from tests.r32.cases import cases
from tests.r32.conftest import as_user

CASES = cases("C_default_pool")
VMS = [param for param in CASES if "kwargs" in param.values[0]["input"]]
KERNEL = "4.4.14-11"


def set_attributes(root, tag, **attrs):
    """Give an element of qubes.xml attributes, as R3.2's own tools might have."""
    path = root / "var/lib/qubes/qubes.xml"
    text = path.read_text()
    for key, value in attrs.items():
        element = re.search(rf"<{tag}\b[^>]*>", text)[0]
        kept = re.sub(rf'\s{key}="[^"]*"', "", element)
        text = text.replace(element, kept.replace(f"<{tag}", f'<{tag} {key}="{value}"', 1))
    path.write_text(text)


def make(root, case):
    """Make vm1 as the case has it, with its template in the default pool; its registry entry."""
    conf = case["input"]["conf"]
    if conf is not None:
        (root / "etc/qubes/storage.conf").write_text(conf)
    system = qubes_storage.connect(root, "local")
    kwargs = dict(case["input"]["kwargs"])
    pool = kwargs.pop("pool_name", "default")
    for name in {"default", pool or "default"}:
        system.set_pool(name)
    system.create_vm("fedora-23", klass="TemplateVM")
    set_attributes(root, "QubesVmCollection", default_kernel=KERNEL)
    (root / "var/lib/qubes/vm-kernels" / KERNEL).mkdir()
    system.create_vm("vm1", template="fedora-23", pool=pool)
    set_attributes(root, "QubesAppVm", **kwargs)
    return system


@pytest.mark.parametrize("case", VMS)
def test_a_vm_lies_where_its_pool_says(case, machine):
    ours = case.get("ours", {})
    wanted = ours if "result" in ours or "exception" in ours else case["observed"]
    with as_user(case):
        if "exception" in wanted:
            pool = case["input"]["kwargs"].get("pool_name", "default")
            with pytest.raises(qubes_storage.StoragePoolException, match=f"pool {pool}: "):
                make(machine, case)
            return
        system = make(machine, case)
    wanted = {**wanted["result"], **ours.get("values", {})}
    found = look(machine, system)
    assert {key: found[key] for key in wanted} == {
        key: value.rstrip("/") if isinstance(value, str) else value for key, value in wanted.items()
    }


def look(root, system):
    """What R3.2's VM and its storage would say, from what is here and on disk."""
    vm, info = system.get_vm("vm1"), system.vm_info("vm1")
    pool = system.get_pool(vm.pool)
    vmdir, attrs = pool.vmdir(vm), vm.entry.attrs
    images = {volume: at["path"] for volume, at in info["volumes"].items()}
    template = system.vm_info(vm.template)["volumes"]["root"]["path"]
    kernels = f"/var/lib/qubes/vm-kernels/{attrs['kernel']}"
    assert type(pool) is xen.Pool
    for path in (images["private"], images["volatile"], template):
        assert (root / path.lstrip("/")).is_file()
    icon = f"{vmdir}/icon.png"
    assert (root / icon.lstrip("/")).is_symlink()
    return {
        "pool_name": vm.pool,
        "pool.dir_path": pool.dir_path.rstrip("/"),
        "storage_class": "qubes.storage.xen.XenStorage",
        "storage.vmdir": vmdir,
        "dir_path(vm)": info["dir_path"],
        "private_img": images["private"],
        "volatile_img": images["volatile"],
        "root_img": template,
        "icon_path": icon,
        "conf_file": os.path.join(vmdir, "vm1.conf"),
        "firewall_conf": os.path.join(vmdir, attrs["firewall_conf"]),
        "kernels_dir": kernels,
        "modules_img": f"{kernels}/modules.img",
        "modules_img_rw": False,
    }


@pytest.mark.parametrize("case", [param for param in CASES if param not in VMS])
def test_load_and_dump_are_inverse_for_a_class(case):
    wanted = case.get("ours", case["observed"])["result"]
    pool = xen.Pool("foo", dir_path="/x")
    assert qubes_storage.dump(pool) == "qubes_storage.drivers.xen.Pool"
    assert qubes_storage.load(qubes_storage.dump(pool)) is xen.Pool
    storage, pool = "qubes.storage.xen.XenStorage", "qubes.storage.xen.XenPool"
    given = [storage, pool, pool, "os.path", "nomodule", "", "a.b.C", "os.Nope", 5]
    assert len(given) == len(wanted["load"])
    for string, seen in zip(given, wanted["load"]):
        if "exception" in seen:
            with pytest.raises(qubes_storage.StoragePoolException):
                qubes_storage.load(string)
        elif "Xen" in seen["ok"]:
            assert qubes_storage.load(string) is xen.Pool
        else:
            assert qubes_storage.load(string) == {"os.path": os.path, 5: 5}[string]
