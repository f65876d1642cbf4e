"""qubes.xml as a text: what we did not change keeps its bytes."""

import os
import threading

import pytest
from qubes_storage import registry
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.registry import Entry

from tests.r32.machine import LIB, XML

ODD = b"""<?xml version="1.0"?>
<!-- a head -->
<QubesVmCollection default_template='1'   other="x &amp; y"
    clockvm="None">
\t<QubesAdminVm qid="0" name="dom0"/><!-- close by -->
  <QubesTemplateVm
     name="t"  qid='1' note="a &gt; b &#10; c > d"   />

  <Foreign><Child name="work">text &amp; more</Child></Foreign>
  <QubesAppVm qid="7" name="work" label="red" template_qid="1"><Inner/></QubesAppVm>
  <!-- a tail -->
</QubesVmCollection>
<!-- after -->
"""


@pytest.mark.parametrize("data", [ODD, ODD.replace(b"\n", b"\r\n"), registry.empty().dumps()])
def test_a_text_comes_back_byte_for_byte(data):
    assert registry.loads(data).dumps() == data


def test_a_change_touches_only_its_element():
    found = registry.loads(ODD)
    old = found.by_name["work"]
    new = found.replaced(old, old.changed(label="blue", qid=None)).dumps()
    assert new == ODD.replace(
        b'<QubesAppVm qid="7" name="work" label="red" template_qid="1">',
        b'<QubesAppVm label="blue" name="work" template_qid="1">',
    )


def test_what_is_added_and_taken_out_again_leaves_no_trace():
    found = registry.loads(ODD)
    for qid in ("2", "9"):
        entry = Entry("QubesAppVm", {"qid": qid, "name": "new", "b": "<&>\"\n\t\r'\u0105"})
        with_new = found.added(entry)
        row = b'\n  <QubesAppVm b="&lt;&amp;&gt;&quot;&#10;&#9;&#13;\'&#261;" name="new" qid="%s"/>'
        assert with_new.dumps().replace(row % qid.encode(), b"") == ODD
        again = registry.loads(with_new.dumps())
        assert again.by_name["new"].attrs == entry.attrs
        assert again.replaced(again.by_name["new"]).dumps() == ODD


def test_entries_stand_in_the_order_of_their_qids():
    found = registry.loads(ODD).added(Entry("QubesAppVm", {"qid": "2", "name": "new"}))
    assert [e.attrs.get("qid") for e in found.entries] == ["0", "1", None, "2", "7"]


def test_attributes_of_the_collection_change_alone():
    found = registry.loads(ODD)
    new = found.copy(attrs={**found.attrs, "clockvm": "7"}).dumps()
    head = b'<QubesVmCollection default_template="1" other="x &amp; y" clockvm="7">'
    assert new[new.index(b"\n\t<") :] == ODD[ODD.index(b"\n\t<") :]
    assert head in new
    assert registry.loads(new).attrs == {**found.attrs, "clockvm": "7"}
    assert new.startswith(ODD[: ODD.index(b"<QubesVmCollection")])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<QubesVmCollection>",
        b"<QubesVmCollection/><a/>",
        b"<Other/>",
        b'<QubesVmCollection a="1" a="2"/>',
        b'<QubesVmCollection a="\xff"/>',
        b"<!DOCTYPE a><QubesVmCollection/>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><QubesVmCollection d="&b;"/>',
        '<?xml version="1.0" encoding="UTF-16"?><QubesVmCollection/>'.encode("utf-16"),
        "<QubesVmCollection/>".encode("utf-16-le"),
        b'<?xml version="1.0" encoding="ISO-8859-1"?><QubesVmCollection/>',
        b'<?xml version="1.0" encoding="big5"?><QubesVmCollection/>',
        b'<?xml version="1.0" encoding="nope"?><QubesVmCollection/>',
        b"\0",
    ],
)
def test_what_is_no_registry_is_refused_with_path_and_cure(data):
    with pytest.raises(StoragePoolException, match=f"{XML}: .*(restore|take|save)"):
        registry.loads(data)


def test_an_empty_collection_keeps_what_stands_around_it():
    data = b"<!-- a -->\n<QubesVmCollection clockvm='1' /><!-- b -->"
    found = registry.loads(data)
    assert found.dumps() == data
    new = found.added(Entry("QubesAppVm", {"qid": "2", "name": "new"}))
    assert new.dumps() == (
        b"<!-- a -->\n<QubesVmCollection clockvm='1' >\n"
        b'  <QubesAppVm name="new" qid="2"/>\n</QubesVmCollection><!-- b -->'
    )
    assert new.replaced(new.by_name["new"]).dumps() == data


@pytest.mark.parametrize("value", ["a\x01b", "a\udcffb", "\ufffe"])
def test_what_xml_has_no_form_for_is_refused(value):
    with pytest.raises(InvalidInput, match=f"{XML}: label .* has a character that XML has no form"):
        registry.empty().added(Entry("QubesAppVm", {"name": "a", "label": value}))


def test_names_of_attributes_that_are_not_ascii_stay():
    data = (
        '<QubesVmCollection>\n  <QubesAppVm name="a" \u0105="1"/>\n</QubesVmCollection>\n'.encode()
    )
    found = registry.loads(data)
    new = found.replaced(found.by_name["a"], found.by_name["a"].changed(label="red"))
    assert registry.loads(new.dumps()).by_name["a"].attrs == {
        "name": "a", "\u0105": "1", "label": "red",
    }  # fmt: skip


def test_numbers_that_are_none_are_no_qids():
    for qid in ("", "abc", "-1", "254", "\u0663", "1.0", "9" * 5000):
        assert Entry("QubesAppVm", {"qid": qid}).number is None
    assert Entry("QubesAppVm", {}).number is None
    assert Entry("QubesAppVm", {"qid": "253"}).number == 253


def test_a_load_is_cached_until_the_file_changes(scratch):
    machine = scratch()
    root = machine.connect().root
    first = registry.load(root)
    assert registry.load(root) is first
    os.utime(machine.path(XML))
    assert registry.load(root) is not first
    machine.path(XML).unlink()
    assert registry.load(root) is None


def test_owner_group_and_mode_of_the_file(scratch):
    machine = scratch()
    if os.geteuid() == 0:
        os.chown(machine.path(XML), 1000, 1234)
    os.chmod(machine.path(XML), 0o644)
    old = os.stat(machine.path(XML))
    with registry.lock(machine.connect().root) as found:
        registry.save(machine.connect().root, found)
    new = os.stat(machine.path(XML))
    assert (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid)
    assert new.st_mode & 0o7777 == 0o660


def test_a_registry_behind_a_link_is_replaced_where_it_lies(scratch):
    machine = scratch()
    os.rename(machine.path(XML), machine.path("/mnt/real.xml"))
    machine.path(XML).symlink_to("/mnt/real.xml")
    # Where others may write, the link could be one that root made for something else.
    with pytest.raises(StoragePoolException, match="is a link in a directory that others may wri"):
        machine.connect().create_vm("work", klass="StandaloneVM")
    machine.path(LIB).chmod(0o755)
    machine.connect().create_vm("work", klass="StandaloneVM")
    assert machine.path(XML).is_symlink()
    assert b'name="work"' in machine.path("/mnt/real.xml").read_bytes()


def test_threads_wait_for_each_other(scratch):
    machine = scratch()
    errors = []

    def create(number):
        try:
            machine.connect().create_vm(f"vm{number}", klass="HVM")
        except Exception as err:
            errors.append(err)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {f"vm{number}" for number in range(8)} <= set(machine.connect().list_vms())
    qids = [e.attrs["qid"] for e in registry.loads(machine.xml).entries]
    assert len(qids) == len(set(qids))


def test_no_handle_stays_open(scratch):
    machine = scratch()
    system = machine.connect()
    system.create_vm("first", klass="HVM")
    before = sorted(os.listdir("/proc/self/fd"))
    system.create_vm("work", klass="StandaloneVM", template="fedora-23")
    system.remove_vm("work", purge=True)
    with pytest.raises(StoragePoolException):
        system.create_vm("work", template="nope")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert [n for n in os.listdir(machine.path(LIB)) if n.startswith(".")] == []


def test_a_number_is_taken_however_it_is_written():
    numbers = ("1", " 2", "+3", "04", "x", None)
    found = registry.Registry({}, [Entry("QubesAppVm", {"qid": n} if n else {}) for n in numbers])
    assert found.unused("qid") == "5"
    assert found.by_qid(None) is None
