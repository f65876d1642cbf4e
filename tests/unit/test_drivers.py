"""The drivers on real filesystems: blocks shared, old images kept and brought back."""

import itertools
import os
import re
import signal
import subprocess

import pytest
from qubes_storage import files, image
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException

from tests.r32.machine import LIB
from tests.unit.test_image import mount

MIB = 1024**2
IMAGES = ("root", "private")
OLD = re.compile(r"\d+@\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def disk(scratch, tmp_path_factory):
    """``disk(kind)``: a machine with a filesystem of a kind at /mnt/ssd, made with options."""
    mounted = []

    def make(kind, *options):
        machine = scratch()
        place = tmp_path_factory.mktemp(kind) / "mnt"
        place.mkdir()
        mount(kind, place, options=options)
        mounted.append(place)
        inside = machine.mkdir("/mnt/ssd")
        subprocess.run(["mount", "--bind", place, inside], check=True)
        mounted.append(inside)
        return machine

    yield make
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


def pool_with_vm(machine, driver="reflink", **options):
    system = machine.connect()
    system.add_pool("ssd", driver=driver, dir_path="/mnt/ssd/qubes", **options)
    system.create_vm("work", klass="StandaloneVM", template="fedora-23", pool="ssd")
    return system


def write(machine, path, text):
    with open(machine.path(path), "r+b") as file:
        file.write(text.encode())


def read(machine, path, count=3):
    with open(machine.path(path), "rb") as file:
        return file.read(count).decode()


IMG = "/mnt/ssd/qubes/appvms/work/private.img"


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("driver", ["reflink", "file-reflink"])
def test_reflink_refuses_what_shares_no_blocks_and_leaves_nothing(disk, kind, driver):
    machine = disk(kind)
    system = machine.connect()
    before = machine.tree()
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match=f"pool ssd: /mnt/ssd/qubes lies on {kind}"):
            verb("ssd", driver=driver, dir_path="/mnt/ssd/qubes")
        assert {p for p in machine.tree() if "/mnt" in p} == {p for p in before if "/mnt" in p}
    assert "ssd" not in system.list_pools()
    system.add_pool("ssd", driver=driver, dir_path="/mnt/ssd/qubes", setup_check="no")
    assert not [p for p in system.pool_info("ssd")["problems"] if "shares" in p]


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_revisions_are_named_kept_and_brought_back(disk, kind):
    machine = disk(kind)
    system = pool_with_vm(machine, revisions_to_keep="2")
    assert sorted(os.listdir(machine.path("/mnt/ssd/qubes"))) == [
        "appvms", "servicevms", "vm-templates",
    ]  # fmt: skip
    assert system.revisions("work") == []
    with pytest.raises(InvalidInput, match="no revision yet"):
        system.revert("work")
    for text in ("one", "two", "six"):
        write(machine, IMG, text)
        kept = system.reset_vm("work")["revisions"]["new"]
        assert set(kept) == {"root.img", "private.img"}
    found = system.revisions("work", "private")
    assert [each.split("@")[0] for each in found] == ["2", "3"]
    assert all(OLD.fullmatch(each) for each in found)
    write(machine, IMG, "now")
    system.resize_vm("work", "private", "4GiB")
    with pytest.raises(InvalidInput, match="no revision 9; it has 2@"):
        system.revert("work", "private", 9)
    assert system.revert("work", "private", "2") == {"revision": {"old": None, "new": found[0]}}
    assert read(machine, IMG) == "two"
    assert os.stat(machine.path(IMG)).st_size == 4 * 1024 * MIB
    assert [each.split("@")[0] for each in system.revisions("work")] == ["3", "4"]
    system.revert("work")
    assert read(machine, IMG) == "now"
    assert system.verify_vm("work") == []
    system.migrate_vm("work", "default")
    assert not [n for n in os.listdir(machine.path(f"{LIB}/appvms/work")) if "@" in n]
    with pytest.raises(NotSupported, match="driver reflink"):
        system.revisions("work")


def test_a_template_commits_and_reverts_its_root_with_a_new_cow(disk):
    machine = disk("xfs")
    system = pool_with_vm(machine)
    system.clone_vm("fedora-23", "fedora-24", "ssd")
    root = "/mnt/ssd/qubes/vm-templates/fedora-24/root.img"
    assert set(system.commit_vm("fedora-24")) == {"root-cow", "revisions"}
    write(machine, root, "bad")
    system.revert("fedora-24", "root")
    assert read(machine, root, 4) == "ROOT"
    assert system.verify_vm("fedora-24") == []
    with pytest.raises(InvalidInput, match="it has root, private of its own"):
        system.revert("fedora-24", "volatile")


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "xfs", "btrfs"])
def test_sharing_is_tried_out_and_nothing_is_left(disk, kind):
    machine = disk(kind)
    before = set(os.listdir(machine.path("/mnt/ssd")))
    with files.closing(os.open(machine.path("/mnt/ssd"), os.O_RDONLY)) as fd:
        assert image.can_share(fd) is (kind in ("xfs", "btrfs"))
    assert set(os.listdir(machine.path("/mnt/ssd"))) == before


def subvolumes(machine):
    """The names of the subvolumes below the pool."""
    command = ["btrfs", "subvolume", "list", machine.path("/mnt/ssd")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted(line.rpartition("/")[2] for line in shown.splitlines())


def test_btrfs_has_a_subvolume_a_vm_and_deletes_it(disk):
    machine = disk("btrfs")
    system = pool_with_vm(machine, "btrfs")
    assert subvolumes(machine) == ["work"]
    write(machine, IMG, "one")
    system.clone_vm("work", "play", "ssd")
    play = IMG.replace("work", "play")
    assert subvolumes(machine) == ["play", "work"]
    assert read(machine, play) == "one"
    assert sorted(n for n in os.listdir(machine.path(play).parent) if "." in n) == [
        "icon.png", "private.img", "root.img",
    ]  # fmt: skip
    assert machine.path(play).parent.stat().st_mode & 0o7777 == 0o2770
    system.reset_vm("work")
    write(machine, IMG, "two")
    system.revert("work")
    assert read(machine, IMG) == "one"
    system.rename_vm("play", "game")
    assert subvolumes(machine) == ["game", "work"]
    assert system.verify_vm("work") == system.verify_vm("game") == []
    system.remove_vm("game", purge=True)
    system.migrate_vm("work", "default")
    assert subvolumes(machine) == []
    system.migrate_vm("work", "ssd")
    assert subvolumes(machine) == ["work"]
    assert read(machine, IMG) == "one"


def test_what_btrfs_keeps_is_of_one_moment(disk):
    """A writer puts each number into root, then into private; no revision has it there alone."""
    machine = disk("btrfs")
    system = pool_with_vm(machine, "btrfs", revisions_to_keep="30")
    writer = os.fork()
    if not writer:
        sync = os.O_WRONLY | os.O_DSYNC
        fds = [os.open(machine.path(IMG.replace("private", name)), sync) for name in IMAGES]
        for number in itertools.count():
            for fd in fds:
                os.pwrite(fd, b"%08d" % number, 0)
    try:
        while not read(machine, IMG, 8).isdigit():
            pass
        for _ in range(30):
            system.reset_vm("work")
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    seen = set()
    for roots, privates in zip(*(system.revisions("work", name) for name in IMAGES)):
        paths = (f"root.img.{roots}", f"private.img.{privates}")
        root, private = (int(read(machine, IMG.replace("private.img", p), 8)) for p in paths)
        assert root - private in (0, 1)
        seen.add(root)
    assert len(seen) > 10


def test_btrfs_refuses_another_filesystem(disk):
    machine = disk("xfs")
    for verb in (machine.connect().pool_diff, machine.connect().add_pool):
        with pytest.raises(StoragePoolException, match="lies on xfs, not on btrfs; mount btrfs"):
            verb("ssd", driver="btrfs", dir_path="/mnt/ssd/qubes")


def nearly_full(system, machine, pool):
    """Have VM work hold 64 MiB that do not fit into a pool beside what it is to keep free."""
    with open(machine.path(IMG), "r+b") as file:
        file.write(os.urandom(64 * MIB))
        os.fsync(file.fileno())
    free = system.pool_info(pool)["free"]
    system.set_pool(pool, min_free=free - 32 * MIB)


def test_a_move_that_keeps_the_old_copy_needs_room_for_another(disk):
    machine = disk("ext4")
    system = pool_with_vm(machine, "xen")
    system.add_pool("near", dir_path="/mnt/ssd/near")
    nearly_full(system, machine, "near")
    with pytest.raises(StoragePoolException, match="pool near: .* are needed and min_free keeps"):
        system.migrate_vm("work", "near", keep=True)
    assert system.vm_info("work")["pool"] == "ssd"
    assert set(system.migrate_vm("work", "near")) == {"pool"}


def test_on_xfs_that_shares_no_blocks_copies_need_room_and_test_mode_tells(disk):
    machine = disk("xfs", "-m", "reflink=0")
    system = pool_with_vm(machine, "xen")
    nearly_full(system, machine, "ssd")
    for call in (
        lambda: system.vm_diff("play", clone_from="work", pool="ssd"),
        lambda: system.clone_vm("work", "play", "ssd"),
    ):
        with pytest.raises(StoragePoolException, match="pool ssd: .* are needed and min_free"):
            call()
    for call in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match="pool two: .*xfs, which shares no blocks"):
            call("two", driver="reflink", dir_path="/mnt/ssd/two")
