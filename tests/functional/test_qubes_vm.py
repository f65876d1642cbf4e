"""States and functions of qubes_vm, through Salt's loader, on real files."""

import errno
import os

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.functional.conftest import snapshot

GIB = 1024**3


@pytest.fixture
def template(states):
    """The default pool, and a template in it, which becomes the system's default."""
    states.qubes_pool.present("default")
    states.qubes_vm.present("fedora-23", klass="TemplateVM")
    return "fedora-23"


def test_present_says_the_same_in_test_mode(states, modules, root, template, testmode):
    ret = states.qubes_vm.present(
        "work", template=template, label="green", volumes={"private": "10GiB"}, test=testmode
    )
    assert ret.result is (None if testmode else True)
    assert {key: entry["new"] for key, entry in ret.changes.items()} == {
        "created": "work",
        "klass": "AppVM",
        "template": template,
        "label": "green",
        "pool": "default",
        "volumes": {"private": 10 * GIB},
    }
    assert (root / "var/lib/qubes/appvms/work/private.img").exists() is not testmode
    assert (modules.qubes_vm.info("work") is None) is testmode


def test_present_twice_changes_nothing(states, root, template):
    declared = {"template": template, "label": "green", "volumes": {"private": {"size": "3GiB"}}}
    states.qubes_vm.present("work", **declared)
    before = snapshot(root)
    ret = states.qubes_vm.present("work", klass="AppVM", pool="default", **declared)
    assert ret.result is True
    assert ret.changes == {}
    assert snapshot(root) == before


def test_a_size_is_at_least(states, modules, template, testmode):
    states.qubes_vm.present("work", volumes={"private": "3GiB"})
    assert states.qubes_vm.present("work", volumes={"private": "1GiB"}).changes == {}
    ret = states.qubes_vm.present("work", volumes={"private": "4GiB"}, test=testmode)
    sizes = {"old": {"private": 3 * GIB}, "new": {"private": 4 * GIB}}
    assert ret.changes == {"volumes": sizes}
    private = modules.qubes_vm.info("work")["volumes"]["private"]
    assert private["size"] == (3 if testmode else 4) * GIB


def test_label_and_template_are_changed_where_they_are_declared(states, modules, root, template):
    states.qubes_vm.present("debian", klass="TemplateVM")
    states.qubes_vm.present("work", template=template)
    ret = states.qubes_vm.present("work", template="debian", label="blue")
    assert set(ret.changes) == {"template", "label"}
    info = modules.qubes_vm.info("work")
    assert (info["template"], info["label"]) == ("debian", "blue")
    icon = root / "var/lib/qubes/appvms/work/icon.png"
    assert icon.readlink().name == "appvm-blue.png"


def test_template_of_a_template_matters_at_creation_only(states, template):
    states.qubes_vm.present("copy", klass="TemplateVM", template=template)
    assert states.qubes_vm.present("copy", klass="TemplateVM", template="gone").changes == {}


def test_another_pool_or_class_is_an_error_that_says_so(states, template, testmode):
    states.qubes_pool.present("ssd", dir_path="/opt/qubes-vm")
    states.qubes_vm.present("work")
    ret = states.qubes_vm.present("work", pool="ssd", test=testmode)
    assert (ret.result, ret.changes) == (False, {})
    assert "lies in pool default, not in ssd" in ret.comment
    ret = states.qubes_vm.present("work", klass="NetVM", test=testmode)
    assert (ret.result, ret.changes) == (False, {})
    assert "is of class AppVM, not NetVM" in ret.comment


def test_an_image_that_is_gone_is_never_made_anew(states, root, template, testmode):
    states.qubes_vm.present("work")
    states.qubes_vm.present("other")
    (root / "var/lib/qubes/appvms/work/private.img").unlink()
    before = snapshot(root)
    ret = states.qubes_vm.present("work", test=testmode)
    assert ret.result is False
    assert "/var/lib/qubes/appvms/work/private.img is gone" in ret.comment
    assert snapshot(root) == before


def test_a_vm_waits_for_its_pool_and_template_in_test_mode_only(states, root):
    before = snapshot(root)
    ret = states.qubes_vm.present("work", pool="ssd", template="fedora-23", test=True)
    assert ret.result is None
    assert ret.comment == "VM work waits for pool ssd and template fedora-23"
    ret = states.qubes_vm.present("t", klass="TemplateVM", pool="ssd", test=True)
    assert ret.result is None
    assert ret.comment == "VM t waits for pool ssd"
    assert snapshot(root) == before
    ret = states.qubes_vm.present("t", klass="TemplateVM", pool="ssd")
    assert ret.result is False
    assert "pool ssd: unknown" in ret.comment


def test_absent_names_the_images_it_does_not_delete(states, root, template, testmode):
    states.qubes_vm.present("work")
    (root / "var/lib/qubes/appvms/work/private.img").write_bytes(b"x" * 8192)
    ret = states.qubes_vm.absent("work", test=testmode)
    assert ret.result is False
    assert "/var/lib/qubes/appvms/work/private.img (8.0 KiB in use)" in ret.comment
    assert (root / "var/lib/qubes/appvms/work/private.img").exists()


def test_absent_with_purge_says_the_same_in_test_mode(states, modules, root, template, testmode):
    states.qubes_vm.present("work")
    ret = states.qubes_vm.absent("work", purge=True, test=testmode)
    assert ret.result is (None if testmode else True)
    assert set(ret.changes) == {"removed", "deleted"}
    assert (root / "var/lib/qubes/appvms/work").exists() is testmode
    assert ("work" in modules.qubes_vm.list()) is testmode
    assert bool(states.qubes_vm.absent("work", purge=True, test=testmode).changes) is testmode


def test_absent_claims_no_images_that_could_not_be_deleted(states, template, monkeypatch):
    states.qubes_vm.present("work")
    unlink = os.unlink

    def fail(path, **where):
        if path == "private.img":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, **where)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", fail)
        ret = states.qubes_vm.absent("work", purge=True)
    assert (ret.result, set(ret.changes)) == (False, {"removed"})
    assert "Input/output error" in ret.comment
    ret = states.qubes_vm.absent("work", purge=True)
    assert (ret.result, set(ret.changes)) == (True, {"unfinished"})


def test_a_template_that_others_run_on_is_not_removed(states, template):
    states.qubes_vm.present("work")
    ret = states.qubes_vm.absent(template, purge=True)
    assert ret.result is False
    assert "is the template of work" in ret.comment


def test_functions_tell_wrong_asking_from_what_cannot_be_done(modules, template):
    with pytest.raises(SaltInvocationError, match="'1bad': not a name for a VM"):
        modules.qubes_vm.create("1bad")
    with pytest.raises(SaltInvocationError, match="unknown label 'pink'; it is one of red"):
        modules.qubes_vm.create("work", label="pink")
    with pytest.raises(SaltInvocationError, match="'10 gigs' is not a size"):
        modules.qubes_vm.create("work", volumes={"private": "10 gigs"})
    with pytest.raises(CommandExecutionError, match="create it with qubes_vm.create"):
        modules.qubes_vm.set("work", label="red")
    assert modules.qubes_vm.info("work") is None


def test_a_vm_that_create_only_leaves_alone_is_not_told_as_declared(states, template, testmode):
    states.qubes_vm.present("work", klass="StandaloneVM")
    for create_only, comment in (
        (True, "VM work is there and is left as it is (create_only)"),
        ("no", "VM work is as declared"),
    ):
        label = "blue" if create_only is True else None
        ret = states.qubes_vm.present("work", label=label, create_only=create_only, test=testmode)
        assert (ret.result, ret.changes, ret.comment) == (True, {}, comment)
