"""VMs whose directory is not where it should be, or not alone: nothing is forgotten or lost."""

import os
import shutil
import subprocess

import pytest
from qubes_storage import StoragePoolException, guards, markers, mending, registry

from tests.r32.machine import GIB, LIB, element
from tests.unit.test_image import mount

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
VMDIR = f"{LIB}/appvms/work"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def machine(scratch):
    machine = scratch(CONF)
    machine.add_pools()
    return machine


def killed(function, module, name):
    """Run a function in a process that is killed as it comes to ``module.name``."""
    child = os.fork()
    if not child:
        try:
            setattr(module, name, lambda *_, **__: os._exit(9))
            function()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def refused(machine, why, *calls):
    before = machine.tree()
    for call in calls:
        with pytest.raises(StoragePoolException, match=why):
            call()
    assert machine.tree() == before


def test_a_vm_in_a_directory_of_its_class_that_is_a_link_is_not_forgotten(machine):
    machine.connect().create_vm("work")
    machine.path(f"{LIB}/appvms").rename(machine.path("/mnt/appvms"))
    machine.path(f"{LIB}/appvms").symlink_to("/mnt/appvms")
    system = machine.connect()
    refused(
        machine,
        f"VM work: {VMDIR} is no directory that can be opened",
        lambda: system.vm_remove_diff("work"),
        lambda: system.remove_vm("work", purge=True),
    )


def test_images_are_not_deleted_while_the_disk_of_their_class_is_away(machine):
    for name in ("work", "other"):
        machine.connect().create_vm(name)
    machine.path(f"{LIB}/appvms").rename(machine.path("/mnt/appvms"))
    machine.mkdir(f"{LIB}/appvms")
    system = machine.connect()
    why = f"VM work: not one .* is in {LIB}/appvms, so its disk is not mounted"
    refused(machine, why, lambda: system.remove_vm("work", purge=True))
    assert system.remove_vm("work", keep=True) == {"removed": {"old": "work", "new": None}}


def test_a_vm_whose_directory_alone_is_gone_is_removed(machine):
    system = machine.connect()
    for name in ("work", "other"):
        system.create_vm(name)
    shutil.rmtree(machine.path(VMDIR))
    assert system.remove_vm("work", purge=True) == {"removed": {"old": "work", "new": None}}


def test_a_vm_on_a_disk_that_has_died_can_be_forgotten(machine):
    machine.connect().create_vm("work", pool="foo")
    guards.save(machine.connect().root, "foo", {"require_mount": "/mnt/foo"})
    shutil.rmtree(machine.path("/mnt/foo"))
    system = machine.connect()
    cure = "VM work: pool foo: /mnt/foo is not mounted.* or forget the VM .* --just-db work"
    refused(machine, cure, lambda: system.remove_vm("work"))
    assert system.remove_vm("work", keep=True) == {"removed": {"old": "work", "new": None}}
    assert "removed" in system.remove_pool("foo")


@pytest.mark.parametrize("alone", [False, True])
def test_a_directory_of_a_vm_that_is_a_link_is_told_as_one(machine, alone):
    system = machine.connect()
    system.create_vm("work")
    if not alone:
        system.create_vm("other")
    machine.path(VMDIR).rename(machine.path("/mnt/work"))
    machine.path(VMDIR).symlink_to("/mnt/work")
    told = f"{VMDIR}: is no directory, and a link is not followed; put it there"
    assert system.verify_vm("work") == [told]
    refused(
        machine,
        f"VM work: {VMDIR} is no directory, and a link is not followed",
        lambda: system.vm_diff("work", label="blue"),
        lambda: system.vm_diff("work", pool="foo", migrate=True),
    )
    assert system.create_vm("new")


def test_a_vm_whose_directory_lies_in_no_class_is_told_of(machine):
    system = machine.connect()
    system.create_vm("work")
    shutil.rmtree(machine.path(f"{LIB}/appvms"))
    assert system.verify_vm("work") == [
        f"{VMDIR}: is gone; mount its disk or restore it from a backup"
    ]
    machine.path(f"{LIB}/appvms").symlink_to("/mnt")
    assert "Not a directory" in system.verify_vm("work")[0]


def test_a_removal_that_died_stands_in_no_other_vms_way(machine):
    system = machine.connect()
    system.create_vm("work", pool="foo")
    killed(lambda: system.remove_vm("work", purge=True), registry, "save")
    assert machine.path("/mnt/foo/appvms/.work.removing").exists()
    assert system.pool_info("foo")["problems"] == []
    assert system.create_vm("other", pool="foo")
    assert [told.split(": ")[1] for told in system.verify_vm("work")] == [
        "is left by a run that died; qubes_vm.set work mends it"
    ]


def test_a_backup_beside_what_a_removal_left_costs_neither(machine):
    system = machine.connect()
    system.create_vm("work")
    machine.path(f"{VMDIR}/private.img").write_bytes(b"the newest" + bytes(502))
    killed(lambda: system.remove_vm("work", purge=True), registry, "save")
    machine.mkdir(VMDIR)
    machine.image(f"{VMDIR}/private.img", 4096, "an old backup")
    system = machine.connect()
    refused(
        machine,
        f"{VMDIR} and {LIB}/appvms/.work.removing, .* both have images: move away the one",
        lambda: system.vm_diff("work", label="blue"),
        lambda: system.set_vm("work", label="blue"),
        lambda: system.remove_vm("work", purge=True),
    )
    shutil.rmtree(machine.path(VMDIR))
    system.set_vm("work", label="blue")
    assert machine.path(f"{VMDIR}/private.img").read_bytes().startswith(b"the newest")


@pytest.mark.parametrize("left", ["nothing", "an icon", "a file"])
def test_what_a_removal_left_without_images_goes(machine, left):
    system = machine.connect()
    system.create_vm("work")
    beside = machine.path(f"{LIB}/appvms/.work.removing")
    if left == "a file":
        beside.write_bytes(b"")
    else:
        beside.mkdir(0o700)
    if left == "an icon":
        (beside / "icon.png").write_bytes(b"")
    assert "unfinished" in system.set_vm("work", label="blue")
    assert not beside.exists()


def test_what_a_killed_run_of_create_only_left_is_finished(machine, tmp_path):
    system, disk = machine.connect(), tmp_path / "disk.raw"
    disk.write_bytes(b"mine" + bytes(508))
    disk.chmod(0o600)
    declared = {"klass": "StandaloneVM", "root_move_from": str(disk), "create_only": True}
    killed(lambda: system.create_vm("work", **declared), mending, "finish")
    left = {"unfinished": {"old": [f"{LIB}/appvms/.work.creating"], "new": None}}
    assert system.vm_diff("work", **declared) == left
    assert system.set_vm("work", **declared) == left
    assert not disk.exists()
    assert machine.path(f"{VMDIR}/root.img").read_bytes().startswith(b"mine")
    assert system.vm_diff("work", **declared) == {}
    assert system.verify_vm("work") == []


def test_the_rules_of_a_vm_of_another_pool_are_not_lost(machine):
    """Where R3.2 saves them (load_pool_foo)."""
    place, rules = "/mnt/foo/appvms/work", f"{VMDIR}/firewall.xml"
    attrs = {"pool_name": "foo", "dir_path": place, "firewall_conf": rules}
    machine.elements.append(element("QubesAppVm", "work", 5, template_qid="1", **attrs))
    machine.write_registry()
    machine.mkdir(place)
    machine.image(f"{place}/private.img", 2 * GIB)
    machine.mkdir(VMDIR)
    machine.write(rules, b"<QubesFirewallRules policy='deny'/>")
    system = machine.connect()
    assert system.orphans() == []
    why = f"VM work: {VMDIR} is there, .*; copy firewall.xml to {place} first, and then move"
    refused(machine, why, lambda: system.migrate_vm("work", "default"))
    shutil.copy(machine.path(rules), machine.path(f"{place}/firewall.xml"))
    machine.path(VMDIR).rename(machine.path("/mnt/away"))
    system.migrate_vm("work", "default")
    assert machine.path(rules).read_bytes() == b"<QubesFirewallRules policy='deny'/>"


def test_disposables_count_no_image_again(machine):
    machine.elements += [
        element("QubesDisposableVm", f"disp{n}", n, template_qid="1") for n in (7, 8)
    ]
    machine.write_registry()
    system = machine.connect()
    before = system.pool_info("default")["provisioned"]
    system.create_vm("fedora-23-dvm")
    once = system.pool_info("default")["provisioned"]
    assert once - before == sum(
        volume["size"] for volume in system.vm_info("fedora-23-dvm")["volumes"].values()
    )
    assert system.report()["default"]["provisioned"] == once
    assert system.report()["default"]["vms"]["disp7"] == {}


@root_only
def test_a_move_to_another_mount_of_the_filesystem_counts_what_it_copies(scratch, tmp_path):
    machine = scratch(CONF)
    disk = machine.mkdir("/mnt/disk")
    mount("ext4", disk)
    there = machine.mkdir("/mnt/foo")
    try:
        machine.mkdir("/mnt/disk/foo")
        subprocess.run(["mount", "--bind", disk / "foo", there], check=True)
        machine.add_pools()
        for name in ("near", "near/appvms", "near/servicevms", "near/vm-templates"):
            machine.mkdir(f"/mnt/disk/{name}")
        system = machine.connect()
        system.add_pool("near", dir_path="/mnt/disk/near")
        system.create_vm("work", pool="near")
        with open(machine.path("/mnt/disk/near/appvms/work/private.img"), "r+b") as file:
            file.write(os.urandom(8 << 20))
        found = os.statvfs(there)
        free = found.f_bavail * found.f_frsize
        system.set_pool("foo", min_free=f"{(free >> 20) - 4}MiB")
        refused(
            machine,
            r"pool foo: .* are needed and min_free keeps",
            lambda: system.vm_diff("work", pool="foo", migrate=True),
        )
    finally:
        subprocess.run(["umount", there], check=False)
        subprocess.run(["umount", disk], check=False)


@pytest.mark.parametrize("path", ["/", "/.", "//", "/./."])
def test_a_pool_has_a_directory_of_its_own(machine, path):
    system = machine.connect()
    why = "is not an absolute path of a directory of its own"
    refused(machine, why, lambda: system.add_pool("new", dir_path=path))


def test_a_report_looks_for_each_pool_once(scratch):
    def calls(pools):
        sections = "".join(f"[p{n}]\ndriver=xen\ndir_path=/mnt/p{n}\n" for n in range(pools))
        system = scratch(f"[default]\ndriver=xen\n{sections}").connect()
        looked, find = [], system._find_real
        system._find_real = lambda path: looked.append(path) or find(path)
        system.report()
        return len(looked)

    assert calls(20) <= 2 * calls(10)


def test_the_directory_that_a_dead_run_was_removing_is_nobody_s_orphan(machine):
    system = machine.connect()
    system.create_vm("work", pool="foo")
    killed(lambda: system.remove_vm("work", purge=True), registry, "save")
    assert machine.path("/mnt/foo/appvms/.work.removing").exists()
    assert machine.connect().orphans() == []


def test_a_pool_stays_while_what_a_dead_run_left_is_in_it(machine):
    system = machine.connect()
    system.create_vm("work")
    killed(lambda: system.clone_vm("work", "copy", "foo"), registry, "save")
    why = "pool foo: /mnt/foo/appvms/.copy.creating is left by a run that died; .*remove copy mends"
    refused(machine, why, lambda: machine.connect().remove_pool("foo"))
    assert machine.connect().remove_vm("copy")
    assert "removed" in machine.connect().remove_pool("foo")
    assert os.listdir(machine.path("/mnt/foo/appvms")) == []


def test_the_rules_in_force_go_along_and_not_older_ones_in_the_directory(machine):
    rules = f"{LIB}/appvms/work/firewall.xml"
    machine.connect().create_vm("work", pool="foo")
    found = machine.path("/var/lib/qubes/qubes.xml").read_text()
    line = next(each for each in found.splitlines() if 'name="work"' in each)
    changed = line.replace('firewall_conf="firewall.xml"', f'firewall_conf="{rules}"')
    machine.path("/var/lib/qubes/qubes.xml").write_text(found.replace(line, changed))
    machine.mkdir(f"{LIB}/appvms/work")
    machine.write(rules, b"in force")
    machine.write("/mnt/foo/appvms/work/firewall.xml", b"old")
    system = machine.connect()
    system.clone_vm("work", "copy")
    assert machine.path("/mnt/foo/appvms/copy/firewall.xml").read_bytes() == b"in force"
    system.add_pool("bar", dir_path="/mnt/bar")
    system.migrate_vm("work", "bar")
    assert machine.path("/mnt/bar/appvms/work/firewall.xml").read_bytes() == b"in force"
    assert system.verify_vm("work") == []


def test_what_a_package_installed_is_not_deleted_but_forgotten(machine):
    machine.elements.append(element("QubesAppVm", "shipped", 9, installed_by_rpm="True"))
    machine.write_registry()
    machine.mkdir(f"{LIB}/appvms/shipped")
    machine.image(f"{LIB}/appvms/shipped/private.img", 4096, "x")
    system = machine.connect()
    why = "VM shipped: is installed by RPM; remove its package with dnf, .* --just-db shipped"
    refused(machine, why, lambda: system.remove_vm("shipped", purge=True))
    assert "removed" in system.remove_vm("shipped", keep=True)
    assert machine.path(f"{LIB}/appvms/shipped/private.img").exists()


@root_only
def test_free_space_is_that_of_a_class_directory_with_a_disk_of_its_own(machine):
    """On a small disk what does not fit is refused; on a large one what fits is not."""
    system = machine.connect()
    place = machine.path(f"{LIB}/appvms")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=2770", "none", place], check=True)
    try:
        system.create_vm("work")
        with open(machine.path(f"{VMDIR}/private.img"), "r+b") as file:
            file.write(b"x" * (40 << 20))
        why = f"pool default: 2.*MiB are free in {LIB}/appvms, 40.* are needed; free some space"
        refused(machine, why, lambda: system.clone_vm("work", "copy"))
        system.set_pool("default", min_free="100MiB")
        why = f"pool default: 2.*MiB are free in {LIB}/appvms, 4.0 KiB are needed and min_free"
        refused(machine, why, lambda: system.create_vm("new"))
        system.set_pool("default", min_free="1MiB")
        assert system.create_vm("new")
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_pool_that_a_vm_was_leaving_stays_until_that_is_finished(machine):
    system = machine.connect()
    system.create_vm("work", pool="foo")
    killed(lambda: system.migrate_vm("work", "default"), markers.Origin, "leave")
    why = "pool foo: /mnt/foo/appvms/.work.moving is left by a run that died; .*set work mends"
    refused(machine, why, lambda: machine.connect().remove_pool("foo"))
    assert "unfinished" in machine.connect().set_vm("work")
    assert "removed" in machine.connect().remove_pool("foo")
    assert os.listdir(machine.path("/mnt/foo/appvms")) == []


def test_rules_that_lie_in_no_vms_directory_stay_and_those_in_its_own_go_along(machine):
    machine.elements.append(
        element("QubesAppVm", "work", 9, template_qid="1", firewall_conf="/etc/odd/firewall.xml")
    )
    machine.write_registry()
    machine.mkdir(VMDIR)
    machine.image(f"{VMDIR}/private.img", 4096, "x")
    machine.write(f"{VMDIR}/firewall.xml", b"own")
    machine.connect().migrate_vm("work", "foo")
    assert machine.path("/mnt/foo/appvms/work/firewall.xml").read_bytes() == b"own"
