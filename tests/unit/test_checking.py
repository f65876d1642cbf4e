"""What verify finds, and the images that are made anew."""

import errno
import fcntl
import os
import re

import pytest
from qubes_storage.exc import InvalidInput, StoragePoolException

from tests.r32.machine import GIB, KERNEL, LIB, element

TEMPLATE = f"{LIB}/vm-templates/fedora-23"
VMDIR = f"{LIB}/appvms/work"
KERNELS = f"{LIB}/vm-kernels/{KERNEL}"


@pytest.fixture
def machine(scratch):
    made = scratch()
    made.connect().create_vm("work", template="fedora-23")
    return made


def stat_of(machine, path):
    return machine.path(path).stat()


BREAK = {
    "private": (lambda p: p("private.img").unlink(), "private.img: is gone"),
    "directory": (lambda p: p("").rename(p("../gone")), "appvms/work: is gone"),
    "size": (lambda p: os.truncate(p("private.img"), 1000), "1000 bytes, which is no disk"),
    "nothing in it": (lambda p: os.truncate(p("private.img"), 0), "0 bytes, which is no disk"),
    "mode": (lambda p: p("private.img").chmod(0o666), "mode 0666; give it 0660"),
    "closed": (lambda p: p("private.img").chmod(0o600), "mode 0600; give it 0660"),
    "directory's mode": (lambda p: p("").chmod(0o2777), "mode 2777; give it 2770"),
    "stranger": (lambda p: p("core").touch(), "core: has no business here"),
    "link": (lambda p: p("firewall.xml").symlink_to("/etc/passwd"), "firewall.xml: is a link"),
    "second name": (lambda p: os.link(p("private.img"), p("../x")), "private.img: has a name els"),
    "no file": (lambda p: p("volatile.img.old").mkdir(), "volatile.img.old: is no file"),
    "half a run": (lambda p: p("../.work.creating").mkdir(), "a run that died; qubes_vm.set work"),
}


@pytest.mark.parametrize("what", BREAK)
def test_verify_names_what_is_wrong_and_nothing_else(machine, what):
    system = machine.connect()
    assert system.verify_vm("work") == []
    breaking, expected = BREAK[what]
    breaking(lambda name: machine.path(VMDIR) / name)
    before = machine.tree()
    problems = system.verify_vm("work")
    assert len(problems) == 1, problems
    assert expected in problems[0]
    assert machine.tree() == before


def test_verify_looks_at_the_template_and_the_kernel_too(machine):
    system = machine.connect()
    machine.path(f"{KERNELS}/vmlinuz").unlink()
    machine.path(f"{TEMPLATE}/root.img").rename(machine.path("/mnt/root.img"))
    kernel, template = system.verify_vm("work")
    assert f"{KERNELS}/vmlinuz: is gone" in kernel
    assert f"{TEMPLATE}/root.img: is gone, the root of its template fedora-23" in template
    assert any("root.img: is gone; restore" in p for p in system.verify_vm("fedora-23"))


def test_what_r32_and_its_tools_put_there_is_no_problem(machine):
    for name in ("work.conf", "dvm-savefile", "private.img.old", "firewall.xml"):
        machine.image(f"{VMDIR}/{name}", 512)
    os.link(machine.path(f"{VMDIR}/private.img"), machine.path(f"{VMDIR}/private-cow.img"))
    for name in ("apps", "apps.templates", "kernels"):
        machine.mkdir(f"{VMDIR}/{name}")
    machine.path(f"{VMDIR}/volatile.img").unlink()
    system = machine.connect()
    assert system.verify_vm("work") == []
    assert system.verify_vm("dom0") == []
    with pytest.raises(StoragePoolException, match="not in qubes.xml"):
        system.verify_vm("nope")


def test_a_root_cow_that_does_not_fit_its_root_is_named_with_the_cure(machine):
    system = machine.connect()
    os.truncate(machine.path(f"{TEMPLATE}/root.img"), 12 * GIB)
    (cow,) = system.verify_vm("fedora-23")
    assert "qubes_vm.commit fedora-23" in cow
    system.commit_vm("fedora-23")
    assert system.verify_vm("fedora-23") == []


@pytest.mark.parametrize("klass", ["TemplateVM", "StandaloneVM", "HVM", "TemplateHVM"])
def test_after_its_root_has_grown_nothing_is_wrong_with_a_vm(machine, klass):
    system = machine.connect()
    system.create_vm("own", klass=klass)
    assert system.resize_vm("own", "root", "30GiB")
    assert system.verify_vm("own") == []


def test_commit_sets_the_changes_aside_and_begins_anew(machine):
    machine.image(f"{TEMPLATE}/root-cow.img", 10 * GIB, "changes")
    system = machine.connect()
    changes = {"root-cow": {"old": 10 * GIB, "new": 10 * GIB}}
    assert system.commit_vm("fedora-23") == changes
    tree = machine.tree()
    assert tree[f"{TEMPLATE}/root-cow.img.old"]["head"] == "changes"
    assert tree[f"{TEMPLATE}/root-cow.img"]["blocks_zero"]
    assert tree[f"{TEMPLATE}/root-cow.img"]["mode"] == "0660"
    system.commit_vm("fedora-23")
    assert machine.tree()[f"{TEMPLATE}/root-cow.img.old"]["blocks_zero"]
    with pytest.raises(InvalidInput, match="only a template"):
        system.commit_vm("work")


def test_reset_makes_volatile_anew_where_it_holds_nothing_of_worth(machine):
    system = machine.connect()
    size = 10 * GIB + 3 * GIB // 2
    machine.image(f"{VMDIR}/volatile.img", GIB, "old")
    assert system.reset_vm("work") == {"volatile": {"old": GIB, "new": size}}
    assert stat_of(machine, f"{VMDIR}/volatile.img").st_size == size
    machine.image(f"{TEMPLATE}/volatile.img", GIB, "old")
    assert system.reset_vm("fedora-23") == {}
    assert stat_of(machine, f"{TEMPLATE}/volatile.img").st_size == GIB
    with pytest.raises(InvalidInput, match="dom0"):
        system.reset_vm("dom0")


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        ({"pool_name": "nope"}, "pool nope: unknown"),
        ({"template_qid": "99"}, r"VM odd: its template \(qid 99\) is gone; give it another"),
        ({"uses_default_kernel": "False", "kernel": "../x"}, "kernel '../x' is no name of one"),
        ({"uses_default_kernel": "False", "kernel": "9.9"}, "vm-kernels/9.9/vmlinuz: is gone"),
    ],
    ids=["pool", "template", "kernel's name", "kernel"],
)
def test_what_the_registry_says_and_nothing_has_is_told(machine, attrs, expected):
    machine.connect().create_vm("odd", template="fedora-23")
    entry = machine.entries()["odd"]
    machine.elements.append(("QubesAppVm", {**entry.attrs, **attrs}))
    machine.write_registry()
    found = machine.connect().verify_vm("odd")
    assert any(re.search(expected, problem) for problem in found), found


def test_a_kernel_of_its_own_choice_is_the_one_that_is_looked_at(machine):
    machine.elements.append(
        element("QubesAppVm", "work", 2, template_qid="1", uses_default_kernel="False")
    )
    machine.attrs["default_kernel"] = "9.9"
    machine.write_registry()
    assert machine.connect().verify_vm("work") == []


def test_a_template_in_a_pool_that_is_unknown_is_told_and_its_size_is_taken_for_the_usual(machine):
    machine.elements = [
        machine.elements[0],
        element("QubesTemplateVm", "fedora-23", 1, pool_name="nope"),
        element("QubesAppVm", "work", 2, template_qid="1"),
    ]
    machine.write_registry()
    system = machine.connect()
    assert [p.split(";")[0] for p in system.verify_vm("work")] == ["pool nope: unknown"]
    machine.image(f"{VMDIR}/volatile.img", GIB, "old")
    assert system.reset_vm("work")["volatile"]["new"] == 12348030976


def test_commit_begins_where_there_were_no_changes(machine):
    machine.path(f"{TEMPLATE}/root-cow.img").unlink()
    changes = machine.connect().commit_vm("fedora-23")
    assert changes == {"root-cow": {"old": None, "new": 10 * GIB}}
    assert stat_of(machine, f"{TEMPLATE}/root-cow.img").st_size == 10 * GIB
    assert not machine.path(f"{TEMPLATE}/root-cow.img.old").exists()


def test_what_a_dead_commit_has_set_aside_already_stays_set_aside(machine):
    machine.image(f"{TEMPLATE}/root-cow.img", 10 * GIB, "changes")
    cow = machine.path(f"{TEMPLATE}/root-cow.img")
    os.link(cow, cow.with_name("root-cow.img.old"))
    machine.connect().commit_vm("fedora-23")
    tree = machine.tree()
    assert tree[f"{TEMPLATE}/root-cow.img.old"]["head"] == "changes"
    assert tree[f"{TEMPLATE}/root-cow.img"]["blocks_zero"]


@pytest.fixture
def links_fail(monkeypatch):
    """``links_fail(number)``: the filesystem answers each hard link with that error."""

    def use(number):
        def link(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)

    return use


def test_commit_sets_aside_by_a_rename_where_there_are_no_hard_links(machine, links_fail):
    machine.image(f"{TEMPLATE}/root-cow.img", 10 * GIB, "changes")
    links_fail(errno.EPERM)
    machine.connect().commit_vm("fedora-23")
    tree = machine.tree()
    assert tree[f"{TEMPLATE}/root-cow.img.old"]["head"] == "changes"
    assert tree[f"{TEMPLATE}/root-cow.img"]["blocks_zero"]


def test_a_commit_whose_link_fails_leaves_all_as_it_was(machine, links_fail):
    machine.image(f"{TEMPLATE}/root-cow.img", 10 * GIB, "changes")
    before = machine.tree()
    links_fail(errno.EIO)
    with pytest.raises(StoragePoolException, match=f"{TEMPLATE}: Input/output error; mend it"):
        machine.connect().commit_vm("fedora-23")
    assert machine.tree() == before


def test_a_commit_whose_rename_fails_leaves_all_as_it_was(machine, monkeypatch):
    machine.image(f"{TEMPLATE}/root-cow.img", 10 * GIB, "changes")
    machine.image(f"{TEMPLATE}/root-cow.img.old", 10 * GIB, "those before")
    before = machine.tree()
    rename = os.rename

    def fail(old, new, **where):
        if new == "root-cow.img.old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new, **where)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StoragePoolException, match=f"{TEMPLATE}: Input/output error; mend it"):
        machine.connect().commit_vm("fedora-23")
    assert machine.tree() == before


def test_a_directory_that_goes_once_the_lock_is_held_is_told(machine, monkeypatch):
    """The loop devices are the last that is looked at before anything is written."""
    lockf, listdir, held = fcntl.lockf, os.listdir, []

    def lock(fd, how):
        lockf(fd, how)
        held.append(fd)

    def look(path):
        if path == "/sys/block" and held and machine.path(VMDIR).exists():
            machine.path(VMDIR).rename(machine.path("/mnt/away"))
        return listdir(path)

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(os, "listdir", look)
    machine.image(f"{VMDIR}/volatile.img", GIB, "old")
    with pytest.raises(StoragePoolException, match=f"{VMDIR}: Not a directory; mend it"):
        machine.connect().reset_vm("work")
    assert not machine.path(VMDIR).exists()
    assert machine.path("/mnt/away/volatile.img").stat().st_size == GIB
