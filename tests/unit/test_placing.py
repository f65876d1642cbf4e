"""Pools whose directories or classes are not as they should be: added, looked for and removed."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import qubes_storage
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import LIB, SUBDIRS
from tests.unit.test_build import kill_at, steps
from tests.unit.test_image import mount

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"


@pytest.fixture
def machine(scratch):
    made = scratch(CONF)
    made.add_pools()
    return made


def tree(machine):
    return {path: seen for path, seen in machine.tree().items() if path.startswith("/mnt/")}


def test_a_class_that_is_no_pool_of_ours_is_written_down_and_has_no_directories(
    machine, tmp_path, monkeypatch
):
    path = tmp_path / "foreign_to_tests.py"
    path.write_text("class Thing:\n    def __init__(self, name, **config):\n        pass\n")
    path.chmod(0o644)
    monkeypatch.syspath_prepend(str(tmp_path))
    system, before = machine.connect(), tree(machine)
    try:
        system.add_pool("odd", **{"class": "foreign_to_tests.Thing", "place": "/mnt/odd"})
        wanted = {"class": "foreign_to_tests.Thing", "place": "/mnt/odd"}
        assert system.list_pools()["odd"] == wanted
        assert set(system.remove_pool("odd", purge=True)) == {"removed"}
    finally:
        sys.modules.pop("foreign_to_tests", None)
    assert "odd" not in system.list_pools()
    assert tree(machine) == before


def test_a_pool_whose_disk_is_away_is_removed_with_no_directory(machine):
    machine.path("/mnt/foo").rename(machine.path("/mnt/away"))
    system = machine.connect()
    assert set(system.remove_pool("foo", purge=True)) == {"removed"}
    assert sorted(os.listdir(machine.path("/mnt/away"))) == sorted(SUBDIRS)


def test_the_directories_of_a_pool_whose_disk_goes_come_back_on_that_disk(machine):
    system, before = machine.connect(), tree(machine)
    with pytest.raises(RuntimeError), system._unmade(system._empty_dirs("foo")):
        assert not machine.path("/mnt/foo").exists()
        machine.path("/mnt").rename(machine.path("/away"))
        machine.path("/mnt").mkdir()
        raise RuntimeError
    assert os.listdir(machine.path("/mnt")) == []
    machine.path("/mnt").rmdir()
    machine.path("/away").rename(machine.path("/mnt"))
    assert tree(machine) == before


def test_what_is_no_directory_of_a_pool_stays(machine):
    (machine.path("/mnt/foo/appvms")).rmdir()
    (machine.path("/mnt/foo/appvms")).symlink_to("servicevms")
    changes = machine.connect().remove_pool("foo", purge=True)
    gone = ["/mnt/foo/servicevms", "/mnt/foo/vm-templates"]
    assert sorted(changes["directories"]["old"]) == gone
    assert os.listdir(machine.path("/mnt/foo")) == ["appvms"]


@pytest.mark.parametrize("place", ["link", "mount", "subdirectory"])
def test_purge_leaves_a_link_and_a_mount_point_to_the_user(machine, place):
    directory = kept = machine.path("/mnt/foo")
    mounted = {"mount": directory, "subdirectory": directory / "appvms"}.get(place)
    if place == "link":
        kept = directory.rename(machine.path("/mnt/real"))
        directory.symlink_to("/mnt/real")
    else:
        mount("tmpfs", mounted)
    try:
        system = machine.connect()
        system.set_pool("foo")
        changes = system.pool_remove_diff("foo", purge=True)
        assert system.remove_pool("foo", purge=True) == changes
        assert system.remove_pool("foo", purge=True) == {}
        left = [mounted.name] if place == "subdirectory" else []
        assert os.listdir(kept) == left
        assert directory.is_symlink() is (place == "link")
        gone = [f"/mnt/foo/{name}" for name in SUBDIRS if name not in left]
        assert changes["directories"]["old"] == gone
    finally:
        if mounted:
            subprocess.run(["umount", mounted], check=True)


def test_the_directories_come_back_with_the_pool_that_could_not_be_removed(machine, monkeypatch):
    rename = os.rename

    def fail(old, new, **kwargs):
        if new == "storage.conf":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new, **kwargs)

    system = machine.connect()
    system.set_pool("foo", min_free="1MiB")
    before = {path: seen.get("mode") for path, seen in tree(machine).items()}
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        with pytest.raises((OSError, StoragePoolException), match="Input/output error"):
            system.remove_pool("foo", purge=True)
    assert {path: seen.get("mode") for path, seen in tree(machine).items()} == before
    assert system.pool_info("foo")["min_free"] == "1MiB"
    assert system.pool_info("foo")["problems"] == []
    assert "directories" in system.remove_pool("foo", purge=True)
    assert tree(machine) == {}


def test_where_no_more_files_can_be_opened_a_place_is_not_made_up():
    """The root itself cannot be opened then, and is not looked for above itself."""
    system = qubes_storage.connect("/", "local")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            system._real("/none/such")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert system._real("/none/such") == "/none/such"


@pytest.fixture
def fresh(scratch):
    """A machine without storage.conf, where the default pool's directories are not there."""
    made = scratch(None)
    made.path(f"{LIB}/appvms").rmdir()
    made.path(f"{LIB}/servicevms").rmdir()
    return made


def test_the_first_pool_is_not_written_down_where_the_default_ones_directories_cannot_be_made(
    fresh, monkeypatch
):
    def fail(name, *args, **kwargs):
        if name == ".servicevms.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(name, *args, **kwargs)

    mkdir, before = os.mkdir, fresh.tree()
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", fail)
        with pytest.raises(StoragePoolException, match="pool default: cannot make .*No space left"):
            fresh.connect().add_pool("foo", dir_path="/mnt/foo", min_free="1MiB")
    assert fresh.tree() == before
    assert "created" in fresh.connect().add_pool("foo", dir_path="/mnt/foo", min_free="1MiB")
    check_first(fresh)


def check_first(machine):
    system = machine.connect()
    assert system.pool_diff("foo", dir_path="/mnt/foo", min_free="1MiB") == {}
    assert list(system.list_pools()) == ["default", "foo"]
    assert set(SUBDIRS) <= set(os.listdir(machine.path(LIB)))
    assert set(SUBDIRS) == set(os.listdir(machine.path("/mnt/foo")))


def test_the_first_pool_that_died_anywhere_twice_is_whole_after_the_next_run(scratch):
    def add():
        system = machine.connect()
        if system.pool_diff("foo", dir_path="/mnt/foo", min_free="1MiB"):
            system.add_pool("foo", dir_path="/mnt/foo", min_free="1MiB")

    for number in steps(3):
        machine = scratch(None)
        machine.path(f"{LIB}/appvms").rmdir()
        through = kill_at(number, add)
        kill_at(number // 2, add)
        add()
        check_first(machine)
        if through:
            break


INNER = "[in]\ndriver=xen\ndir_path={}\n"


@pytest.mark.parametrize("linked", [False, True])
def test_a_vm_in_whose_directory_a_pool_lies_stays_where_it_is(machine, linked):
    """As where the pool was written by hand."""
    system = machine.connect()
    system.create_vm("work")
    place = f"{LIB}/appvms/work/more"
    machine.mkdir(place)
    if linked:
        machine.path("/opt").symlink_to(f"{LIB}/appvms"[1:])
        place = "/opt/work/more"
    machine.write("/etc/qubes/storage.conf", (CONF + INNER.format(place)).encode())
    machine.add_pools()
    before = machine.tree()
    for verb in (
        lambda: system.vm_remove_diff("work", purge=True),
        lambda: system.remove_vm("work", purge=True),
        lambda: system.rename_vm("work", "other"),
        lambda: system.vm_diff("work", pool="foo", migrate=True),
        lambda: system.migrate_vm("work", "foo"),
    ):
        with pytest.raises(StoragePoolException, match=rf"pool in \({place}\) lies in its dire"):
            verb()
    assert machine.tree() == before
    assert set(system.remove_vm("work", keep=True)) == {"removed"}


def test_no_vm_is_brought_into_a_pool_that_lies_among_those_of_another(machine):
    system = machine.connect()
    system.create_vm("work")
    place = f"{LIB}/appvms/more"
    machine.write("/etc/qubes/storage.conf", (CONF + INNER.format(place)).encode())
    machine.add_pools()
    before = machine.tree()
    for verb in (
        lambda: system.create_vm("new", pool="in"),
        lambda: system.clone_vm("work", "new", pool="in"),
        lambda: system.migrate_vm("work", "in"),
    ):
        with pytest.raises(StoragePoolException, match=rf"pool in: .*of pool default \({LIB}\); g"):
            verb()
    assert machine.tree() == before
    system.create_vm("new")


@pytest.mark.parametrize("mount_point", [True, False])
def test_nothing_is_made_in_a_directory_of_a_pool_whose_vms_are_all_missing(machine, mount_point):
    """As where that directory is a disk of its own, which is away."""
    system = machine.connect()
    system.create_vm("work")
    system.create_vm("there", pool="foo")
    appvms = machine.path(f"{LIB}/appvms")
    appvms.rename(machine.path("/mnt/away"))
    if mount_point:
        appvms.mkdir()
    before = machine.tree()
    for verb in (
        lambda: system.create_vm("new"),
        lambda: system.clone_vm("work", "new"),
        lambda: system.clone_vm("there", "new", pool="default"),
        lambda: system.migrate_vm("there", "default"),
        lambda: system.set_vm("work", label="green"),
    ):
        match = f"pool default: not one of its VMs is in {LIB}/appvms, .*; mount it"
        with pytest.raises(StoragePoolException, match=match) as caught:
            verb()
        assert caught.value.waits_for == [("mount", f"{LIB}/appvms")]
    assert machine.tree() == before
    system.create_vm("net", klass="NetVM")
    system.create_vm("new", pool="foo")
    (appvms / "renamed").mkdir(parents=True)  # by somebody: then the disk is there
    assert "created" in system.vm_diff("other")
    (appvms / "renamed").rmdir()
    appvms.rmdir()
    machine.path("/mnt/away").rename(appvms)
    assert set(system.set_vm("work", label="green")) == {"label"}


@pytest.mark.parametrize("path", [LIB, f"{LIB}/appvms"])
def test_the_first_pool_does_not_lie_over_the_default_one_that_is_written_with_it(root, path):
    system = qubes_storage.connect(str(root))
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match="pool foo: .*of pool default"):
            verb("foo", dir_path=path)
    assert not (root / "etc/qubes/storage.conf").exists()
    system.add_pool("foo", dir_path=f"{LIB}/foo")


def test_directories_that_are_another_pools_too_stay(scratch):
    machine = scratch(f"{CONF}[a]\ndriver=xen\ndir_path=/mnt/x\n[b]\ndriver=xen\ndir_path=/mnt/x\n")
    machine.add_pools()
    system = machine.connect()
    assert "directories" not in system.pool_remove_diff("b", purge=True)
    system.remove_pool("b", purge=True)
    system.create_vm("new", pool="a")
    system.remove_vm("new", purge=True)
    system.remove_pool("a", purge=True)
    assert not machine.path("/mnt/x").exists()
