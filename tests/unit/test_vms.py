"""VMs: created whole or not at all, changed where declared, removed where nobody minds."""

import os
import shutil
import subprocess

import pytest
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.vm import CREATABLE

from tests.r32.machine import GIB, KERNEL, LIB, XML, element, run

FOO = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
TEMPLATE = f"{LIB}/vm-templates/fedora-23"
SUBDIRS = {"NetVM": "servicevms", "ProxyVM": "servicevms"}
SUBDIRS.update(dict.fromkeys(("TemplateVM", "TemplateHVM"), "vm-templates"))

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def machine(scratch):
    made = scratch(FOO)
    made.add_pools()
    return made


@pytest.fixture
def system(machine):
    return machine.connect()


def refused(machine, call, match):
    """A call is refused with an error, and changes nothing."""
    before = machine.tree()
    with pytest.raises(StoragePoolException, match=match):
        call()
    assert machine.tree() == before


def sizes(system, name):
    return {v: found["size"] for v, found in system.vm_info(name)["volumes"].items()}


def test_an_image_is_not_told_to_be_gone_while_its_disk_is_to_be_mounted(machine, system):
    system.create_vm("work", pool="foo")
    system.create_vm("other", pool="foo")
    system.set_pool("foo", min_free="1")
    guards = machine.path("/etc/qubes/storage-guards.conf")
    guards.write_text(guards.read_text() + "require_mount = /mnt\n")
    for away in ("/mnt/foo/appvms/work", "/mnt/foo/appvms/other"):
        machine.path(away).rename(machine.path(f"{away}.away"))
        with pytest.raises(StoragePoolException, match="pool foo: /mnt is not mounted") as caught:
            system.vm_diff("work", label="red")
        assert caught.value.waits_for == [("mount", "/mnt")]
    guards.unlink()
    refused(machine, lambda: system.set_vm("work", label="red"), "its disk is not mounted; mount")


def test_a_vm_in_another_pool_is_told_whether_that_is_there_or_not(machine, system):
    system.create_vm("work")
    for pool in ("foo", "nope"):
        words = f"VM work: lies in pool default, not in {pool}"
        refused(machine, lambda: system.set_vm("work", pool=pool), words)  # noqa: B023


@pytest.mark.parametrize("klass", CREATABLE)
@pytest.mark.parametrize("pool", ["default", "foo"])
def test_each_class_is_created_once_and_is_then_as_declared(machine, system, klass, pool):
    declared = {"klass": klass, "pool": pool}
    before = machine.tree()
    changes = system.vm_diff("vm", **declared)
    assert machine.tree() == before
    assert changes["created"] == {"old": None, "new": "vm"}
    assert system.create_vm("vm", **declared) == changes
    assert system.vm_diff("vm", **declared) == {}
    after = machine.tree()
    assert system.set_vm("vm", **declared) == {}
    assert machine.tree() == after
    info = system.vm_info("vm")
    place = {"default": LIB, "foo": "/mnt/foo"}[pool]
    assert info["dir_path"] == f"{place}/{SUBDIRS.get(klass, 'appvms')}/vm"
    assert (info["klass"], info["pool"]) == (klass, pool)
    refused(machine, lambda: system.create_vm("vm", **declared), "already")


@pytest.mark.parametrize("klass", ["HVM", "NetVM", "ProxyVM"])
def test_a_vm_with_a_root_of_its_own_keeps_it(machine, system, klass):
    template = {"HVM": "wint"}.get(klass, "fedora-23")
    system.create_vm("wint", klass="TemplateHVM")
    system.create_vm("own", klass=klass, template=template, standalone=True)
    match = "VM own: has a root of its own, .*; leave template out"
    for verb in (system.vm_diff, system.set_vm):
        refused(machine, lambda: verb("own", klass=klass, template=template), match)  # noqa: B023
    assert system.vm_diff("own", klass=klass, template=template, standalone=True) == {}
    assert "/own/root.img" in system.disks("own")["rootdev"]


@pytest.mark.parametrize("klass", ["AppVM", "NetVM", "HVM"])
def test_a_vm_whose_template_is_gone_is_given_another(machine, system, klass):
    template = {"HVM": "wint"}.get(klass, "fedora-23")
    system.create_vm("wint", klass="TemplateHVM")
    system.create_vm("work", klass=klass, template=template)
    qid = machine.entries()[template].attrs["qid"]
    text = machine.xml.decode().replace(f'template_qid="{qid}"', 'template_qid="77"')
    machine.path(XML).write_text(text)
    assert system.verify_vm("work") == [
        "VM work: its template (qid 77) is gone; give it another",
    ]
    assert set(system.vm_info("work")["volumes"]) == {"private", "volatile"}
    for call in (lambda: system.disks("work"), lambda: system.reset_vm("work")):
        refused(machine, call, "qubes_vm.set work template=NAME")
    refused(machine, lambda: system.clone_vm("work", "copy"), "the template of work is not in")
    match = "its root is that of its template, which is gone"
    refused(machine, lambda: system.set_vm("work", volumes={"root": GIB}), match)
    assert "created" in system.vm_diff("copy", clone_from="work", template=template)
    assert system.set_vm("work", label="blue") == {"label": {"old": "red", "new": "blue"}}
    changes = {"template": {"old": None, "new": template}}
    assert system.vm_diff("work", klass=klass, template=template) == changes
    assert system.set_vm("work", klass=klass, template=template) == changes
    assert system.verify_vm("work") == []
    assert "/vm-templates/" in system.disks("work")["rootdev"]


def test_a_vm_of_a_class_that_is_not_known_here_is_left_alone(machine, system):
    place = "/mnt/foo/servicevms/win"
    win = element("QubesWindowsVm", "win", 7, pool_name="foo", dir_path=place)
    machine.elements += [element("QubesWindowsVm", "lost", 8, pool_name="foo"), win]
    machine.write_registry()
    machine.mkdir(place)
    machine.image(f"{place}/private.img", GIB, "mine")
    system.create_vm("work")
    match = "VM win: is a <QubesWindowsVm> in .*qubes.xml, a class that is not known here; take"
    for call in (
        lambda: system.vm_diff("win"),
        lambda: system.create_vm("win"),
        lambda: system.set_vm("win", label="blue"),
        lambda: system.vm_remove_diff("win", purge=True),
        lambda: system.remove_vm("win", purge=True),
        lambda: system.clone_vm("work", "win"),
        lambda: system.clone_vm("win", "copy"),
        lambda: system.rename_vm("work", "win"),
        lambda: system.rename_vm("win", "play"),
        lambda: system.create_vm("app", template="win"),
    ):
        refused(machine, call, match)
    assert (system.vm_info("win"), system.orphans()) == (None, [])
    info = system.pool_info("foo")
    assert (info["vms"], info["provisioned"]) == (["lost", "win"], GIB)
    match = r"pool foo: VMs lie in it \(lost, win\); migrate or remove"
    refused(machine, lambda: system.remove_pool("foo"), match)
    match = r"dir_path cannot change while VMs lie in it \(lost, win\)"
    refused(machine, lambda: system.set_pool("foo", dir_path="/mnt/bar"), match)


@pytest.mark.parametrize(
    ("pool", "there"),
    [("default", "/var/lib/qubes"), ("foo", "/mnt/foo"), ("bar", "/mnt/bar/")],
)
@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}//", "/.{}", "{}/../{name}"])
def test_a_dir_path_that_is_spelled_otherwise_is_no_move(machine, pool, there, spelled):
    text = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
    text += "[bar]\ndriver=xen\ndir_path=/mnt/bar/\n"
    machine.write("/etc/qubes/storage.conf", text.encode())
    for path in ("/mnt/foo", "/mnt/bar"):
        for subdir in ("appvms", "servicevms", "vm-templates"):
            machine.mkdir(f"{path}/{subdir}")
    system = machine.connect()
    system.create_vm("work", pool=pool)
    path = spelled.format(there, name=there.strip("/").split("/")[-1])
    declared = {"driver": "xen", "dir_path": path}
    assert system.pool_diff(pool, **declared) == {}
    wanted = {"min_free": {"old": None, "new": "1MiB"}}
    assert system.set_pool(pool, min_free="1MiB", **declared) == wanted
    assert system.pool_diff(pool, min_free="1MiB", **declared) == {}


@pytest.mark.parametrize("umask", ["000", "077", "777"])
def test_modes_are_ours_whatever_the_umask(machine, umask):
    declared = {"klass": "StandaloneVM", "template": "fedora-23"}
    before = machine.tree()
    error = run(lambda: machine.connect().create_vm("vm", **declared), umask=umask)[1]
    assert error is None
    made = [entry for path, entry in machine.tree().items() if path not in before]
    assert {(entry["type"], entry.get("mode")) for entry in made} == {
        ("dir", "2770"),
        ("file", "0660"),
        ("link", None),
    }


def test_sizes_are_made_as_declared_grow_later_and_never_shrink(machine, system):
    declared = {"klass": "StandaloneVM", "template": "fedora-23"}
    volumes = {"private": "5GiB", "root": {"size": 12 * GIB}}
    system.create_vm("vm", **declared, volumes=volumes)
    assert sizes(system, "vm") == {
        "root": 12 * GIB,
        "private": 5 * GIB,
        "volatile": 10 * GIB + 3 * GIB // 2,
    }
    for smaller in ("1GiB", "5GiB"):
        assert system.vm_diff("vm", volumes={"private": smaller}) == {}
    changes = system.vm_diff("vm", volumes={"private": "6GiB", "root": "1GiB"})
    assert changes == {"volumes": {"old": {"private": 5 * GIB}, "new": {"private": 6 * GIB}}}
    assert system.set_vm("vm", volumes={"private": "6GiB", "root": "1GiB"}) == changes
    assert sizes(system, "vm")["private"] == 6 * GIB
    assert sizes(system, "vm")["root"] == 12 * GIB
    with open(machine.path(f"{LIB}/appvms/vm/private.img"), "rb") as file:
        assert file.readline() == b"PRIV:fedora-23\n"


def test_a_copy_is_never_smaller_than_its_source(system):
    system.create_vm("vm", volumes={"private": "1MiB"})
    assert sizes(system, "vm")["private"] == 2 * GIB


def test_the_cow_of_a_template_grows_with_its_root(system):
    system.create_vm("t", klass="TemplateVM", template="fedora-23", volumes={"root": "11GiB"})
    assert sizes(system, "t")["root-cow"] == 11 * GIB
    system.set_vm("t", volumes={"root": "12GiB"})
    assert (sizes(system, "t")["root-cow"], sizes(system, "t")["root"]) == (12 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    ("declared", "match"),
    [
        ({"volumes": {"root": "20GiB"}}, "its template fedora-23"),
        ({"volumes": {"volatile": "1GiB"}}, "volatile"),
        ({"volumes": {"private": "big"}}, "not a size"),
        ({"volumes": {"private": {"pool": "foo"}}}, "backend local"),
        ({"volumes": ["private"]}, "no map"),
        ({"klass": "DispVM"}, "starts one"),
        ({"klass": "Nope"}, "unknown klass"),
        ({"label": "pink"}, "unknown label"),
        ({"pool": "nope"}, "nope"),
        ({"template": "nope"}, "not in qubes.xml"),
        ({"klass": "HVM", "template": "fedora-23"}, "TemplateHVM"),
        ({"clone_from": "work"}, "of which it is to be a clone, is not in qubes.xml"),
        ({"clone_from": "fedora-23", "root_copy_from": "/root.img"}, "declare one of them"),
        ({"root_copy_from": "/root.img"}, "declare klass: StandaloneVM"),
        ({"template": 5}, "not a text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(machine, system, declared, match):
    refused(machine, lambda: system.create_vm("vm", **declared), match)
    refused(machine, lambda: system.vm_diff("vm", **declared), match)


@pytest.mark.parametrize("name", ["", "1a", "a/b", "..", "a\n", "x-dm", "none", None, 5])
def test_a_name_that_r32_cannot_use_is_refused(machine, system, name):
    refused(machine, lambda: system.create_vm(name), "not a|is empty")


@pytest.mark.parametrize("content", [None, "precious", "link"])
def test_a_place_that_is_taken_is_refused_and_left_alone(machine, system, content):
    place = machine.path(f"{LIB}/appvms/vm")
    if content == "link":
        place.symlink_to("/nowhere")
    else:
        place.mkdir()
    if content == "precious":
        (place / content).write_text(content)
    refused(machine, lambda: system.create_vm("vm"), "left alone")


@pytest.mark.parametrize("gone", ["private.img", "root.img", None])
def test_a_create_whose_source_is_gone_leaves_nothing_and_can_be_tried_again(machine, system, gone):
    declared = {"klass": "StandaloneVM", "template": "fedora-23"}
    path = machine.path(f"{TEMPLATE}/{gone}" if gone else f"{LIB}/vm-kernels/{KERNEL}/vmlinuz")
    os.rename(path, f"{path}.away")
    refused(machine, lambda: system.create_vm("vm", **declared), path.name)
    os.rename(f"{path}.away", path)
    assert "created" in system.create_vm("vm", **declared)


@root_only
def test_a_full_disk_leaves_nothing_and_the_create_can_be_tried_again(machine, system):
    with open(machine.path(f"{TEMPLATE}/private.img"), "r+b") as file:
        file.write(b"x" * 8 * 1024**2)
    machine.write(f"{LIB}/vm-kernels/{KERNEL}/modules.img", b"x" * 2 * 1024**2)
    target = machine.path("/mnt/foo")
    declared = {"klass": "StandaloneVM", "template": "fedora-23", "pool": "foo"}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9M", "none", target], check=True)
    try:
        machine.add_pools()
        before = machine.tree()
        with pytest.raises(StoragePoolException, match="No space left on device"):
            system.create_vm("vm", **declared)
        assert machine.tree() == before
        subprocess.run(["mount", "-o", "remount,size=20M", target], check=True)
        assert "created" in system.create_vm("vm", **declared)
        assert system.vm_diff("vm", **declared) == {}
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("how", ["no default kernel", "no vm-kernels"])
def test_without_a_kernel_the_attribute_says_none_and_nothing_is_copied(machine, system, how):
    if how == "no vm-kernels":
        shutil.rmtree(machine.path(f"{LIB}/vm-kernels"))
    else:
        machine.attrs["default_kernel"] = "None"
        machine.write_registry()
    system.create_vm("vm", klass="StandaloneVM", template="fedora-23")
    assert machine.entries()["vm"].attrs["kernel"] == "None"
    assert not machine.path(f"{LIB}/appvms/vm/kernels").exists()


def test_label_and_template_change_where_declared_and_nothing_else_does(machine, system):
    system.create_vm("t2", klass="TemplateVM", template="fedora-23")
    system.create_vm("work", label="green")
    old = machine.entries()["work"].attrs
    assert system.set_vm("work", label="blue", template="t2") == {
        "label": {"old": "green", "new": "blue"},
        "template": {"old": "fedora-23", "new": "t2"},
    }
    qid = machine.entries()["t2"].attrs["qid"]
    assert machine.entries()["work"].attrs == {**old, "label": "blue", "template_qid": qid}
    assert os.readlink(machine.path(f"{LIB}/appvms/work/icon.png")).endswith("appvm-blue.png")
    assert system.vm_diff("work") == {}
    for match, template in (("not in qubes.xml", "nope"), ("runs on TemplateVM", "work")):
        refused(machine, lambda t=template: system.set_vm("work", template=t), match)


def test_a_class_or_pool_that_differs_is_refused(machine, system):
    system.create_vm("work")
    refused(machine, lambda: system.vm_diff("work", klass="StandaloneVM"), "never changes")
    refused(machine, lambda: system.vm_diff("work", pool="foo"), "lies in pool default")
    with pytest.raises(InvalidInput):
        system.vm_diff("dom0", label="red")
    assert system.vm_diff("work", root_copy_from="/x") == {}  # it matters at creation only


def test_an_image_that_is_gone_is_never_made_anew(machine, system):
    system.create_vm("work")
    system.create_vm("other")
    machine.path(f"{LIB}/appvms/work/private.img").unlink()
    refused(machine, lambda: system.vm_diff("work", volumes={"private": "5GiB"}), "never made anew")
    shutil.rmtree(machine.path(f"{LIB}/appvms/work"))
    refused(machine, lambda: system.set_vm("work", label="blue"), "never made anew")


def test_nothing_is_made_in_a_pool_whose_disk_is_away(machine, system):
    system.create_vm("work", pool="foo")
    os.rename(machine.path("/mnt/foo"), machine.path("/mnt/away"))
    refused(machine, lambda: system.create_vm("new", pool="foo"), "foo")
    machine.add_pools()
    refused(machine, lambda: system.create_vm("new", pool="foo"), "disk is not mounted")
    refused(machine, lambda: system.set_vm("work", label="blue"), "foo")


def test_guards_stop_creation_and_growth(machine, system):
    system.create_vm("work", pool="foo")
    system.set_pool("foo", min_free="1000TiB")
    refused(machine, lambda: system.create_vm("new", pool="foo"), "min_free")
    refused(machine, lambda: system.set_vm("work", volumes={"private": "9GiB"}), "min_free")
    system.set_pool("foo", min_free="1MiB")
    assert system.set_vm("work", volumes={"private": "9GiB"})


def test_what_others_use_is_not_removed(machine, system):
    system.create_vm("net", klass="NetVM")
    system.create_vm("fw", klass="ProxyVM")
    system.create_vm("work")
    refused(machine, lambda: system.remove_vm("fedora-23", purge=True), "template of fw, net, work")
    refused(machine, lambda: system.remove_vm("net", purge=True), "NetVM of fw")
    refused(machine, lambda: system.remove_vm("fw", purge=True), "NetVM of")
    refused(machine, lambda: system.remove_vm("dom0", purge=True), "cannot be removed")


def test_images_are_deleted_only_with_purge(machine, system):
    before = machine.tree(but=[XML])
    system.create_vm("work")
    refused(machine, lambda: system.remove_vm("work"), "purge")
    shown = system.vm_remove_diff("work", purge=True)
    assert f"{LIB}/appvms/work/private.img" in shown["deleted"]["old"]
    assert system.remove_vm("work", purge=True) == shown
    assert machine.tree(but=[XML]) == before
    assert "work" not in system.list_vms()
    assert system.remove_vm("work", purge=True) == {}


def test_a_vm_without_images_is_removed_without_purge(machine, system):
    system.create_vm("work")
    shutil.rmtree(machine.path(f"{LIB}/appvms/work"))
    assert system.remove_vm("work") == {"removed": {"old": "work", "new": None}}


def test_removing_a_default_leaves_none(machine, system):
    system.create_vm("net", klass="NetVM")
    system.remove_vm("net", purge=True)
    assert b'clockvm="None"' in machine.xml
    assert b'default_fw_netvm="None"' in machine.xml


def test_links_are_deleted_and_never_followed(machine, system):
    system.create_vm("work")
    machine.mkdir("/mnt/precious")
    machine.image("/mnt/precious/data", 4096, "mine")
    machine.path(f"{LIB}/appvms/work/link").symlink_to(machine.path("/mnt/precious"))
    system.remove_vm("work", purge=True)
    assert machine.path("/mnt/precious/data").exists()
    system.create_vm("other")
    shutil.rmtree(machine.path(f"{LIB}/appvms/other"))
    machine.path(f"{LIB}/appvms/other").symlink_to(machine.path("/mnt/precious"))
    with pytest.raises(StoragePoolException, match="other is no directory that can be opened"):
        system.remove_vm("other", purge=True)
    assert machine.path("/mnt/precious/data").exists()


def test_looking_writes_nothing(machine, system):
    system.create_vm("work")
    before = machine.tree()
    system.list_vms()
    system.vm_info("work")
    assert system.vm_info("nope") is None
    system.vm_diff("work", label="blue")
    system.vm_remove_diff("work", purge=True)
    system.orphans()
    assert machine.tree() == before


def test_a_template_in_another_pool_is_copied_from_there(machine, system):
    system.create_vm("t2", klass="TemplateVM", template="fedora-23", pool="foo")
    system.create_vm("work", template="t2")
    with open(machine.path(f"{LIB}/appvms/work/private.img"), "rb") as file:
        assert file.readline() == b"PRIV:fedora-23\n"
