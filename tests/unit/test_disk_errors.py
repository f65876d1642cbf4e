"""The disk refuses a step, or somebody is there first: what is told, what stays, what goes on."""

import errno
import itertools
import os
import subprocess

import pytest
from qubes_storage import build
from qubes_storage.exc import NotSupported, OutOfStep, StoragePoolException

from tests.r32.machine import GIB, LIB, XML

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
GUARDS = "/etc/qubes/storage-guards.conf"
VMDIR = f"{LIB}/appvms/work"
EIO = "Input/output error"
UNSAVED = "/etc/qubes/storage.conf: cannot be saved"

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.add_pools()
    made.connect().create_vm("work", label="green")
    return made


@pytest.fixture
def failing(monkeypatch):
    """``failing(call, when)``: that call of ``os`` fails where ``when(first argument)`` is true."""

    def use(call, when):
        before = getattr(os, call)

        def fail(first, *args, **kwargs):
            if when(first):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return before(first, *args, **kwargs)

        monkeypatch.setattr(os, call, fail)

    return use


def opened(fd):
    """The path of an open file."""
    return os.readlink(f"/proc/self/fd/{fd}")


@pytest.fixture
def read_only(machine):
    """``read_only(path)``: what is there goes onto a disk that is read-only from then on."""
    mounted = []

    def use(path):
        place = machine.path(path)
        kept = place.with_name("kept")
        place.rename(kept)
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9M", "none", place], check=True)
        mounted.append(place)
        subprocess.run(["cp", "-a", f"{kept}/.", place], check=True)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)

    yield use
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_source_that_goes_once_it_is_planned_is_told_and_nothing_is_made(machine):
    system = machine.connect()
    plan = system.plan("vm", template="fedora-23")[1]
    copied = system.plan("copy", clone_from="work")[1]
    machine.path(VMDIR).rename(machine.path("/mnt/away"))
    before = machine.tree()
    with (
        pytest.raises(StoragePoolException, match=f"VM work: {VMDIR}/private.img: is gone; mount"),
        system.locked(),
        build.built(copied),
    ):
        pass
    assert machine.tree() == before
    with system.locked(), build.built(plan):
        assert machine.path(f"{LIB}/appvms/vm/private.img").exists()


def test_a_place_that_somebody_takes_meanwhile_is_left_to_him(machine, monkeypatch):
    sync, place = os.fsync, machine.path(f"{LIB}/appvms/vm")

    def fsync(fd):
        if opened(fd).endswith("/.vm.creating"):
            place.mkdir()
            (place / "precious").write_bytes(b"mine")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    text = machine.xml
    with pytest.raises(OutOfStep, match="appvms/vm is there, .*it is left alone"):
        machine.connect().create_vm("vm")
    assert os.listdir(place) == ["precious"]
    assert sorted(os.listdir(place.parent)) == ["vm", "work"]
    assert machine.xml == text


def test_a_place_that_somebody_takes_before_anything_is_made_is_left_to_him(machine, monkeypatch):
    mend, place = build.mending.mend, f"{LIB}/appvms/new"

    def late(pool, vm, registered):
        mend(pool, vm, registered)
        machine.mkdir(place)

    monkeypatch.setattr(build.mending, "mend", late)
    with pytest.raises(OutOfStep, match=f"VM new: {place} is there, .*: it is left alone"):
        machine.connect().create_vm("new")
    assert sorted(os.listdir(machine.path(f"{LIB}/appvms"))) == ["new", "work"]
    assert "new" not in machine.connect().list_vms()


def test_a_vm_that_moved_is_told_to_have_moved_where_its_old_place_cannot_go(machine, monkeypatch):
    left = machine.path(f"{LIB}/appvms/.work.removing")
    system, unlink = machine.connect(), os.unlink

    def fail(name, **where):
        if name == "private.img" and opened(where["dir_fd"]) == str(left):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(name, **where)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", fail)
        with pytest.raises(StoragePoolException, match=f"is in /mnt/foo/.*deleted: {EIO}"):
            system.migrate_vm("work", "foo")
    assert system.list_vms()["work"]["pool"] == "foo"
    assert (left / "private.img").exists()
    assert "unfinished" in system.set_vm("work")
    assert not left.exists()
    assert system.vm_diff("work", pool="foo") == {}


def test_a_vm_that_is_removed_is_told_to_be_where_its_images_cannot_go(machine, failing):
    system, left = machine.connect(), f"{LIB}/appvms/.work.removing"
    broken = [True]
    failing("unlink", lambda name: broken and name == "private.img")
    with pytest.raises(StoragePoolException, match=f"it is done, but {left} could not be .*{EIO}"):
        system.remove_vm("work", purge=True)
    assert "work" not in system.list_vms()
    assert machine.path(f"{left}/private.img").exists()
    broken.clear()
    assert set(system.remove_vm("work", purge=True)) == {"unfinished"}
    assert not machine.path(left).exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_vm_whose_directory_is_gone_is_removed_with_what_a_dead_run_left(machine, fails):
    machine.path(VMDIR).rename(machine.path("/mnt/away"))
    marker = machine.path(f"{LIB}/appvms/.work.creating")
    marker.mkdir(0o700)
    system = machine.connect()
    if fails:
        with pytest.raises(RuntimeError), system.locked():
            vm = system.get_vm("work")
            with build.removed(system.pool_of(vm), vm):
                raise RuntimeError
        assert "work" in system.list_vms()
    else:
        assert set(system.remove_vm("work")) == {"removed", "unfinished"}
        assert "work" not in system.list_vms()
    assert os.listdir(marker.parent) == []


def test_a_pool_whose_section_cannot_be_written_keeps_its_guards(machine, failing):
    system, broken = machine.connect(), [True]
    failing("fsync", lambda fd: broken and opened(fd).endswith("/.storage.conf.new"))
    before = machine.tree()
    with pytest.raises(StoragePoolException, match=f"pool new: {UNSAVED}: {EIO}"):
        system.add_pool("new", dir_path="/mnt/new", min_free="1GiB")
    assert machine.tree() == before
    broken.clear()
    system.set_pool("foo", min_free="1GiB")
    text = machine.path(GUARDS).read_bytes()
    broken.append(True)
    with pytest.raises(StoragePoolException, match=f"pool foo: {UNSAVED}: {EIO}"):
        system.remove_pool("foo")
    assert machine.path(GUARDS).read_bytes() == text
    assert "foo" in system.list_pools()
    broken.clear()
    assert set(system.remove_pool("foo")) == {"removed", "min_free"}


def test_the_file_is_named_where_the_pool_cannot_be(machine, failing):
    conf = machine.path("/etc/qubes/storage.conf")
    conf.write_text(f"{CONF}[odd]\ndriver=nope\n")
    failing("fsync", lambda fd: opened(fd).endswith("/.storage.conf.new"))
    with pytest.raises(StoragePoolException, match=f"pool odd: {UNSAVED}: {EIO}"):
        machine.connect().remove_pool("odd")
    assert "[odd]" in conf.read_text()


def test_the_directory_of_a_vm_is_named_where_its_disk_tells_nothing(machine, failing):
    system = machine.connect()
    system.set_pool("default", min_free="1KiB")
    failing("fstatvfs", lambda fd: True)
    with pytest.raises(StoragePoolException, match=f"pool default: {LIB}: {EIO}; mend it and try"):
        system.resize_vm("work", "private", 3 * GIB)
    assert machine.path(f"{VMDIR}/private.img").stat().st_size == 2 * GIB


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("pool", "foo", "/mnt/foo"),
        ("pool", "new", "/etc/qubes/storage.conf"),
        ("VM", "work", VMDIR),
        ("VM", "new", XML),
    ],
)
def test_what_goes_wrong_with_a_pool_or_vm_is_told_of_its_place(machine, kind, name, place):
    system = machine.connect()
    match = f"{kind} {name}: {place}: {EIO}; mend it and try again"
    with pytest.raises(StoragePoolException, match=match), system.locked(kind, name):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("declared", [{"label": "blue"}, {"template": "t2"}])
def test_a_vm_that_cannot_be_saved_keeps_its_icon(machine, failing, declared):
    system, broken = machine.connect(), []
    system.create_vm("t2", klass="TemplateVM", template="fedora-23")
    failing("fsync", lambda fd: broken and opened(fd).endswith("/.qubes.xml.new"))
    text, broken = machine.xml, broken.append(True) or broken
    with pytest.raises(StoragePoolException, match=f"{XML}: cannot be saved: {EIO}; it is as it"):
        system.set_vm("work", **declared)
    assert machine.xml == text
    assert os.readlink(machine.path(f"{VMDIR}/icon.png")).endswith("appvm-green.png")
    broken.clear()
    assert set(system.set_vm("work", **declared)) == set(declared)
    assert system.vm_diff("work", **declared) == {}


def test_what_fails_once_a_vm_has_moved_says_that_it_has(machine, failing):
    failing("symlink", lambda target: str(target).endswith("appvm-blue.png"))
    system = machine.connect()
    with pytest.raises(StoragePoolException, match=f"{EIO}.*; it is in pool foo already"):
        system.set_vm("work", pool="foo", migrate=True, label="blue")
    assert system.list_vms()["work"]["pool"] == "foo"
    assert system.list_vms()["work"]["label"] == "green"
    icon = machine.path("/mnt/foo/appvms/work/icon.png")
    assert os.readlink(icon).endswith("appvm-green.png")


@root_only
def test_what_a_read_only_disk_cannot_take_is_told_with_the_path_and_the_cure(machine, read_only):
    system = machine.connect()
    system.set_vm("work", pool="foo", migrate=True)
    read_only("/mnt/foo")
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="/mnt/foo/appvms/work: Read-only .*; mend it"):
        system.set_vm("work", label="blue")
    with pytest.raises(StoragePoolException, match="VM vm: cannot be made in pool foo .*Read-only"):
        system.create_vm("vm", pool="foo")
    match = "pool new: cannot make /mnt/foo/new: Read-only file system; make /mnt/foo, or mount it"
    with pytest.raises(StoragePoolException, match=match):
        system.add_pool("new", dir_path="/mnt/foo/new")
    assert machine.tree() == before


def test_a_driver_that_keeps_no_revisions_goes_back_to_none(machine):
    pool = machine.connect().get_pool("foo")
    with pytest.raises(NotSupported, match="pool foo: its driver keeps no revisions"):
        pool.revert(-1, "private.img", "1")


def test_the_place_of_a_pool_is_named_where_sharing_cannot_be_tried_out(machine, failing):
    failing("write", lambda fd: True)
    before = machine.tree()
    with pytest.raises(StoragePoolException, match=f"pool new: /mnt/new: {EIO}; mend it"):
        machine.connect().add_pool("new", driver="reflink", dir_path="/mnt/new")
    assert machine.tree() == before


def test_the_place_of_a_pool_is_named_whenever_it_cannot_be_opened(machine, failing):
    machine.mkdir("/mnt/new")
    failed = []
    failing("open", lambda name: name == "new" and next(opens) == at)
    for at in range(1, 99):
        opens = itertools.count(1)
        try:
            machine.connect().pool_diff("new", dir_path="/mnt/new")
        except StoragePoolException as err:
            failed.append(str(err))
        if next(opens) <= at:
            break
    assert len(failed) > 5
    assert all(err.startswith("pool new: ") and f"/mnt/new: {EIO}; " in err for err in failed)


def test_a_pool_whose_guards_cannot_be_removed_stays(machine, failing):
    system, broken = machine.connect(), []
    system.set_pool("foo", min_free="1GiB")
    files = [machine.path(path) for path in ("/etc/qubes/storage.conf", GUARDS)]
    before = [path.read_bytes() for path in files]
    failing("fsync", lambda fd: broken and opened(fd).endswith("/.storage-guards.conf.new"))
    broken.append(True)
    with pytest.raises(StoragePoolException, match=f"pool foo: {GUARDS}: cannot be saved: {EIO}"):
        system.remove_pool("foo")
    assert [path.read_bytes() for path in files] == before
    failing("rmdir", lambda name: name == "appvms")
    with pytest.raises(StoragePoolException, match=f"pool foo: /mnt/foo: {EIO}; mend it"):
        system.remove_pool("foo", purge=True)
    assert [path.read_bytes() for path in files] == before
    assert machine.path("/mnt/foo/appvms").is_dir()


def test_what_a_disk_that_fails_does_not_let_go_is_told_and_goes_with_the_next_run(
    machine, failing
):
    system, broken = machine.connect(), [True]
    failing("fsync", lambda fd: broken and opened(fd).endswith("/.new.creating"))
    failing("unlink", lambda name: broken and name == "private.img")
    left = r"\.new\.creating beside it was left behind, mend it and try again"
    with pytest.raises(StoragePoolException, match=f"appvms/new\\): {EIO}; {left}"):
        system.create_vm("new")
    broken.clear()
    assert set(system.vm_diff("new")) >= {"created", "unfinished"}
    system.create_vm("new")
    assert system.verify_vm("new") == []


def test_a_vm_that_could_be_neither_removed_nor_put_back_is_put_back_by_the_next_run(
    machine, failing
):
    system, broken = machine.connect(), [True]
    before = machine.tree()
    failing("fsync", lambda fd: broken and opened(fd).endswith("/.qubes.xml.new"))
    failing("rename", lambda name: broken and name == ".work.removing")
    with pytest.raises(StoragePoolException, match=r"work: is kept, but .*removing: .*puts it bac"):
        system.remove_vm("work", purge=True)
    broken.clear()
    assert "unfinished" in system.set_vm("work")
    assert machine.tree() == before


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(path)``: Ctrl-C comes when that directory is synced."""

    def use(path):
        before = os.fsync

        def interrupt(fd):
            if opened(fd) == str(path):
                raise KeyboardInterrupt
            before(fd)

        monkeypatch.setattr(os, "fsync", interrupt)

    yield use
    monkeypatch.undo()


def test_what_ctrl_c_comes_after_is_done(machine, interrupted, monkeypatch):
    """Once a file is replaced, whatever else there is stays as it says."""
    system = machine.connect()
    interrupted(machine.path(LIB))
    with pytest.raises(KeyboardInterrupt):
        system.create_vm("new")
    monkeypatch.undo()
    assert "unfinished" in system.set_vm("new")
    assert system.verify_vm("new") == []
    interrupted(machine.path("/etc/qubes"))
    with pytest.raises(KeyboardInterrupt):
        system.add_pool("new", dir_path="/mnt/new")
    monkeypatch.undo()
    assert system.pool_diff("new", dir_path="/mnt/new") == {}
