"""Sizes, options and names: what people write, made into one form, in one place."""

import os
import re

from qubes_storage.exc import InvalidInput

_UNITS = {
    "": 1,
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
    **{p: 1024**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)},
}
_SECTOR = 512
_TRUE = {"true", "1", "on", "yes"}
_FALSE = {"false", "0", "off", "no"}
# What R3.2 turns into something else than a string when it reads an attribute of qubes.xml.
_NOT_A_STRING = {"none", "true", "false"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse_size(value, what="size"):
    """
    Bytes of a size: a whole number, or one with KiB MiB GiB TiB, K M G T (1024) or kB MB GB TB
    (1000). Anything else, 0 and negative numbers included, is :py:class:`InvalidInput`.
    """
    text = str(value).strip() if isinstance(value, (int, str)) else ""
    match = re.fullmatch(r"(\d{1,20})\s*([A-Za-z]*)", text, re.ASCII)
    if not match or match[2] not in _UNITS or not int(match[1]):
        raise InvalidInput(
            f"{what}: {value!r} is not a size; write whole bytes, or a whole number with KiB, MiB,"
            " GiB, TiB, K, M, G, T (1024) or kB, MB, GB, TB (1000), such as 10GiB"
        )
    size = int(match[1]) * _UNITS[match[2]]
    if size > 2**63 - 1:
        raise InvalidInput(f"{what}: {value!r} is more than any file can hold (8 EiB)")
    return size


def format_size(size):
    """A size for people: ``10.0 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def shown(names, most=20):
    """Names for a message, in order, the first ``most`` of them."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def to_bool(value, what):
    """True or False as the Admin API reads them: true, 1, on, yes; false, 0, off, no."""
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise InvalidInput(f"{what}: {value!r} is neither true nor false")


def is_true(text):
    """The same of what the daemon tells, where whatever else there is counts as false."""
    return str(text).strip().lower() in _TRUE


def to_flag(value, what):
    """Whether a flag is set; None, as an empty line of a pillar gives it, is a flag that is not."""
    return False if value is None else to_bool(value, what)


def to_int(value, what):
    """A whole number, also one written as text."""
    if not isinstance(value, bool) and re.fullmatch(r"-?\d{1,19}", str(value).strip(), re.ASCII):
        return int(value)
    raise InvalidInput(f"{what}: {value!r} is not a whole number")


def normalise(option, value, type_=None, what=None):
    """
    The value of an option in the form that is compared: by the driver's type where it has one
    (``bool``, ``int``), as a path for ``dir_path``, else as text (17 = "17", True = "true").
    """
    what = what or option
    if type_ is bool:
        return to_bool(value, what)
    if type_ is int:
        return to_int(value, what)
    if option == "dir_path":
        return "/" + os.path.normpath(str(value)).lstrip("/") if value else ""
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def as_text(option, value, what):
    """
    The text that storage.conf gets for a value.

    Raises :py:class:`InvalidInput` for what is not a text, number or truth value.
    """
    if isinstance(value, bytes) or not isinstance(value, (str, int, float)):
        kind = type(value).__name__
        raise InvalidInput(f"{what}: option {option} is a {kind}; write a text or a number")
    try:
        str(value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as err:
        raise InvalidInput(
            f"{what}: option {option}: {value!r} cannot be written in UTF-8"
        ) from err
    return str(value)


def is_xml(text):
    """Whether XML has a form for each character of a text."""
    return not _NOT_XML.search(text)


def check_pool_name(name):
    """
    Refuse the name of a new pool that R3.2 could not read back.

    In storage.conf it is a section header, in qubes.xml an attribute that R3.2 turns into a number
    or a truth value if it looks like one; ``[DEFAULT]`` holds defaults and is no pool.
    """
    if not isinstance(name, str):
        raise InvalidInput(f"pool {name!r}: the name is not a text; put it in quotes")
    problem = None
    if not name:
        problem = "the name is empty"
    elif not name.isascii() or not name.isprintable():
        problem = "the name has a character that is not printable ASCII"
    elif "[" in name or "]" in name:
        problem = "the name has a bracket, which ends a section header of storage.conf"
    elif name != name.strip():
        problem = "the name begins or ends with a space"
    elif name.isdigit() or name.lower() in _NOT_A_STRING:
        problem = "R3.2 reads such a name in qubes.xml as a number or a truth value"
    elif name.lower() == "default" and name != "default":
        problem = "R3.2 keeps the name for defaults; the default pool is 'default'"
    if problem:
        raise InvalidInput(f"pool {name!r}: {problem}; choose a name such as 'ssd'")
    return name


def check_vm_name(name):
    """
    Refuse the name of a new VM that R3.2's ``verify_name`` refuses, and ``"a\\n"``, which it lets
    pass: 1 to 31 of ``a-z A-Z 0-9 _ . -``, a letter first, no ``-dm`` at the end, no word that
    qubes.xml would turn into something else, not ``default`` and not ``lost+found``.
    """
    taken = name == "default" or str(name).lower() in _NOT_A_STRING
    return _vm_name(name, taken, "default, none, true, false")


def check_admin_vm_name(name):
    """Refuse what no VM of R4 can be called: the same, but ``true`` and ``None`` are names."""
    return _vm_name(name, name in ("default", "none"), "default, none")


def _vm_name(name, taken, words):
    if not isinstance(name, str):
        raise InvalidInput(f"VM {name!r}: the name is not a text; put it in quotes")
    fits = re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}", name) and not name.endswith("-dm")
    if taken or not fits:
        raise InvalidInput(
            f"VM {name!r}: not a name for a VM; take 1 to 31 of a-z A-Z 0-9 _ . - with a letter"
            f" first, not ending in -dm, and none of {words}"
        )
    return name


def whole_sectors(size):
    """A size in bytes as a disk has it."""
    return min(size + -size % _SECTOR, 2**63 - _SECTOR)  # a file holds no more
