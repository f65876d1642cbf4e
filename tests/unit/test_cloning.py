"""VMs made of others, and of files that the caller brings."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from qubes_storage.exc import InvalidInput, StoragePoolException

from tests.r32.machine import GIB, GID, LIB, USER, element
from tests.unit.test_build import kill_at, steps
from tests.unit.test_files import as_user
from tests.unit.test_image import mount
from tests.unit.test_moving import CONF, MIB, refused

VMDIR = f"{LIB}/appvms/work"
SET = {"memory": "1234", "vcpus": "7", "label": "purple", "include_in_backups": "False",
       "services": "{'cups': True}", "kernelopts": "quiet", "uses_default_kernelopts": "False",
       "pcidevs": "['00:1f.6']", "mac": "00:16:3e:00:00:01", "maxmem": "4000",
       "netvm_qid": "1", "uses_default_netvm": "False", "default_user": "me"}  # fmt: skip


@pytest.fixture
def machine(scratch):
    """Two pools, and the VMs ``work`` with settings of its own, and ``alone`` with a root."""
    made = scratch(CONF)
    made.add_pools()
    made.elements.append(
        element("QubesAppVm", "work", 2, template_qid="1", autostart="True", uuid="u", **SET)
    )
    made.write_registry()
    made.mkdir(VMDIR)
    made.image(f"{VMDIR}/private.img", 3 * GIB, "mine")
    made.image(f"{VMDIR}/volatile.img", GIB)
    made.image(f"{VMDIR}/firewall.xml", 100, "rules")
    made.mkdir(f"{VMDIR}/apps.templates")
    made.image(f"{VMDIR}/apps.templates/a", 10, "app")
    made.image(f"{VMDIR}/work.conf", 100)
    made.connect().create_vm("alone", klass="StandaloneVM", template="fedora-23")
    return made


def entry(machine, name):
    return machine.entries()[name].attrs


@pytest.mark.parametrize("pool", [None, "foo"])
def test_a_clone_has_images_rules_and_settings_of_its_source(machine, pool):
    system = machine.connect()
    before = machine.tree()
    home = {None: f"{LIB}/appvms", "foo": "/mnt/foo/appvms"}[pool]
    changes = system.vm_diff("play", clone_from="work", pool=pool)
    assert machine.tree() == before
    assert system.clone_vm("work", "play", pool) == changes
    assert changes["clone_from"] == {"old": None, "new": "work"}
    after = machine.tree()
    assert {path: after[path] for path in before if "qubes.xml" not in path} == {
        path: entry for path, entry in before.items() if "qubes.xml" not in path
    }
    made = {p.removeprefix(f"{home}/play"): e for p, e in after.items() if p.startswith(home)}
    made = {p: e for p, e in made.items() if p.startswith("/") and not p.startswith(home)}
    assert set(made) == {
        "/icon.png", "/private.img", "/firewall.xml", "/apps.templates", "/apps.templates/a",
    }  # fmt: skip
    assert (made["/private.img"]["size"], made["/private.img"]["head"]) == (3 * GIB, "mine")
    assert made["/icon.png"]["target"].endswith("appvm-purple.png")
    assert {e["mode"] for e in made.values() if "mode" in e} == {"0660", "2770"}
    cloned, source = entry(machine, "play"), entry(machine, "work")
    assert {key: cloned[key] for key in SET} == SET
    assert cloned["qid"] != source["qid"]
    assert cloned["uuid"] != source["uuid"]
    assert cloned["autostart"] == "False"
    assert (cloned["firewall_conf"], cloned["conf_file"]) == ("firewall.xml", "play.conf")
    assert cloned["dir_path"] == f"{home}/play"
    assert system.vm_diff("play", clone_from="work", pool=pool) == {}
    assert system.verify_vm("play") == []


def test_a_clone_lies_in_the_pool_of_its_source_unless_another_is_declared(machine):
    system = machine.connect()
    system.migrate_vm("work", "foo")
    assert system.vm_diff("play", clone_from="work")["pool"] == {"old": None, "new": "foo"}
    system.clone_vm("work", "play")
    system.clone_vm("work", "near", "default")
    pools = {name: vm["pool"] for name, vm in system.list_vms().items()}
    assert (pools["play"], pools["near"]) == ("foo", "default")


def test_a_clone_of_a_vm_with_a_root_has_one_and_the_kernels(machine):
    system = machine.connect()
    system.clone_vm("alone", "copy", "foo")
    there = sorted(os.listdir(machine.path("/mnt/foo/appvms/copy")))
    assert there == ["icon.png", "kernels", "private.img", "root.img"]
    assert machine.tree()["/mnt/foo/appvms/copy/root.img"]["head"] == "ROOT:fedora-23"
    assert len(os.listdir(machine.path("/mnt/foo/appvms/copy/kernels"))) == 3


@pytest.mark.parametrize("klass", ["TemplateVM", "TemplateHVM"])
def test_a_clone_of_a_template_can_be_run_on(machine, klass):
    system = machine.connect()
    system.create_vm("t", klass=klass)
    system.clone_vm("t", "t2", "foo")
    volumes = system.vm_info("t2")["volumes"]
    assert volumes["root-cow"]["size"] == volumes["root"]["size"]
    assert volumes["root-cow"]["allocated"] == 0


def test_what_is_declared_beside_clone_from_is_kept(machine):
    system = machine.connect()
    system.create_vm("t", klass="TemplateVM")
    declared = {"label": "blue", "template": "t", "volumes": {"private": 4 * GIB}}
    system.create_vm("play", klass="AppVM", clone_from="work", **declared)
    assert system.list_vms()["play"]["template"] == "t"
    assert system.vm_info("play")["volumes"]["private"]["size"] == 4 * GIB
    assert system.vm_diff("play", clone_from="work", **declared) == {}


def test_what_cannot_be_cloned_is_refused_and_nothing_changes(machine):
    system = machine.connect()
    for declared, match in (
        ({"clone_from": "nope"}, "is not in qubes.xml"),
        ({"clone_from": "work", "pool": "nope"}, "pool nope: unknown"),
        ({"clone_from": "dom0"}, "dom0"),
        ({"clone_from": "work", "klass": "NetVM"}, "is of class AppVM, not NetVM"),
        ({"clone_from": "alone", "template": "fedora-23"}, "declare one of them"),
        ({"clone_from": "work", "volumes": {"root": GIB}}, "template fedora-23"),
    ):
        refused(machine, lambda: system.create_vm("play", **declared), match)  # noqa: B023
    refused(machine, lambda: system.clone_vm("work", "1bad"), "not a name", InvalidInput)
    refused(machine, lambda: system.clone_vm("work", "alone"), "in qubes.xml already")
    for content in (False, True):
        place = machine.mkdir(f"{LIB}/appvms/play")
        if content:
            (place / "precious").touch()
        refused(machine, lambda: system.clone_vm("work", "play"), "left alone")
    with pytest.raises(StoragePoolException) as error:
        system.vm_diff("x", clone_from="nope", pool="none-such")
    assert error.value.waits_for == [("VM", "nope"), ("pool", "none-such")]


def test_what_cannot_be_taken_along_is_told_beforehand(machine):
    os.link(machine.path(f"{VMDIR}/apps.templates/a"), machine.path("/mnt/a"))
    system = machine.connect()
    for call in (
        lambda: system.vm_diff("play", clone_from="work"),
        lambda: system.clone_vm("work", "play"),
    ):
        refused(machine, call, "VM work: .*: a has a name elsewhere too")


@pytest.fixture
def start(machine):
    """``start(image)``: have a loop device over an image, as a VM that runs has; returns it."""
    started = []

    def attach(path):
        done = subprocess.run(
            ["losetup", "--find", "--show", machine.path(path)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"no loop device: {done.stderr}")
        started.append(done.stdout.strip())
        return started[-1]

    yield attach
    for device in started:
        subprocess.run(["losetup", "--detach", device], check=True)


FROM_TEMPLATE = {"klass": "StandaloneVM", "template": "fedora-23"}


@pytest.mark.parametrize("declared", [FROM_TEMPLATE, {"clone_from": "fedora-23"}])
def test_a_template_that_runs_is_not_copied_and_one_that_is_run_on_is(machine, start, declared):
    system = machine.connect()
    start(f"{LIB}/vm-templates/fedora-23/root.img")
    assert "created" in system.vm_diff("new", **declared)
    device = start(f"{LIB}/vm-templates/fedora-23/private.img")
    for verb in (system.vm_diff, system.create_vm):
        refused(machine, lambda: verb("new", **declared), f"is in use by {device}; shut the VM")  # noqa: B023
    assert "created" in system.create_vm("app", template="fedora-23")


@pytest.mark.parametrize("declared", [FROM_TEMPLATE, {"clone_from": "work"}])
def test_a_copy_of_what_was_started_meanwhile_goes(machine, start, monkeypatch, declared):
    source = f"{VMDIR}/private.img"
    if "template" in declared:
        source = f"{LIB}/vm-templates/fedora-23/private.img"
    symlink = os.symlink

    def start_and_link(target, name, **kwargs):
        if name == "icon.png":
            start(source)
        symlink(target, name, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", start_and_link)
        refused(machine, lambda: machine.connect().create_vm("new", **declared), "is in use by")


@pytest.fixture
def disk(tmp_path):
    """A file of the caller's, a root image."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"BOOT\n")
    os.truncate(path, 5 * MIB)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("moved", [False, True], ids=["copied", "moved"])
@pytest.mark.parametrize("klass", ["StandaloneVM", "TemplateVM", "HVM"])
def test_a_root_image_is_brought_in(machine, disk, klass, moved):
    system = machine.connect()
    word = "root_move_from" if moved else "root_copy_from"
    declared = {"klass": klass, word: str(disk)}
    changes = system.vm_diff("new", **declared)
    assert changes[word] == {"old": None, "new": str(disk)}
    assert system.create_vm("new", **declared) == changes
    volumes = system.vm_info("new")["volumes"]
    assert volumes["root"]["size"] == 5 * MIB
    assert volumes["root"]["size"] == 5 * MIB
    if "root-cow" in volumes:  # of the size that R3.2 gives it, for a root that is not larger
        assert volumes["root-cow"]["size"] == 10 * 1024 * MIB
    assert machine.tree()[volumes["root"]["path"]]["head"] == "BOOT"
    assert machine.tree()[volumes["root"]["path"]]["mode"] == "0660"
    assert disk.exists() is not moved
    assert system.vm_diff("new", **declared) == {}
    assert system.verify_vm("new") == []


def test_a_root_image_that_cannot_be_one_is_refused(machine, disk, tmp_path):
    system = machine.connect()
    empty = tmp_path / "empty"
    empty.touch()
    for path, match in (
        ("disk.raw", "not an absolute path"),
        (str(tmp_path / "none"), "No such file or directory; name an image"),
        (str(tmp_path), "not a regular file"),
        (str(empty), "is empty"),
    ):
        call = lambda: system.create_vm("new", klass="HVM", root_copy_from=path)  # noqa: B023, E731
        refused(machine, call, match)
    call = lambda: system.create_vm("new", template="fedora-23", root_copy_from=str(disk))  # noqa: E731
    refused(machine, call, "declare klass: StandaloneVM")


@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from"])
@pytest.mark.parametrize(("size", "declared", "made"), [(1000, None, 1024), (1000, 513, 1024)])
def test_a_root_image_that_is_brought_in_becomes_whole_sectors(
    machine, disk, word, size, declared, made
):
    os.truncate(disk, size)
    system = machine.connect()
    given = {"klass": "HVM", word: str(disk), "volumes": {"root": declared}}
    changes = system.vm_diff("new", **given)
    assert changes.get("volumes") == (declared and {"old": None, "new": {"root": made}})
    assert system.create_vm("new", **given) == changes
    assert system.vm_info("new")["volumes"]["root"]["size"] == made
    assert system.verify_vm("new") == []
    assert system.vm_diff("new", **given) == {}


def test_a_root_image_that_is_linked_needs_no_space(machine):
    place = machine.mkdir("/mnt/ssd")
    mount("ext4", place, 64 * MIB)
    try:
        system = machine.connect()
        system.add_pool("ssd", dir_path="/mnt/ssd/q")
        disk = place / "disk.raw"
        disk.write_bytes(b"BOOT".ljust(40 * MIB, b"."))
        disk.chmod(0o600)
        given = {"klass": "HVM", "pool": "ssd"}
        for declared in (
            {"root_copy_from": str(disk)},
            {"root_move_from": str(disk), "volumes": {"root": "50MiB"}},  # which is copied
        ):
            call = lambda: system.create_vm("new", **given, **declared)  # noqa: B023, E731
            refused(machine, call, "40.0 MiB are needed")
        changes = system.vm_diff("new", **given, root_move_from=str(disk))
        assert system.create_vm("new", **given, root_move_from=str(disk)) == changes
        assert not disk.exists()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("owner", ["work", "fedora-23", "elsewhere"])
@pytest.mark.parametrize("name", ["itself", "a link to it", "another name of it"])
def test_an_image_of_a_vm_is_not_taken_from_it(machine, owner, name):
    system = machine.connect()
    system.create_vm("elsewhere", klass="HVM", pool="foo")
    volumes = system.vm_info(owner)["volumes"]
    image = machine.path(volumes.get("root", volumes["private"])["path"])
    path = {"itself": image}.get(name, machine.path("/mnt/other.img"))
    if name == "a link to it":
        path.symlink_to(image)
    elif name == "another name of it":
        os.link(image, path)
    match = f"root_move_from {path} is an image of VM {owner}, .*; use root_copy_from"
    for verb in (system.vm_diff, system.create_vm):
        refused(machine, lambda: verb("new", klass="HVM", root_move_from=str(path)), match)  # noqa: B023
    system.create_vm("new", klass="HVM", root_copy_from=str(path))


@pytest.mark.parametrize(("place", "taken"), [("work", False), ("lost", True)])
def test_a_vm_whose_pool_has_no_section_keeps_the_image_that_has_its_name(machine, place, taken):
    machine.elements.append(element("QubesHVm", "lost", 9, pool_name="gone"))
    machine.write_registry()
    machine.mkdir(f"/mnt/gone/appvms/{place}")
    machine.image(f"/mnt/gone/appvms/{place}/root.img", MIB, "BOOT")
    image = machine.path(f"/mnt/gone/appvms/{place}/root.img")
    system, given = machine.connect(), {"klass": "HVM", "root_move_from": str(image)}
    if taken:
        match = f"root_move_from {image} is an image of VM lost, which would lose it"
        for verb in (system.vm_diff, system.create_vm):
            refused(machine, lambda: verb("new", **given), match)  # noqa: B023
    else:
        assert system.create_vm("new", **given) and not image.exists()


@pytest.mark.parametrize("near", [False, True], ids=["another filesystem", "the same"])
def test_an_import_that_died_anywhere_loses_nothing(scratch, tmp_path, near):
    for number in steps(3):
        machine = scratch()
        system = machine.connect()
        disk = (machine.root.parent if near else tmp_path) / "disk.raw"
        disk.write_bytes(b"BOOT\n")
        os.truncate(disk, 5 * MIB)
        declared = {"klass": "HVM", "root_move_from": str(disk)}
        through = kill_at(number, lambda: machine.connect().create_vm("new", **declared))  # noqa: B023
        if "new" in system.list_vms():
            if system.vm_diff("new", **declared):
                system.set_vm("new", **declared)
        else:
            assert disk.read_bytes().startswith(b"BOOT\n")
            system.create_vm("new", **declared)
        assert not disk.exists()
        assert os.listdir(machine.path(f"{LIB}/appvms")) == ["new"]
        assert machine.tree()[f"{LIB}/appvms/new/root.img"]["head"] == "BOOT"
        assert system.verify_vm("new") == []
        if through:
            break


def test_an_import_is_finished_though_the_disk_that_it_came_from_is_away(
    scratch, tmp_path, monkeypatch
):
    def unlink(name, **kwargs):
        if name == "disk.raw":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink_(name, **kwargs)

    disk = tmp_path / "usb" / "disk.raw"
    disk.parent.mkdir()
    disk.write_bytes(b"BOOT".ljust(5 * MIB, b"\0"))
    system = scratch().connect()
    with monkeypatch.context() as patch:
        unlink_ = os.unlink
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(
            StoragePoolException, match="could not be deleted: .*disk.raw: Input/output"
        ):
            system.create_vm("new", klass="HVM", root_move_from=str(disk))
    disk.parent.rename(tmp_path / "away")
    assert "unfinished" in system.set_vm("new")
    assert (tmp_path / "away/disk.raw").exists()
    assert system.vm_diff("new") == {}


def test_an_import_that_died_is_finished_though_its_vm_was_used_meanwhile(scratch):
    """The file is the image then, by its other name."""
    machine = scratch()
    system = machine.connect()
    machine.image("/mnt/disk.raw", 5 * MIB, "BOOT")
    disk = machine.path("/mnt/disk.raw")
    disk.chmod(0o600)  # closed to others, so that it is linked and not copied

    def dies(event, args):
        if event == "os.remove" and args[0] == "disk.raw":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        sys.addaudithook(dies)
        system.create_vm("new", klass="HVM", root_move_from=str(disk))
        os._exit(0)
    os.waitpid(child, 0)
    image = machine.path(f"{LIB}/appvms/new/root.img")
    assert image.samefile(disk)
    with open(image, "r+b") as file:
        file.write(b"USED")
    assert "unfinished" in system.set_vm("new", label="blue")
    assert not disk.exists()
    assert image.read_bytes().startswith(b"USED")
    assert system.vm_diff("new", label="blue") == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(
    ("word", "mode", "why"),
    [
        ("root_copy_from", 0o600, "Permission denied; name an image"),
        ("root_move_from", 0o644, "cannot be deleted there; mount its disk writable, or use"),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused_beforehand(machine, word, mode, why):
    place = machine.root.parent / "stick"
    place.mkdir(mode=0o755)
    disk = place / "disk.raw"
    disk.write_bytes(b"BOOT" * 128)
    disk.chmod(mode)
    declared = {"klass": "StandaloneVM", word: str(disk)}

    before, system = machine.tree(), machine.connect()
    with as_user(USER, GID):
        for verb in (system.vm_diff, system.create_vm):
            with pytest.raises(StoragePoolException, match=f"VM new: {word} {disk}.* ?{why}"):
                verb("new", **declared)
    assert machine.tree() == before


def test_a_file_that_cannot_be_deleted_once_it_became_an_image_is_named(machine, monkeypatch):
    disk = machine.root.parent / "disk.raw"
    disk.write_bytes(b"BOOT" * 128)
    unlink = os.unlink

    def fail(name, **kwargs):
        if name == "disk.raw":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(name, **kwargs)

    monkeypatch.setattr(os, "unlink", fail)
    system = machine.connect()
    with pytest.raises(StoragePoolException, match=f"but {disk} .*could not be deleted"):
        system.create_vm("new", klass="HVM", root_move_from=str(disk))
    with pytest.raises(StoragePoolException, match=f"mended: {disk}: Read-only file system; mend"):
        system.set_vm("new", label="blue")
    monkeypatch.undo()
    system.set_vm("new", label="blue")
    assert not disk.exists()


@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from", "clone_from", "pool"])
def test_a_nul_is_in_no_name(machine, word):
    refused(machine, lambda: machine.connect().vm_diff("new", **{word: "/a\0b"}), "has a NUL in it")
