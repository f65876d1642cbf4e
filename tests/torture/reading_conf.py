"""
What has to hold for any storage.conf: it reads as R3.2 reads it, and an edit changes what it says.
"""

import re

from qubes_storage import conf
from qubes_storage.exc import InvalidInput

from tests.r32 import python27
from tests.r32.cases import load, raw

MODULES = [conf]
_LINES = [
    b"[foo]", b"[default] ; x", b"[DEFAULT]", b"[a]b]", b"[foo", b"driver = xen", b"k: 1 ; c",
    b"K=2;3", b" more", b"\tmore ; more", b"# c", b"; c", b"", b" ", b"rem c", b"REM", b"remark=1",
    b"k =", b'q = ""', b"k = ;x", b"k=;", b"= v", b"none", b"__name__ = x", b"k = \xff ;", b"\r",
]  # fmt: skip
WORDS = [
    *(line + b"\n" for line in _LINES), b"\n", b"\r\n", b" ", b"\t", b"\x0b", b"\x0c", b"\0",
    b"=", b":", b";", b" ;", b"#", b"[", b"]", b'""', b"rem ", b"\xff", "é".encode(), b"\xc2\x85",
]  # fmt: skip
_SECTIONS = ["foo", "default", "new", "DEFAULT", "a", "", "a]", "\n", "é", "\udcff", "a;b"]
_OPTIONS = ["k", "driver", "dir_path", "new", "q", "rem", "remark", "__name__", "", " k", "K", "k=",
            "#k", "[k]", "é", "a b"]  # fmt: skip
_VALUES = [None, None, "xen", "/mnt/a b", "", "1", "2;3", "a ; b", ";", '""', " a", "a\n", "a\nb",
           "é", "\udcff", "\ud800", "a\r", "\x0b", "a\0b"]  # fmt: skip
_SANE = re.compile(r"[A-Za-z0-9/_.-]+( [A-Za-z0-9/_.-]+)*")


def seeds():
    """The texts that R3.2 was recorded to read."""
    texts = [
        case["input"].get("text")
        for topic in ("A_storage_conf", "B_add_remove_pool")
        for case in load(topic)
    ]
    return [b"", *sorted({raw(text) for text in texts if text})]


def grammar(chance):
    """A text of lines that mean something."""
    lines = chance.choices(_LINES, k=chance.randrange(12))
    ending = chance.choice((b"\n", b"\n", b"\r\n"))
    return ending.join([b"[foo]", *lines]) + chance.choice((b"", ending))


def check(data, chance, root):
    """Read a text, edit it, remove a section."""
    del root
    try:
        wanted = python27.read(data)
    except python27.Wrong as err:
        wanted = err
    try:
        read = conf.Conf(data)
    except conf.ConfError as err:
        assert isinstance(wanted, python27.Wrong), (data, err)
        told = [int(number) for number in re.findall(r"line (\d+): ['\"]", str(err))]
        assert told[:1] == wanted.lines[:1] and set(told) >= set(wanted.lines[:5]), (data, err)
        return
    assert not isinstance(wanted, python27.Wrong), (data, wanted)
    pools = read.pools()
    assert pools == wanted.pools() and list(pools) == list(wanted.pools()), (data, pools)
    assert read.dumps() == data
    if chance.random() < 0.6:
        return
    section = chance.choice([*_SECTIONS, *pools])
    options = {
        chance.choice([*_OPTIONS, *pools.get(section, ())]): chance.choice(_VALUES)
        for _ in range(chance.choice((1, 1, 2)))
    }
    check_edit(data, section, options)
    if section != "DEFAULT":  # which is no pool
        check_removal(data, section)


def check_edit(data, section, options):
    """What was set is read back, and every other line is as it was; or the text is."""
    before, edited = python27.read(data), conf.Conf(data)
    case = (data, section, options)
    expected = before.pools()
    there = {**expected.get(section, _texts(before.defaults)), **options}
    expected[section] = {key: value for key, value in there.items() if value is not None}
    try:
        edited.edit(section, options)
    except InvalidInput:
        assert edited.dumps() == data and edited.pools() == before.pools(), case
        assert _is_odd(data) or not _is_sane(before, section, options), ("refused", *case)
        return
    after = python27.read(edited.dumps())
    assert after.pools() == edited.pools() == expected, case
    left = _others(data, before, section, options, False)
    lines = _others(edited.dumps(), after, section, options, section not in before.pools())
    assert _is_kept(left, lines, data, _inline(data, before, section, options)), (*case, lines)


def check_removal(data, section):
    """A section goes with all its pieces, and every line that is not one of them is as it was."""
    before, edited = python27.read(data), conf.Conf(data)
    edited.remove(section)
    after = python27.read(edited.dumps())
    assert after.pools() == {k: v for k, v in before.pools().items() if k != section}, data
    rest = iter(data.splitlines(True))
    assert all(line in rest for line in edited.dumps().splitlines(True)), data
    if section not in before.pools():
        assert edited.dumps() == data
    else:
        own = section.encode("utf-8", "surrogateescape")
        keep = sum(len(places) for (name, _), places in before.places.items() if name != own)
        assert sum(len(places) for places in after.places.values()) == keep, data


def _texts(options):
    return {_text(key): _text(value) for key, value in options.items() if key != b"__name__"}


def _text(data):
    return data.decode("utf-8", "surrogateescape")


def _is_odd(data):
    """Whether the last line is read otherwise once it ends with the others' return and new line."""
    return b";" in data.split(b"\n")[-1] and data.split(b"\n")[0].endswith(b"\r")


def _is_sane(before, section, options):
    """Whether nothing speaks against an edit."""
    inherited = _texts(before.defaults)
    return (
        section != "DEFAULT"
        and _SANE.fullmatch(section)
        and all(
            re.fullmatch("[a-z_]+", key)
            and key not in ("rem", "__name__")
            and (key not in inherited if value is None else _SANE.fullmatch(value))
            for key, value in options.items()
        )
    )


def _places(read, section, options):
    """The lines that an edit of these options may touch: for a value, those of the one in force."""
    own, found = section.encode("utf-8", "surrogateescape"), set()
    for key, value in options.items():
        there = read.places.get((own, key.encode("utf-8", "surrogateescape")), [])
        for lines in there if value is None else there[-1:]:
            found.update(lines)
    return found


def _others(data, read, section, options, is_new):
    lines = data.split(b"\n")
    skip = _places(read, section, options)
    if is_new:
        skip.update(read.headers[section.encode("utf-8", "surrogateescape")])
    return [line for n, line in enumerate(lines) if n not in skip]


def _inline(data, read, section, options):
    """What stands after a ``;`` on the lines that are touched: it may get a line of its own."""
    lines = data.split(b"\n")
    at = (lines[n] for n in _places(read, section, options))
    return {line[line.index(b";") :].strip() for line in at if b";" in line}


def _is_kept(old, new, data, inline):
    """Whether ``new`` has the lines of ``old`` in their order, and only what may be added."""
    ending = b"\r" if data.split(b"\n")[0].endswith(b"\r") else b""
    rest = iter(new)
    for line in old:
        for other in rest:
            if other == line or (line == old[-1] and other == line + ending):
                break
            if other.strip() and other.strip() not in inline:
                return False
        else:
            if line:
                return False
    return all(not line.strip() or line.strip() in inline for line in rest)
