"""Pools on a real root: what add, set and remove make, what is refused, what looking leaves."""

import contextlib
import os
import pathlib
import re
import stat
import subprocess

import pytest
import qubes_storage
from qubes_storage import Pool
from qubes_storage.exc import InvalidInput, StoragePoolException

CONF = "etc/qubes/storage.conf"
GUARDS = "etc/qubes/storage-guards.conf"
SHIPPED = b"# of the system\n[default] ; always there\ndriver=xen ; images as files\n\n"
SUBDIRS = ("appvms", "servicevms", "vm-templates")


@pytest.fixture
def system(root):
    (root / CONF).write_bytes(SHIPPED)
    return qubes_storage.connect(root, "local")


@pytest.fixture
def ssd(system):
    """A machine with a pool ``ssd``."""
    system.add_pool("ssd", dir_path="/opt/ssd")
    return system


def tree(root):
    """All below a root, with modes, times and bytes: looking changes none of it."""
    found = {}
    for place in [root, *sorted(root.rglob("*"))]:
        at = place.lstat()
        small = stat.S_ISREG(at.st_mode) and at.st_size < 2**20
        data = place.read_bytes() if small else at.st_size
        found[str(place)] = (at.st_mode, at.st_uid, at.st_gid, at.st_ino, at.st_mtime_ns, data)
    return found


@contextlib.contextmanager
def refused(root, match, kind=StoragePoolException):
    """The block raises an error that matches, and changes nothing below the root."""
    before = tree(root)
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert tree(root) == before


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- add


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_add_makes_directories_and_section_with_our_modes_under_any_umask(system, root, umask):
    old = os.umask(umask)
    try:
        changes = system.add_pool("ssd", driver="xen", dir_path="/opt/ssd", min_free="1GiB")
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert changes["created"] == {"old": None, "new": "ssd"}
    assert changes["dir_path"] == {"old": None, "new": "/opt/ssd"}
    for path in ("opt/ssd", *(f"opt/ssd/{name}" for name in SUBDIRS)):
        assert mode(root / path) == 0o2770
    assert sorted(os.listdir(root / "opt/ssd")) == sorted(SUBDIRS)
    assert mode(root / GUARDS) == 0o660
    assert mode(root / "var/lib/qubes/qubes.xml") == 0o660
    section = b"[ssd]\ndriver = xen\ndir_path = /opt/ssd\n\n"
    assert (root / CONF).read_bytes() == SHIPPED + section


def test_a_machine_without_storage_conf_gets_one_as_an_installed_system_has(root):
    system = qubes_storage.connect(root, "local")
    system.add_pool("ssd", dir_path="/opt/ssd")
    assert system.list_pools() == {
        "default": {"driver": "xen"},
        "ssd": {"driver": "xen", "dir_path": "/opt/ssd"},
    }
    text = (root / CONF).read_text()
    assert text.startswith("#")
    assert "\n[default]\ndriver=xen\n" in text
    assert mode(root / CONF) == 0o660
    assert (root / "var/lib/qubes/appvms").is_dir()


def test_what_is_added_twice_is_an_error_that_names_the_way(ssd, root):
    with refused(root, "pool ssd: is in .*storage.conf already; change it with qubes_pool.set"):
        ssd.add_pool("ssd", dir_path="/opt/ssd")


def test_options_come_as_keywords_as_a_map_or_as_a_list_of_maps(system, root):
    system.add_pool("one", dir_path="/opt/one", driver="xen")
    system.add_pool("two", options={"dir_path": "/opt/two", "driver": "xen"})
    system.add_pool("three", options=[{"driver": "xen"}, {"dir_path": "/opt/three"}])
    for name in ("one", "two", "three"):
        assert system.list_pools()[name] == {"driver": "xen", "dir_path": f"/opt/{name}"}
        assert system.pool_diff(name, options=[{"dir_path": f"/opt/{name}"}]) == {}


@pytest.mark.parametrize(
    "given",
    [
        {"dir_path": "/opt/a", "options": {"dir_path": "/opt/a"}},
        {"options": [{"dir_path": "/opt/a"}, {"dir_path": "/opt/b"}]},
        {"options": [{"dir_path": "/opt/a"}, {"DIR_PATH": "/opt/a"}]},
        {"driver": "xen", "dir_path": "/opt/a", "options": {"driver": "xen"}},
        {"min_free": "1G", "dir_path": "/opt/a", "options": {"min_free": "1G"}},
    ],
    ids=repr,
)
def test_a_key_that_is_given_twice_is_refused(system, root, given):
    with refused(root, "pool foo: (dir_path|driver|min_free) is given twice", InvalidInput):
        system.add_pool("foo", **given)


def test_an_option_whose_name_is_no_text_is_refused(system, root):
    with refused(root, "pool foo: option 17 is not a text; put it in quotes", InvalidInput):
        system.add_pool("foo", options={17: "x"})


@pytest.mark.parametrize("options", ["dir_path=/opt/a", 5, [["dir_path", "/opt/a"]], [None]])
def test_options_that_are_no_map_are_refused(system, root, options):
    with refused(root, "pool foo: options .* are no map", InvalidInput):
        system.add_pool("foo", options=options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "driver xen needs option dir_path"),
        ({"dir_path": "/opt/a", "size": "1"}, "driver xen takes no option size; it takes dir_path"),
        (
            {"driver": "zfs", "dir_path": "/opt/a"},
            "unknown driver 'zfs'; there are .*xen.*class = ",
        ),
        ({"driver": "", "dir_path": "/opt/a"}, "unknown driver ''"),
        ({"class": "no.such.Thing", "dir_path": "/opt/a"}, "no.such.Thing cannot be imported"),
        ({"class": "nodots", "dir_path": "/opt/a"}, "'nodots' is no dotted path"),
        ({"class": "os.path.Nope"}, "os.path.Nope cannot be imported"),
        ({"dir_path": "opt/a"}, "dir_path 'opt/a' is not an absolute path"),
        ({"dir_path": ""}, "dir_path '' is not an absolute path"),
        ({"dir_path": "/mnt/a\x01"}, "has a character that storage.conf or qubes.xml cannot hold"),
        ({"dir_path": "/mnt/caf\udce9"}, "storage.conf or qubes.xml cannot hold; rename that"),
        ({"dir_path": f"/mnt/{'a' * 251}/"}, "is too long .*; take one of at most 250 bytes"),
        ({"dir_path": "/"}, "dir_path '/' is not an absolute path of a directory of its own"),
        ({"dir_path": "/opt/../opt/a"}, r"has '\.\.' in it"),
        ({"dir_path": "/opt/a ; b"}, "would not be read back as written"),
        ({"dir_path": "/opt/a\nb"}, "pool .?foo"),
        ({"dir_path": "/opt/a "}, "would not be read back as written"),
        ({"dir_path": "/opt/a\0"}, "pool .?foo"),
        ({"dir_path": "/opt/\ud800"}, "cannot be written in UTF-8"),
        ({"dir_path": ["/opt/a"]}, "option dir_path is a list; write a text"),
        ({"dir_path": "/opt/a", "min_free": "lots"}, "min_free: 'lots' is not a size"),
        ({"dir_path": "/opt/a", "require_mount": "opt"}, "require_mount 'opt' is not an absolute"),
        ({"dir_path": "/opt/a", "require_mount": "/opt"}, "/opt is not mounted"),
        ({"dir_path": "/opt/a", "require_mount": "/a ; b"}, "guards.conf would not be read back"),
        ({"dir_path": "/no/parent/here"}, "/no/parent: No such file.* never made in silence"),
        ({"dir_path": "/opt/file/a"}, "dir_path /opt/file/a: Not a directory"),
        ({"dir_path": "/opt/file"}, "dir_path /opt/file: Not a directory"),
        ({"dir_path": "/opt/link"}, "/opt/link is a link to what is not there; mount its disk"),
        ({"dir_path": "/var/lib/qubes"}, "is the directory of pool default too"),
        ({"dir_path": "/var/lib/qubes/appvms"}, "lies in the VM directories of pool default"),
        ({"dir_path": "/var/lib/qubes/vm-templates/x"}, "lies in the VM directories of pool def"),
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused_before_anything_is_made(system, root, given, message):
    (root / "opt/file").touch()
    (root / "opt/link").symlink_to("/nowhere")
    system.set_pool("default")
    with refused(root, message):
        system.add_pool("foo", **given)
    with refused(root, message):
        system.pool_diff("foo", **given)


@pytest.mark.parametrize(
    "name", ["", " a", "a\nb", "[a", "a]", "123", "true", "None", "DEFAULT", 5]
)
def test_a_name_that_would_not_be_read_back_is_refused(system, root, name):
    with refused(root, "pool ", InvalidInput):
        system.add_pool(name, dir_path="/opt/a")


@pytest.mark.parametrize("name", ["a b", "a ; b", "a/b", "#a", "p.1", "a=b", "; a"])
def test_any_other_name_is_written_and_read_back(system, name):
    system.add_pool(name, dir_path="/opt/a")
    assert system.list_pools()[name] == {"driver": "xen", "dir_path": "/opt/a"}
    assert system.pool_diff(name, dir_path="/opt/a") == {}
    system.remove_pool(name)
    assert name not in system.list_pools()


def test_a_new_pool_counts_what_DEFAULT_gives_it(system, root):  # noqa: N802
    own = b"[default]\ndriver=xen\ndir_path = /var/lib/qubes\n"
    (root / CONF).write_bytes(own + b"[DEFAULT]\ndir_path = /opt/all\n")
    system.add_pool("foo")
    assert (root / "opt/all/appvms").is_dir()
    assert system.get_pool("foo").dir_path == "/opt/all"
    assert system.pool_diff("foo", driver="xen") == {}


def test_an_option_of_DEFAULT_that_the_driver_does_not_take_is_refused_at_once(system, root):  # noqa: N802
    (root / CONF).write_bytes(SHIPPED + b"[DEFAULT]\na = 1\n")
    with refused(root, "takes no option a", InvalidInput):
        system.add_pool("foo", dir_path="/opt/foo")


def test_directories_are_taken_away_again_if_the_section_cannot_be_written(system, root):
    if os.geteuid():
        (root / CONF).parent.chmod(0o555)
    else:
        subprocess.run(["chattr", "+i", root / CONF], check=False)
        if not is_immutable(root / CONF):
            pytest.skip("this filesystem knows no immutable files")
    try:
        with pytest.raises(
            StoragePoolException, match="pool foo: /etc/qubes/storage.conf: cannot be"
        ):
            system.add_pool("foo", dir_path="/opt/foo")
    finally:
        if os.geteuid():
            (root / CONF).parent.chmod(0o755)
        else:
            subprocess.run(["chattr", "-i", root / CONF], check=True)
    assert not (root / "opt/foo").exists()
    assert (root / CONF).read_bytes() == SHIPPED
    assert os.listdir(root / "etc/qubes") == ["storage.conf"]
    system.add_pool("foo", dir_path="/opt/foo")


def is_immutable(path):
    found = subprocess.run(["lsattr", path], capture_output=True, text=True, check=False)
    return "i" in found.stdout.split(" ")[0]


# --- set


def test_set_changes_only_what_is_declared(ssd, root):
    text = (root / CONF).read_bytes()
    changes = ssd.set_pool("ssd", dir_path="/opt/fast")
    assert changes["dir_path"] == {"old": "/opt/ssd", "new": "/opt/fast"}
    assert (root / CONF).read_bytes() == text.replace(b"/opt/ssd", b"/opt/fast")
    assert (root / "opt/fast/appvms").is_dir()
    assert (root / "opt/ssd/appvms").is_dir(), "what was there stays"


def test_set_twice_changes_nothing_the_second_time(ssd, root):
    before = tree(root)
    assert ssd.set_pool("ssd", driver="xen", dir_path="/opt//ssd/") == {}
    assert ssd.set_pool("ssd") == {}
    assert tree(root) == before


def test_set_of_a_pool_that_is_not_there_names_the_way(system, root):
    with refused(root, "pool foo: is not in .*; add it with qubes_pool.add") as caught:
        system.set_pool("foo", dir_path="/opt/foo")
    assert caught.value.waits_for == [("pool", "foo")]


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_directory_is_told_and_is_not_waited_for(ssd, root, is_link):
    place = root / "opt/ssd/servicevms"
    place.rmdir()
    with refused(root, "ssd/servicevms: No such file.*; make it with qubes_pool.set ssd") as caught:
        ssd.create_vm("net", klass="NetVM", template=None, pool="ssd", standalone=True)
    assert caught.value.waits_for == [("pool", "ssd")]
    place.symlink_to("/nowhere") if is_link else place.touch()
    with refused(root, "ssd/servicevms: Not a directory; move what is there away") as caught:
        ssd.create_vm("net", klass="NetVM", template=None, pool="ssd", standalone=True)
    assert not caught.value.waits_for
    assert ssd.pool_info("ssd")["problems"] == ["/opt/ssd/servicevms is no directory: move it away"]


def test_set_makes_again_the_directories_that_are_gone(ssd, root):
    (root / "opt/ssd/servicevms").rmdir()
    assert ssd.pool_diff("ssd") == {"directories": {"old": [], "new": ["/opt/ssd/servicevms"]}}
    assert ssd.set_pool("ssd") == {"directories": {"old": [], "new": ["/opt/ssd/servicevms"]}}
    assert mode(root / "opt/ssd/servicevms") == 0o2770
    assert ssd.pool_diff("ssd") == {}


def test_null_removes_an_option_and_another_time_nothing(system, root):
    system.set_pool("default", dir_path="/opt/all")
    assert system.get_pool("default").dir_path == "/opt/all"
    changes = system.set_pool("default", options={"dir_path": None})
    assert changes["dir_path"] == {"old": "/opt/all", "new": None}
    assert (root / CONF).read_bytes() == SHIPPED
    assert system.get_pool("default").dir_path == "/var/lib/qubes"
    assert system.set_pool("default", options={"dir_path": None}) == {}


def test_null_of_an_option_that_is_needed_is_refused(ssd, root):
    with refused(root, "needs option dir_path", InvalidInput):
        ssd.set_pool("ssd", options={"dir_path": None})


def test_null_removes_a_guard(ssd, root):
    ssd.set_pool("ssd", min_free="1GiB")
    assert ssd.guards("ssd") == {"min_free": "1GiB"}
    assert ssd.set_pool("ssd", min_free="1024MiB") == {}
    assert ssd.set_pool("ssd", options={"min_free": None})["min_free"] == {
        "old": "1GiB",
        "new": None,
    }
    assert ssd.guards("ssd") == {}


@pytest.mark.parametrize(
    "options",
    [
        {"class": "qubes_storage.drivers.reflink.Pool"},
        {"dir_path": "/opt/x"},
        {"driver": "reflink"},
        {"driver": None, "class": "qubes_storage.drivers.btrfs.Pool"},
    ],
    ids=str,
)
def test_a_pool_does_not_move_away_from_its_vms(ssd, root, options):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    with refused(root, r"pool ssd: .*cannot change while VMs lie in it \(base\); migrate"):
        ssd.set_pool("ssd", options=options)


@pytest.mark.parametrize("wrong", ["/opt/zz", "opt/zz"])
def test_a_dir_path_that_somebody_changed_is_put_back_where_the_vms_are(ssd, root, wrong):
    ssd.set_pool("default")
    for name in ("base", "other"):
        ssd.create_vm(name, klass="TemplateVM", pool="ssd")
    conf = root / CONF
    before = conf.read_text()
    conf.write_text(before.replace("/opt/ssd", wrong))
    with refused(root, r"lie neither where .* nor in /opt/yy \(base, other\); mount its disk"):
        ssd.set_pool("ssd", dir_path="/opt/yy")
    changes = {"dir_path": {"old": wrong, "new": "/opt/ssd"}}
    assert ssd.pool_diff("ssd", dir_path="/opt/ssd") == changes
    assert ssd.set_pool("ssd", dir_path="/opt/ssd") == changes
    assert conf.read_text() == before
    assert ssd.pool_diff("ssd", dir_path="/opt/ssd") == {}


def test_a_dir_path_is_not_put_where_not_all_vms_are(ssd, root):
    ssd.set_pool("default")
    for name in ("base", "other"):
        ssd.create_vm(name, klass="TemplateVM", pool="ssd")
    (root / "opt/copied/vm-templates/base").mkdir(parents=True)
    (root / "opt/copied/vm-templates/other").mkdir()
    with refused(root, r"cannot change while VMs lie in it \(base, other\); migrate"):
        ssd.set_pool("ssd", dir_path="/opt/copied")
    (root / "opt/copied/vm-templates/base").rmdir()
    (root / CONF).write_text((root / CONF).read_text().replace("/opt/ssd", "/opt/zz"))
    with refused(root, r"nor in /opt/copied \(base\); mount its disk"):
        ssd.set_pool("ssd", dir_path="/opt/copied")


def test_a_dir_path_that_nobody_wrote_wrong_stays_while_its_disk_is_away(ssd, root):
    """In the other place is what a move left there, or a backup."""
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    (root / "opt/ssd").rename(root / "opt/away")
    (root / "opt/old/vm-templates/base").mkdir(parents=True)
    match = (
        r"registered in /opt/ssd, .* not in /opt/old \(base\); mount its disk, or write dir_path"
    )
    with refused(root, match):
        ssd.pool_diff("ssd", dir_path="/opt/old")
    with refused(root, match):
        ssd.set_pool("ssd", dir_path="/opt/old")
    (root / "opt/away").rename(root / "opt/ssd")
    assert ssd.pool_diff("ssd") == {}


@pytest.mark.parametrize("wrong", ["driver = xne", "class = no.such.Thing", "size = 3"])
def test_a_section_that_cannot_be_loaded_is_put_right_where_all_vms_are(ssd, root, wrong):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    conf = root / CONF
    before = conf.read_text()
    conf.write_text(before.replace("[ssd]\ndriver = xen", f"[ssd]\n{wrong}"))
    right = {"driver": "xen", "class": None, "size": None}
    (root / "opt/ssd").rename(root / "opt/away")
    with refused(root, r"pool ssd: VMs are not in /opt/ssd \(base\), so .*; mount its disk first"):
        ssd.set_pool("ssd", options=right)
    (root / "opt/away").rename(root / "opt/ssd")
    assert ssd.pool_diff("ssd", options=right) == ssd.set_pool("ssd", options=right) != {}
    assert ssd.list_pools()["ssd"] == {"driver": "xen", "dir_path": "/opt/ssd"}
    assert ssd.pool_diff("ssd", options=right) == {}
    assert ssd.set_vm("base", label="green")


@pytest.mark.parametrize("old", ["driver = xen", "class = qubes.storage.xen.XenPool"])
@pytest.mark.parametrize("new", [{"driver": "xen"}, {"class": "qubes.storage.xen.XenStorage"}])
def test_another_word_for_the_class_of_a_pool_is_no_move(ssd, root, old, new):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    conf = root / CONF
    conf.write_text(conf.read_text().replace("[ssd]\ndriver = xen", f"[ssd]\n{old}"))
    ssd.set_pool("ssd", options=new)
    assert ssd.pool_diff("ssd", options=new) == {}
    assert ssd.pool_info("ssd")["problems"] == ssd.pool_notes("ssd")


# --- storage.conf as a file


def test_owner_group_and_mode_of_storage_conf_are_kept(system, root):
    conf = root / CONF
    conf.chmod(0o604)
    if os.geteuid() == 0:
        os.chown(conf, 1234, 4321)
    before = conf.stat()
    system.add_pool("ssd", dir_path="/opt/ssd")
    after = conf.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino, "it is replaced whole"
    assert os.listdir(conf.parent) == ["storage.conf"]


@pytest.mark.parametrize("target", ["../../opt/real.conf", "/opt/real.conf"])
def test_a_link_in_its_place_is_kept_and_its_target_replaced(system, root, target):
    (root / CONF).rename(root / "opt/real.conf")
    (root / CONF).symlink_to(target)
    system.add_pool("ssd", dir_path="/opt/ssd")
    assert os.readlink(root / CONF) == target
    assert qubes_storage.loads((root / "opt/real.conf").read_bytes()) == system.list_pools()
    assert "ssd" in system.list_pools()
    system.remove_pool("ssd")
    assert (root / "opt/real.conf").read_bytes() == SHIPPED


def test_text_that_cannot_be_parsed_is_left_as_it_is(system, root):
    (root / CONF).write_bytes(SHIPPED + b"no option\n")
    with refused(root, "line 5: 'no option'"):
        system.add_pool("ssd", dir_path="/opt/ssd")
    with refused(root, "line 5: 'no option'"):
        system.remove_pool("default")


# --- where pools lie


def test_two_pools_over_one_directory_are_refused_also_through_a_link(ssd, root):
    (root / "opt/link").symlink_to("ssd")
    (root / "opt/away").symlink_to("/opt")
    for path in ("/opt/ssd/", "/opt//ssd", "/opt/link", "/opt/away/ssd"):
        with refused(root, "is the directory of pool ssd too; give each a directory of its own"):
            ssd.add_pool("foo", dir_path=path)


def test_a_pool_in_or_around_the_vm_directories_of_another_is_refused(ssd, root):
    (root / "opt/link").symlink_to("ssd/appvms")
    for path in ("/opt/ssd/appvms", "/opt/ssd/appvms/x", "/opt/link", "/opt/link/x"):
        with refused(root, r"lies in the VM directories of pool ssd \(/opt/ssd\)"):
            ssd.add_pool("foo", dir_path=path)
    (root / "mnt/a/servicevms").mkdir(parents=True)
    ssd.add_pool("inner", dir_path="/mnt/a/servicevms/x")
    with refused(root, r"has pool inner \(/mnt/a/servicevms/x\) in its VM directories"):
        ssd.add_pool("foo", dir_path="/mnt/a")


def test_a_pool_beside_the_vm_directories_of_another_is_fine(ssd, root):
    ssd.add_pool("foo", dir_path="/opt/ssd/foo")
    ssd.add_pool("bar", dir_path="/var/lib/qubes/appvms-too")
    assert ssd.pool_info("foo")["problems"] == []


def test_a_link_that_leads_out_of_the_root_ends_in_it(system, root, tmp_path):
    (tmp_path / "outside").mkdir()
    (root / "opt/out").symlink_to("../../../../../.." + str(tmp_path / "outside"))
    with refused(root, "pool foo: .*"):
        system.add_pool("foo", dir_path="/opt/out/foo")
    assert os.listdir(tmp_path / "outside") == []


def test_a_link_for_a_vm_directory_is_never_followed(system, root):
    (root / "opt/ssd").mkdir()
    (root / "mnt/other").mkdir()
    (root / "opt/ssd/appvms").symlink_to("/mnt/other")
    system.add_pool("ssd", dir_path="/opt/ssd")
    system.set_pool("default")
    with pytest.raises(StoragePoolException, match="pool ssd: /opt/ssd/appvms"):
        system.create_vm("work", klass="StandaloneVM", pool="ssd")
    assert os.listdir(root / "mnt/other") == []


# --- guards and disks


@pytest.fixture
def mounted(root):
    """``/mnt`` of the machine as a mount point of its own."""
    if os.geteuid():
        pytest.skip("only root can mount")
    path = root / "mnt"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", path], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], capture_output=True, check=False)


def test_require_mount_lets_a_pool_be_made_on_a_mounted_disk_alone(system, root, mounted):
    system.add_pool("usb", dir_path="/mnt/qubes", require_mount="/mnt/")
    assert (mounted / "qubes/appvms").is_dir()
    assert system.pool_info("usb")["require_mount"] == "/mnt/"
    assert system.pool_info("usb")["problems"] == []
    assert system.pool_diff("usb", dir_path="/mnt/qubes", require_mount="/mnt") == {}
    subprocess.run(["umount", mounted], check=True)
    with refused(root, "pool usb: /mnt/ is not mounted.*mount its disk") as caught:
        system.set_pool("usb")
    assert caught.value.waits_for == [("mount", "/mnt/")]
    assert any("is not mounted" in problem for problem in system.pool_info("usb")["problems"])
    assert os.listdir(mounted) == []


def test_directories_made_below_a_disk_that_was_unmounted_meanwhile_go(
    system, root, mounted, monkeypatch
):
    create = Pool.create

    def unmount_and_create(self):
        if self.name == "usb":
            subprocess.run(["umount", mounted], check=True)
        create(self)

    monkeypatch.setattr(Pool, "create", unmount_and_create)
    with pytest.raises(StoragePoolException, match="pool usb: /mnt is not mounted"):
        system.add_pool("usb", dir_path="/mnt/qubes", require_mount="/mnt")
    assert os.listdir(mounted) == []
    assert "usb" not in system.list_pools()


def test_a_pool_whose_disk_has_to_be_mounted_is_not_purged_without(system, root, mounted):
    system.add_pool("usb", dir_path="/mnt/qubes", require_mount="/mnt")
    subprocess.run(["umount", mounted], check=True)
    with refused(root, "pool usb: /mnt is not mounted.*mount its disk"):
        system.remove_pool("usb", purge=True)
    assert set(system.remove_pool("usb")) == {"removed", "require_mount"}


def test_a_directory_below_a_mount_point_is_no_mount_point(system, root, mounted):
    (mounted / "sub").mkdir()
    with refused(root, "/mnt/sub is not mounted"):
        system.add_pool("usb", dir_path="/mnt/sub/qubes", require_mount="/mnt/sub")


def test_a_mount_point_with_a_space_is_one(system, root):
    if os.geteuid():
        pytest.skip("only root can mount")
    path = root / "mnt/my disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount here")
    try:
        system.add_pool("usb", dir_path="/mnt/my disk/qubes", require_mount="/mnt/my disk")
        assert system.pool_info("usb")["problems"] == []
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_min_free_stops_what_would_leave_less_and_nothing_is_made(ssd, root):
    ssd.set_pool("default")
    ssd.set_pool("ssd", min_free="8000000TiB")
    with refused(root, "pool ssd: .* are free.*min_free keeps .*free some space"):
        ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    ssd.set_pool("ssd", min_free="1")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")


def test_guards_lie_beside_storage_conf_and_go_with_their_pool(ssd, root):
    ssd.set_pool("ssd", min_free="1GiB")
    assert b"min_free" not in (root / CONF).read_bytes()
    assert qubes_storage.loads((root / GUARDS).read_bytes()) == {"ssd": {"min_free": "1GiB"}}
    changes = ssd.remove_pool("ssd")
    assert changes["min_free"] == {"old": "1GiB", "new": None}
    assert qubes_storage.loads((root / GUARDS).read_bytes()) == {}
    ssd.add_pool("ssd", dir_path="/opt/ssd")
    assert ssd.guards("ssd") == {}


def test_a_new_pool_has_no_guards_that_one_of_its_name_left_behind(system, root):
    (root / GUARDS).write_text("[ssd]\nmin_free = 1TiB\nrequire_mount = /mnt\n")
    system.add_pool("ssd", dir_path="/opt/ssd", min_free="1GiB")
    assert system.guards("ssd") == {"min_free": "1GiB"}


def test_a_guard_that_someone_else_wrote_wrong_is_a_problem_of_its_pool(ssd, root):
    (root / GUARDS).write_text("[ssd]\nmin_free = lots\n")
    assert any("min_free: 'lots'" in p for p in ssd.pool_info("ssd")["problems"])
    assert ssd.pool_info("default")["dir_path"] == "/var/lib/qubes"


@pytest.mark.parametrize(
    ("guard", "wrong", "problem", "right"),
    [
        ("min_free", "20 gigs", "min_free: '20 gigs' is not a size; write", "1MiB"),
        ("require_mount", "opt", "require_mount 'opt' is not an absolute path", None),
    ],
)
def test_a_guard_that_someone_else_wrote_wrong_is_named_and_mended(
    ssd, root, guard, wrong, problem, right
):
    ssd.set_pool("default")
    (root / GUARDS).write_text(f"[ssd]\n{guard} = {wrong}\n")
    problem = f"pool ssd: /{GUARDS}: {problem}"
    with refused(root, problem):
        ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    assert [p.startswith(problem) for p in ssd.pool_info("ssd")["problems"]] == [True]
    changes = {guard: {"old": wrong, "new": right}}
    options = {"options": {guard: right}}
    assert ssd.pool_diff("ssd", **options) == changes
    assert ssd.set_pool("ssd", **options) == changes
    assert ssd.pool_diff("ssd", **options) == {}
    assert ssd.pool_info("ssd")["problems"] == []
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")


def test_nothing_is_made_in_a_pool_whose_vms_are_all_missing(ssd, root):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    (root / "opt/ssd").rename(root / "opt/away")
    assert any("mount" in problem for problem in ssd.pool_info("ssd")["problems"])
    with refused(root, "pool ssd: not one of its VMs is in /opt/ssd.*mount it"):
        ssd.set_pool("ssd")
    (root / "opt/ssd").mkdir()
    with refused(root, "pool ssd: not one of its VMs is in /opt/ssd.*mount it"):
        ssd.set_pool("ssd")
    with refused(root, "pool ssd: "):
        ssd.create_vm("other", klass="TemplateVM", pool="ssd")
    (root / "opt/ssd").rmdir()
    (root / "opt/away").rename(root / "opt/ssd")
    assert ssd.set_pool("ssd") == {}


# --- looking


BROKEN = b"""\
[relative]
driver = xen
dir_path = opt/relative
[nul]
driver = xen
dir_path = /opt/a\0b
[options]
driver = xen
dir_path = /opt/options
size = 1
[driver]
driver = zfs
dir_path = /opt/driver
[class]
class = no.such.Thing
[neither]
dir_path = /opt/neither
[foreign]
class = collections.OrderedDict
[lacking]
driver = xen
[latin]
driver = xen
dir_path = /opt/caf\xe9
[same]
driver = xen
dir_path = /opt/ssd
[inside]
driver = xen
dir_path = /opt/ssd/appvms/x
[parentless]
driver = xen
dir_path = /no/parent
[file]
driver = xen
dir_path = /etc/qubes/storage.conf
"""


def test_a_problem_in_one_pool_hides_none_of_the_others(ssd, root):
    (root / CONF).write_bytes((root / CONF).read_bytes() + BROKEN)
    before = tree(root)
    names = re.findall(r"^\[(\w+)\]", BROKEN.decode("latin-1"), re.M)
    assert set(ssd.list_pools()) == {"default", "ssd", *names}
    for name in names:
        info = ssd.pool_info(name)
        assert info["problems"], name
        assert not qubes_storage.pool_exists(name, root=root) or name not in ("driver", "class")
    assert ssd.pool_info("default")["size"] > 0
    assert ssd.pool_diff("ssd", dir_path="/opt/ssd") == {}  # the later of two is the wrong one
    with pytest.raises(StoragePoolException, match="is the directory of pool ssd too"):
        ssd.pool_diff("same")
    assert tree(root) == before
    ssd.add_pool("fine", dir_path="/opt/fine")
    assert ssd.pool_info("fine")["problems"] == []
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="fine")
    assert set(ssd.list_vms()) == {"dom0", "base"}
    for name in names:
        ssd.remove_pool(name)
    assert set(ssd.list_pools()) == {"default", "ssd", "fine"}


def test_what_r32_cannot_load_is_a_problem_that_is_named(system):
    system.set_pool("default", dir_path="/opt/all")
    problems = " ".join(system.pool_info("default")["problems"])
    assert "R3.2's own tools fail on [default] with options (dir_path)" in problems
    assert system.pool_notes("default", dir_path="/opt/all") != []
    assert system.pool_notes("ssd", dir_path="/opt/ssd") == []


def test_info_says_what_is_in_force(ssd):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    info = ssd.pool_info("ssd")
    at = os.statvfs(ssd.get_pool("ssd").root + "/opt/ssd")
    assert info["driver"] == "xen"
    assert info["dir_path"] == "/opt/ssd"
    assert info["vms"] == ["base"]
    assert info["size"] == at.f_blocks * at.f_frsize
    assert info["provisioned"] == sum(
        image["size"] for image in ssd.vm_info("base")["volumes"].values()
    )
    assert info["problems"] == []
    assert ssd.pool_info("nope") is None


def test_a_class_of_r32s_own_name_is_the_driver_xen(system):
    for number, name in enumerate(("XenStorage", "XenPool")):
        options = {"class": f"qubes.storage.xen.{name}", "dir_path": f"/opt/{number}"}
        system.add_pool(name, **options)
        assert system.list_pools()[name] == options
        assert system.pool_info(name)["class"] == f"qubes.storage.xen.{name}"
        assert type(system.get_pool(name)) is type(system.get_pool("default"))


def test_looking_writes_nothing(ssd, root):
    ssd.set_pool("ssd", min_free="1GiB")
    (root / "var/lib/qubes/qubes.xml").unlink()
    (root / "opt/ssd/appvms").rmdir()
    before = tree(root)
    ssd.list_pools()
    ssd.list_drivers()
    for name in ("default", "ssd", "nope"):
        ssd.pool_info(name)
    ssd.pool_diff("ssd", dir_path="/opt/ssd")
    ssd.pool_diff("new", dir_path="/opt/new", min_free="1GiB")
    ssd.pool_notes("new", dir_path="/opt/new")
    ssd.pool_remove_diff("ssd", purge=True)
    ssd.get_pool("ssd").missing()
    qubes_storage.get_pool("default", root=root)
    qubes_storage.pool_exists("ssd", root=root)
    ssd.list_vms()
    assert tree(root) == before


def test_diff_says_what_add_and_set_then_do(system):
    new = {"dir_path": "/opt/ssd", "min_free": "1GiB"}
    wanted = system.pool_diff("ssd", **new)
    assert system.add_pool("ssd", **new) == wanted
    assert system.pool_diff("ssd", **new) == {}
    more = {"dir_path": "/opt/fast", "min_free": "2GiB"}
    wanted = system.pool_diff("ssd", **more)
    assert system.set_pool("ssd", **more) == wanted
    assert system.pool_diff("ssd", **more) == {}


# --- remove


def test_remove_takes_the_section_and_leaves_the_directories(ssd, root):
    (root / "opt/ssd/appvms/data").touch()
    assert ssd.remove_pool("ssd") == {"removed": {"old": "ssd", "new": None}}
    assert (root / CONF).read_bytes() == SHIPPED
    assert os.listdir(root / "etc/qubes") == ["storage.conf"], "no guards, no file of guards"
    assert (root / "opt/ssd/appvms/data").exists()
    assert ssd.remove_pool("ssd") == {}


def test_purge_removes_directories_that_are_empty_alone(ssd, root):
    (root / "opt/ssd/appvms/data").touch()
    changes = ssd.remove_pool("ssd", purge=True)
    assert changes["directories"]["new"] == []
    assert sorted(changes["directories"]["old"]) == ["/opt/ssd/servicevms", "/opt/ssd/vm-templates"]
    assert os.listdir(root / "opt/ssd") == ["appvms"]
    ssd.add_pool("two", dir_path="/opt/two")
    ssd.remove_pool("two", purge=True)
    assert not (root / "opt/two").exists()


@pytest.mark.parametrize("end", ["/", "/.", "/./", "//.//"])
def test_purge_removes_a_directory_however_it_is_written(system, root, end):
    (root / "opt/ssd").mkdir()
    system.add_pool("ssd", dir_path=f"/opt/ssd{end}")
    changes = system.pool_remove_diff("ssd", purge=True)
    assert changes["directories"]["old"] == [*(f"/opt/ssd/{s}" for s in SUBDIRS), "/opt/ssd"]
    assert system.remove_pool("ssd", purge=True) == changes
    assert not (root / "opt/ssd").exists()


def test_a_pool_in_use_and_the_default_pool_are_not_removed(ssd, root):
    ssd.set_pool("default")
    ssd.create_vm("base", klass="TemplateVM", pool="ssd")
    with refused(root, r"pool ssd: VMs lie in it \(base\); migrate or remove"):
        ssd.remove_pool("ssd")
    with refused(root, "pool default: stays in"):
        ssd.remove_pool("default", purge=True)


def test_a_pool_that_is_not_there_is_removed_without_a_word(system, root):
    before = tree(root)
    assert system.remove_pool("nope") == {}
    assert qubes_storage.remove_pool("nope", root=root) == {}
    assert tree(root) == before


def test_paths_in_errors_are_the_machines_own(system, root):
    with pytest.raises(StoragePoolException) as caught:
        system.add_pool("foo", dir_path="/no/parent")
    assert str(pathlib.Path(root)) not in str(caught.value)


def test_the_machine_s_own_directory_is_made_where_a_root_is_empty(tmp_path):
    system = qubes_storage.connect(tmp_path)
    assert set(system.pool_diff("default")) == {"created", "driver"}
    assert list(tmp_path.iterdir()) == []
    system.add_pool("default")
    assert (tmp_path / "var/lib/qubes/appvms").is_dir()
    assert system.pool_diff("default") == {}


def test_a_pool_that_lies_where_another_is_made_beforehand_keeps_its_images(system, root):
    system.add_pool("a", dir_path="/mnt/.b.new")
    before = sorted(os.listdir(root / "mnt/.b.new"))
    with pytest.raises(StoragePoolException, match=r"pool b: /mnt/\.b\.new is in the way"):
        system.pool_diff("b", dir_path="/mnt/b")
    with pytest.raises(StoragePoolException, match=r"pool b: /mnt/\.b\.new is in the way"):
        system.add_pool("b", dir_path="/mnt/b")
    assert sorted(os.listdir(root / "mnt/.b.new")) == before


def test_guards_that_a_dead_removal_left_are_removed(ssd, root):
    ssd.set_pool("ssd", min_free="1MiB")
    conf = root / "etc/qubes/storage.conf"
    conf.write_text("[default]\ndriver=xen\n")
    left = {"min_free": {"old": "1MiB", "new": None}}
    assert ssd.pool_remove_diff("ssd") == left
    assert ssd.remove_pool("ssd") == left
    assert ssd.remove_pool("ssd") == {}
    assert conf.read_text() == "[default]\ndriver=xen\n"
