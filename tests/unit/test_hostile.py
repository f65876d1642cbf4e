"""What others put into a pool, or write into the registry, leads nowhere else."""

import os
import shutil
import struct

import pytest
from qubes_storage import Pool, files, markers, revisions
from qubes_storage.drivers import reflink
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import GID, LIB, XML

OTHER = 12345
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another's files")


@pytest.fixture
def machine(scratch):
    """A machine with pool foo, VM work in the default pool, and something precious outside."""
    made = scratch()
    for name in ("/mnt/precious", "/mnt/precious/appvms"):
        made.mkdir(name)
    made.image("/mnt/precious/disk.raw", 1 << 20, "precious")
    made.image("/mnt/precious/secret", 1 << 20, "secret")
    made.path("/mnt/precious/secret").chmod(0o600)
    system = made.connect()
    system.add_pool("foo", dir_path="/mnt/foo")
    system.create_vm("work", klass="StandaloneVM", template="fedora-23")
    made.appvms = made.path(f"{LIB}/appvms")
    return made


def outside(machine):
    return {p: seen for p, seen in machine.tree().items() if p.startswith("/mnt/precious")}


def forged(machine, name, uid=OTHER, moved=True):
    """A marker such as a dead run leaves, of somebody's; of a VM that moves, or is imported."""
    place = machine.appvms / f".{name}.creating"
    place.mkdir(mode=0o700)
    old = machine.mkdir("/mnt/precious/appvms/.old.removing")
    path = "/mnt/precious/appvms/old"
    disk = machine.path("/mnt/precious/disk.raw")
    found = os.stat(disk)
    home = f"{LIB}/appvms/{name}"
    with files.closing(os.open(place, os.O_RDONLY)) as fd:
        if moved:
            markers.Origin(path, str(os.stat(old).st_ino), False, home).write(fd)
        stamp = str(found.st_mtime_ns), str(found.st_ino)
        markers.Taken(str(disk), *stamp, home).write(fd)
    for each in (place, *place.iterdir()):
        os.chown(each, uid, uid, follow_symlinks=False)
    return place


@pytest.mark.parametrize("name", ["work", "new"])
def test_a_marker_that_root_did_not_make_is_refused(machine, name):
    place = forged(machine, name)
    before = outside(machine)
    system = machine.connect()
    with pytest.raises(StoragePoolException, match=rf"VM {name}: {LIB}/appvms: .*delete it"):
        if name == "work":
            system.set_vm("work")
        else:
            system.create_vm("new", klass="StandaloneVM", template="fedora-23")
    assert outside(machine) == before
    shutil.rmtree(place)
    assert system.vm_diff("work") == {}


@pytest.mark.parametrize("moved", [True, False])
def test_a_marker_of_root_s_counts_only_for_the_vm_that_it_names(machine, moved):
    """Who may write appvms can give a marker another VM's name."""
    forged(machine, "other", 0, moved).rename(machine.appvms / ".work.creating")
    before = outside(machine)
    with pytest.raises(StoragePoolException, match="is that of .*appvms/other: rename it back"):
        machine.connect().set_vm("work")
    assert outside(machine) == before


def test_a_forged_link_of_a_move_goes_and_leads_nowhere(machine):
    there = machine.mkdir("/mnt/precious/appvms/.work.creating")
    there.chmod(0o700)
    os.chown(there, OTHER, OTHER)
    (machine.appvms / ".work.moving").symlink_to("/mnt/precious/appvms/work")
    before = outside(machine)
    system = machine.connect()
    system.set_vm("work")
    assert outside(machine) == before
    assert system.vm_diff("work") == {}


def test_an_image_that_has_a_name_elsewhere_is_neither_written_nor_read(machine):
    private = machine.appvms / "work/private.img"
    private.unlink()
    os.link(machine.path("/mnt/precious/secret"), private)
    before = outside(machine)
    system = machine.connect()
    for call in (
        lambda: system.set_vm("work", volumes={"private": "3GiB"}),
        lambda: system.clone_vm("work", "play"),
        lambda: system.migrate_vm("work", "foo"),
        lambda: system.migrate_vm("work", "foo", keep=True),
    ):
        with pytest.raises(StoragePoolException, match="VM .*private.img has a name elsewhere"):
            call()
    assert outside(machine) == before
    assert system.list_vms()["work"]["pool"] == "default"
    assert "play" not in system.list_vms()
    system.remove_vm("work", purge=True)
    assert outside(machine) == before


def test_two_names_in_one_directory_are_no_names_elsewhere(machine):
    os.link(machine.appvms / "work/private.img", machine.appvms / "work/private.img.old")
    system = machine.connect()
    assert "volumes" in system.set_vm("work", volumes={"private": "3GiB"})
    system.migrate_vm("work", "foo")
    system.clone_vm("work", "play", "default")
    found = system.list_vms()
    assert (found["work"]["pool"], found["play"]["pool"]) == ("foo", "default")


def test_a_directory_of_kernels_that_is_a_link_is_not_followed(machine):
    kernels = machine.path(f"{LIB}/vm-kernels")
    kernels.rename(machine.path("/mnt/precious/kernels"))
    kernels.symlink_to("/mnt/precious/kernels")
    system = machine.connect()
    system.create_vm("new", klass="StandaloneVM", template="fedora-23")
    assert not (machine.appvms / "new/kernels").exists()
    assert any("modules.img: is gone" in problem for problem in system.verify_vm("work"))


@pytest.mark.parametrize(
    "path", ["/mnt/precious/secret", "/mnt/precious/appvms/old/firewall.xml", "/etc/passwd",
             f"{LIB}/appvms/../../../mnt/precious/secret", f"{LIB}/appvms/x/y/firewall.xml"],
)  # fmt: skip
def test_rules_are_read_from_vms_directories_alone(machine, path):
    system = machine.connect()
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    machine.elements[-1][1]["firewall_conf"] = path
    machine.write_registry()
    before = machine.tree()
    for call in (
        lambda: system.clone_vm("work", "play"),
        lambda: system.vm_diff("work", pool="foo", migrate=True),
        lambda: system.migrate_vm("work", "foo"),
        lambda: system.rename_vm("work", "play"),
    ):
        with pytest.raises(StoragePoolException, match="firewall_conf .* copy it to"):
            call()
    assert machine.tree() == before


@pytest.mark.parametrize("name", ["../../mnt/precious", "/mnt/precious", "..", "a/../../b"])
def test_a_name_in_the_registry_leads_nowhere_else(machine, name):
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    machine.elements[-1][1]["name"] = name
    machine.write_registry()
    before = machine.tree()
    system = machine.connect()
    for call in (
        lambda: system.set_vm(name, volumes={"private": "3GiB"}),
        lambda: system.migrate_vm(name, "foo"),
        lambda: system.rename_vm(name, "play"),
        lambda: system.clone_vm(name, "play"),
    ):
        with pytest.raises(StoragePoolException, match="leads out of its pool"):
            call()
    report = system.report()["default"]  # it hides no other
    assert report["vms"][name] == {}
    assert "leads out of its pool" in report["problems"][-1]
    assert [row["path"] for row in system.orphans() if row["size"] is None] == [None]
    assert machine.tree() == before
    system.remove_vm(name, purge=True)  # the entry goes, which is the cure
    after = machine.tree()
    assert {path for path in before if before[path] != after[path]} == {XML}


def test_a_registry_that_is_somebody_s_link_is_refused(machine):
    there = machine.path("/mnt/precious/registry.xml")
    machine.path(XML).rename(there)
    machine.path(XML).symlink_to("/mnt/precious/registry.xml")
    os.chown(machine.path(XML), OTHER, -1, follow_symlinks=False)
    before = outside(machine)
    with pytest.raises(StoragePoolException, match=f"{XML}: is a link that uid {OTHER} made"):
        machine.connect().remove_vm("work", purge=True)
    assert outside(machine) == before


def access_list(path, kind):
    """Let uid 12345 do anything, as ``setfacl --modify u:12345:rwx`` does."""
    nobody = 0xFFFFFFFF
    entries = [(1, 7, nobody), (2, 7, OTHER), (4, 7, nobody), (16, 7, nobody), (32, 0, nobody)]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", data)
    except OSError as err:
        pytest.skip(f"no access lists here: {err}")


def test_an_access_list_that_a_pool_hands_down_lets_nobody_in(machine):
    access_list(machine.appvms, "default")
    system = machine.connect()
    system.create_vm("new", klass="StandaloneVM", template="fedora-23")
    system.clone_vm("work", "play")
    system.reset_vm("new")
    for vmdir in (machine.appvms / "new", machine.appvms / "play"):
        for path in (vmdir, *vmdir.rglob("*")):
            if not path.is_symlink():
                assert os.listxattr(path) == [], path
                assert (path.stat().st_uid, path.stat().st_gid) == (0, GID)


def test_a_file_that_its_owner_could_still_write_is_copied_not_linked(machine):
    source = machine.path("/mnt/disk.raw")
    for uid, mode, linked in (
        (0, 0o600, True), (OTHER, 0o600, False), (0, 0o666, False), (0, None, False),
    ):  # fmt: skip
        machine.image("/mnt/disk.raw", 1 << 20, "disk")
        os.chown(source, uid, 0)
        source.chmod(mode or 0o600)
        if mode is None:
            access_list(source, "access")
        inode = source.stat().st_ino
        system = machine.connect()
        system.create_vm("new", klass="StandaloneVM", root_move_from=str(source))
        made = (machine.appvms / "new/root.img").stat()
        assert (made.st_ino == inode) is linked
        assert (made.st_uid, made.st_mode & 0o7777) == (0, 0o660)
        assert not source.exists()
        system.remove_vm("new", purge=True)


def test_an_imported_file_is_not_deleted_through_a_link(machine):
    """Its directory is swapped for a link to another with a file that looks the same."""
    place, there = machine.mkdir("/mnt/drop"), machine.mkdir("/mnt/precious/drop")
    machine.image("/mnt/drop/disk.raw", 1 << 20, "disk")
    system = machine.connect()
    save = type(system).save_registry

    def swap_and_save(self, registry):
        place.rename(f"{place}.away")
        os.link(f"{place}.away/disk.raw", there / "disk.raw")
        place.symlink_to(there)
        save(self, registry)

    system.save_registry = swap_and_save.__get__(system)
    system.create_vm("new", klass="StandaloneVM", root_move_from=str(place / "disk.raw"))
    assert place.is_symlink()
    assert os.listdir(f"{place}.away") == []
    assert (there / "disk.raw").exists()


def test_an_image_that_is_swapped_as_soon_as_it_is_made_is_refused(machine, monkeypatch):
    monkeypatch.setattr(Pool, "create_image", lambda self, path, size: os.mkdir(path))
    with pytest.raises(StoragePoolException, match=r"VM new: .*\.img is not a regular file"):
        machine.connect().create_vm("new", pool="foo")
    assert os.listdir(machine.path("/mnt/foo/appvms")) == []


def test_links_that_are_moved_stay_their_owner_s(machine):
    """One of root's counts where others may write: as a marker, or in place of the registry."""
    link = machine.appvms / "work/link"
    link.symlink_to("/mnt/precious/secret")
    os.chown(link, OTHER, -1, follow_symlinks=False)
    machine.connect().migrate_vm("work", "foo")
    moved = machine.path("/mnt/foo/appvms/work/link")
    assert os.readlink(moved) == "/mnt/precious/secret"
    assert moved.lstat().st_uid == OTHER


def test_libvirt_is_not_told_of_what_is_no_file(machine):
    private = machine.appvms / "work/private.img"
    private.unlink()
    private.symlink_to("/mnt/precious/secret")
    with pytest.raises(StoragePoolException, match="work/private.img is no file; put the image"):
        machine.connect().disks("work")


@pytest.mark.parametrize("date", [-1, 1 << 33, 1 << 38])
@pytest.mark.parametrize("name", ["007", "\u0663", "x"])
def test_revisions_of_odd_names_are_none_and_odd_dates_are_no_hindrance(tmp_path, name, date):
    image = tmp_path / "private.img"
    image.write_bytes(b"old")
    try:
        os.utime(image, (date, date))
    except OSError:
        pytest.skip("no such date on this filesystem")
    (tmp_path / f"private.img.{name}@2026-11-24T16:00:00Z").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    pool = reflink.Pool("foo", dir_path="/mnt/foo")
    assert revisions.listed(fd, "private.img") == []
    kept = revisions.add(pool, fd, "private.img")
    assert revisions.listed(fd, "private.img") == [kept]
    revisions.revert(pool, fd, "private.img", kept)
    assert image.read_bytes() == b"old"
    os.close(fd)
