"""
storage.conf: read exactly as R3.2 reads it, changed in its text.

R3.2 uses the RawConfigParser of Python 2.7, which reads bytes, knows ``=`` and ``:``, an inline
comment after white space and ``;``, ``rem`` lines, continuation lines, ``[DEFAULT]``, and merges
duplicates. Python 3's configparser agrees with it on few of these, so the reader is our own.
"""

import bisect
import re

from qubes_storage.exc import InvalidInput, StoragePoolException

_SECTION = re.compile(rb"\[(?P<header>[^]]+)\]")
_OPTION = re.compile(rb"(?P<option>[^:=\s][^:=]*)(?P<vi>[:=])\s*(?P<value>.*)$")
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")
_DEFAULT = "DEFAULT"


class ConfError(StoragePoolException):
    """storage.conf cannot be parsed: R3.2 could not start a tool with it. Names line and cure."""


def _encode(text):
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as err:
        raise InvalidInput(f"{text!r} cannot be written in UTF-8") from err


def _decode(data):
    return data.decode("utf-8", "surrogateescape")


def loads(text, path="/etc/qubes/storage.conf"):
    """
    ``{section: {option: value}}`` of a storage.conf, as R3.2 reads it.

    ``text`` is a str or bytes; bytes that are not UTF-8 come back as surrogate escapes. The values
    of ``[DEFAULT]`` are in each section, after its own. Raises :py:class:`ConfError`, with line and
    cure, for what R3.2 cannot parse.
    """
    return Conf(text, path).pools()


class _Option:
    """Where an option stands: its line, its continuation lines, and what the line holds."""

    def __init__(self, line, match):
        self.line = line
        self.more = []
        value = match["value"]
        self.start = match.start("value")
        semicolon = value.find(b";")
        # Python 2.7 looks at the character before; before the first one it looks at the last.
        if semicolon != -1 and value[semicolon - 1 : semicolon or None].isspace():
            value = value[:semicolon]
        value = value.strip()
        self.end = self.start + len(value)
        self.values = [b"" if value == b'""' else value]

    @property
    def value(self):
        return _decode(b"\n".join(self.values))


class Conf:
    """The text of a storage.conf; every change is made in it, and all else stays as it was."""

    def __init__(self, text=b"", path="/etc/qubes/storage.conf"):
        self.path = path
        self._parse(_encode(text) if isinstance(text, str) else bytes(text))

    def _parse(self, data):
        self.lines = _LINES.findall(data)
        self.headers = {}  # section: the lines of its headers, for it may come twice
        self.options = {}  # section: {option: [_Option, ...]}, the last one counts
        section = option = None
        wrong = []
        for number, line in enumerate(self.lines):
            if not line.strip() or line[:1] in (b"#", b";"):
                continue
            if line[:1] in (b"r", b"R") and line.split(None, 1)[0].lower() == b"rem":
                continue
            if line[:1].isspace() and section is not None and option:
                option.more.append(number)
                option.values.append(line.strip())
                continue
            match = _SECTION.match(line)
            if match:
                section = _decode(match["header"])
                self.headers.setdefault(section, []).append(number)
                self.options.setdefault(section, {})
                option = None
                continue
            if section is None:
                raise self._error([number], "no [section] stands before it; put one there")
            match = _OPTION.match(line)
            if match:
                option = _Option(number, match)
                name = _decode(match["option"].rstrip().lower())
                self.options[section].setdefault(name, []).append(option)
            else:
                wrong.append(number)
        if wrong:
            raise self._error(
                wrong, "neither 'option = value' at the start of a line nor a comment; mend it"
            )

    def _error(self, numbers, cure):
        shown = ", ".join(f"line {n + 1}: {_decode(self.lines[n].strip())!r}" for n in numbers[:5])
        return ConfError(f"{self.path} cannot be read, by R3.2 neither: {shown}: {cure}")

    def own(self, section):
        """``{option: value}`` that a section itself says; ``__name__`` is R3.2's and no option."""
        found = self.options.get(section, {})
        return {name: at[-1].value for name, at in found.items() if name != "__name__"}

    def pools(self):
        """``{section: {option: value}}``, with what ``[DEFAULT]`` says for every section."""
        defaults = self.own(_DEFAULT)
        return {
            section: {**self.own(section), **{k: v for k, v in defaults.items() if k not in own}}
            for section, own in self.options.items()
            if section != _DEFAULT
        }

    def dumps(self):
        """The text, as bytes."""
        return b"".join(self.lines)

    def edit(self, section, options):
        """
        Set the options of a section, made at the end if it is new; the value None removes one.

        What would not be read back as it is written raises :py:class:`InvalidInput`, and the text
        stays as it was.
        """
        before = self.dumps()
        expected = self.pools()
        wanted = expected.setdefault(section, dict(self.own(_DEFAULT)))
        try:
            if section not in self.headers:
                self._append(section)
            for option, value in options.items():
                if value is None:
                    self._remove_option(section, option)
                    wanted.pop(option, None)
                elif wanted.get(option) != value:
                    self._set_option(section, option, value)
                    wanted[option] = value
            if self.pools() != expected:
                raise InvalidInput(self._not_read_back(section, expected))
        except (InvalidInput, ConfError) as err:
            self._parse(before)
            if isinstance(err, ConfError):
                raise InvalidInput(f"pool {section}: would not be read back: {err}") from err
            raise

    def _not_read_back(self, section, expected):
        found, wanted = self.pools().get(section, {}), expected[section]
        wrong = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        shown = ", ".join(f"{k} = {wanted.get(k)!r}" for k in wrong) or "its name"
        if any(k not in wanted for k in wrong):
            cure = f"[DEFAULT] gives {', '.join(wrong)} to every pool: remove it there"
        else:
            cure = (
                "leave out ' ;', '\"\"', new lines, spaces at the ends, and in a name : = # ; [ ]"
            )
        return f"pool {section!r}: {self.path} would not be read back as written: {shown}; {cure}"

    def remove(self, section):
        """Remove a section: its headers, its options, and the comments between them."""
        drop = set()
        stops = self._stops(section)
        for start in self.headers.get(section, []):
            stop = stops.get(start, start)
            drop.update(range(start, stop + 1))
            above, below = self.lines[start - 1 : start], self.lines[stop + 1 : stop + 2]
            if above and not above[0].strip() and not (below and below[0].strip()):
                drop.add(start - 1)
        self._rewrite([line for n, line in enumerate(self.lines) if n not in drop])

    def _stops(self, section):
        """``{line of a header: last line of its options}``; what stands below a header is its."""
        headers = sorted(n for at in self.headers.values() for n in at)
        stops = {}
        for at in (at for places in self.options.get(section, {}).values() for at in places):
            start = headers[bisect.bisect_left(headers, at.line) - 1]
            stops[start] = max(stops.get(start, start), at.line, *at.more)
        return stops

    def _rewrite(self, lines):
        self._parse(b"".join(lines))

    @property
    def _newline(self):
        return b"\r\n" if self.lines and self.lines[0].endswith(b"\r\n") else b"\n"

    def _append(self, section):
        lines = list(self.lines)
        if lines and not lines[-1].endswith(b"\n"):
            lines[-1] += self._newline
        blank = [self._newline]
        spaced = bool(lines) and not lines[-1].strip()  # as R3.2 writes it, after each section
        header = b"[" + _encode(section) + b"]" + self._newline
        lines += [header, *blank] if spaced else [*(blank if lines else ()), header]
        self._rewrite(lines)
        if section not in self.headers:
            raise InvalidInput(f"pool {section!r}: is no name that a section of storage.conf takes")

    def _set_option(self, section, option, value):
        places = self.options[section].get(option)
        data = _encode(value)
        lines = list(self.lines)
        if not places:
            at = self._last_line(section)
            if not lines[at].endswith(b"\n"):
                lines[at] += self._newline
            lines.insert(at + 1, _encode(option) + b" = " + data + self._newline)
        else:
            old = places[-1]
            line = lines[old.line]
            head, tail = line[: old.start].rstrip(b"\r\n"), line[old.end :]
            if head.endswith((b"=", b":")) and not old.values[0]:
                head += b" "
            above = []
            if tail.strip() and (b";" in data or not data or not tail[:1].isspace()):
                # Beside this value the comment would be read as part of it: it gets its own line.
                above = [tail.strip() + self._newline]
                tail = tail[len(tail.rstrip(b"\r\n")) :]
            more = set(old.more)
            below = [line for n, line in enumerate(lines) if n > old.line and n not in more]
            lines[old.line :] = [*above, head + data + (tail or self._newline), *below]
        self._rewrite(lines)

    def _last_line(self, section):
        start = self.headers[section][-1]
        places = (at for places in self.options[section].values() for at in places)
        return max([start, *(max([at.line, *at.more]) for at in places if at.line > start)])

    def _remove_option(self, section, option):
        drop = {
            number for at in self.options[section].get(option, ()) for number in (at.line, *at.more)
        }
        if drop:
            self._rewrite([line for n, line in enumerate(self.lines) if n not in drop])
