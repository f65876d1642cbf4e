"""The removal of VMs whose place is odd: no pool, no images, what a dead run left."""

import os
import subprocess

import pytest
from qubes_storage.exc import InvalidInput, StoragePoolException

from tests.r32.machine import LIB, element

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
BAD = "[default]\ndriver=xen\n[bad]\ndriver=nope\ndir_path=/mnt/bad\n"


@pytest.fixture
def machine(scratch):
    machine = scratch(BAD)
    machine.elements += [
        element("QubesAppVm", "lost", 7, template_qid="1", pool_name="gone"),
        element("QubesDisposableVm", "disp3", 8, template_qid="1"),
    ]
    machine.write_registry()
    machine.connect().create_vm("work")
    return machine


def test_a_vm_whose_pool_is_not_there_is_forgotten_only_where_its_images_are_to_stay(machine):
    system, before = machine.connect(), machine.tree()
    changes = {"removed": {"old": "lost", "new": None}}
    for verb in (system.vm_remove_diff, system.remove_vm):
        for purge in (False, True):
            cure = "VM lost: pool gone: unknown; .* mend the pool, or .*remove --just-db lost"
            with pytest.raises(StoragePoolException, match=cure) as caught:
                verb("lost", purge=purge)
            assert caught.value.waits_for == [("pool", "gone")]
    assert machine.tree() == before
    assert system.vm_remove_diff("lost", keep=True) == changes
    assert system.remove_vm("lost", keep=True) == changes
    assert "lost" not in machine.entries()
    assert system.remove_vm("lost") == {}


def test_a_disposable_goes_without_the_images_that_it_shares(machine):
    machine.mkdir(f"{LIB}/appvms/fedora-23-dvm")
    machine.image(f"{LIB}/appvms/fedora-23-dvm/private.img", 4096, "shared")
    assert machine.connect().remove_vm("disp3") == {"removed": {"old": "disp3", "new": None}}
    assert "disp3" not in machine.entries()
    assert machine.path(f"{LIB}/appvms/fedora-23-dvm/private.img").exists()


def test_a_name_that_leads_elsewhere_is_looked_for_nowhere(machine):
    machine.mkdir(f"{LIB}/appvms/.a")
    machine.mkdir(f"{LIB}/appvms/.a/b.creating")
    before = machine.tree()
    assert machine.connect().remove_vm("a/b", purge=True) == {}
    assert machine.tree() == before


def test_what_a_dead_run_left_is_found_although_another_pool_cannot_be_loaded(machine):
    machine.mkdir(f"{LIB}/appvms/.new.creating", 0o700)
    system = machine.connect()
    left = {"unfinished": {"old": [f"{LIB}/appvms/.new.creating"], "new": None}}
    assert system.vm_remove_diff("new") == left
    assert system.remove_vm("new") == left
    assert not machine.path(f"{LIB}/appvms/.new.creating").exists()
    assert system.remove_vm("new") == {}


def test_images_are_either_deleted_or_kept(machine):
    before = machine.tree()
    with pytest.raises(InvalidInput, match="VM work: its images cannot be both deleted and kept"):
        machine.connect().remove_vm("work", purge=True, keep=True)
    assert machine.tree() == before


def test_a_removal_that_died_is_undone_where_the_images_are_to_be_kept(machine):
    appvms = machine.path(f"{LIB}/appvms")
    (appvms / "work").rename(appvms / ".work.removing")
    changes = machine.connect().remove_vm("work", keep=True)
    assert changes["unfinished"] == {"old": [f"{LIB}/appvms/.work.removing"], "new": None}
    assert (appvms / "work/private.img").exists()
    assert not (appvms / ".work.removing").exists()
    assert "work" not in machine.entries()


def test_what_a_dead_run_left_elsewhere_goes_too(machine):
    system = machine.connect()
    system.add_pool("ssd", dir_path="/mnt/ssd")
    left = ["/mnt/ssd/appvms/.work.creating"]
    machine.mkdir(left[0], 0o700)
    assert system.vm_remove_diff("work", purge=True)["unfinished"] == {"old": left, "new": None}
    assert system.remove_vm("work", purge=True)["unfinished"] == {"old": left, "new": None}
    assert not machine.path(left[0]).exists()
    assert system.remove_vm("work", purge=True) == {}


def test_a_vm_stays_while_storage_conf_cannot_be_read(machine):
    machine.write("/etc/qubes/storage.conf", b"[default]\ndriver=xen\n[bad\n")
    before = machine.tree()
    with pytest.raises(StoragePoolException, match="storage.conf cannot be read"):
        machine.connect().remove_vm("work")
    assert machine.tree() == before


def test_a_disposable_leaves_what_a_dead_run_left_of_the_vm_whose_images_it_shares(machine):
    shared = f"{LIB}/appvms/fedora-23-dvm"
    machine.mkdir(shared)
    machine.image(f"{shared}/private.img", 4096, "shared")
    machine.mkdir(f"{shared}/.volatile.img.new", 0o700)
    assert machine.connect().remove_vm("disp3") == {"removed": {"old": "disp3", "new": None}}
    assert machine.path(f"{shared}/private.img").exists()
    assert machine.path(f"{shared}/.volatile.img.new").exists()


def test_a_vm_in_whose_place_is_a_link_is_not_taken_for_one_without_images(machine):
    machine.path(f"{LIB}/appvms/work").rename(machine.path("/opt"))
    machine.path(f"{LIB}/appvms/work").symlink_to("/opt")
    system, before = machine.connect(), machine.tree()
    for verb in (system.vm_remove_diff, system.remove_vm):
        with pytest.raises(StoragePoolException, match=f"{LIB}/appvms/work is no directory that"):
            verb("work", purge=True)
    assert machine.tree() == before
    assert system.remove_vm("work", keep=True) == {"removed": {"old": "work", "new": None}}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@root_only
@pytest.mark.parametrize("where", ["", "apps"])
@pytest.mark.parametrize("verb", ["remove", "migrate", "rename"])
def test_what_is_mounted_in_a_vm_s_directory_stays_there(machine, tmp_path, where, verb):
    system, vmdir = machine.connect(), machine.path(f"{LIB}/appvms/work")
    system.add_pool("foo", dir_path="/mnt/foo")
    if where:
        (vmdir / where).mkdir()
    (tmp_path / "precious").write_text("precious")
    subprocess.run(["cp", "-a", "--sparse=always", f"{vmdir}/.", tmp_path], check=True)
    subprocess.run(["mount", "--bind", tmp_path, vmdir / where], check=True)
    path = os.path.join(f"{LIB}/appvms/work", where).rstrip("/")
    match = f"VM work: something is mounted at {path}, .*; unmount it"
    before = machine.tree()
    calls = {
        "remove": [
            lambda: system.vm_remove_diff("work", purge=True),
            lambda: system.remove_vm("work", purge=True),
        ],
        "migrate": [
            lambda: system.vm_diff("work", pool="foo", migrate=True),
            lambda: system.migrate_vm("work", "foo"),
        ],
        "rename": [lambda: system.rename_vm("work", "new")],
    }
    try:
        for call in calls[verb]:
            with pytest.raises(StoragePoolException, match=match):
                call()
        assert machine.tree() == before
    finally:
        subprocess.run(["umount", vmdir / where], check=True)
    calls[verb][-1]()
    assert (tmp_path / "precious").exists()


@root_only
def test_what_is_mounted_in_what_a_dead_run_was_deleting_is_never_deleted(machine):
    machine.mkdir("/opt")
    machine.write("/opt/precious", b"precious")
    removing = machine.mkdir(f"{LIB}/appvms/.gone.removing")
    apps = machine.mkdir(f"{LIB}/appvms/.gone.removing/apps")
    subprocess.run(["mount", "--bind", machine.path("/opt"), apps], check=True)
    try:
        with pytest.raises(StoragePoolException, match="apps is a mount point: unmount it; mend"):
            machine.connect().remove_vm("gone", purge=True)
        assert machine.path("/opt/precious").exists()
    finally:
        subprocess.run(["umount", apps], check=True)
    assert set(machine.connect().remove_vm("gone", purge=True)) == {"unfinished"}
    assert not removing.exists()
    assert machine.path("/opt/precious").exists()


def test_a_vm_in_one_of_two_pools_over_one_directory_is_no_leftover_of_the_other(machine):
    """As two sections have it that were written by hand."""
    machine.write("/etc/qubes/storage.conf", f"{BAD}[too]\ndriver=xen\ndir_path={LIB}\n".encode())
    system = machine.connect()
    assert [row["path"] for row in system.orphans() if row["size"] is not None] == []
    machine.mkdir(f"{LIB}/appvms/.work.creating", 0o700)  # of a run that died once it was made
    system.remove_vm("work", keep=True)
    assert machine.path(f"{LIB}/appvms/work/private.img").exists()


FOO = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"


@pytest.fixture
def foo(scratch):
    """A machine with VMs ``work`` and ``other`` in pool ``foo``."""
    machine = scratch(FOO)
    machine.add_pools()
    for name in ("work", "other"):
        machine.connect().create_vm(name, pool="foo")
    return machine


def test_a_vm_whose_place_nobody_can_tell_is_no_leftover_of_another_pool(foo):
    """As where a section was renamed by hand, after a run that died once the VM was registered."""
    marker = foo.mkdir("/mnt/foo/appvms/.work.creating", 0o700)
    inode = foo.path("/mnt/foo/appvms/work").stat().st_ino
    (marker / str(inode)).touch()
    foo.write("/etc/qubes/storage.conf", FOO.replace("[foo]", "[bar]").encode())
    before = foo.tree()
    assert foo.connect()._all_left("work") == []
    assert foo.tree() == before
    foo.connect().remove_vm("work", keep=True)
    assert foo.path("/mnt/foo/appvms/work/private.img").exists()


def test_the_place_that_the_registry_names_is_no_leftover_of_another_pool(foo):
    """As where a pool was given another place by hand, and another pool has the old one."""
    foo.mkdir("/mnt/foo/appvms/.work.creating", 0o700)
    conf = FOO.replace("/mnt/foo", "/mnt/new") + "[bar]\ndriver=xen\ndir_path=/mnt/foo\n"
    foo.write("/etc/qubes/storage.conf", conf.encode())
    foo.add_pools()
    assert foo.connect()._all_left("work") == []
    foo.connect().remove_vm("work", keep=True)
    assert foo.path("/mnt/foo/appvms/work/private.img").exists()


@pytest.mark.parametrize("purge", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("/mnt/foo", "/mnt/foo\nsize=3", "driver xen takes no option size; it takes dir_path"),
        ("[foo]\ndriver=xen", "[foo]\ndriver=xne", "unknown driver 'xne'; there are"),
        ("[foo]\ndriver=xen", "[foo]", "has neither driver nor class in"),
    ],
)
def test_a_vm_of_a_pool_that_cannot_be_loaded_stays(foo, purge, old, new, problem):
    foo.write("/etc/qubes/storage.conf", FOO.replace(old, new).encode())
    system, before = foo.connect(), foo.tree()
    for verb in (system.vm_remove_diff, system.remove_vm):
        with pytest.raises(StoragePoolException, match=f"VM work: pool foo: {problem}.*--just-db"):
            verb("work", purge=purge)
    assert foo.tree() == before


def test_a_vm_on_a_disk_that_is_away_is_forgotten_but_not_purged(foo):
    foo.path("/mnt/foo").rename(foo.path("/mnt/away"))
    foo.mkdir("/mnt/foo")
    system, before = foo.connect(), foo.tree()
    for verb in (system.vm_remove_diff, system.remove_vm):
        cure = "not one of the VMs of pool foo is in /mnt/foo, .*; mount it, or .*--just-db work"
        with pytest.raises(StoragePoolException, match=cure) as caught:
            verb("work", purge=True)
        assert caught.value.waits_for == [("mount", "/mnt/foo")]
    assert foo.tree() == before
    assert system.remove_vm("work") == {"removed": {"old": "work", "new": None}}


def test_images_that_are_links_are_what_a_vm_has(foo):
    """As where somebody moved them to a larger disk and left links."""
    here, big = "/mnt/foo/appvms/work", foo.mkdir("/mnt/big")
    for name in ("private.img", "volatile.img"):
        foo.path(f"{here}/{name}").rename(big / name)
        foo.path(f"{here}/{name}").symlink_to(f"/mnt/big/{name}")
    system, before = foo.connect(), foo.tree()
    for verb in (system.vm_remove_diff, system.remove_vm):
        with pytest.raises(StoragePoolException, match=f"VM work: has images: {here}/private.img"):
            verb("work")
    with pytest.raises(StoragePoolException, match="private.img is a link, which is not followed;"):
        system.vm_diff("work", label="green")
    assert foo.tree() == before
    gone = [f"{here}/private.img", f"{here}/volatile.img"]
    assert system.remove_vm("work", purge=True)["deleted"]["old"] == gone
    assert sorted(os.listdir(big)) == ["private.img", "volatile.img"]


def test_only_the_defaults_that_a_vm_was_are_unset(scratch):
    machine = scratch(FOO)
    machine.attrs.update(schema_version="2", clockvm="2", default_kernel="2")
    machine.elements.append(element("QubesNetVm", "net", 2, template_qid="1"))
    machine.write_registry()
    system = machine.connect()
    before = dict(system.registry().attrs)
    system.remove_vm("net")
    assert dict(system.registry().attrs) == {**before, "clockvm": "None"}


DEFAULTS = {"default_netvm": "3", "default_fw_netvm": "2"}
WHO_USES = [  # (attributes of VM app, the VMs that it uses besides its template)
    ({}, "fw"),
    ({"uses_default_netvm": None}, "fw"),
    ({"uses_default_netvm": "true", "netvm_qid": "4"}, "fw"),
    ({"uses_default_netvm": "False", "netvm_qid": "4"}, "vpn"),
    ({"uses_default_netvm": "false", "netvm_qid": "04"}, "vpn"),
    ({"uses_default_netvm": "False", "netvm_qid": "none"}, None),
    ({"uses_default_netvm": "False", "netvm_qid": None}, None),
    ({"uses_default_netvm": "False", "dispvm_netvm": "4"}, None),
    ({"uses_default_dispvm_netvm": None, "dispvm_netvm": "4"}, "fw"),
    ({"uses_default_netvm": "0", "uses_default_dispvm_netvm": "False", "dispvm_netvm": "4"}, "vpn"),
]


@pytest.fixture
def net(scratch):
    """``net(tag, attributes)``: a machine with NetVMs and a VM of that kind called app."""

    def make(tag, attrs):
        machine = scratch()
        machine.attrs.update(DEFAULTS)
        alone = {"uses_default_netvm": "False", "netvm_qid": "none"}
        machine.elements += [
            element("QubesNetVm", "net", 2, template_qid="1", **alone),
            element("QubesProxyVm", "fw", 3, template_qid="1", **alone),
            element("QubesProxyVm", "vpn", 4, template_qid="1", **alone),
            element(tag, "app", 5, **{"template_qid": "1", **attrs}),
        ]
        found = machine.elements[-1][1]
        for key in [key for key, value in attrs.items() if value is None]:
            del found[key]
        machine.elements[1][1].update(alone)  # of the template, which follows a default, too
        machine.write_registry()
        return machine

    return make


@pytest.mark.parametrize(("attrs", "used"), WHO_USES)
def test_a_netvm_that_is_used_stays_and_goes_after_its_users(net, attrs, used):
    system = net("QubesAppVm", attrs).connect()
    names = ["vpn", "fw", "net", "app"]
    last = [] if used is None else [used]
    assert system.removal_order(names) == [*(n for n in names if n not in last), *last]
    for name in ("vpn", "fw"):
        if name == used:
            with pytest.raises(StoragePoolException, match=f"VM {name}: is the NetVM.* of app;"):
                system.vm_remove_diff(name)
        else:
            assert system.vm_remove_diff(name)


@pytest.mark.parametrize("tag", ["QubesNetVm", "QubesProxyVm"])
def test_a_netvm_follows_no_default(net, tag):
    system = net(tag, {"uses_default_netvm": "True", "netvm_qid": "4"}).connect()
    assert system.vm_remove_diff("fw")
    assert system.vm_remove_diff("net")
    with pytest.raises(StoragePoolException, match="VM vpn: is the NetVM of app"):
        system.vm_remove_diff("vpn")


@pytest.mark.parametrize("qid", ["01", " 1", "+1"])
def test_a_template_in_use_stays_however_its_number_is_written(net, qid):
    system = net("QubesAppVm", {"template_qid": qid}).connect()
    assert system.list_vms()["app"]["template"] == "fedora-23"
    with pytest.raises(StoragePoolException, match="is the template of .*app"):
        system.remove_vm("fedora-23", purge=True)


@pytest.mark.parametrize("qid", ["", "none", "None"])
def test_no_template_is_a_standalone_vm(net, qid):
    system = net("QubesAppVm", {"template_qid": qid}).connect()
    assert system.list_vms()["app"]["klass"] == "StandaloneVM"
    assert "root" in system.get_vm("app").images
