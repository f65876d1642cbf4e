"""
What R3.2 does with a VM that is there: clone, rename, remove, resize, verify, commit, reset.

Ours throughout: what is refused changes nothing, and what is done is whole. ``ours`` of a case
names what is not as recorded, and why.
"""

import os

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.cases import cases, load
from tests.r32.machine import GIB, KERNEL, LIB, XML, element, run

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/var/lib/qubes/foo\n"
CONF += "[bar]\ndriver=xen\ndir_path=/mnt/bar\n"
POOLS = {"default": LIB, "foo": f"{LIB}/foo", "bar": "/mnt/bar"}
# kind: (element, directory, whether it has a root of its own)
KINDS = {
    "appvm": ("QubesAppVm", "appvms", False),
    "netvm": ("QubesNetVm", "servicevms", False),
    "proxyvm": ("QubesProxyVm", "servicevms", False),
    "standalone": ("QubesAppVm", "appvms", True),
    "template": ("QubesTemplateVm", "vm-templates", True),
    "hvm": ("QubesHVm", "appvms", True),
    "hvmt": ("QubesTemplateHVm", "vm-templates", True),
    "hvm_tmpl": ("QubesHVm", "appvms", False),
}
EXTRA = 3 * GIB // 2


class Stage:
    """The scratch system, and in it the VM ``src`` of a case."""

    def __init__(self, machine, case, pool="default"):
        self.machine = machine
        self.case = case
        given = case["input"]
        self.kind = given.get("kind", "appvm")
        self.pool = given.get("src_pool", given.get("pool", pool))
        tag, subdir, own = KINDS[self.kind]
        hvm = self.kind.startswith("hvm")
        self.subdir = subdir
        self.dir = f"{POOLS[self.pool]}/{subdir}/src"
        self.template = f"{LIB}/vm-templates/{'hvm-t' if self.kind == 'hvm_tmpl' else 'fedora-23'}"
        self.root = f"{self.dir if own else self.template}/root.img"
        machine.add_pools()
        attrs = {"pool_name": self.pool, "dir_path": self.dir, "uuid": "u"}
        attrs["template_qid"] = "none" if own else "2" if hvm else "1"
        attrs["label"] = "black" if subdir == "vm-templates" else "red"
        if subdir == "servicevms":
            attrs["netid"] = "1"
        if self.kind == "hvm_tmpl":
            template = element("QubesTemplateHVm", "hvm-t", 2, dir_path=self.template)
            machine.add_template(template, LIB, 20 * GIB, marked=False)
        if self.pool != "default":  # what R3.2 writes there
            attrs["firewall_conf"] = f"{LIB}/{subdir}/src/firewall.xml"
        if "drive" in given:
            attrs["drive"] = given["drive"]
        if case["id"] == "rename_installed_by_rpm":
            attrs["installed_by_rpm"] = "True"
        qid = 3 if self.kind == "hvm_tmpl" else 2
        machine.elements.append(element(tag, "src", qid, **attrs))
        self.fill(own, hvm, attrs["label"])
        if case["id"] == "rename_template_with_dependents":
            machine.elements.append(element("QubesAppVm", "dep", 4, template_qid="2"))
        machine.write_registry()
        self.system = machine.connect()

    def fill(self, own, hvm, label):
        """The files of ``src``."""
        machine, size = self.machine, (20 if hvm else 10) * GIB
        machine.mkdir(self.dir)
        machine.image(f"{self.dir}/private.img", 2 * GIB, "SRCPRIV")
        machine.image(f"{self.dir}/volatile.img", size + EXTRA)
        machine.image(f"{self.dir}/src.conf", 100, "conf")
        icon = f"/usr/share/icons/hicolor/128x128/devices/appvm-{label}.png"
        machine.path(f"{self.dir}/icon.png").symlink_to(icon)
        if own:
            machine.image(f"{self.dir}/root.img", size, "SRCROOT")
            if not hvm:
                machine.mkdir(f"{self.dir}/kernels")
                for name in ("vmlinuz", "initramfs", "modules.img"):
                    machine.image(f"{self.dir}/kernels/{name}", len(name) + 1, name)
        if self.subdir == "vm-templates":
            machine.image(f"{self.dir}/root-cow.img", size)

    def run(self, call):
        """``(result, error, tree before, tree after)`` of a call, as the user of the case."""
        given = self.case["input"]
        before, text = self.machine.tree(but=[XML]), self.machine.xml
        result, error, umask = run(
            lambda: call(self.machine.connect()), given["user"], given["umask"]
        )
        assert umask == given["umask"]
        after = self.machine.tree(but=[XML])
        if error is not None:
            assert isinstance(error, StoragePoolException), error
            assert after == before
            assert self.machine.xml == text
        return result, error, before, after


@pytest.fixture
def stage(scratch):
    return lambda case, **kwargs: Stage(scratch(CONF), case, **kwargs)


def of(verb):
    """The cases of a verb."""
    return [case for case in cases("F_ops") if case.id.startswith(f"{verb}_")]


VERBS = ("clone", "rename", "remove", "resize", "verify", "commit", "reset", "prepare", "firewall")


def test_every_case_is_run():
    assert sum(len(of(verb)) for verb in VERBS) == len(load("F_ops"))


def observed(case):
    """``(what was recorded, whether ours refuses it)``."""
    result = case["observed"]["result"]
    failed = isinstance(result, dict) and "exception" in result
    return result, case.get("ours", {}).get("refused", failed)


def seen(entry, keys):
    return {key: entry.get(key) for key in keys}


def recorded(entries, keys=("type", "target", "size", "blocks_zero", "head")):
    """``{path: entry}`` of a recorded tree, with the keys that tell what it is."""
    return {e["path"]: {k: e[k] for k in keys if k in e} for e in entries}


def compare(after, wanted):
    for path, entry in wanted.items():
        assert path in after, path
        if not path.endswith((".conf", "kernels/vmlinuz", "kernels/initramfs")):
            assert seen(after[path], entry) == entry, path


@pytest.mark.parametrize("case", of("clone"))
def test_clone(stage, case):
    on = stage(case)
    result, refused = observed(case)
    ours = case.get("ours", {})
    pool = result.get("dst", {}).get("pool_name", "nope" if "pool" in case["id"] else None)
    private = on.machine.path(f"{on.dir}/private.img")
    if "src_mode" in case["id"]:
        os.chown(private, 1000 if os.geteuid() == 0 else -1, -1)
        private.chmod(0o600)
    elif "private_missing" in case["id"]:
        private.unlink()
    elif "dst_dir" in case["id"]:
        on.machine.mkdir(f"{LIB}/appvms/dst")
    elif "icon_missing" in case["id"]:
        on.machine.path(f"{on.dir}/icon.png").unlink()
    name = "1bad" if "bad_name" in case["id"] else "dst"
    _, error, before, after = on.run(lambda system: system.clone_vm("src", name, pool))
    assert (error is not None) is refused
    if refused:
        return
    vmdir = result["dst"]["vmdir"]
    wanted = recorded(result["created"])
    for gone in ours["not_made"]:
        wanted.pop(f"{vmdir}/{gone}", None)
    for more in ours.get("also_made", ()):
        wanted[f"{vmdir}/{more}"] = {}
    assert {path for path in after if path not in before} == set(wanted)
    assert {path: after[path] for path in before} == before
    compare(after, wanted)
    for path in wanted:
        if after[path]["type"] != "link":
            assert after[path]["mode"] == ours["modes"][after[path]["type"]]
    info = on.system.vm_info("dst")
    dst = result["dst"]
    assert info["dir_path"] == vmdir == on.machine.entries()["dst"].attrs["dir_path"]
    assert info["pool"] == dst["pool_name"]
    assert info["volumes"]["private"]["path"] == dst["private_img"]
    assert info["volumes"].get("root", {"path": on.root})["path"] == dst["root_img"]
    assert info["volumes"].get("root-cow", {"path": None})["path"] == dst["rootcow_img"]
    source = on.system.vm_info("src")["volumes"]
    for volume in {"private", "root"} & set(source):
        assert info["volumes"][volume]["size"] == source[volume]["size"]
    attrs = on.machine.entries()["dst"].attrs
    assert (attrs["firewall_conf"], attrs["conf_file"]) == ("firewall.xml", "dst.conf")
    assert attrs["uuid"] != on.machine.entries()["src"].attrs["uuid"]
    assert on.system.verify_vm("dst") == []


@pytest.mark.parametrize("case", of("rename"))
def test_rename(stage, case):
    on = stage(case)
    result, refused = observed(case)
    ours = case.get("ours", {})
    parent = os.path.dirname(on.dir)
    if "dir_exists" in case["id"]:
        place = on.machine.mkdir(f"{parent}/newname")
        if "nonempty" in case["id"]:
            (place / "precious").touch()
    elif "dir_missing" in case["id"]:
        on.machine.path(on.dir).rename(on.machine.path("/mnt/away"))
    name = case["input"].get("new_name", "newname")
    _, error, before, after = on.run(lambda system: system.rename_vm("src", name))
    assert (error is not None) is refused
    if refused:
        return
    gone = {path for path in before if path not in after}
    made = {path for path in after if path not in before}
    assert gone == {path for path in before if path.startswith(on.dir)}
    assert {
        p.replace(f"/{name}", "/src").replace(f"/{name}.conf", "/src.conf") for p in made
    } == gone
    if result["created"]:
        compare(after, recorded(result["created"]))
        assert made == set(recorded(result["created"]))
        assert gone == set(result["removed"])
    attrs = on.machine.entries()[name].attrs
    assert attrs["dir_path"] == f"{parent}/{name}"
    assert attrs["conf_file"] == f"{name}.conf"
    assert attrs["firewall_conf"] == ours.get("firewall_conf", "firewall.xml")
    reloaded = result["reload"]["ok"] if "reload" in result else []
    if "offline" not in case["id"]:
        qids = {row[1]: str(row[0]) for row in reloaded}
        assert attrs["qid"] == qids[name]
    if "dependents" in case["id"]:
        assert on.system.list_vms()["dep"]["template"] == name
    assert on.system.verify_vm(name) == []


@pytest.mark.parametrize("case", of("remove"))
def test_remove(stage, case):
    on = stage(case)
    result, refused = observed(case)
    if "dir_missing" in case["id"]:
        on.machine.path(on.dir).rename(on.machine.path("/mnt/away"))
    _, error, before, after = on.run(lambda system: system.remove_vm("src", purge=True))
    assert (error is not None) is refused
    gone = {path for path in before if path not in after}
    assert {path: after[path] for path in before if path not in gone} == {
        path: entry for path, entry in before.items() if path not in gone
    }
    assert gone == {path for path in before if path.startswith(on.dir)}
    if result["removed"]:
        assert gone == set(result["removed"])
    assert "src" not in on.machine.entries()


@pytest.mark.parametrize("case", of("resize"))
def test_resize(stage, case):
    on = stage(case)
    result, refused = observed(case)
    ours = case.get("ours", {})
    volume = "root" if "root" in case["id"] else "private"
    path = f"{on.dir}/private.img" if volume == "private" else on.root
    size = case["input"].get("size", GIB)
    size = on.machine.path(path).stat().st_size if size == "current" else size
    _, error, before, after = on.run(lambda system: system.resize_vm("src", volume, size))
    assert (error is not None) is refused
    if refused:
        if "shrink" in case["id"] and "template" not in str(error):
            assert str(before[path]["size"]) in str(error)  # the present size
        return
    wanted = ours.get("size", result["size_after"])
    assert after[path]["size"] == wanted
    assert after[path]["head"] == result["head_after"]
    changed = {p for p in after if after[p] != before.get(p)}
    grown = {path} if wanted != before[path]["size"] else set()
    assert changed == grown | ({f"{on.dir}/root-cow.img"} if ours.get("root_cow") else set())


MISSING = {
    "dir": "{dir}",
    "private": "{dir}/private.img",
    "volatile": "{dir}/volatile.img",
    "rootcow": "{dir}/root-cow.img",
    "template_rootcow": "{template}/root-cow.img",
    "icon": "{dir}/icon.png",
    "conf": "{dir}/src.conf",
    "modules": f"{LIB}/vm-kernels/{KERNEL}/modules.img",
    "vmlinuz": f"{LIB}/vm-kernels/{KERNEL}/vmlinuz",
    "initramfs": f"{LIB}/vm-kernels/{KERNEL}/initramfs",
    "kernels_dir": f"{LIB}/vm-kernels/{KERNEL}",
}


@pytest.mark.parametrize("case", of("verify"))
def test_verify(stage, case):
    on = stage(case, pool="foo" if "_foo_" in case["id"] else "default")
    result, _ = observed(case)
    missing = case["input"].get("missing", case["id"].rsplit("_", 1)[1])
    assert on.system.verify_vm("src") == []
    if missing in (None, "None"):
        assert result == {"ok": True}
        return
    path = MISSING.get(missing, on.root).format(dir=on.dir, template=on.template)
    there = on.machine.path(path)
    if os.path.lexists(there):
        there.rename(on.machine.path("/mnt/away"))
    else:
        assert result == {"skipped": True}
    problems, error, *_ = on.run(lambda system: system.verify_vm("src"))
    assert error is None
    if "exception" not in result:
        assert problems == []
        return
    named = result["exception"]["message"].rsplit(": ", 1)[1]
    assert any(problem.startswith(f"{named}: is gone") for problem in problems), problems
    if missing != "kernels_dir":
        assert len(problems) == 1


@pytest.mark.parametrize("case", of("commit"))
def test_commit(stage, case):
    on = stage(case)
    result, refused = observed(case)
    cow = f"{on.dir}/root-cow.img"
    on.machine.image(cow, 10 * GIB, "COWDATA")
    if "no_cow" in case["id"]:
        on.machine.path(cow).unlink()
    elif "old_exists" in case["id"]:
        on.machine.image(f"{cow}.old", 10 * GIB, "OLD")
    elif "root_missing" in case["id"]:
        on.machine.path(on.root).rename(on.machine.path("/mnt/away"))
    elif "root_grown" in case["id"]:
        os.truncate(on.machine.path(on.root), 12 * GIB)
    times = case["input"].get("times", 1)
    _, error, before, after = on.run(lambda system: [system.commit_vm("src") for _ in range(times)])
    assert (error is not None) is refused
    if refused:
        return
    wanted = recorded(result["changed"] + result["created"])
    compare(after, wanted)
    changed = {p for p in after if after[p].get("inode") != before.get(p, {}).get("inode")}
    assert changed == set(wanted)
    assert {after[path]["mode"] for path in wanted} == {"0660"}


@pytest.mark.parametrize("case", of("reset"))
def test_reset_volatile(stage, case):
    on = stage(case)
    result, _ = observed(case)
    ours = case.get("ours", {})
    path = f"{on.dir}/volatile.img"
    if case["input"].get("volatile") == "missing":
        on.machine.path(path).unlink()
    changes, error, before, after = on.run(lambda system: system.reset_vm("src"))
    assert error is None
    recreated = ours.get("recreated", result["recreated"])
    assert (after[path]["inode"] != before.get(path, {}).get("inode")) is recreated
    assert bool(changes) is recreated
    assert after[path]["size"] == ours.get("size", result["size"])
    assert {p: after[p] for p in before if p != path} == {
        p: entry for p, entry in before.items() if p != path
    }


@pytest.mark.parametrize("case", of("prepare"))
def test_what_a_start_makes_in_r32(stage, case):
    on = stage(case)
    ours = case["ours"]
    if "verify" in ours:
        on.machine.path(f"{on.dir}/private.img").rename(on.machine.path("/mnt/away"))
        problems, _, before, after = on.run(lambda system: system.verify_vm("src"))
        assert ours["verify"] in problems[0]
        assert after == before
    elif "commit" in ours:
        on.machine.path(f"{on.dir}/root-cow.img").unlink()
        *_, after = on.run(lambda system: system.commit_vm("src"))
        compare(after, recorded(case["observed"]["result"]["created"]))
    else:
        on.run(lambda system: system.set_vm("src", label="blue"))
        assert on.machine.entries()["src"].attrs["drive"] == case["input"]["drive"]


@pytest.mark.parametrize("case", of("firewall"))
def test_rules_of_the_firewall_have_a_place_that_is_there(stage, case):
    on = stage(case)
    pool = case["input"]["pool"]
    on.run(lambda system: system.create_vm("new", pool=pool))
    conf = on.machine.entries()["new"].attrs["firewall_conf"]
    assert conf == case["ours"]["firewall_conf"]
    assert on.machine.path(os.path.join(on.system.vm_info("new")["dir_path"], conf)).parent.is_dir()
