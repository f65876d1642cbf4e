"""
The reader of R3.2, told again: what the RawConfigParser of Python 2.7 makes of the bytes of a file.

It is the measure for our own reader, so it follows the steps of Python's, in their order, and has
nothing of ours. :py:func:`test_the_measure_is_python_2_7` holds it against the real one.
"""

import re

_SECTION = re.compile(rb"\[(?P<header>[^]]+)\]")
_OPTION = re.compile(rb"(?P<option>[^:=\s][^:=]*)\s*(?P<vi>[:=])\s*(?P<value>.*)$")


class Wrong(Exception):
    """It cannot be parsed; ``lines`` are the numbers of those that are wrong, from 1."""

    def __init__(self, lines):
        super().__init__(f"lines {lines}")
        self.lines = lines


class Read:
    """
    ``sections`` and ``defaults``: ``{name: {option: value}}``, all of it bytes; ``places``:
    ``{(section, option): [[line, continuation, ...], ...]}``, and ``headers``: ``{section: [line,
    ...]}``, both with numbers from 0.
    """

    def __init__(self):
        self.sections = {}
        self.defaults = {}
        self.places = {}
        self.headers = {}

    def pools(self):
        """``{section: {option: value}}``: each section's own, then what [DEFAULT] adds."""
        found = {}
        for section, own in self.sections.items():
            merged = dict(own)
            for key, value in self.defaults.items():
                merged.setdefault(key, value)
            merged.pop(b"__name__", None)
            found[_text(section)] = {_text(k): _text(v) for k, v in merged.items()}
        return found


def _text(data):
    return data.decode("utf-8", "surrogateescape")


def read(data):
    """The :py:class:`Read` of a file; raises :py:class:`Wrong`."""
    found = Read()
    section = values = option = None
    wrong = []
    for number, line in enumerate(data.split(b"\n")):
        if line.strip() == b"" or line[0:1] in (b"#", b";"):
            continue
        if line.split(None, 1)[0].lower() == b"rem" and line[0:1] in (b"r", b"R"):
            continue
        if line[0:1].isspace() and values is not None and option:
            values[option].append(line.strip())
            found.places[section, option][-1].append(number)
            continue
        match = _SECTION.match(line)
        if match:
            section = match.group("header")
            values = found.defaults if section == b"DEFAULT" else None
            if values is None:
                values = found.sections.setdefault(section, {})
            found.headers.setdefault(section, []).append(number)
            option = None
            continue
        if values is None:
            raise Wrong([number + 1])
        match = _OPTION.match(line)
        if not match:
            wrong.append(number + 1)
            continue
        option = match.group("option").rstrip().lower()
        value = match.group("value")
        if b";" in value:
            at = value.find(b";")
            if bytes([value[at - 1]]).isspace():
                value = value[:at]
        value = value.strip()
        values[option] = [b"" if value == b'""' else value]
        found.places.setdefault((section, option), []).append([number])
    if wrong:
        raise Wrong(wrong)
    for values in (found.defaults, *found.sections.values()):
        for name in values:
            values[name] = b"\n".join(values[name])
    return found
