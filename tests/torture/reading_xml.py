"""
What has to hold for any qubes.xml: it is read, and then a change touches nothing else; or it is
refused with path and cure; and as long as nothing is set, the file is left alone.
"""

import itertools
import os
import re
from xml.etree import ElementTree

from qubes_storage import collection, registry
from qubes_storage.collection import Entry
from qubes_storage.exc import StoragePoolException
from qubes_storage.vm import VM

from tests.r32.cases import load, text
from tests.r32.machine import DOM0, KLASSES, TEMPLATE, element

MODULES = [collection, registry]
_TAGS = ["QubesAppVm", "QubesTemplateVm", "QubesNetVm", "QubesHVm", "QubesAdminVm", "Qubes",
         "Other", "QubesDisposableVm", "QubesVmCollection", "é", "a:b"]  # fmt: skip
_KEYS = ["qid", "name", "label", "template_qid", "pool_name", "netid", "dir_path", "uuid",
         "kernel", "default_template", "default_netvm", "clockvm", "é", "xml:lang", "xmlns",
         "a.b"]  # fmt: skip
_VALUES = ["0", "1", "7", "253", "254", "-1", "9" * 5000, "٣", "", "None", "none", "True", "work",
           "dom0", "a b", "&lt;&gt;", "&#10;", "&#0;", "é", "&#x10ffff;", "&nope;", "../x", "{}",
           "[1, 2]", "default", ">"]  # fmt: skip
_MISC = [b"<!-- c -->", b"<?p i?>", b"text", b"&amp;", b"<![CDATA[ <a> ]]>", b"\n  ", b"\r\n", b""]
_HEADS = [b"", b"", b"", b'<?xml version="1.0"?>\n', b"<?xml version='1.0' encoding='UTF-8'?>",
          b'<?xml version="1.0" encoding="ISO-8859-1"?>', b'<?xml version="1.1" encoding="x"?>',
          b'<?xml version="1.0" encoding="UTF-7"?>', b'<?xml version="1.0" encoding="utf-16"?>',
          b'<?xml version="1.0" encoding="big5"?>', b"\xef\xbb\xbf", b"<!-- c -->\n", b"\n",
          b'<!DOCTYPE a [<!ENTITY b "c">]>', b'<!DOCTYPE a SYSTEM "file:///etc/passwd">',
          b'<!DOCTYPE QubesVmCollection PUBLIC "a" "http://b/">']  # fmt: skip
WORDS = [
    *_HEADS, *_MISC, *(value.encode() for value in _VALUES), *(tag.encode() for tag in _TAGS),
    *(f' {key}="1"'.encode() for key in _KEYS), b"<", b">", b"/>", b"</", b'"', b"'", b"=", b"&",
    b"</QubesVmCollection>", b"<QubesVmCollection>", b"<QubesVmCollection/>", b"\0", b"\xff",
    b"<a>" * 300, b'<QubesAppVm qid="9" name="x"/>',
]  # fmt: skip
_SET = [None, "", "1", "blue", "a\"b<&>'\n\t\r", "é", "\U0001f600", "]]>", "&amp;"]
_VALUE = r"(?:[ !#-%'-;=-~]|&(?:amp|lt|gt|quot|#(?:9|10|13));)*"
_ELEMENT = rf'(?:Qubes[A-Za-z]+)(?: ([a-z_]+)="{_VALUE}")*'
_PLAIN = re.compile(
    rf'<QubesVmCollection(?: [a-z_]+="{_VALUE}")*>(?:\n  <{_ELEMENT}/>)*\n</QubesVmCollection>\n'
)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_times = itertools.count(10**18)


def seeds():
    """Registries as R3.2 writes them, with each element that one was recorded to read."""
    entries = [DOM0, TEMPLATE, *(element(tag, f"vm{n}", n) for n, tag in enumerate(KLASSES, 2))]
    found = [_written(entries), _written([]), collection.empty().dumps()]
    for case in load("G_qubes_xml"):
        given = case["input"]
        if given.get("element"):
            attrs = {k: text(v) for k, v in given.get("set", {}).items()}
            _, start = element(given["element"], "work", 9)
            kept = {k: v for k, v in {**start, **attrs}.items() if k not in given["remove"]}
            found.append(_written([DOM0, (given["element"], kept)]))
    return found


def _written(entries):
    registry_ = collection.Registry({"default_template": "1"}, [])
    for tag, attrs in entries:
        registry_ = registry_.copy([*registry_.entries, Entry(tag, attrs)])
    return registry_.dumps()


def grammar(chance):
    """A collection that is nearly well-formed, with odd attributes and children."""

    def attributes():
        keys = dict.fromkeys(chance.choices(_KEYS, k=chance.randrange(5)))
        quote = chance.choice('""\'')
        return "".join(f" {key}={quote}{chance.choice(_VALUES)}{quote}" for key in keys).encode()

    def one(depth):
        tag = chance.choice(_TAGS).encode()
        head = b"<" + tag + attributes() + chance.choice((b"", b"", b" ", b"\n"))
        if depth > 3 or chance.random() < 0.6:
            return head + b"/>"
        return head + b">" + several(depth + 1) + b"</" + tag + b">"

    def several(depth):
        return b"".join(
            chance.choice(_MISC) + one(depth) + chance.choice(_MISC)
            for _ in range(chance.randrange(4))
        )

    head = chance.choice(_HEADS) + b"<QubesVmCollection" + attributes()
    if chance.random() < 0.1:
        return head + b"/>" + chance.choice(_MISC)
    whole = head + b">" + several(0) + b"</QubesVmCollection>" + chance.choice(_MISC)
    return whole.decode().encode("utf-16-le") if chance.random() < 0.02 else whole


def check(data, chance, root):
    """Read a file, change it in each way, save it."""
    path = os.path.join(root, registry.PATH.lstrip("/"))
    with open(path, "wb") as file:
        file.write(data)
    now = next(_times)
    os.utime(path, ns=(now, now))
    before = _watched(path)
    try:
        found = registry.load(root)
    except StoragePoolException as err:
        assert str(err).startswith(f"{registry.PATH}: "), (data, err)
        assert re.search("; (restore|take|save) ", str(err)), (data, err)
        assert _watched(path) == before, data
        assert not _is_plain(data), (data, err)
        return
    assert _watched(path) == before, data
    plain = collection.loads(data)
    assert plain.dumps() == data or not plain.entries, data
    if b":" not in data and b"xmlns" not in data:
        told = [(child.tag, child.attrib) for child in ElementTree.fromstring(data)]
        assert [(entry.tag, entry.attrs) for entry in plain.entries] == told, data
    for entry in found.entries:
        vm = VM.of(entry, found)
        assert vm is None or (vm.name and vm.klass and vm.images is not None)
    if chance.random() < 0.4:
        check_change(data, found, chance)
    if chance.random() < 0.05:
        changed = found.copy(attrs={**found.attrs, "clockvm": "1"})
        with registry.lock(root):
            registry.save(root, changed)
        with open(path, "rb") as file:
            assert file.read() == changed.dumps(), data
        assert registry.load(root) is changed, data
        assert _watched(path)[0] == before[0], data


def check_change(data, found, chance):
    """A change of one element, a new one, or an attribute of the collection is all that differs."""
    attrs = {chance.choice(_KEYS[:10]): chance.choice(_SET) for _ in range(chance.choice((1, 2)))}
    kept = [(entry.tag, entry.attrs) for entry in found.entries]
    entry = chance.choice(found.entries)
    at = found.entries.index(entry)
    wanted = {k: v for k, v in {**entry.attrs, **attrs}.items() if v is not None}
    again = _again(found, found.replaced(entry, entry.changed(**attrs)), data, attrs)
    assert again == [*kept[:at], (entry.tag, wanted), *kept[at + 1 :]], (data, attrs)
    again = _again(found, found.replaced(entry), data, "removed", entry.raw + entry.lead)
    assert again == [*kept[:at], *kept[at + 1 :]], (data, at)
    given = {**found.attrs, **{k: v for k, v in attrs.items() if v is not None}}
    assert _again(found, found.copy(attrs=given), data, attrs) == kept, (data, attrs)
    try:
        new = Entry("QubesAppVm", {"name": "new", "qid": found.unused("qid")})
    except StoragePoolException:
        assert len(found.entries) > collection.MAX_ID
        return
    again = _again(found, found.added(new), data, "added")
    assert sorted(again, key=repr) == sorted([*kept, (new.tag, new.attrs)], key=repr), data


def _again(found, changed, data, what, gone=b""):
    """The elements that a changed registry reads as; its comments are as they were."""
    text_ = changed.dumps()
    try:
        again = collection.loads(text_)
    except StoragePoolException as err:
        raise AssertionError(f"{data!r} with {what} is written as {text_!r}: {err}") from err
    assert again.attrs == changed.attrs, (data, what)
    comments = _COMMENT.findall(found.dumps())
    left = [comment for comment in comments if comment not in gone]
    assert [c for c in _COMMENT.findall(text_) if c in left] == left, (data, what)
    return [(entry.tag, entry.attrs) for entry in again.entries]


def _watched(path):
    place = os.path.dirname(path)
    found = os.stat(path)
    with open(path, "rb") as file:
        return set(os.listdir(place)), found.st_ino, found.st_mtime_ns, file.read()


def _is_plain(data):
    """Whether it is what R3.2 writes."""
    try:
        text_ = data.decode("ascii")
    except UnicodeDecodeError:
        return False
    if not _PLAIN.fullmatch(text_):
        return False
    tags = re.findall("<[^>]*>", text_)
    keys = [re.findall(' ([a-z_]+)="', re.sub('"[^"]*"', '""', tag)) for tag in tags]
    return all(len(set(found)) == len(found) for found in keys)
