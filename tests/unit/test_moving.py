"""VMs that move, to another pool or name: whole at every moment, whatever dies, on any disk."""

import hashlib
import os
import shutil
import subprocess

import pytest
from qubes_storage import files, image, registry
from qubes_storage.exc import InvalidInput, StoragePoolException

from tests.r32.machine import LIB, element
from tests.unit.test_build import kill_at, steps
from tests.unit.test_image import mount

MIB = 1024**2
CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
HOME = {"default": f"{LIB}/appvms", "foo": "/mnt/foo/appvms"}
CONTENT = {
    "private.img": b"PRIV", "root.img": b"ROOT", "volatile.img": b"", "apps/menu.desktop": b"menu",
    "kernels/vmlinuz": b"vmlinuz", "firewall.xml": b"<rules/>",
}  # fmt: skip

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount or attach a loop")


@pytest.fixture
def make(scratch):
    """``make()``: a machine with two pools and the StandaloneVM ``work``, with data of its own."""

    def build():
        machine = scratch(CONF)
        machine.add_pools()
        system = machine.connect()
        system.create_vm("work", klass="StandaloneVM", label="green")
        vmdir = machine.path(f"{HOME['default']}/work")
        (vmdir / "apps").mkdir()
        for name, data in CONTENT.items():
            with open(vmdir / name, "rb+" if (vmdir / name).exists() else "xb") as file:
                file.seek(3 * MIB if name.endswith(".img") else 0)
                file.write(data)
        (vmdir / "apps/menu.desktop").chmod(0o644)
        (vmdir / "work.conf").write_text("conf")
        (vmdir / "link").symlink_to("elsewhere")
        return machine

    return build


@pytest.fixture
def machine(make):
    return make()


def content(machine, place, name="work"):
    """``{path: (mode, what is in it)}`` of a VM's directory, image data by its sum."""
    found = {}
    vmdir = machine.path(f"{place}/{name}")
    for path in [vmdir, *sorted(vmdir.rglob("*"))]:
        mode = path.lstat().st_mode
        inside = None
        if path.is_symlink():
            inside = os.readlink(path)
        elif path.is_file():
            with open(path, "rb") as file:
                data = file.read(4 * MIB) if path.suffix == ".img" else file.read()
                inside = (path.stat().st_size, hashlib.sha256(data).hexdigest())
        found[str(path.relative_to(vmdir)).replace(f"{name}.conf", "NAME.conf")] = mode, inside
    return found


def strays(machine):
    """Every name in a VM directory that is not a VM's."""
    found = set()
    for place in (LIB, *HOME.values(), f"{LIB}/vm-templates"):
        for name in os.listdir(machine.path(place)):
            if name.startswith(".") or (place in HOME.values() and name not in ("work", "play")):
                found.add(f"{place}/{name}")
    return found


def attrs(machine, name="work"):
    return machine.entries()[name].attrs


def refused(machine, call, match, error=StoragePoolException):
    """A call is refused, and changes nothing."""
    before = machine.tree()
    with pytest.raises(error, match=match):
        call()
    assert machine.tree() == before


def test_a_vm_moves_to_another_pool_and_back(machine):
    system = machine.connect()
    before, text = content(machine, HOME["default"]), machine.xml
    inode = machine.path(f"{HOME['default']}/work/private.img").stat().st_ino
    tree = machine.tree()
    changes = {"pool": {"old": "default", "new": "foo"}}
    assert system.vm_diff("work", pool="foo", migrate=True) == changes
    assert machine.tree() == tree
    assert system.migrate_vm("work", "foo") == changes
    assert content(machine, HOME["foo"]) == before
    assert not machine.path(f"{HOME['default']}/work").exists()
    assert attrs(machine)["pool_name"] == "foo"
    assert (
        attrs(machine)["dir_path"] == system.vm_info("work")["dir_path"] == "/mnt/foo/appvms/work"
    )
    assert machine.path("/mnt/foo/appvms/work/private.img").stat().st_ino == inode  # not copied
    assert system.migrate_vm("work", "foo") == {}
    assert system.orphans() == []
    system.migrate_vm("work", "default")
    assert content(machine, HOME["default"]) == before
    assert machine.xml == text
    assert strays(machine) == set()


def test_the_old_copy_stays_where_it_is_kept_and_is_a_copy_of_its_own(machine):
    system = machine.connect()
    before = content(machine, HOME["default"])
    system.migrate_vm("work", "foo", keep=True)
    assert content(machine, HOME["default"]) == content(machine, HOME["foo"]) == before
    old = machine.path(f"{HOME['default']}/work/private.img").stat()
    assert old.st_ino != machine.path(f"{HOME['foo']}/work/private.img").stat().st_ino
    assert [row["path"] for row in system.orphans()] == [f"{HOME['default']}/work"]
    refused(machine, lambda: system.migrate_vm("work", "default"), "left alone")
    assert strays(machine) == set()


def test_what_cannot_move_is_refused_and_nothing_changes(machine):
    system = machine.connect()
    refused(machine, lambda: system.migrate_vm("work", "nope"), "pool nope: unknown")
    refused(machine, lambda: system.migrate_vm("nope", "foo"), "VM nope: is not in qubes.xml")
    refused(machine, lambda: system.migrate_vm("dom0", "foo"), "dom0", InvalidInput)
    refused(machine, lambda: system.set_vm("work", pool="foo"), "or migrate: true")
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    disp = element("QubesDisposableVm", "disp1", 9, template_qid="1")
    machine.elements.append(disp)
    machine.write_registry()
    machine.mkdir(f"{HOME['default']}/fedora-23-dvm")
    machine.image(f"{HOME['default']}/fedora-23-dvm/private.img", MIB)
    refused(machine, lambda: system.migrate_vm("disp1", "foo"), "DispVM")
    machine.mkdir("/mnt/foo/appvms/work")
    refused(machine, lambda: system.migrate_vm("work", "foo"), "left alone")
    os.rmdir(machine.path("/mnt/foo/appvms/work"))
    guards = "/etc/qubes/storage-guards.conf"
    machine.write(guards, b"[foo]\nmin_free = 4000TiB\n")
    refused(machine, lambda: system.migrate_vm("work", "foo"), "min_free keeps")
    machine.write(guards, b"[foo]\nrequire_mount = /mnt\n")
    refused(machine, lambda: system.migrate_vm("work", "foo"), "/mnt is not mounted")
    machine.write(guards, b"")
    os.mkfifo(machine.path(f"{HOME['default']}/work/pipe"))
    before, text = content(machine, HOME["default"]), machine.xml
    with pytest.raises(StoragePoolException, match="no file, directory or link"):
        system.migrate_vm("work", "foo", keep=True)
    assert (content(machine, HOME["default"]), machine.xml) == (before, text)
    os.unlink(machine.path(f"{HOME['default']}/work/pipe"))
    machine.path(f"{HOME['default']}/work/private.img").unlink()
    refused(machine, lambda: system.migrate_vm("work", "foo"), "private.img is gone")


@root_only
def test_a_vm_that_runs_is_refused_and_grows(machine):
    system = machine.connect()
    private = machine.path(f"{HOME['default']}/work/private.img")
    done = subprocess.run(
        ["losetup", "--find", "--show", private], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        for call in (
            lambda: system.migrate_vm("work", "foo"),
            lambda: system.rename_vm("work", "play"),
            lambda: system.clone_vm("work", "play"),
        ):
            refused(machine, call, f"in use by {device}; shut the VM down")
        size = 3 * 1024**3
        system.resize_vm("work", "private", size)
        with open(f"/sys/block/{device[5:]}/size", encoding="utf-8") as file:
            assert int(file.read()) * 512 == size
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_rules_of_the_firewall_come_into_the_directory_from_wherever_r32_has_them(machine):
    rules = f"{HOME['default']}/gone/firewall.xml"
    machine.path(f"{HOME['default']}/work/firewall.xml").unlink()
    system = machine.connect()
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    for _, given in machine.elements:
        if given["name"] == "work":
            given["firewall_conf"] = rules
    machine.write_registry()
    machine.mkdir(os.path.dirname(rules))
    machine.write(rules, b"<mine/>")
    system.clone_vm("work", "play")
    system.migrate_vm("work", "foo")
    for place, name in ((HOME["foo"], "work"), (HOME["default"], "play")):
        assert machine.path(f"{place}/{name}/firewall.xml").read_bytes() == b"<mine/>"
        assert attrs(machine, name)["firewall_conf"] == "firewall.xml"


@pytest.mark.parametrize("place", [f"{LIB}/appvms", "/mnt//foo/./appvms", f"/{LIB}/appvms"])
@pytest.mark.parametrize("verb", ["migrate", "rename", "clone"])
def test_rules_are_found_where_r32_has_them_whether_a_pool_is_there_or_not(scratch, place, verb):
    conf = CONF.replace("driver=xen\n", "driver=xen\ndir_path=/data/qubes\n", 1)
    machine = scratch(conf, template=False)
    machine.add_pools()
    machine.connect().create_vm("work", klass="StandaloneVM", pool="foo")
    machine.elements = [(e.tag, dict(e.attrs)) for e in machine.entries().values()]
    machine.elements[-1][1]["firewall_conf"] = f"{place}/work/firewall.xml"
    machine.write_registry()
    machine.mkdir(f"{place}/work")
    machine.write(f"{place}/work/firewall.xml", b"<mine/>")
    system = machine.connect()
    if verb == "migrate":
        assert system.vm_diff("work", pool="default", migrate=True) == system.migrate_vm(
            "work", "default"
        )
    elif verb == "rename":
        system.rename_vm("work", "play")
    else:
        system.clone_vm("work", "play")
    name = "work" if verb == "migrate" else "play"
    vmdir = machine.path(system.vm_info(name)["dir_path"])
    assert (vmdir / "firewall.xml").read_bytes() == b"<mine/>"


def test_a_vm_is_renamed_with_its_directory_and_those_who_run_on_it_follow(machine):
    system = machine.connect()
    before = content(machine, HOME["default"])
    assert system.rename_vm("work", "play") == {"name": {"old": "work", "new": "play"}}
    assert content(machine, HOME["default"], "play") == before
    assert not machine.path(f"{HOME['default']}/work").exists()
    found = attrs(machine, "play")
    assert found["conf_file"] == "play.conf"
    assert found["dir_path"] == f"{HOME['default']}/play"
    system.create_vm("child", template="fedora-23")
    system.rename_vm("fedora-23", "f24")
    assert system.list_vms()["child"]["template"] == "f24"
    assert system.verify_vm("child") == []
    for name, match in (("a b", "not a name"), ("child", "already"), ("dom0", "already")):
        refused(machine, lambda: system.rename_vm("play", name), match)  # noqa: B023
    refused(machine, lambda: system.rename_vm("dom0", "d"), "dom0", InvalidInput)
    machine.mkdir(f"{HOME['default']}/taken")
    refused(machine, lambda: system.rename_vm("play", "taken"), "left alone")


def check(machine, before, home, name):
    """The VM is there, whole, and nothing else is."""
    system = machine.connect()
    assert content(machine, home, name) == before
    assert strays(machine) == set()
    assert set(system.list_vms()) == {"dom0", "fedora-23", name}
    assert [p for p in system.verify_vm(name) if "no business" not in p] == []
    for place in HOME.values():
        there = set(os.listdir(machine.path(place)))
        assert there == ({name} if place == home else set())


@pytest.mark.parametrize("keep", [False, True], ids=["moved", "kept"])
def test_a_move_that_died_anywhere_is_finished_by_the_next(make, keep):
    died = 0
    for number in steps(7):
        machine = make()
        before = content(machine, HOME["default"])
        through = kill_at(number, lambda: machine.connect().migrate_vm("work", "foo", keep))  # noqa: B023
        registry.loads(machine.xml)
        system = machine.connect()
        pool = system.list_vms()["work"]["pool"]
        assert content(machine, HOME[pool]) == before  # the registry names a whole copy
        system.migrate_vm("work", "foo", keep)
        if keep:
            assert content(machine, HOME["default"]) == before
            shutil.rmtree(machine.path(f"{HOME['default']}/work"))
        check(machine, before, HOME["foo"], "work")
        assert system.migrate_vm("work", "foo") == {}
        if through:
            break
        died += 1
    assert died > 10


def test_a_move_that_died_anywhere_is_mended_by_any_change(make):
    for number in steps(5):
        machine = make()
        before = content(machine, HOME["default"])
        through = kill_at(number, lambda: machine.connect().migrate_vm("work", "foo"))  # noqa: B023
        system = machine.connect()
        pool = system.list_vms()["work"]["pool"]
        if system.vm_diff("work"):
            assert set(system.set_vm("work")) == {"unfinished"}
        check(machine, before, HOME[pool], "work")
        if through:
            break


def test_a_move_that_died_anywhere_leaves_nothing_of_a_vm_that_is_removed(make):
    for number in steps(7):
        machine = make()
        through = kill_at(number, lambda: machine.connect().migrate_vm("work", "foo"))  # noqa: B023
        system = machine.connect()
        system.remove_vm("work", purge=True)
        assert strays(machine) == set()
        assert [os.listdir(machine.path(place)) for place in HOME.values()] == [[], []]
        if through:
            break


def test_a_conf_that_has_the_new_name_already_stays_what_it_is(machine):
    (machine.path(f"{HOME['default']}/work") / "play.conf").write_text("other")
    machine.connect().rename_vm("work", "play")
    vmdir = machine.path(f"{HOME['default']}/play")
    assert [(vmdir / f"{n}.conf").read_text() for n in ("work", "play")] == ["conf", "other"]


@pytest.mark.parametrize(("name", "where"), [("caf\udce9", "/mnt/c"), ("c", "/mnt/caf\udce9")])
def test_what_qubes_xml_cannot_hold_is_never_written_there(machine, name, where):
    conf = f"[default]\ndriver=xen\n[{name}]\ndriver=xen\ndir_path={where}\n"
    machine.path("/etc/qubes/storage.conf").write_bytes(conf.encode(errors="surrogateescape"))
    for subdir in ("appvms", "servicevms", "vm-templates"):
        machine.mkdir(f"{where}/{subdir}")
    system = machine.connect()
    for call in (
        lambda: system.vm_diff("new", pool=name),
        lambda: system.create_vm("new", pool=name, klass="StandaloneVM"),
        lambda: system.clone_vm("work", "new", name),
        lambda: system.vm_diff("work", pool=name, migrate=True),
        lambda: system.migrate_vm("work", name),
    ):
        refused(machine, call, r"has a character that cannot be written in .*; rename it")


def test_what_is_in_the_way_of_what_is_made_in_a_vm_is_left_alone(machine):
    mine = machine.path(f"{HOME['default']}/work/.icon.png.new")
    mine.write_text("mine")
    with pytest.raises(StoragePoolException, match=r"\.icon\.png\.new is in the way: move it"):
        machine.connect().set_vm("work", label="blue")
    assert mine.read_text() == "mine"


def test_a_rename_that_died_anywhere_is_finished_by_the_next(make):
    died = 0
    for number in steps(7):
        machine = make()
        before = content(machine, HOME["default"])
        through = kill_at(number, lambda: machine.connect().rename_vm("work", "play"))  # noqa: B023
        system = machine.connect()
        name = "work" if "work" in system.list_vms() else "play"
        assert content(machine, HOME["default"], name) == before
        if name == "work" or system.vm_diff("play"):
            system.rename_vm("work", "play")
        check(machine, before, HOME["default"], "play")
        if through:
            break
        died += 1
    assert died > 10


def test_an_old_name_can_be_taken_again_after_a_rename_that_died(make):
    for number in steps(7):
        machine = make()
        through = kill_at(number, lambda: machine.connect().rename_vm("work", "play"))  # noqa: B023
        system = machine.connect()
        if "work" not in system.list_vms():
            before = content(machine, HOME["default"], "play")
            system.create_vm("work", klass="StandaloneVM")
            if system.vm_diff("play"):
                system.set_vm("play")
            assert content(machine, HOME["default"], "play") == before
            assert system.vm_diff("work") == {}
            assert strays(machine) == set()
        if through:
            break


FILESYSTEMS = ("ext4", "xfs", "btrfs")
PAIRS = [(a, b) for a in FILESYSTEMS for b in FILESYSTEMS if a != b]


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """A filesystem of each kind, mounted; or the test is skipped with the reason."""
    made = {}

    def get(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind) / "mnt"
            place.mkdir()
            mount(kind, place)
            made[kind] = place
        return made[kind]

    yield get
    for place in made.values():
        subprocess.run(["umount", place], check=True)


def scattered(path, size):
    """An image with data here and there, and holes between; returns its sum."""
    with open(path, "rb+") as file:
        file.truncate(size)
        for offset in (0, 5 * MIB + 4096, 17 * MIB, 40 * MIB, size - 8192):
            file.seek(offset)
            file.write(os.urandom(MIB if offset < size - MIB else 8192))
        file.flush()
        os.fsync(file.fileno())
    return checksum(path)


def checksum(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(4 * MIB), b""):
            found.update(piece)
    return found.hexdigest()


@root_only
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_a_move_between_filesystems_keeps_content_holes_and_modes(scratch, disks, source, target):
    machine = scratch("[default]\ndriver=xen\n")
    system = machine.connect()
    for kind in (source, target):
        machine.mkdir(f"/mnt/{kind}")
        bound = ["mount", "--bind", disks(kind), machine.path(f"/mnt/{kind}")]
        subprocess.run(bound, check=True)
    try:
        for kind in (source, target):
            system.add_pool(kind, dir_path=f"/mnt/{kind}/qubes")
        system.create_vm("work", template="fedora-23", pool=source)
        private = machine.path(f"/mnt/{source}/qubes/appvms/work/private.img")
        private.unlink()
        private.touch()
        private.chmod(0o640)
        was = scattered(private, 64 * MIB)
        allocated = private.stat().st_blocks
        system.migrate_vm("work", target)
        moved = machine.path(f"/mnt/{target}/qubes/appvms/work/private.img")
        os.sync()
        assert checksum(moved) == was
        assert abs(moved.stat().st_blocks - allocated) <= allocated / 20
        assert moved.stat().st_mode & 0o7777 == 0o640
        assert not private.parent.exists()
        assert system.orphans() == []
        system.remove_vm("work", purge=True)
        for kind in (source, target):
            system.remove_pool(kind)
            shutil.rmtree(machine.path(f"/mnt/{kind}/qubes"))
    finally:
        for kind in (source, target):
            subprocess.run(["umount", machine.path(f"/mnt/{kind}")], check=True)


@root_only
def test_a_gibibyte_goes_round_all_filesystems_and_comes_home_as_it_was(scratch):
    machine = scratch("[default]\ndriver=xen\n")
    system = machine.connect()
    mounted = []
    try:
        for kind in FILESYSTEMS:
            place = machine.path(f"/mnt/{kind}")
            machine.mkdir(f"/mnt/{kind}")
            mount(kind, place, 3072 * MIB)
            mounted.append(place)
            system.add_pool(kind, dir_path=f"/mnt/{kind}/qubes")
        system.create_vm("work", template="fedora-23", pool="ext4", volumes={"private": "3GiB"})
        private = "qubes/appvms/work/private.img"
        with open(machine.path(f"/mnt/ext4/{private}"), "rb+") as file:
            for part in range(8):  # 128 MiB of data, 256 MiB of hole, and so on
                file.seek(part * 384 * MIB)
                file.write(os.urandom(128 * MIB))
            os.fsync(file.fileno())
        was = checksum(machine.path(f"/mnt/ext4/{private}"))
        for target in ("xfs", "btrfs", "ext4"):
            system.migrate_vm("work", target)
            moved = machine.path(f"/mnt/{target}/{private}")
            os.sync()
            assert checksum(moved) == was
            assert abs(moved.stat().st_blocks * 512 - 1024 * MIB) <= 1024 * MIB / 20
            assert moved.stat().st_mode & 0o7777 == 0o660
        assert system.orphans() == []
    finally:
        for place in mounted:
            subprocess.run(["umount", place], check=True)


def test_a_copy_that_differs_is_told(tmp_path):
    for name, data in (("a", b"x" * 5 * MIB), ("b", b"x" * 5 * MIB), ("c", b"x" * MIB)):
        (tmp_path / name).write_bytes(data)
    os.truncate(tmp_path / "c", 5 * MIB)
    with files.closing(image.open_image(tmp_path / "a")) as a:
        with files.closing(image.open_image(tmp_path / "b")) as b:
            image.check_same(a, b)
        with files.closing(image.open_image(tmp_path / "c")) as c:
            for pair in ((a, c), (c, a)):
                with pytest.raises(OSError, match="differs"):
                    image.check_same(*pair)


@pytest.mark.parametrize("name", ["from", "taken", "outside"])
def test_a_vm_may_have_any_name_there_is_to_move_and_to_import(machine, name):
    system = machine.connect()
    machine.image("/mnt/disk.raw", 1 << 20, "BOOT")
    system.create_vm(name, klass="HVM", root_move_from=str(machine.path("/mnt/disk.raw")))
    assert system.migrate_vm(name, "foo")
    system.rename_vm(name, "other")
    system.rename_vm("other", name)
    assert system.vm_diff(name, pool="foo") == {}
