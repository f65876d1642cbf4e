"""Runs of several states: what test mode tells of each is what the run does, and once is enough."""

import os
import re
import subprocess

import pytest
from salt.exceptions import SaltInvocationError

from tests.functional.conftest import check_foretold, snapshot

REGISTRY = "var/lib/qubes/qubes.xml"


@pytest.fixture
def there(states):
    """Pools, a template with a VM that runs on it, and another template."""
    states.qubes_pool.present("default")
    states.qubes_pool.present("a", dir_path="/opt/a")
    states.qubes_pool.present("b", dir_path="/opt/b")
    states.qubes_vm.present("t", klass="TemplateVM")
    states.qubes_vm.present("t2", klass="TemplateVM")
    states.qubes_vm.present("work", pool="a", template="t")


@pytest.fixture
def refused_before(run, root):
    """``refused_before(*states)``: why the last one is refused, in test mode as in the run."""

    def call(*declared):
        before = snapshot(root)
        told, done = run(*declared, test=True), run(*declared)
        assert snapshot(root) != before
        name = declared[-1][1]
        assert (told[name]["result"], told[name]["changes"]) == (False, {}), told[name]
        assert (done[name]["result"], done[name]["changes"]) == (False, {}), done[name]
        return told[name]["comment"]

    return call


@pytest.fixture
def foretold(run, root):
    """``foretold(*states)``: call them in all ways; what test mode said, ``{name: comment}``."""

    def call(*declared):
        before = snapshot(root)
        told = run(*declared, test=True)
        assert snapshot(root) == before
        return check_foretold(run, declared, told)

    return call


PURGE = {"purge": True}


def qid(text, name):
    """The number of a VM in the text of qubes.xml."""
    return re.search(rf'name="{name}".*? qid="(\d+)"', text)[1]


def take_numbers(root, first):
    """Have all from a number on be taken."""
    others = "".join(f'<Other qid="{number}"/>' for number in range(first, 254))
    path, end = root / REGISTRY, "</QubesVmCollection>"
    path.write_text(path.read_text().replace(end, others + end))


@pytest.mark.parametrize(
    ("vm", "absent", "comment"),
    [
        (
            ("qubes_vm.present", "work", {"pool": "b", "migrate": True}),
            ("qubes_pool.absent", "a", PURGE),
            "Pool a waits for work to leave it",
        ),
        (
            ("qubes_vm.present", "work", {"template": "t2"}),
            ("qubes_vm.absent", "t", PURGE),
            "VM t waits for work to leave it",
        ),
        (
            ("qubes_vm.absent", "work", PURGE),
            ("qubes_vm.absent", "t", PURGE),
            "VM t waits for work to leave it",
        ),
        (
            ("qubes_vm.absent", "work", PURGE),
            ("qubes_pool.absent", "a", PURGE),
            "Pool a waits for work to leave it",
        ),
    ],
)
def test_what_goes_waits_for_the_vms_that_the_run_has_leave_it(
    foretold, there, vm, absent, comment
):
    assert foretold(vm, absent)[absent[1]] == comment


def test_a_netvm_waits_for_the_vms_that_are_connected_to_it(foretold, states, there, root):
    states.qubes_vm.present("net", klass="NetVM", template="t2")
    path, off = root / REGISTRY, 'uses_default_netvm="False"'
    text = path.read_text().replace('uses_default_netvm="True"', off)
    mine = f'name="work" netvm_qid="{qid(text, "net")}"'
    path.write_text(text.replace('name="work" netvm_qid="none"', mine))
    told = foretold(("qubes_vm.absent", "work", PURGE), ("qubes_vm.absent", "net", PURGE))
    assert told["net"] == "VM net waits for work to leave it"


@pytest.mark.parametrize(
    ("declared", "absent"),
    [
        ({"pool": "a", "label": "blue"}, ("qubes_pool.absent", "a", {})),
        ({"template": "t", "label": "blue"}, ("qubes_vm.absent", "t", PURGE)),
        ({"label": "blue"}, ("qubes_vm.absent", "t", PURGE)),
    ],
)
def test_what_goes_is_refused_for_the_vms_that_stay(foretold, there, declared, absent):
    assert "work" in foretold(("qubes_vm.present", "work", declared), absent)[absent[1]]


def test_what_goes_is_refused_for_the_vms_that_the_run_has_use_it(foretold, states, there):
    states.qubes_pool.present("c", dir_path="/opt/c")
    told = foretold(
        ("qubes_pool.present", "d", {"dir_path": "/opt/d"}),
        ("qubes_vm.present", "work", {"pool": "b", "migrate": True, "template": "t2"}),
        ("qubes_vm.present", "new", {"pool": "b"}),
        ("qubes_vm.present", "later", {"pool": "d", "template": "t2"}),
        ("qubes_vm.present", "copy", {"klass": "StandaloneVM", "template": "t2", "pool": "c"}),
        ("qubes_pool.absent", "a", {}),
        ("qubes_pool.absent", "b", {}),
        ("qubes_pool.absent", "c", {}),
        ("qubes_vm.absent", "t", PURGE),
        ("qubes_vm.absent", "t2", PURGE),
    )
    assert told["a"] == "Pool a waits for work to leave it"
    assert "VMs lie in it (new, work)" in told["b"]
    assert "VMs lie in it (copy)" in told["c"]
    assert "is the template of new;" in told["t"]  # the system's default one
    assert "is the template of later, work;" in told["t2"]


@pytest.mark.parametrize(("klass", "stays"), [("AppVM", True), ("NetVM", False)])
def test_the_default_netvm_is_used_by_the_new_vms_of_the_run(
    foretold, states, there, root, klass, stays
):
    states.qubes_vm.present("fw", klass="ProxyVM")
    path = root / REGISTRY
    path.write_text(path.read_text().replace('default_netvm="True"', 'default_netvm="False"'))
    new = ("qubes_vm.present", "new", {"klass": klass})
    told = foretold(new, ("qubes_vm.absent", "fw", PURGE))
    assert ("is the NetVM of new" in told["fw"]) is stays


@pytest.mark.parametrize(
    "verb", [("qubes_vm.absent", "copy", {}), ("qubes_vm.present", "copy", {})]
)
def test_a_pool_waits_for_the_vm_of_which_a_dead_run_left_something_in_it(
    foretold, there, root, verb
):
    (root / "opt/b/appvms/.copy.creating").mkdir(mode=0o700)
    told = foretold(verb, ("qubes_pool.absent", "b", PURGE))
    assert told["b"] == "Pool b waits for VM copy"


def test_a_pool_stays_while_a_dead_run_has_left_something_in_it(refused_before, there, root):
    (root / "opt/b/appvms/.copy.creating").mkdir(mode=0o700)
    why = refused_before(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}), ("qubes_pool.absent", "b", {})
    )
    assert "/opt/b/appvms/.copy.creating is left by a run that died; qubes_vm.remove copy" in why


def test_a_pool_changes_its_place_once_its_vms_have_left_it(foretold, there):
    told = foretold(
        ("qubes_vm.absent", "work", PURGE), ("qubes_pool.present", "a", {"dir_path": "/opt/new"})
    )
    assert told["a"] == "Pool a waits for work to leave it"


def test_a_pool_that_has_gone_takes_no_vm(run, there):
    declared = ("qubes_pool.absent", "b", {}), ("qubes_vm.present", "new", {"pool": "b"})
    told, done = run(*declared, test=True)["new"], run(*declared)["new"]
    assert (told["result"], told["comment"]) == (done["result"], done["comment"])
    assert "pool b: unknown" in told["comment"]


def test_a_pool_goes_if_its_vm_is_made_anew_in_another(run, there):
    declared = (
        ("qubes_vm.absent", "work", PURGE),
        ("qubes_vm.present", "work", {"template": "t"}),
        ("qubes_pool.absent", "a", {}),
    )
    assert run(*declared, test=True)["a"]["comment"] == "Pool a waits for work to leave it"
    assert run(*declared)["a"]["comment"] == "Pool a was removed"


def test_what_goes_is_refused_for_vms_that_go_later_or_not_at_all(run, there):
    pool, later = ("qubes_pool.absent", "a", {}), ("qubes_vm.absent", "work", PURGE)
    kept = ("qubes_vm.absent", "work", {})
    for states in ((kept, pool), (pool, later)):
        told = run(*states, test=True)
        assert told["a"]["result"] is False
        assert told["a"]["comment"] == run(*states)["a"]["comment"]


def test_a_template_that_is_to_go_without_purge_has_images_whoever_leaves_it(foretold, there):
    told = foretold(("qubes_vm.present", "work", {"template": "t2"}), ("qubes_vm.absent", "t", {}))
    assert "has images" in told["t"]


@pytest.mark.parametrize("is_link", [False, True])
def test_a_vm_does_not_wait_for_a_directory_where_something_else_is(
    foretold, modules, root, there, is_link
):
    for name in ("appvms", "vm-templates"):
        (root / "opt/c" / name).mkdir(parents=True)
    wrong = root / "opt/c/servicevms"
    wrong.symlink_to("/nowhere") if is_link else wrong.touch()
    pool = ("qubes_pool.present", "c", {"dir_path": "/opt/c"})
    vm = ("qubes_vm.present", "net", {"klass": "NetVM", "pool": "c"})
    for _ in ("the pool is made", "the pool is there"):
        assert "move what is there away, and make it" in foretold(pool, vm)["net"]
    assert modules.qubes_pool.info("c")["problems"] == [
        "/opt/c/servicevms is no directory: move it away"
    ]


def test_a_vm_waits_for_the_directories_that_its_pool_lacks(foretold, root, there):
    (root / "opt/b/appvms").rmdir()
    told = foretold(("qubes_pool.present", "b", {}), ("qubes_vm.present", "new", {"pool": "b"}))
    assert told["new"] == "VM new waits for pool b"


def test_a_pool_whose_directories_are_there_already_is_planned_with(foretold, root, there):
    for name in ("appvms/taken", "servicevms", "vm-templates"):
        (root / "opt/c" / name).mkdir(parents=True)
    told = foretold(
        ("qubes_pool.present", "c", {"options": [{"dir_path": "/opt/c"}]}),
        ("qubes_vm.present", "taken", {"pool": "c"}),
        ("qubes_vm.present", "free", {"pool": "c"}),
    )
    assert "/opt/c/appvms/taken is there" in told["taken"]
    assert told["free"] == "VM free would be created"


def test_guards_that_the_run_sets_are_kept(foretold, states, there):
    states.qubes_pool.present("b", min_free="900TiB")
    told = foretold(
        ("qubes_pool.present", "a", {"min_free": "900TiB"}),
        ("qubes_pool.present", "b", {"options": {"min_free": None}}),
        ("qubes_vm.present", "full", {"pool": "a"}),
        ("qubes_vm.present", "free", {"pool": "b"}),
    )
    assert "min_free keeps 900.0 TiB" in told["full"]
    assert told["free"] == "VM free would be created"


def test_what_a_new_pool_keeps_free_is_kept(foretold, states, there):
    states.qubes_vm.present("here", pool="b", template="t")
    told = foretold(
        ("qubes_pool.present", "new", {"dir_path": "/opt/new", "min_free": "900TiB"}),
        ("qubes_pool.present", "room", {"dir_path": "/opt/room", "min_free": "1MiB"}),
        ("qubes_vm.present", "full", {"pool": "new", "template": "t"}),
        ("qubes_vm.present", "work", {"pool": "new", "migrate": True}),
        ("qubes_vm.present", "free", {"pool": "room", "template": "t"}),
        ("qubes_vm.present", "here", {"pool": "room", "migrate": True}),
    )
    assert [vm for vm in told if "in /opt/new and min_free keeps 900.0 TiB" in told[vm]] == [
        "full", "work"
    ]  # fmt: skip
    assert (told["free"], told["here"]) == tuple(
        f"VM {vm} waits for pool room" for vm in ("free", "here")
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a filesystem")
def test_vms_wait_for_the_disk_that_the_run_mounts(foretold, root, tmp_path, there):
    place, disk = root / "mnt/ssd", tmp_path / "disk"
    for path in (place, disk):
        path.mkdir()
    mount = {"device": str(disk), "fstype": "none", "opts": "bind", "persist": False}
    declared = (
        ("mount.mounted", str(place), mount),
        ("qubes_pool.present", "c", {"dir_path": "/mnt/ssd/c", "require_mount": "/mnt/ssd"}),
        ("qubes_vm.present", "alone", {"klass": "StandaloneVM", "pool": "c", "label": "blue"}),
    )
    away = (declared[0], ("qubes_vm.absent", "alone", PURGE))
    try:
        for states in (declared, declared, away):
            told = foretold(*states)
            subprocess.run(["umount", place], check=True)
            assert told["alone"] in ("VM alone waits for pool c", "VM alone waits for /mnt/ssd")
        assert told["alone"] == "VM alone waits for /mnt/ssd"
        (disk / "sub").mkdir()
        told = foretold(declared[0], ("qubes_pool.present", "d", {"dir_path": "/mnt/ssd/sub/d"}))
        assert told["d"] == "Pool d waits for /mnt/ssd/sub"
    finally:
        subprocess.run(["umount", place], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a filesystem")
def test_what_needs_an_image_on_the_disk_that_the_run_mounts_waits_for_it(
    foretold, root, tmp_path, there
):
    place, disk = root / "mnt/usb", tmp_path / "disk"
    for path in (place, disk):
        path.mkdir(parents=True)
    mount = {"device": str(disk), "fstype": "none", "opts": "bind", "persist": False}
    mounted = ("mount.mounted", str(place), mount)
    pool = ("qubes_pool.present", "c", {"dir_path": "/mnt/usb/c"})
    template = ("qubes_vm.present", "t3", {"klass": "TemplateVM", "pool": "c"})
    others = (
        ("qubes_vm.present", "clone", {"clone_from": "t3", "pool": "a"}),
        ("qubes_vm.present", "alone", {"klass": "StandaloneVM", "template": "t3", "pool": "a"}),
        ("qubes_vm.present", "runs", {"template": "t3", "pool": "a"}),
    )
    try:
        foretold(mounted, pool, template)
        subprocess.run(["umount", place], check=True)
        told = foretold(mounted, pool, template, *others)
        waits = {name: told[name].partition(" waits for ")[2] for name in told}
        assert waits["c"] == waits["t3"] == waits["clone"] == "/mnt/usb/c"
        assert waits["alone"] == "/mnt/usb/c/vm-templates/t3/root.img"
        subprocess.run(["umount", place], check=True)
        assert "its disk is not mounted" in foretold(pool)["c"]
    finally:
        subprocess.run(["umount", place], check=False, capture_output=True)


def test_vms_of_a_pool_whose_dir_path_is_put_right_are_told_as_they_will_be(foretold, root, there):
    conf = root / "etc/qubes/storage.conf"
    conf.write_text(conf.read_text().replace("/opt/a", "/opt/elsewhere"))
    told = foretold(
        ("qubes_pool.present", "a", {"dir_path": "/opt/a"}),
        ("qubes_vm.present", "work", {"label": "blue"}),
        ("qubes_vm.present", "new", {"pool": "a"}),
    )
    assert told["work"] == "VM work would be set"
    assert told["new"] == "VM new would be created"


def test_who_makes_a_mount_point_mounts_nothing(foretold, root):
    told = foretold(
        ("file.directory", str(root / "mnt/usb"), {}),
        ("qubes_pool.present", "u", {"dir_path": "/mnt/usb/q", "require_mount": "/mnt/usb"}),
    )
    assert "pool u: /mnt/usb is not mounted" in told["u"]


@pytest.mark.parametrize(
    ("state", "made"),
    [
        (("file.directory", "mnt/x/pool", {"makedirs": True}), True),
        (("file.managed", "mnt/x/y/README", {"makedirs": True, "contents": "hi"}), True),
        (("file.directory", "mnt/x/pool", {}), False),
        (("file.directory", "mnt/xy/pool", {"makedirs": True}), False),
    ],
)
def test_a_pool_waits_for_a_directory_that_is_made_on_the_way(foretold, root, state, made):
    function, path, arguments = state
    told = foretold(
        (function, str(root / path), arguments),
        ("qubes_pool.present", "c", {"dir_path": "/mnt/x/pool"}),
    )
    assert (told["c"] == "Pool c waits for /mnt/x") is made


def test_a_pool_does_not_wait_for_a_directory_that_goes_again(foretold, root):
    place = str(root / "mnt/x")
    told = foretold(
        ("file.directory", place, {"makedirs": True}),
        ("file.absent", place, {}),
        ("qubes_pool.present", "c", {"dir_path": "/mnt/x/pool"}),
    )
    assert "/mnt/x: No such file" in told["c"]


def test_a_pool_does_not_wait_for_what_is_only_written_to_fstab(foretold, root):
    place = str(root / "mnt/x")
    mount = {"device": "tmpfs", "fstype": "tmpfs", "mkmnt": True, "mount": False, "persist": False}
    told = foretold(
        ("mount.mounted", place, mount),
        ("qubes_pool.present", "c", {"dir_path": "/mnt/x/c", "require_mount": "/mnt/x"}),
    )
    assert "/mnt/x is not mounted" in told["c"]


@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from"])
def test_a_vm_waits_for_the_image_that_the_run_brings(run, modules, tmp_path, there, word):
    disk = str(tmp_path / "disk.raw")
    image = ("file.managed", disk, {"contents": "BOOT"})
    vm = ("qubes_vm.present", "new", {"klass": "HVM", word: disk})
    alone = run(vm, test=True)["new"]
    assert (alone["result"], alone["comment"]) == (False, run(vm)["new"]["comment"])
    other = ("file.managed", f"{disk}.md5", {"contents": "none"})
    told = run(other, image, vm, test=True)["new"]
    assert (told["result"], told["comment"]) == (None, f"VM new waits for {disk}")
    done = run(image, vm)["new"]
    assert (done["result"], word in done["changes"]) == (True, True)
    assert run(vm)["new"]["changes"] == {}


def test_a_pool_waits_for_the_directory_of_a_pool(foretold, there):
    told = foretold(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        ("qubes_pool.present", "d", {"dir_path": "/opt/c/d"}),
        ("qubes_pool.present", "e", {"options": {"dir_path": "/opt/c/d/e"}}),
    )
    assert told["d"] == "Pool d waits for /opt/c"
    assert told["e"] == "Pool e waits for /opt/c/d"


def test_of_two_pools_over_one_directory_the_second_is_refused(foretold, there):
    told = foretold(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        ("qubes_pool.present", "d", {"options": {"dir_path": "/opt/c/"}}),
        ("qubes_pool.present", "e", {"dir_path": "/opt/c/e"}),
        ("qubes_pool.present", "f", {"options": {"dir_path": "/opt/c/e"}}),
    )
    assert "is the directory of pool c too" in told["d"]
    assert "is the directory of pool e too" in told["f"]


def test_a_pool_takes_the_directory_that_another_leaves(foretold, there):
    told = foretold(
        ("qubes_pool.present", "b", {"dir_path": "/opt/new"}),
        ("qubes_pool.present", "c", {"dir_path": "/opt/b"}),
    )
    assert told["c"] == "Pool c would be added"


def test_a_pool_takes_the_directory_of_one_that_goes(run, there):
    declared = (
        ("qubes_pool.absent", "b", {}),
        ("qubes_pool.present", "c", {"dir_path": "/opt/b"}),
        ("qubes_pool.present", "b", {"dir_path": "/opt/new"}),
    )
    told, done = run(*declared, test=True), run(*declared)
    assert told["c"]["changes"] == done["c"]["changes"] != {}
    assert told["b"]["comment"] == "Pool b waits for an earlier state of pool b"
    assert (done["b"]["result"], set(done["b"]["changes"])) == (
        True,
        {"created", "driver", "dir_path"},
    )


def test_a_clone_waits_for_the_vm_that_the_run_changes(foretold, modules, there):
    told = foretold(
        ("qubes_vm.present", "work", {"label": "blue"}),
        ("qubes_vm.present", "copy", {"clone_from": "work"}),
        ("qubes_vm.present", "other", {"clone_from": "t"}),
    )
    assert told["copy"] == "VM copy waits for VM work"
    assert told["other"] == "VM other would be created"
    assert modules.qubes_vm.info("copy")["label"] == "blue"


def test_a_clone_of_what_goes_before_is_refused(run, there):
    declared = (
        ("qubes_vm.absent", "work", PURGE),
        ("qubes_vm.present", "copy", {"clone_from": "work"}),
    )
    assert run(*declared, test=True)["copy"]["result"] is False
    assert run(*declared)["copy"]["result"] is False


STANDALONE = {"klass": "StandaloneVM"}
ROOT = "var/lib/qubes/appvms/alone/root.img"
GONE = ("qubes_vm.absent", "t2", PURGE)


@pytest.mark.parametrize("klass", ["AppVM", "StandaloneVM"])
def test_what_is_made_of_a_template_waits_for_its_images_to_grow(foretold, modules, there, klass):
    new = {"klass": klass, "template": "t2", "volumes": {"private": "3GiB"}}
    told = foretold(
        ("qubes_vm.present", "t2", {"label": "blue", "volumes": {"private": "5GiB"}}),
        ("qubes_vm.present", "t", {"label": "blue"}),
        ("qubes_vm.present", "new", new),
        ("qubes_vm.present", "other", {**new, "template": "t"}),
        ("qubes_vm.present", "work", {"template": "t2"}),
    )
    assert told["new"] == "VM new waits for template t2"
    assert told["other"] == "VM other would be created"
    assert told["work"] == "VM work would be set"
    assert modules.qubes_vm.info("new")["volumes"]["private"]["size"] == 5 * 1024**3


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("new", {"template": "t2"}),
        ("new", {"template": "t2", **STANDALONE}),
        ("new", {"template": "t2", "pool": "c"}),
        ("work", {"template": "t2"}),
    ],
)
def test_what_needs_a_template_that_goes_before_is_refused(refused_before, there, name, declared):
    pool = ("qubes_pool.present", "c", {"dir_path": "/opt/c"})
    said = refused_before(GONE, pool, ("qubes_vm.present", name, declared))
    assert f"VM {name}: " in said
    assert "t2 is removed before; " in said


def test_who_needs_the_default_template_that_goes_before_waits_for_another(foretold, states, there):
    states.qubes_vm.present("work", template="t2")
    new, other = ("qubes_vm.present", "new", {}), ("qubes_vm.present", "other", {"label": "blue"})
    told = foretold(
        ("qubes_vm.absent", "t", PURGE), ("qubes_vm.present", "t3", {"klass": "TemplateVM"}), new
    )
    assert told["new"] == "VM new waits for a default template"
    assert foretold(other)["other"] == "VM other would be created"


def test_who_needs_the_default_template_that_goes_before_is_refused(refused_before, states, there):
    states.qubes_vm.present("work", template="t2")
    made = ("qubes_vm.present", "t3", {"klass": "TemplateVM"})
    said = refused_before(made, ("qubes_vm.absent", "t", PURGE), ("qubes_vm.present", "new", {}))
    assert said == "VM new: its template t is removed before; declare another"


def test_a_copy_of_a_vms_image_waits_for_it(foretold, states, modules, root, there):
    states.qubes_vm.present("alone", **STANDALONE)
    states.qubes_vm.present("still", **STANDALONE)
    path = root / ROOT
    size = {"volumes": {"root": "12GiB"}}
    copy = {**STANDALONE, "root_copy_from": str(path), **size}
    still = {**copy, "root_copy_from": str(path).replace("alone", "still")}
    fresh = {**copy, "root_copy_from": str(path).replace("alone", "fresh")}
    moved = {**copy, "root_copy_from": str(root / "opt/b/appvms/mover/root.img")}
    states.qubes_vm.present("mover", **STANDALONE)
    told = foretold(
        ("qubes_vm.present", "alone", {"volumes": {"root": "15GiB"}}),
        ("qubes_vm.present", "still", {"label": "blue"}),
        ("qubes_vm.present", "fresh", STANDALONE),
        ("qubes_vm.present", "mover", {"pool": "b", "migrate": True}),
        ("qubes_vm.present", "copy", copy),
        ("qubes_vm.present", "stills", still),
        ("qubes_vm.present", "freshs", fresh),
        ("qubes_vm.present", "movers", moved),
    )
    assert told["copy"] == "VM copy waits for VM alone"
    assert told["stills"] == "VM stills would be created"
    assert told["freshs"] == f"VM freshs waits for {fresh['root_copy_from']}"
    assert told["movers"] == f"VM movers waits for {moved['root_copy_from']}"
    assert modules.qubes_vm.info("copy")["volumes"]["root"]["size"] == 15 * 1024**3


@pytest.mark.parametrize("word", ["root_copy_from", "root_move_from"])
@pytest.mark.parametrize("pool", ["a", "c"])
@pytest.mark.parametrize(
    ("before", "why"),
    [
        (("qubes_vm.absent", "alone", PURGE), "which is removed before"),
        (
            ("qubes_vm.present", "alone", {"pool": "b", "migrate": True}),
            "which moves to another pool before",
        ),
    ],
)
def test_an_image_of_a_vm_that_leaves_before_is_refused(
    refused_before, states, root, there, before, why, word, pool
):
    states.qubes_vm.present("alone", **STANDALONE)
    copy = {**STANDALONE, word: str(root / ROOT), "pool": pool}
    made = ("qubes_pool.present", "c", {"dir_path": "/opt/c"})
    said = refused_before(before, made, ("qubes_vm.present", "copy", copy))
    if word == "root_copy_from":
        assert said == f"VM copy: {word} {root / ROOT} is a file of VM alone, {why}; name an image"


def test_a_file_that_a_vm_takes_is_not_there_for_another(refused_before, foretold, tmp_path, there):
    disk = tmp_path / "disk.raw"
    disk.write_text("BOOT")
    declared = (
        ("qubes_vm.present", "one", {"klass": "HVM", "root_move_from": str(disk)}),
        ("qubes_vm.present", "two", {"klass": "HVM", "root_copy_from": str(disk)}),
    )
    said = refused_before(*declared)
    assert said == f"VM two: root_copy_from {disk} is taken by VM one before; name an image"
    disk.write_text("BOOT")
    assert foretold(*declared)["two"] == "VM two would be created"


@pytest.mark.parametrize("state", ["copy", "managed"])
def test_a_file_that_comes_again_once_a_vm_took_it_is_waited_for(foretold, tmp_path, there, state):
    disk, other = tmp_path / "disk.raw", tmp_path / "other.raw"
    for path in (disk, other):
        path.write_text("BOOT")
    source = {"copy": {"source": str(other)}, "managed": {"contents": "BOOT"}}[state]
    told = foretold(
        ("qubes_vm.present", "one", {"klass": "HVM", "root_move_from": str(disk)}),
        (f"file.{state}", str(disk), source),
        ("qubes_vm.present", "two", {"klass": "HVM", "root_copy_from": str(disk)}),
        ("qubes_vm.present", "three", {"klass": "HVM", "root_copy_from": str(other)}),
    )
    assert told["two"] == f"VM two waits for {disk}"
    assert told["three"] == "VM three would be created"


def test_a_vm_whose_pool_is_to_be_made_has_no_files(foretold, states, root, tmp_path, there):
    states.qubes_vm.present("lost", pool="b", template="t")
    conf = root / "etc/qubes/storage.conf"
    conf.write_text(re.sub(r"\[b\]\n([^[].*\n|\n)*", "", conf.read_text()))
    (root / "opt/b/servicevms").rmdir()
    disk = tmp_path / "disk.raw"
    disk.write_text("BOOT")
    told = foretold(
        ("qubes_pool.present", "b", {"dir_path": "/opt/b"}),
        ("qubes_vm.present", "lost", {"label": "blue"}),
        ("qubes_vm.present", "copy", {"klass": "HVM", "root_copy_from": str(disk)}),
    )
    assert told["lost"] == "VM lost waits for pool b"
    assert told["copy"] == "VM copy would be created"


def test_a_root_that_a_vm_of_the_run_will_not_have_is_not_waited_for(refused_before, root, there):
    path = str(root / "opt/a/appvms/fresh/root.img")
    said = refused_before(
        ("qubes_vm.present", "fresh", {"pool": "a", "template": "t"}),
        ("qubes_vm.present", "copy", {"klass": "HVM", "root_copy_from": path}),
    )
    assert said == f"VM copy: root_copy_from {path}: No such file or directory; name an image"


def test_a_file_that_is_not_there_is_not_waited_for_with_a_pool(refused_before, tmp_path, there):
    disk = str(tmp_path / "disk.raw")
    said = refused_before(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        ("qubes_vm.present", "new", {"klass": "HVM", "root_copy_from": disk, "pool": "c"}),
    )
    assert said == f"VM new: root_copy_from {disk}: No such file or directory; name an image"


def test_a_pool_waits_for_the_directory_that_goes_with_another(foretold, refused_before, there):
    told = foretold(
        ("qubes_pool.absent", "b", PURGE),
        ("qubes_pool.present", "c", {"dir_path": "/opt/b"}),
    )
    assert told["c"] == "Pool c would be added"
    told = foretold(
        ("qubes_pool.present", "d", {"dir_path": "/opt/d"}),
    )
    told = foretold(
        ("qubes_pool.absent", "c", PURGE),
        ("qubes_pool.present", "d", {"dir_path": "/opt/b"}),
        ("qubes_vm.present", "new", {"pool": "d"}),
    )
    assert told["d"] == "Pool d waits for pool c to leave /opt/b"
    assert told["new"] == "VM new would be created"
    said = refused_before(
        ("qubes_vm.absent", "new", PURGE),
        ("qubes_pool.absent", "d", PURGE),
        ("qubes_pool.present", "e", {"dir_path": "/opt/b/e"}),
    )
    assert "parent is never made in silence" in said


def test_what_a_vm_waits_for_is_called_what_it_is(foretold, there):
    told = foretold(
        ("qubes_vm.present", "t3", {"klass": "TemplateVM"}),
        ("qubes_vm.present", "copy", {"clone_from": "t3"}),
        ("qubes_vm.present", "app", {"template": "t3"}),
    )
    assert told["copy"] == "VM copy waits for VM t3"
    assert told["app"] == "VM app waits for template t3"


def test_a_vm_waits_for_the_first_template_of_the_run(run, root):
    declared = (
        ("qubes_pool.present", "default", {}),
        ("qubes_vm.present", "hvm", {"klass": "HVM"}),
        ("qubes_vm.present", "app", {}),
        ("qubes_vm.present", "t", {"klass": "TemplateVM"}),
        ("qubes_vm.present", "net", {"klass": "NetVM"}),
    )
    told, done = run(*declared, test=True), run(*declared)
    assert told["app"]["result"] is done["app"]["result"] is False
    assert told["net"]["comment"] == "VM net waits for pool default and a default template"
    assert done["net"]["result"] is True


@pytest.mark.parametrize("pool", ["b", "c"])
def test_more_new_vms_than_there_are_numbers_for_are_refused(foretold, root, there, pool):
    take_numbers(root, 6)
    told = foretold(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        *(("qubes_vm.present", f"vm{n}", {"pool": pool}) for n in range(4)),
        ("qubes_vm.present", "work", {"label": "blue"}),
    )
    refused = {name for name, comment in told.items() if "every qid from 1 to 253" in comment}
    assert refused == {"vm2", "vm3"}
    assert told["work"] == "VM work would be set"


def test_a_vm_that_moves_into_a_pool_of_the_run_takes_no_number(foretold, root, there):
    take_numbers(root, 4)
    told = foretold(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        ("qubes_vm.present", "work", {"pool": "c", "migrate": True}),
    )
    assert told["work"] == "VM work waits for pool c"


def test_a_vm_that_lies_elsewhere_does_not_wait_for_a_pool_of_the_run(foretold, there):
    told = foretold(
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
        ("qubes_vm.present", "work", {"pool": "c"}),
    )
    assert "lies in pool a, not in c" in told["work"]


def test_only_states_before_one_count(run, there):
    declared = (
        ("qubes_vm.present", "new", {"pool": "c"}),
        ("qubes_pool.present", "c", {"dir_path": "/opt/c"}),
    )
    told, done = run(*declared, test=True), run(*declared)
    assert told["new"]["result"] is done["new"]["result"] is False
    assert told["new"]["comment"] == done["new"]["comment"]


@pytest.mark.parametrize("run", [1, (), ("a",), "ab"])
def test_what_no_state_has_handed_over_is_refused(modules, there, run):
    with pytest.raises(SaltInvocationError, match="is none that a state has handed over"):
        modules.qubes_vm.diff("new", run=run)


def test_the_first_run_of_a_machine_has_the_pool_default(foretold):
    told = foretold(
        ("qubes_pool.present", "foo", {"dir_path": "/mnt/foo"}),
        ("qubes_vm.present", "alone", {"klass": "HVM"}),
        ("qubes_pool.present", "default", {"driver": "xen"}),
        ("qubes_vm.present", "other", {"klass": "HVM", "pool": "foo"}),
    )
    assert told["alone"] == "VM alone waits for pool default"
    assert told["default"] == "Pool default waits for an earlier state, which makes it"


def test_of_two_pools_over_one_directory_the_later_one_is_wrong_in_test_mode_too(foretold, root):
    text = "".join(f"[{name}]\ndriver=xen\ndir_path=/mnt/x\n" for name in ("default", "a", "b"))
    (root / "etc/qubes/storage.conf").write_text(text.replace("dir_path=/mnt/x\n", "", 1))
    told = foretold(*(("qubes_pool.present", name, {"min_free": "1MiB"}) for name in "ab"))
    assert told["a"] == "Pool a would be set"
    assert "is the directory of pool a too" in told["b"]


FRESH = [
    ("qubes_pool.present", "default", {}),
    ("qubes_vm.present", "t1", {"klass": "TemplateVM"}),
    ("qubes_vm.present", "s1", {"klass": "StandaloneVM", "template": "t1"}),
    ("qubes_vm.present", "app", {"template": "t1"}),
    ("qubes_vm.present", "copy", {"clone_from": "s1"}),
    ("qubes_vm.present", "app2", {"clone_from": "app"}),
]
LARGE = {"volumes": {"root": "30GiB"}}


@pytest.mark.parametrize(
    ("declared", "comment"),
    [
        ({"template": "s1"}, "s1 is of class StandaloneVM; AppVM runs on TemplateVM"),
        ({"klass": "HVM", "template": "t1"}, "t1 is of class TemplateVM; HVM runs on TemplateHVM"),
        ({"template": "copy"}, "copy is of class StandaloneVM; AppVM runs on TemplateVM"),
        ({"template": "t1", **LARGE}, "its root is that of its template t1; declare its size"),
        ({"clone_from": "app2", **LARGE}, "its root is that of its template t1; declare its size"),
        (
            {"klass": "StandaloneVM", "clone_from": "t1"},
            "a clone of t1 is of class TemplateVM, not StandaloneVM",
        ),
        (
            {"klass": "NetVM", "clone_from": "copy"},
            "a clone of copy is of class StandaloneVM, not NetVM",
        ),
        ({"template": "t1", "clone_from": "s1"}, "clone_from and template both say what it is"),
    ],
)
def test_what_does_not_fit_a_vm_that_the_run_makes_is_refused(refused_before, declared, comment):
    said = refused_before(*FRESH, ("qubes_vm.present", "new", declared))
    assert said.startswith(f"VM new: {comment}")


@pytest.mark.parametrize(
    "declared",
    [
        {"template": "t1", "klass": "StandaloneVM", **LARGE},
        {"clone_from": "copy", **LARGE},
        {"clone_from": "app2", "template": "t1"},
        {"clone_from": "app2", "klass": "AppVM"},
        {"klass": "HVM", **LARGE},
        {},
    ],
)
def test_what_fits_a_vm_that_the_run_makes_waits_for_it(foretold, declared):
    foretold(*FRESH, ("qubes_vm.present", "new", declared))


@pytest.mark.parametrize("name", ["work", "new"])
def test_a_template_of_another_class_is_refused_though_the_pool_is_to_be_made(
    refused_before, there, name
):
    pool = ("qubes_pool.present", "c", {"dir_path": "/opt/c"})
    moved = {"pool": "c", "template": "work", "migrate": True}
    said = refused_before(pool, ("qubes_vm.present", name, moved))
    assert said == f"VM {name}: work is of class AppVM; AppVM runs on TemplateVM"
