"""
qubes.xml: what R3.2 writes is what we write, and what it reads we read.

Ours throughout: what we did not change keeps its bytes, one bad VM hides no other, looking takes no
lock, and the file is never left half written.
"""

import contextlib
import fcntl
import os
import re
import select
import signal

import pytest
from qubes_storage import owning, registry
from qubes_storage.exc import StoragePoolException
from qubes_storage.registry import Entry
from qubes_storage.values import check_vm_name
from qubes_storage.vm import ICONS, KLASSES, LABELS, VM

from tests.r32 import machine as scratch_system
from tests.r32.cases import cases, raw
from tests.r32.machine import GIB, LIB, XML, element, run

ALL = {case.id: case.values[0] for case in cases("G_qubes_xml")}
GLOBALS = ("clockvm", "default_fw_netvm", "default_netvm", "default_template", "updatevm")
UUID = "12345678-1234-1234-1234-123456789abc"


def some(*prefixes):
    """The cases whose id begins so."""
    found = [case for case in cases("G_qubes_xml") if case.id.startswith(prefixes)]
    return pytest.mark.parametrize("case", found)


def one(name):
    """The case of an id: what it does is in none of its fields."""
    return some(name)


def test_every_case_is_run():
    known = ("full_", "create_empty_", "load_", "text_", "verify_name", "add_new_vm_errors")
    known += ("netid_", "global_", "labels", "lock_", "save_")
    assert [name for name in ALL if not name.startswith(known)] == []


def populated(scratch, case):
    """The system of topic G: a NetVM, a ProxyVM and the AppVM ``work`` beside the template."""
    machine = scratch(case["input"].get("conf", "[default]\ndriver=xen\n"))
    machine.elements += [
        element("QubesNetVm", "sys-net", 2, netid="1", template_qid="1", memory="300"),
        element("QubesProxyVm", "sys-firewall", 3, netid="2", netvm_qid="2", template_qid="1"),
        element("QubesAppVm", "work", 4, label="green", template_qid="1", uuid=UUID),
    ]
    machine.attrs.update(
        clockvm="2", default_fw_netvm="2", default_netvm="3", updatevm="3", default_template="1"
    )
    for path in ("servicevms/sys-net", "servicevms/sys-firewall", "appvms/work"):
        machine.mkdir(f"{LIB}/{path}")
        machine.image(f"{LIB}/{path}/private.img", 2 * GIB)
    machine.write_registry()
    return machine


def seen(system, name):
    """What we say of a VM, in the words of the cases."""
    info = system.vm_info(name) if name is not None else None  # an element without one is no VM
    if info is None:
        return None
    root = info["volumes"].get("root")
    below = info
    while root is None and below["template"]:
        below = system.vm_info(below["template"])
        root = below["volumes"].get("root")
    return {
        "klass": info["klass"],
        "label": info["label"],
        "pool_name": info["pool"],
        "template": info["template"],
        "dir_path": info["dir_path"],
        "private_img": info["volumes"].get("private", {}).get("path"),
        "root_img": (root or {}).get("path"),
    }


def recorded(vm):
    """What R3.2 says of a VM, as :py:func:`seen` does."""
    templated = vm["template"] is not None
    found = {key: vm[key] for key in ("label", "pool_name", "template", "dir_path")}
    found["klass"] = scratch_system.KLASSES[vm["class"]][not templated]
    images = vm["class"] != "QubesAdminVm"  # dom0 has no images, R3.2 has paths for them
    found.update({k: vm[k] if images else None for k in ("private_img", "root_img")})
    return found


# -- what is written


@one("full_collection")
def test_new_elements_are_written_as_r32_writes_them(scratch, case):
    observed, ours = case["observed"]["result"], case["ours"]
    machine = scratch(case["input"]["conf"], template=False)
    machine.add_pools()
    machine.elements = []
    machine.write_registry()
    rows = re.findall(r"<(Qubes\w+) (.*?)/>", observed["xml_after_create"])
    names = {}
    for tag, text in rows:
        attrs = dict(re.findall(r'(\S+)="(.*?)"', text))
        names[attrs["qid"]] = attrs["name"]
        create(machine, tag, attrs, names.get(attrs["template_qid"]))

    expected = observed["xml_after_create"]
    for name, changed in ours["attrs"].items():
        for key, value in changed.items():
            row = re.search(f'<.* name="{name}".*/>', expected)[0]
            expected = expected.replace(row, re.sub(f' {key}="[^"]*"', f' {key}="{value}"', row))
    ours_text = machine.xml.decode("ascii")
    for key in ours["not_compared"]:
        expected = re.sub(f'(<Qubes(?!Admin|VmC).*?) {key}="[^"]*"', r"\1", expected)
        ours_text = re.sub(f'(<Qubes(?!Admin|VmC).*?) {key}="[^"]*"', r"\1", ours_text)
    expected = re.sub(r'firewall_conf="/\S*/', 'firewall_conf="', expected)
    assert ours_text == expected
    for entry in machine.entries().values():
        if entry.tag not in ("QubesAdminVm", "QubesDisposableVm"):
            assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", entry.attrs["uuid"])


def create(machine, tag, attrs, template):
    """Create what a recorded element says; what no create makes is written as it is."""
    if tag == "QubesAdminVm":
        return
    system = machine.connect()
    if tag == "QubesDisposableVm":
        attrs["firewall_conf"] = "firewall.xml"
        with system.locked() as found:
            system.save_registry(found.added(Entry(tag, attrs)))
        return
    klass = scratch_system.KLASSES[tag][template is None]
    declared = {"template": template, "label": attrs["label"], "pool": attrs["pool_name"]}
    system.create_vm(attrs["name"], klass=klass, **declared)


@one("full_collection")
@pytest.mark.parametrize("text", ["xml_after_create", "xml_after_load_save"])
def test_what_r32_wrote_is_read_as_r32_reads_it_and_saved_as_it_was(scratch, case, text):
    observed = case["observed"]["result"]
    machine = scratch(case["input"]["conf"])
    data = observed[text].replace("<UUID>", UUID).encode("ascii")
    machine.write(XML, data, 0o660)
    system = machine.connect()
    for vm in observed["loaded"]:
        assert seen(system, vm["name"]) == recorded(vm)
    assert list(system.list_vms()) == [vm["name"] for vm in observed["loaded"]]
    found = registry.load(system.root)
    for key, qid in observed["globals"].items():
        assert found.attrs[key[: -len("_qid")] if key.endswith("_qid") else key] == str(qid)
    with system.locked() as found:
        system.save_registry(found)
    assert machine.xml == data


@some("create_empty_")
def test_a_missing_registry_is_made_as_r32_makes_it(scratch, case):
    observed = case["observed"]["result"]
    machine = scratch(template=False)
    machine.path(XML).unlink()

    def lock():
        with machine.connect().locked():
            pass

    error, umask = run(lock, case["input"]["user"], case["input"]["umask"])[1:]
    assert (error, umask) == (None, case["input"]["umask"])
    assert machine.xml.decode() == observed["xml"]
    assert machine.tree()[XML]["mode"] == observed["stat"]["mode"]
    assert sorted(os.listdir(machine.path(LIB))) == observed["ls"]


@one("load_empty_adds_dom0")
def test_an_empty_registry_has_dom0_once_it_is_saved(scratch, case):
    machine = scratch(case["input"].get("conf", "[default]\ndriver=xen\n"), template=False)
    machine.write(XML, registry.empty().dumps(), 0o660)
    observed = case["observed"]["result"]
    system = machine.connect()
    before = machine.tree()
    assert {name: seen(system, name) for name in system.list_vms()} == {
        vm["name"]: recorded(vm) for vm in observed["vms"]
    }
    assert machine.tree() == before
    with system.locked() as found:
        system.save_registry(found)
    assert machine.xml.decode() == observed["xml"]


# -- what is read


@some("load_empty_no_", "load_default_pool")
def test_a_trouble_with_the_default_pool_hides_no_vm(scratch, case):
    ours = case["ours"]
    machine = scratch(case["input"]["conf"])
    system = machine.connect()
    assert set(system.list_vms()) == {"dom0", "fedora-23"}
    assert (system.pool_info("default") or {}).get("dir_path") == ours["default_dir_path"]
    assert seen(system, "fedora-23")["dir_path"] == ours["template_dir_path"]


LOADS = [case for case in cases("G_qubes_xml") if "element" in case.values[0]["input"]]


def damaged(scratch, case):
    """A system with the attributes of a case, and what the name of its VM is now."""
    machine = populated(scratch, case)
    given = case["input"]
    attrs = machine.attrs
    if given["element"]:
        attrs = next(a for tag, a in machine.elements if tag == given["element"])
    attrs.update(given["set"])
    for key in given["remove"]:
        attrs.pop(key, None)
    machine.write_registry()
    return machine, attrs.get("name")


@pytest.mark.parametrize("case", LOADS)
def test_a_vm_is_read_as_r32_reads_it_and_hides_no_other(scratch, case):
    observed, ours = case["observed"]["result"], case.get("ours", {})
    machine, name = damaged(scratch, case)
    before = machine.tree()
    system = machine.connect()
    names = {attrs.get("name") for _, attrs in machine.elements}
    assert set(system.list_vms()) == names - {None}
    for other in system.list_vms():
        assert system.vm_info(other)["klass"] == system.list_vms()[other]["klass"]
    if case["input"]["element"]:
        assert seen(system, name) == (ours["vm"] if "vm" in ours else recorded(observed["vm"]))
    if "qids" in observed:
        qids = [int(entry.attrs["qid"]) for entry in registry.load(system.root).entries]
        assert sorted(qids) == observed["qids"]
    system.orphans()
    assert [system.pool_info(pool) is None for pool in system.list_pools()].count(True) == 0
    assert machine.tree() == before


@pytest.mark.parametrize("case", LOADS)
def test_the_systems_defaults_are_read_as_r32_reads_them(scratch, case):
    observed, ours = case["observed"]["result"], case.get("ours", {})
    machine, _ = damaged(scratch, case)
    found = registry.load(machine.connect().root)
    effective = {"default_kernel": found.get("default_kernel")}
    for key in GLOBALS:
        entry = found.by_qid(found.get(key))
        effective[f"{key}_qid"] = int(entry.attrs["qid"]) if entry else None
    expected = ours.get("globals", observed.get("globals"))
    if expected is not None:
        assert effective == expected


@pytest.mark.parametrize("case", LOADS)
def test_a_save_keeps_every_other_byte(scratch, case):
    machine, _ = damaged(scratch, case)
    before = machine.xml
    machine.connect().create_vm("extra", klass="StandaloneVM")
    row = re.search(rb'\n  <QubesAppVm [^>]*name="extra"[^>]*/>', machine.xml)[0]
    assert machine.xml.replace(row, b"") == before


def registry_text(machine, case):
    """The text of a case about the text."""
    if "text" in case["input"]:
        return raw(case["input"]["text"])
    data = machine.registry_text()
    if case["id"] == "text_malformed":
        return data.replace(b"</QubesVmCollection>", b"  <<</QubesVmCollection>")
    if case["id"] == "text_unknown_element":
        return data.replace(b"  <QubesNetVm", b'  <!-- ours -->\n  <Foo bar="1"/>\n  <QubesNetVm')
    assert case["id"] == "text_entity"
    head = b'<!DOCTYPE QubesVmCollection [<!ENTITY e "work">]>\n'
    return head + data.replace(b'name="work"', b'name="&e;"')


@some("text_")
def test_a_text_that_cannot_be_read_is_left_alone_and_any_other_is_kept(scratch, case):
    machine = populated(scratch, case)
    data = registry_text(machine, case)
    machine.write(XML, data, 0o660)
    before = machine.tree()
    system = machine.connect()
    if case.get("ours", {}).get("refused", "exception" in case["observed"]["result"]):
        with pytest.raises(StoragePoolException, match=XML):
            system.list_vms()
        with pytest.raises(StoragePoolException, match=XML):
            system.create_vm("new", klass="StandaloneVM")
        assert machine.tree() == before
        return
    assert set(system.list_vms()) == {"dom0", "fedora-23", "sys-net", "sys-firewall", "work"}
    system.set_vm("work", label="blue")
    assert machine.xml == data.replace(b'label="green"', b'label="blue"')


# -- what is allowed


@one("verify_name")
def test_a_name_is_taken_where_r32_takes_it(case):
    ours = dict(map(tuple, case["ours"]["result"]))
    for name, verdict in case["observed"]["result"]:
        taken = True
        try:
            check_vm_name(name)
        except StoragePoolException:
            taken = False
        assert taken is ours.get(name, verdict.get("ok")), name


@one("add_new_vm_errors")
def test_what_cannot_be_added_is_refused_before_anything_is_written(scratch, case):
    machine = populated(scratch, case)
    system = machine.connect()
    before = machine.tree()
    for name, declared in (
        ("work", {}),
        ("dom0", {}),
        ("a", {"klass": "Nope"}),
        (None, {}),
        ("a", {"template": "work"}),
        ("a", {"template": "nope"}),
        ("a", {"klass": "HVM", "template": "fedora-23"}),
        ("a", {"label": "pink"}),
        ("a", {"pool": "nope"}),
    ):
        with pytest.raises(StoragePoolException):
            system.create_vm(name, **declared)
    assert machine.tree() == before


def added(found, name, klass, template="t"):
    """A registry with one more VM."""
    entry = VM(name, KLASSES[klass], template=template).new_entry(found, f"/{name}")
    return found.added(entry), (int(entry.attrs["qid"]), int(entry.attrs.get("netid", 0)))


@one("netid_allocation")
def test_numbers_are_the_smallest_that_are_free_and_run_out_as_in_r32(case):
    observed = case["observed"]["result"]
    found, _ = added(registry.with_dom0(registry.empty()), "t", "TemplateVM", None)
    given = []
    for name in ("n1", "n2", "n3", "n4"):
        found, numbers = added(found, name, "NetVM")
        given.append(numbers)
    found, _ = added(found, "a", "AppVM")
    found, numbers = added(found.replaced(found.by_name["n2"]), "n5", "NetVM")
    assert [*given, numbers] == [tuple(row[:2]) for row in observed["list"]]
    last = 0
    with pytest.raises(StoragePoolException, match="every qid from 1 to 253"):
        for number in range(300):
            found, (_, netid) = added(found, f"m{number}", "NetVM")
            last = max(last, netid)
    assert (len(found.entries), last) == (observed["count"], observed["max_netid"])
    assert [entry.number for entry in found.entries] == sorted(e.number for e in found.entries)


@one("global_defaults")
def test_the_first_vm_of_a_kind_becomes_the_systems_default(scratch, case):
    machine = scratch(template=False)
    machine.write(XML, registry.empty().dumps(), 0o660)
    system = machine.connect()
    for step, expected in case["ours"]["result"]:
        what, _, name = step.partition(" ")
        if what == "pop":
            with contextlib.suppress(StoragePoolException):
                system.remove_vm(name, purge=True)
        elif what != "start":
            klass = scratch_system.KLASSES[what][what == "QubesAppVm"]
            system.create_vm(name, klass=klass, standalone=True)
        found = registry.load(system.root) or registry.empty()
        for key, value in expected.items():
            is_ = found.attrs[key[: -len("_qid")] if key.endswith("_qid") else key]
            assert is_ == ("None" if value is None else str(value)), (step, key)


@one("labels")
def test_labels_icons_and_their_defaults_are_r32s(case):
    observed = case["observed"]["result"]
    by_index = sorted(observed["labels"], key=lambda label: observed["labels"][label]["index"])
    assert list(LABELS) == by_index
    for label in LABELS:
        assert ICONS.format(label) == observed["labels"][label]["icon_path"]
    defaults = observed["defaults"]
    assert KLASSES["AppVM"].label == defaults["appvm_label"]
    assert KLASSES["NetVM"].label == KLASSES["ProxyVM"].label == defaults["servicevm_label"]
    assert KLASSES["TemplateVM"].label == KLASSES["TemplateHVM"].label == defaults["template_label"]


# -- locks and saves


def r32_can_lock(machine):
    """Whether another process gets R3.2's lock now."""

    def lock():
        with open(machine.path(XML), "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

    return run(lock)[0]


@contextlib.contextmanager
def r32_holds(machine):
    """Another process holds R3.2's lock."""
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with open(machine.path(XML), "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(ready[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield lambda: os.write(release[1], b"x")
    finally:
        os.write(release[1], b"x")
        os.waitpid(child, 0)
        for fd in (*ready, *release):
            os.close(fd)


class Ours:
    """A process that reads or writes with the core; ``done`` tells whether it got through."""

    def __enter__(self):
        return self

    def __init__(self, machine, what):
        self.pipe = os.pipe()
        self.child = os.fork()
        if not self.child:
            system = machine.connect()
            if what == "reading":
                system.list_vms()
            else:
                system.set_vm("work", label="blue")
            os.write(self.pipe[1], b"x")
            os._exit(0)

    def done(self, seconds):
        return bool(select.select([self.pipe[0]], [], [], seconds)[0])

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        for fd in self.pipe:
            os.close(fd)


@some("lock_reading_", "lock_writing_")
def test_r32_and_we_keep_each_other_out(scratch, case):
    machine = populated(scratch, case)
    if case["input"]["first"] == "writing":
        with machine.connect().locked():
            assert r32_can_lock(machine) is not case["observed"]["result"]["blocked"]
        assert r32_can_lock(machine)
    blocked = case.get("ours", case["observed"]["result"])["blocked"]
    with r32_holds(machine) as release, Ours(machine, case["input"]["second"]) as ours:
        assert ours.done(0.3 if blocked else 10) is not blocked
        release()
        assert ours.done(10)


@one("lock_errors")
def test_a_lock_nests_and_follows_a_file_that_is_replaced(scratch, case):
    machine = populated(scratch, case)
    system = machine.connect()
    with system.locked() as outer, system.locked() as inner:
        assert outer is inner
    assert r32_can_lock(machine)
    with r32_holds(machine) as release, Ours(machine, "writing") as ours:
        assert not ours.done(0.2)
        data = machine.xml.replace(b'name="sys-net"', b'name="sys-nut"')
        machine.write(f"{LIB}/other", data, 0o660)
        os.replace(machine.path(f"{LIB}/other"), machine.path(XML))
        release()
        assert ours.done(10)
    assert machine.xml == data.replace(b'label="green"', b'label="blue"')


@one("lock_missing_file")
def test_locking_makes_a_registry_that_is_missing(scratch, case):
    machine = scratch(template=False)
    machine.path(XML).unlink()
    assert machine.connect().list_vms() == {}
    assert not machine.path(XML).exists()
    with machine.connect().locked() as found:
        assert list(found.by_name) == ["dom0"]
        assert not r32_can_lock(machine)
    assert machine.path(XML).exists()


@one("lock_readonly_file_user")
def test_a_registry_that_may_not_be_written_is_an_error_with_the_cure(scratch, case):
    machine = populated(scratch, case)
    os.chmod(machine.path(XML), 0o440)
    before = machine.tree()
    user = case["input"]["user"]
    assert set(run(machine.connect().list_vms, user)[0]) >= {"work"}
    error = run(lambda: machine.connect().set_vm("work", label="blue"), user)[1]
    assert "run as root or as a member of group qubes" in str(error)
    assert machine.tree() == before


@one("lock_kept_across_save")
def test_the_lock_is_kept_across_a_save(scratch, case):
    machine = populated(scratch, case)
    system = machine.connect()
    inode = os.stat(machine.path(XML)).st_ino  # opening it here would drop our own lock
    with system.locked() as found:
        system.save_registry(found)
        assert os.stat(machine.path(XML)).st_ino != inode
        assert not r32_can_lock(machine)
        system.list_vms()
        assert not r32_can_lock(machine)
    assert r32_can_lock(machine)


@one("save_dir_not_writable")
def test_a_save_that_fails_leaves_the_registry_and_no_vm(scratch, case):
    machine = populated(scratch, case)
    os.chmod(machine.path(LIB), 0o550)
    before = machine.tree()
    error = run(
        lambda: machine.connect().create_vm("new", klass="StandaloneVM"), case["input"]["user"]
    )[1]
    after = machine.tree()
    os.chmod(machine.path(LIB), 0o770)  # or an ordinary user could not delete it
    assert "qubes.xml: cannot be saved" in str(error)
    assert after == before


@one("save_no_qubes_group")
def test_a_machine_without_the_group_is_no_reason_to_fail(scratch, case):
    machine = populated(scratch, case)

    def save():
        owning.GROUP = "no-such-group"
        return machine.connect().set_vm("work", label="blue")

    changes, error, _ = run(save)
    assert error is None
    assert changes == {"label": {"old": "green", "new": "blue"}}
    assert machine.tree()[XML]["mode"] == "0660"
    ls = [name for name in case["observed"]["result"]["ls"] if "<TMP6>" not in name]
    assert sorted(os.listdir(machine.path(LIB))) == ls
