"""
The text of qubes.xml: a collection of elements, each with its attributes and its bytes.

R3.2 writes it with lxml, in ASCII: an element a VM, attributes in alphabetical order, two spaces
before each. What is written here serialises what changed and reuses the bytes of everything else,
so unknown elements, attributes, comments and their order live on.
"""

import re
from xml.parsers import expat

from qubes_storage.exc import InvalidInput, OutOfStep, StoragePoolException
from qubes_storage.values import is_xml

PATH = "/var/lib/qubes/qubes.xml"
MAX_ID = 253  # R3.2: qid and netid are 1..253
_GLOBALS = (
    "clockvm", "default_fw_netvm", "default_kernel", "default_netvm", "default_template",
    "updatevm",
)  # fmt: skip
_DEFAULT = "default_netvm"
_NETVMS = ("QubesNetVm", "QubesProxyVm")
_SERVE = ("QubesAdminVm", *_NETVMS)  # R3.2 has none of them follow a default
_BACKUP = "restore it from a backup in /var/lib/qubes/backup"
_END = b"\n</QubesVmCollection>"
_TAG = re.compile(rb"<[^>\"']*(?:\"[^\"]*\"[^>\"']*|'[^']*'[^>\"']*)*>")
_DOM0 = {
    "autostart": "False", "backup_content": "False", "backup_path": "", "backup_size": "0",
    "conf_file": "dom0.conf", "debug": "False", "default_user": "user",
    "dir_path": "/var/lib/qubes/servicevms/dom0", "dispvm_netvm": "none",
    "firewall_conf": "firewall.xml", "include_in_backups": "True", "installed_by_rpm": "False",
    "internal": "False", "label": "black", "maxmem": "0", "memory": "300", "name": "dom0",
    "netid": "0", "pci_e820_host": "True", "pci_strictreset": "True", "pcidevs": "[]",
    "pool_name": "default", "qid": "0", "qrexec_timeout": "60",
    "services": "{'meminfo-writer': True}", "template_qid": "none",
    "uses_default_dispvm_netvm": "True", "vcpus": "0",
}  # fmt: skip
_ESCAPES = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;",
    "\t": "&#9;",
}  # fmt: skip


def _attributes(attrs):
    for name, value in attrs.items():
        if not is_xml(value):
            raise InvalidInput(f"{PATH}: {name} {value!r} has a character that XML has no form for")
        text = "".join(_ESCAPES.get(char, char) for char in value)
        yield b' %s="%s"' % (name.encode(), text.encode("ascii", "xmlcharrefreplace"))


def _collection(attrs):
    return b"".join([b"<QubesVmCollection", *_attributes(attrs), b">"])


class Entry:
    """A child element of the registry: its tag, its attributes, and its bytes if unchanged."""

    __slots__ = ("attrs", "lead", "raw", "tag")

    def __init__(self, tag, attrs, raw=None, lead=b"\n  "):
        self.tag = tag
        self.attrs = attrs
        self.raw = raw or b"".join(
            [b"<", tag.encode(), *_attributes(dict(sorted(attrs.items()))), b"/>"]
        )
        self.lead = lead

    def changed(self, **attrs):
        """The same element with other attributes; None removes one."""
        new = {k: v for k, v in {**self.attrs, **attrs}.items() if v is not None}
        head = _TAG.match(self.raw)[0]
        entry = Entry(self.tag, new, lead=self.lead)
        if not head.endswith(b"/>"):  # R3.2 writes no children, but what is inside stays inside
            entry.raw = entry.raw[:-2] + b">" + self.raw[len(head) :]
        return entry

    def flag(self, name, default):
        """A truth value as R3.2 reads one; ``default`` where there is none."""
        text = self.attrs.get(name)
        if text is None:
            return default
        if text.isascii() and text.isdigit():
            return bool(text.strip("0"))
        return text.lower() not in ("", "none", "false")

    @property
    def number(self):
        """The qid, or None where it is none that R3.2 takes."""
        qid = self.attrs.get("qid", "")
        is_short = qid.isascii() and qid.isdigit() and len(qid) < 10
        return int(qid) if is_short and int(qid) <= MAX_ID else None


def _number(text):
    """The number that R3.2 takes a qid or netid for, or None."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return None


class Registry:
    """What qubes.xml says: ``attrs`` of the collection (default_template...), and ``entries``."""

    def __init__(self, attrs, entries, head=None, tail=_END + b"\n"):
        self.attrs = attrs
        self.entries = entries
        self._head = head
        self._tail = tail
        self.by_name = {}
        self._by_qid = {}
        for entry in entries:
            if entry.tag.startswith("Qubes"):
                self.by_name.setdefault(entry.attrs.get("name"), entry)
                self._by_qid.setdefault(_number(entry.attrs.get("qid")), entry)
        self._by_qid.pop(None, None)  # one without is nobody's

    def by_qid(self, qid):
        """The entry that an attribute names, or None; R3.2 compares the numbers."""
        return self._by_qid.get(_number(qid))

    def uses(self, entry):
        """``{word: entry or None}`` of the VMs that one uses, as R3.2 loads them."""
        attrs, serves = entry.attrs, entry.tag in _SERVE
        follows = not serves and entry.flag("uses_default_netvm", True)
        found = {
            "template": attrs.get("template_qid"),
            "NetVM": self.get("default_netvm") if follows else attrs.get("netvm_qid"),
        }
        if not entry.flag("uses_default_dispvm_netvm", True):
            found["NetVM of the DispVMs"] = attrs.get("dispvm_netvm")
        return {word: self.by_qid(qid) for word, qid in found.items()}

    def get(self, key):
        """The qid that the collection's attribute ``key`` names, or None."""
        value = self.attrs.get(key, "None")
        return None if value.lower() == "none" else value

    def clockvm(self):
        """
        The qid that R3.2 takes where the collection has no such attribute: that of the VM behind
        the default NetVM which has no NetVM itself; None where nothing is the default.
        """
        found = above = self.by_qid(self.get(_DEFAULT))
        for _ in self.entries:  # as far as a chain goes that is no circle
            if above is None:
                break
            found, above = above, self.uses(above)["NetVM"]
        return found and found.attrs["qid"]

    def lacks(self, key):
        """
        Whether a new VM becomes what the collection's attribute ``key`` names, as R3.2 loads it.
        """
        if self.get(key) is None:
            return key != "clockvm" or key in self.attrs or self.clockvm() is None
        # One that names no VM is none, but for those that R3.2 gives the default NetVM then.
        names = {_DEFAULT: (_DEFAULT, "default_fw_netvm")}.get(key, (key,))
        others = key in ("clockvm", "updatevm")
        return not others and not any(self.by_qid(self.get(name)) for name in names)

    def copy(self, entries=None, attrs=None):
        """Another version: with other entries, or other attributes of the collection."""
        head = self._head
        if attrs not in (None, self.attrs) and head is not None:
            before = head[: head.rindex(b"<QubesVmCollection")]
            head = before + _collection(attrs)
        return Registry(
            self.attrs if attrs is None else attrs,
            self.entries if entries is None else entries,
            head,
            self._tail,
        )

    def unused(self, attr):
        """The smallest number of 1..253 that no VM has as its ``qid`` or ``netid``."""
        used = {_number(entry.attrs.get(attr)) for entry in self.entries}
        free = [number for number in range(1, MAX_ID + 1) if number not in used]
        taken = [e for e in self.entries if attr == "netid" and e.tag in _NETVMS]
        taken = [e for e in taken if _number(e.attrs.get(attr)) is None]  # R3.2 gives them these
        if len(free) > len(taken):
            return str(free[len(taken)])
        raise StoragePoolException(
            f"{PATH}: every {attr} from 1 to {MAX_ID} is taken; remove a VM first"
        )

    def added(self, entry):
        """This registry and a new entry, in R3.2's order: by qid."""
        entries = list(self.entries)
        place = len(entries)
        while place and (entries[place - 1].number or 0) > entry.number:
            place -= 1
        entries.insert(place, entry)
        return self.copy(entries)

    def replaced(self, old, new=None):
        """
        This registry with ``new`` in place of an entry, or without it; it has to have that one.

        One that was read from another version of the file counts as the same if it is alike.
        """
        place = next((n for n, e in enumerate(self.entries) if e is old or e.raw == old.raw), None)
        if place is None:
            raise OutOfStep(
                f"VM {old.attrs.get('name')}: {PATH} was changed meanwhile by somebody who does not"
                " lock it; run again"
            )
        entries = list(self.entries)
        entries[place : place + 1] = [new] if new else []
        return self.copy(entries)

    def dumps(self):
        """The text, as bytes."""
        head = self._head
        if head is None:
            head = _collection(self.attrs)
        if not self.entries and self._tail.startswith(_END):
            return head[:-1] + b"/>" + self._tail[len(_END) :]
        return b"".join([head, *(p for e in self.entries for p in (e.lead, e.raw)), self._tail])


def empty():
    """The collection that R3.2 makes where there is none."""
    return Registry(dict.fromkeys(_GLOBALS, "None"), [])


def loads(data, path=PATH):
    """
    The :py:class:`Registry` of a qubes.xml.

    Raises :py:class:`StoragePoolException` for what is not well-formed, is not UTF-8, is something
    else, or declares entities (R3.2 expands them; a registry has no use for one).
    """
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    found = {"depth": 0, "entries": []}

    def refuse(*_):
        raise StoragePoolException(
            f"{path}: declares a document type or entities; take the declaration out"
        )

    def declared(_, encoding, __):
        if encoding and encoding.lower() not in ("utf-8", "us-ascii", "ascii"):
            raise StoragePoolException(f"{path}: is declared to be in {encoding}; save it in UTF-8")

    def start(tag, attrs):
        index = parser.CurrentByteIndex
        if not found["depth"]:
            if tag != "QubesVmCollection":
                raise StoragePoolException(
                    f"{path}: is a <{tag}>, no <QubesVmCollection>; {_BACKUP}"
                )
            found.update(attrs=attrs, head=(index, index + len(_TAG.match(data, index)[0])))
        elif found["depth"] == 1:
            found["entries"].append([tag, attrs, index, index + len(_TAG.match(data, index)[0])])
        found["depth"] += 1

    def end(_):
        index = parser.CurrentByteIndex
        found["depth"] -= 1
        if found["depth"] == 1:
            entry = found["entries"][-1]
            if data[entry[3] - 2 : entry[3]] != b"/>":  # else the tag was the whole element
                entry[3] = index + len(_TAG.match(data, index)[0])
        elif not found["depth"]:
            found["tail"] = index

    parser.XmlDeclHandler = declared
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    if b"\0" in data:
        raise StoragePoolException(f"{path}: has a NUL, as no text in UTF-8; {_BACKUP}")
    try:
        data.decode("utf-8")
        parser.Parse(data, True)
    except (expat.ExpatError, UnicodeDecodeError) as err:
        raise StoragePoolException(f"{path}: {err}; {_BACKUP}") from err
    return _assemble(data, found)


def _assemble(data, found):
    start, stop = found["head"]
    head = data[:stop]
    if data[start:stop].endswith(b"/>"):
        return Registry(found["attrs"], [], data[: stop - 2] + b">", _END + data[stop:])
    entries = []
    for tag, attrs, first, last in found["entries"]:
        entries.append(Entry(tag, attrs, data[first:last], data[stop:first]))
        stop = last
    return Registry(found["attrs"], entries, head, data[stop:])


def with_dom0(registry):
    """R3.2's load adds dom0 to a collection that lacks it."""
    if registry.by_qid("0"):
        return registry
    return registry.copy([Entry("QubesAdminVm", dict(_DOM0)), *registry.entries])
