"""VMs over the Admin API, on each release."""

import sys
from pathlib import Path

import pytest
from qubes_storage import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.admin import AdminSystem
from qubes_storage.system import System

from tests.r4.machine import RELEASES, forget, machine, writes

GIB = 1024**3


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    with machine(request.param, tmp_path) as found:
        forget(*found)
        yield found


def test_list_and_info_tell_class_pool_template_label_and_volumes(there):
    daemon, system = there
    assert system.list_vms() == {
        "dom0": {"klass": "AdminVM", "pool": None, "template": None, "label": "black"},
        "fedora": {
            "klass": "TemplateVM", "pool": "varlibqubes", "template": None, "label": "black"
        },
        "vault": {"klass": "AppVM", "pool": "varlibqubes", "template": "fedora", "label": "red"},
        "work": {"klass": "AppVM", "pool": "ssd", "template": "fedora", "label": "red"},
    }  # fmt: skip
    info = system.vm_info("work")
    assert info["state"] == "Halted" and info["dir_path"] is None
    assert list(info["volumes"]) == ["root", "private", "volatile"]
    assert info["volumes"]["private"] == {
        "path": "/mnt/ssd/qubes/appvms/work/private-dirty.img",
        "size": 2 * GIB,
        "allocated": 4096 * len("the work of years"),
        "pool": "ssd",
        "revisions_to_keep": "1",
    }
    assert info["volumes"]["root"]["pool"] == "varlibqubes"
    assert system.vm_info("nosuch") is None
    assert not writes(daemon)


def test_one_statement_makes_a_vm_in_a_pool_with_a_large_private_volume(there):
    daemon, system = there
    declared = {
        "template": "fedora",
        "label": "green",
        "pool": "btrfs",
        "volumes": {"private": {"size": "20GiB", "revisions_to_keep": 3}, "volatile": "11GiB"},
    }
    changes = system.vm_diff("new", **declared)
    assert not writes(daemon)
    assert changes == {
        "created": {"old": None, "new": "new"},
        "klass": {"old": None, "new": "AppVM"},
        "template": {"old": None, "new": "fedora"},
        "label": {"old": None, "new": "green"},
        "pool": {"old": None, "new": "btrfs"},
        "volumes": {"old": None, "new": {"private": 20 * GIB, "volatile": 11 * GIB}},
        "revisions_to_keep": {"old": None, "new": {"private": "3"}},
    }
    assert system.create_vm("new", **declared) == changes
    made = daemon.vms["new"]
    assert made.set["label"] == "green"
    assert {n: v.pool.name for n, v in made.volumes.items()} == {
        "root": "varlibqubes", "private": "btrfs", "volatile": "btrfs", "kernel": "linux-kernel"
    }  # fmt: skip
    assert made.volumes["private"].size == 20 * GIB
    assert made.volumes["private"].revisions_to_keep == "3"
    forget(daemon, system)
    assert system.vm_diff("new", **declared) == {}
    assert system.set_vm("new", **declared) == {}
    assert not writes(daemon)
    with pytest.raises(StoragePoolException, match="is there already"):
        system.create_vm("new", **declared)


def test_each_volume_has_its_pool(there):
    daemon, system = there
    volumes = {"private": {"pool": "ssd"}, "volatile": {"pool": "btrfs"}}
    changes = system.create_vm("new", klass="TemplateVM", pool="varlibqubes", volumes=volumes)
    assert changes["volume_pools"]["new"] == {"private": "ssd", "volatile": "btrfs"}
    made = daemon.vms["new"].volumes
    assert [made[v].pool.name for v in ("root", "private", "volatile")] == [
        "varlibqubes", "ssd", "btrfs"
    ]  # fmt: skip
    system.refresh()
    assert system.vm_diff("new", pool="varlibqubes", volumes=volumes) == {}


def test_defaults_are_appvm_red_and_the_systems_template_and_pool(there):
    daemon, system = there
    system.create_vm("new")
    made = daemon.vms["new"]
    assert (made.klass, made.set["label"], made.set["template"]) == ("AppVM", "red", "fedora")
    assert made.volumes["private"].pool.name == "varlibqubes"


def test_a_default_pool_that_is_not_set_guards_nothing(there):
    daemon, system = there
    daemon.globals.set["default_pool_volatile"] = ""
    system.refresh()
    assert "created" in system.vm_diff("new")


def test_a_standalone_without_a_template_is_empty(there):
    daemon, system = there
    system.create_vm("alone", klass="StandaloneVM", pool="ssd", volumes={"root": "20GiB"})
    assert daemon.vms["alone"].volumes["root"].size == 20 * GIB
    assert daemon.vms["alone"].volumes["root"].pool.name == "ssd"


def test_a_disposable_needs_a_disposable_template(there):
    daemon, system = there
    with pytest.raises(InvalidInput, match="no disposable template"):
        system.create_vm("disp", klass="DispVM", template="work")
    daemon.vms["work"].set["template_for_dispvms"] = "True"
    system.create_vm("disp", klass="DispVM", template="work")
    assert daemon.vms["disp"].klass == "DispVM"
    forget(daemon, system)
    assert system.vm_diff("disp", klass="DispVM", template="work") == {}


def test_without_a_default_kernel_the_vm_is_there_although_nothing_was_answered(there):
    daemon, system = there
    del daemon.globals.set["default_kernel"]
    assert system.create_vm("new", volumes={"private": "3GiB"})["created"]["new"] == "new"
    assert daemon.vms["new"].volumes["private"].size == 3 * GIB


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ({"template": "nosuch"}, "its template nosuch is not there"),
        ({"template": "work"}, "work is of class AppVM; AppVM runs on TemplateVM"),
        ({"label": "pink"}, "unknown label 'pink'; it is one of red"),
        ({"label": "1"}, "is no label"),
        ({"pool": "nosuch"}, "no pool nosuch"),
        ({"pool": "linux-kernel"}, "cannot lie in pool linux-kernel"),
        ({"volumes": {"root": {"pool": "ssd"}}}, "snapshot and lies with its template's"),
        ({"volumes": {"root": "20GiB"}}, "declare its size there"),
        ({"volumes": {"modules": "20GiB"}}, "no volume 'modules'"),
        ({"volumes": {"private": "20 elephants"}}, "is not a size"),
        ({"volumes": {"private": {"shape": 3}}}, "has no option 'shape'"),
        ({"volumes": ["private"]}, "no map"),
        ({"volumes": {"private": {"revisions_to_keep": "abc"}}}, "not a whole number"),
        ({"volumes": {"private": {"revisions_to_keep": 2}}}, "can keep"),
        ({"klass": "NoSuchVM"}, "unknown klass"),
        ({"template": 17}, "not a text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(there, declared, why):
    daemon, system = there
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match=why):
            verb("new", **declared)
    assert not writes(daemon)


@pytest.mark.parametrize("klass", ["NetVM", "ProxyVM", "HVM", "TemplateHVM"])
def test_the_classes_of_r32_are_refused_with_the_words_of_r4(there, klass):
    _, system = there
    word = "provides_network" if klass in ("NetVM", "ProxyVM") else "virt_mode hvm"
    for name in ("work", "new"):
        with pytest.raises(NotSupported, match=f"backend admin.*{word}"):
            system.vm_diff(name, klass=klass)
    with pytest.raises(NotSupported, match="qvm-volume import"):
        system.vm_diff("new", root_copy_from="/tmp/root.img")


@pytest.mark.parametrize("name", ["1a", "a b", "a" * 32, "default", "none", "x-dm", "a\n", 17])
def test_a_name_that_is_none_is_not_sent(there, name):
    daemon, system = there
    with pytest.raises(InvalidInput, match="name"):
        system.create_vm(name)
    assert not daemon.log


def test_what_differs_is_mended_and_shown_before(there):
    daemon, system = there
    daemon.add_vm("debian", "TemplateVM")
    system.refresh()
    declared = {"label": "green", "template": "debian", "volumes": {"private": "5GiB"}}
    changes = system.vm_diff("work", **declared)
    assert not writes(daemon)
    assert changes == {
        "label": {"old": "red", "new": "green"},
        "template": {"old": "fedora", "new": "debian"},
        "volumes": {"old": {"private": 2 * GIB}, "new": {"private": 5 * GIB}},
    }
    assert system.set_vm("work", **declared) == changes
    work = daemon.vms["work"]
    assert (work.set["label"], work.set["template"]) == ("green", "debian")
    assert work.volumes["private"].data == "the work of years"
    system.refresh()
    assert system.vm_diff("work", **declared) == {}


def test_a_size_is_at_least_and_never_shrinks(there):
    daemon, system = there
    daemon.vms["work"].volumes["private"].size = 5 * GIB
    system.refresh()
    assert system.vm_diff("work", volumes={"private": "3GiB"}) == {}
    assert system.set_vm("work", volumes={"private": "3GiB"}) == {}
    with pytest.raises(StoragePoolException, match="never shrinks"):
        system.resize_vm("work", "private", "3GiB")
    assert not writes(daemon)
    assert system.resize_vm("work", "private", 5 * GIB) == {}
    changes = {"volumes": {"old": {"private": 5 * GIB}, "new": {"private": 6 * GIB}}}
    assert system.resize_vm("work", "private", "6GiB") == changes
    assert daemon.vms["work"].volumes["private"].size == 6 * GIB


def test_a_volume_that_someone_grew_meanwhile_is_not_cut_off(there):
    daemon, system = there
    private = daemon.vms["work"].volumes["private"]

    def grow(call):
        # After the plan was made and before the volume is resized.
        if call.method == "admin.vm.property.Set":
            private.size = 9 * GIB

    daemon.before = grow
    system.set_vm("work", label="green", volumes={"private": "5GiB"})
    assert private.size == 9 * GIB


def test_a_running_vm_grows_and_keeps_its_template(there):
    daemon, system = there
    daemon.add_vm("debian", "TemplateVM")
    daemon.vms["work"].running = True
    system.refresh()
    with pytest.raises(StoragePoolException, match="while the VM is halted: shut it down"):
        system.vm_diff("work", template="debian")
    daemon.qrexec = False  # the daemon grows the image, cannot tell the VM, and raises
    system.set_vm("work", volumes={"private": "4GiB"})
    assert daemon.vms["work"].volumes["private"].size == 4 * GIB


def test_a_vm_that_starts_in_the_middle_is_said(there):
    daemon, system = there
    daemon.add_vm("debian", "TemplateVM")

    def start(call):
        if call.method == "admin.vm.property.Set":
            daemon.vms["work"].running = True

    daemon.before = start
    with pytest.raises(StoragePoolException, match=r"template is fedora, not debian: qubesd says"):
        system.set_vm("work", template="debian")


def test_a_vm_that_appears_or_vanishes_meanwhile_is_said(there):
    daemon, system = there

    def appear(call):
        if call.method.startswith("admin.vm.Create"):
            daemon.before = None
            daemon.add_vm("new", "StandaloneVM")

    daemon.before = appear
    with pytest.raises(StoragePoolException, match="someone else created it meanwhile"):
        system.create_vm("new")

    def vanish(call):
        if call.method == "admin.vm.property.Set":
            daemon.vms.pop("work", None)

    daemon.before = vanish
    with pytest.raises(StoragePoolException, match="gone with the VM"):
        system.set_vm("work", label="green")
    daemon.before = None
    system.refresh()
    with pytest.raises(StoragePoolException, match="is not there; create it") as err:
        system.set_vm("work", label="green")
    assert err.value.waits_for == [("VM", "work")]


def test_another_pool_is_drift_with_its_cure(there):
    daemon, system = there
    with pytest.raises(
        StoragePoolException, match=r"lies in pool ssd, not in btrfs.*migrate: true"
    ):
        system.vm_diff("work", pool="btrfs")
    with pytest.raises(StoragePoolException, match="no pool nosuch"):
        system.vm_diff("work", pool="nosuch")
    with pytest.raises(StoragePoolException, match="a class never changes"):
        system.vm_diff("work", klass="StandaloneVM")
    assert system.vm_diff("work", pool="btrfs", migrate=True) == {
        "pool": {"old": "ssd", "new": "btrfs"}
    }
    assert not writes(daemon)


def test_create_only_leaves_what_exists_alone(there):
    daemon, system = there
    declared = {"label": "green", "pool": "btrfs", "volumes": {"private": "9GiB"}}
    assert system.vm_diff("work", create_only=True, **declared) == {}
    assert system.set_vm("work", create_only=True, **declared) == {}
    assert not writes(daemon)
    system.create_vm("new", create_only=True, **declared)
    assert daemon.vms["new"].volumes["private"].size == 9 * GIB


@pytest.mark.parametrize("name", ["true", "None", "False", "NONE"])
def test_a_vm_whose_name_r32_would_not_take_is_one_like_others(there, name):
    daemon, system = there
    system.create_vm(name, pool="ssd")
    assert {name, "work"} <= {*system.list_vms()}
    assert system.pool_info("ssd")["vms"] == sorted([name, "work"])
    assert name in system.report()["ssd"]["vms"]
    system.migrate_vm(name, "btrfs")
    system.remove_vm("vault", purge=True)
    system.remove_vm(name, purge=True)
    assert name not in daemon.vms


@pytest.mark.parametrize("name", ["none", "default", "a-dm", "a b", "../x", "1a", "a" * 32])
def test_what_is_no_name_on_r4_is_told_before_the_daemon_is_asked(there, name):
    for call in (there[1].create_vm, there[1].set_vm, there[1].vm_diff):
        with pytest.raises(InvalidInput, match="not a name for a VM"):
            call(name)
    assert not writes(there[0])


def test_remove_says_what_goes_and_who_stands_in_the_way(there):
    daemon, system = there
    with pytest.raises(StoragePoolException, match=r"private in pool ssd.*only with purge: true"):
        system.remove_vm("work")
    with pytest.raises(StoragePoolException, match=r"named by the system's default_template, va"):
        system.remove_vm("fedora", purge=True)
    with pytest.raises(InvalidInput, match="dom0"):
        system.remove_vm("dom0", purge=True)
    changes = system.vm_remove_diff("work", purge=True)
    assert not writes(daemon)
    assert changes["deleted"]["old"] == ["ssd:private"]
    daemon.vms["work"].running = True
    with pytest.raises(StoragePoolException, match="is Running; shut it down"):
        system.remove_vm("work", purge=True)
    daemon.vms["work"].running = False
    assert system.remove_vm("work", purge=True) == changes
    assert "work" not in daemon.vms
    assert system.remove_vm("work", purge=True) == {}


def test_revisions_are_listed_and_gone_back_to(there):
    daemon, system = there
    assert system.revisions("work") == []
    with pytest.raises(StoragePoolException, match="no revisions"):
        system.revert("work")
    private = daemon.vms["work"].volumes["private"]
    private.revisions_to_keep = "3"
    for data in ("second", "third"):
        private.commit(data)
    system.refresh()
    assert system.revisions("work") == ["1", "2"]
    with pytest.raises(InvalidInput, match="no revision '9'; it has 1, 2"):
        system.revert("work", revision="9")
    assert system.revert("work", revision=1) == {"revision": {"old": None, "new": "1"}}
    assert private.data == "the work of years"
    system.revert("work")
    assert private.data == "third"
    daemon.vms["work"].running = True
    with pytest.raises(StoragePoolException, match="shut it down"):
        system.revert("work")
    daemon.vms["vault"].volumes["private"].old = True
    with pytest.raises(NotSupported, match="driver file"):
        system.revert("vault")


def test_verify_names_an_image_that_is_gone_and_a_pool_that_is_not_there(there):
    _, system = there
    assert system.verify_vm("work") == []
    assert system.verify_vm("fedora") == []
    image = Path(system.root) / "mnt/ssd/qubes/appvms/work/private.img"
    image.unlink()
    assert system.verify_vm("work") == [
        "VM work: volume private: /mnt/ssd/qubes/appvms/work/private.img is gone; is its disk"
        " mounted? bring it back"
    ]
    with pytest.raises(StoragePoolException, match="is not there"):
        system.verify_vm("nosuch")


def test_the_report_tells_who_lives_where(there):
    _, system = there
    report = system.report()
    assert report["ssd"]["vms"] == {
        "work": {
            "private": {"size": 2 * GIB, "allocated": 4096 * 17},
            "volatile": {"size": 10 * GIB, "allocated": 0},
        }
    }
    assert report["ssd"]["provisioned"] == 12 * GIB
    assert report["varlibqubes"]["vms"].keys() == {"fedora", "vault"}
    assert report["linux-kernel"]["size"] is None


def test_without_qubesadmin_only_the_copy_of_a_whole_vm_is_refused(there, monkeypatch):
    daemon, system = there
    monkeypatch.setitem(sys.modules, "qubesadmin", None)
    for verb in (
        lambda: system.clone_vm("work", "work2"),
        lambda: system.vm_diff("work2", clone_from="work"),
        lambda: system.create_vm("alone", klass="StandaloneVM", template="fedora"),
    ):
        with pytest.raises(NotSupported, match=r"made by qubesadmin.*dom0"):
            verb()
    assert not writes(daemon)
    assert system.vm_diff("fedora", klass="TemplateVM", template="gone") == {}


def test_a_clone_is_made_by_qubesadmin_on_our_socket(there, qubesadmin):
    daemon, system = there
    changes = system.clone_vm("work", "copy", pool="btrfs")
    assert changes["clone_from"] == {"old": None, "new": "work"}
    assert daemon.vms["copy"].volumes["private"].data == "the work of years"
    assert daemon.vms["copy"].volumes["private"].pool.name == "btrfs"
    with pytest.raises(StoragePoolException, match="is there already"):
        system.clone_vm("work", "copy")
    declared = {"clone_from": "work", "label": "green", "volumes": {"private": "3GiB"}}
    system.create_vm("copy2", **declared)
    assert daemon.vms["copy2"].set["label"] == "green"
    assert daemon.vms["copy2"].volumes["private"].size == 3 * GIB
    forget(daemon, system)
    assert system.vm_diff("copy2", **declared) == {}


def test_a_standalone_of_a_template_is_its_copy(there, qubesadmin):
    daemon, system = there
    daemon.vms["fedora"].volumes["root"].data = "a system"
    system.create_vm("alone", klass="StandaloneVM", template="fedora", pool="ssd")
    assert daemon.vms["alone"].klass == "StandaloneVM"
    assert daemon.vms["alone"].volumes["root"].data == "a system"
    forget(daemon, system)
    assert system.vm_diff("alone", klass="StandaloneVM", template="fedora", pool="ssd") == {}


def test_a_clone_that_fails_is_an_error_with_its_reason(there, qubesadmin):
    daemon, system = there
    daemon.before = lambda call: (
        b"2\0QubesException\0\0no space\0" if "Create" in call.method else None
    )
    with pytest.raises(StoragePoolException, match=r"could not be cloned from work.*no space"):
        system.clone_vm("work", "copy")


@pytest.mark.parametrize("method", ["admin.vm.property.GetAll", "admin.vm.volume.Info"])
def test_a_vm_that_vanishes_while_it_is_compared_is_said(there, method):
    daemon, system = there

    def vanish(call):
        if call.method == method and call.dest == "work":
            daemon.vms.pop("work", None)

    daemon.before = vanish
    declared = {"label": "red", "pool": "ssd"}
    with pytest.raises(StoragePoolException, match="VM work: was removed by someone else"):
        system.set_vm("work", **declared)
    daemon.add_vm("work", pool="ssd")
    system.refresh()
    assert "created" in system.vm_diff("work", **declared)  # it looked again
    assert "work" not in system.list_vms()
    assert not writes(daemon)


@pytest.mark.parametrize("verb", ["orphans", "rename_vm", "commit_vm", "reset_vm", "disks"])
def test_what_only_r32_has_is_refused_with_the_way_there(there, verb):
    daemon, system = there
    with pytest.raises(NotSupported, match="backend admin"):
        getattr(system, verb)("work")
    assert not daemon.log


def test_every_verb_of_the_local_system_is_here_too():
    public = {name for name in dir(System) if not name.startswith("_")}
    inner = {  # what is about R3.2's files, not about pools and VMs
        "check_disk", "default_template", "edit_conf", "find_vm", "get_pool", "get_vm",
        "images_on_disk", "is_absent_disk", "locked", "places", "plan", "pool_of", "registry",
        "save_registry", "sections", "vms_in",
    }  # fmt: skip
    assert public - inner <= set(dir(AdminSystem))


@pytest.mark.parametrize("verb", ["vm_diff", "create_vm"])
def test_a_new_name_has_a_dot_only_where_the_release_takes_one(there, verb):
    daemon, system = there
    if daemon.release == "4.2":
        with pytest.raises(InvalidInput, match="R4.2 takes no dot in the name of a VM"):
            getattr(system, verb)("a.b")
        assert not writes(daemon)
    else:
        assert "created" in getattr(system, verb)("a.b")
