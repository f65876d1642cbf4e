"""The verbs that both backends have, run on R3.2's files and on R4's daemon; and those of one."""

import pytest
from qubes_storage import InvalidInput, NotSupported, connect

from tests.r4.machine import forget, machine

GIB = 1024**3
LOCAL_ONLY = (
    lambda s: s.rename_vm("work", "other"),
    lambda s: s.disks("work"),
    lambda s: s.commit_vm("base"),
    lambda s: s.reset_vm("work"),
    lambda s: s.orphans(),
)
ADMIN_ONLY = (
    lambda s: s.default_pools(),
    lambda s: s.default_pools_diff(default_pool="ssd"),
    lambda s: s.set_default_pools(default_pool="ssd"),
)


class Backend:
    """A system, and the words that its pools and templates have."""

    def __init__(self, name, system, driver, template, again=lambda: None):
        self.name = name
        self.system = system
        self.driver = driver
        self.template = template
        self.again = again


@pytest.fixture(params=["local", "admin"])
def there(request, root, tmp_path, qubesadmin):
    if request.param == "local":
        system = connect(root)
        system.add_pool("default")
        system.create_vm("base", klass="TemplateVM")
        yield Backend("local", system, "xen", "base")
        return
    r4 = tmp_path / "r4"
    r4.mkdir()
    (r4 / "mnt").mkdir()
    with machine("4.3", r4) as (daemon, system):
        yield Backend("admin", system, "file-reflink", "fedora", lambda: forget(daemon, system))


def test_pools_are_listed_told_of_added_set_and_removed(there):
    system = there.system
    path = "/mnt/new" if there.name == "admin" else "/opt/new"
    wanted = {"driver": there.driver, "dir_path": path}
    assert there.driver in system.list_drivers()
    planned = system.pool_diff("new", **wanted)
    assert {"created", "driver", "dir_path"} <= set(planned)
    assert system.pool_notes("new", **wanted) == []
    assert system.pool_info("new") is None
    assert system.add_pool("new", **wanted) == planned
    there.again()
    assert system.list_pools()["new"]["dir_path"] == path
    assert system.pool_diff("new", **wanted) == {}
    info = system.pool_info("new")
    assert info["driver"] == there.driver and info["dir_path"] == path
    assert info["size"] > 0 and info["free"] > 0
    assert info["vms"] == []
    changes = system.set_pool("new", min_free="1GiB")
    assert changes == {"min_free": {"old": None, "new": "1GiB"}}
    assert system.pool_info("new")["min_free"] == "1GiB"
    assert set(system.pool_remove_diff("new")) >= {"removed"}
    assert "removed" in system.remove_pool("new")
    there.again()
    assert "new" not in system.list_pools()
    assert system.remove_pool("new") == {}


def test_vms_are_created_told_of_changed_checked_and_removed(there):
    system = there.system
    declared = {"template": there.template, "label": "green", "volumes": {"private": "3GiB"}}
    planned = system.vm_diff("new", **declared)
    assert {"created", "klass", "template", "label"} <= set(planned)
    assert system.vm_info("new") is None
    assert system.create_vm("new", **declared) == planned
    there.again()
    assert system.list_vms()["new"]["klass"] == "AppVM"
    assert system.vm_diff("new", **declared) == {}
    info = system.vm_info("new")
    assert info["label"] == "green" and info["template"] == there.template
    assert info["volumes"]["private"]["size"] == 3 * GIB
    assert system.set_vm("new", label="blue") == {"label": {"old": "green", "new": "blue"}}
    assert system.resize_vm("new", "private", "4GiB")
    there.again()
    assert system.vm_info("new")["volumes"]["private"]["size"] == 4 * GIB
    with pytest.raises(Exception, match="4294967296|4.0 GiB"):
        system.resize_vm("new", "private", "1GiB")
    assert system.verify_vm("new") == []
    assert "removed" in system.vm_remove_diff("new", purge=True)
    assert "removed" in system.remove_vm("new", purge=True)
    there.again()
    assert "new" not in system.list_vms()
    assert system.remove_vm("new", purge=True) == {}


@pytest.mark.parametrize("source", [None, "template", "clone_from"])
def test_the_sizes_that_are_told_of_a_new_vm_are_those_that_are_made(there, source):
    system = there.system
    system.resize_vm(there.template, "root", "12GiB")
    there.again()
    declared = {"klass": "TemplateVM", **({source: there.template} if source else {})}
    declared["volumes"] = {"private": 10, "root": "5GiB"}
    planned = system.vm_diff("new", **declared)
    there.again()
    assert system.create_vm("new", **declared) == planned
    there.again()
    volumes = system.vm_info("new")["volumes"]
    made = {"private": 2 * GIB, "root": (12 if source else 10) * GIB}
    assert planned["volumes"]["new"] == {v: volumes[v]["size"] for v in made} == made
    assert system.vm_diff("new", **declared) == {}


def test_what_is_null_of_a_volume_is_not_declared(there):
    system = there.system
    nothing = dict.fromkeys(("size", "pool", "revisions_to_keep"))
    for volumes in ({"private": None}, {"private": nothing}):
        assert "volumes" not in system.vm_diff("new", template=there.template, volumes=volumes)
        assert system.vm_diff(there.template, volumes=volumes) == {}
    with pytest.raises(InvalidInput, match="has no option 'colour'"):
        system.vm_diff("new", template=there.template, volumes={"private": {"colour": None}})
    with pytest.raises(InvalidInput, match="None is not a size"):
        system.resize_vm(there.template, "private", None)


@pytest.mark.parametrize("word", ["klass", "template", "pool", "clone_from", "root_copy_from"])
def test_a_word_that_is_empty_is_told(there, word):
    with pytest.raises(InvalidInput, match=f"VM new: the {word} is empty"):
        there.system.vm_diff("new", **{word: ""})
    with pytest.raises(InvalidInput, match="VM '': the name is empty"):
        there.system.vm_info("")


def test_a_vm_is_cloned_moved_and_reported(there):
    system = there.system
    path = "/mnt/far" if there.name == "admin" else "/opt/far"
    system.add_pool("far", driver=there.driver, dir_path=path)
    system.create_vm("new", template=there.template)
    assert "created" in system.clone_vm("new", "copy", pool="far")
    there.again()
    assert system.vm_info("copy")["volumes"]["private"]["pool"] == "far"
    home = system.vm_info("new")["volumes"]["private"]["pool"]
    changes = system.migrate_vm("new", "far")
    assert changes["pool"] == {"old": home, "new": "far"}
    there.again()
    assert system.vm_info("new")["volumes"]["private"]["pool"] == "far"
    assert system.migrate_vm("new", "far") == {}
    assert system.verify_vm("new") == []
    report = system.report()
    assert {"new", "copy"} <= set(report["far"]["vms"])
    assert report["far"]["vms"]["new"]["private"]["size"] == 2 * GIB


def test_what_a_backend_cannot_do_names_the_backend_and_the_way_there(there):
    missing = LOCAL_ONLY if there.name == "admin" else ADMIN_ONLY
    for verb in missing:
        with pytest.raises(NotSupported, match=f"backend {there.name} has no such thing: .{{20,}}"):
            verb(there.system)
    assert isinstance(there.system.list_vms(), dict)


def test_what_is_asked_of_default_pools_is_told_of_them(there):
    if there.name == "local":
        for verb in ("default_pools", "default_pools_diff", "set_default_pools"):
            with pytest.raises(NotSupported, match="^default pools: backend local has no such"):
                getattr(there.system, verb)()
