"""
R4's Admin API, as bytes on the socket of qubesd.

One call a connection: ``METHOD+ARG SRC name DEST`` NUL ``PAYLOAD``, then the sending side is
closed; nothing is answered before. The answer is ``0`` NUL and a content, ``2`` NUL and an
exception, or nothing at all, which is an outcome of its own: R4.2 and R4.3 say nothing where later
daemons raise (an unknown pool or volume, a bad number, an unknown method), and also where the call
was carried out and something failed afterwards. So nobody concludes anything from it: read the
state again.

It needs nothing but the standard library, and no qubesadmin.
"""

import functools
import re
import socket
import time
from typing import NamedTuple

from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.values import check_admin_vm_name

SOCKET = "/var/run/qubesd.sock"
MAX_BYTES = 65536  # of a whole request; qubesd drops a longer one without a word
KEEP = 5.0  # seconds that an answer of a reading call may be used again
_SAFE = "[A-Za-z0-9_.-]+"
_METHOD = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
# Calls that change nothing; whatever is not named here empties the cache.
_READING = re.compile(
    r"admin\.(pool|vm|label|vmclass|deviceclass)\.(List|ListDrivers|Info|UsageDetails|Get)"
    r"|admin\.pool\.volume\.List|admin\.(vm\.)?property\.(Get|GetAll|GetDefault|List)"
    r"|admin\.vm\.(volume\.(List|Info|ListSnapshots)|CurrentState)"
    r"|admin\.vm\.(feature\.(List|Get)|tag\.(List|Get)|notes\.Get|firewall\.Get)"
    r"|admin\.vm\.device\.[a-z]+\.(List|Assigned|Attached|Available)"
)
_kept = {}  # {socket: {request: (time, Answer)}}
_done = {}  # what others had done when it was last looked at


class Answer(NamedTuple):
    """
    What qubesd answered: ``kind`` is ``ok`` with a ``content``, ``exception`` with its class in
    ``error`` and its ``message``, ``events`` (which nobody here asks for), or ``empty``.
    """

    kind: str
    content: str = ""
    error: str = ""
    message: str = ""

    @property
    def ok(self):
        """Whether it is a content."""
        return self.kind == "ok"

    def __str__(self):
        if self.kind == "empty":
            return "qubesd answered nothing; its reason is in dom0's journalctl -u qubesd"
        return f"qubesd says {self.error}: {self.message}" if self.error else "qubesd says ok"


EMPTY = Answer("empty")


def request(method, dest="dom0", arg="", payload=b""):
    """
    The bytes of a call from dom0.

    Raises :py:class:`InvalidInput` for what the header cannot hold (a space, a NUL or a character
    that is not ASCII), for a destination that is no VM's name, and for more than 65,536 bytes.
    """
    if not _METHOD.fullmatch(method):
        raise InvalidInput(f"{method!r}: is no method of the Admin API")
    if not arg.isascii() or not (arg.isprintable() and " " not in arg):
        raise InvalidInput(
            f"{method}: argument {arg!r} has a space or a character that is not printable ASCII,"
            " which the Admin API cannot send; take another name"
        )
    check_admin_vm_name(dest)
    payload = payload.encode() if isinstance(payload, str) else payload
    data = f"{method}+{arg} dom0 name {dest}".encode("ascii") + b"\0" + payload
    if len(data) > MAX_BYTES:
        raise InvalidInput(
            f"{method}: {len(data)} bytes are more than the {MAX_BYTES} that the Admin API takes"
        )
    return data


def parse(data, what="qubesd"):
    """
    The :py:class:`Answer` of the bytes of a response.

    Raises :py:class:`StoragePoolException` for one that was cut off or is not understood; what
    follows the message of an exception is ignored.
    """
    if not data:
        return EMPTY
    try:
        if data.startswith(b"0\0"):
            return Answer("ok", data[2:].decode("utf-8"))
        if data.startswith(b"1\0") and data.endswith(b"\0\0"):
            return Answer("events", data[2:].decode("utf-8"))
        fields = data.split(b"\0")
        # 2 CLASS TRACEBACK MESSAGE, each with its NUL.
        if fields[0] == b"2" and len(fields) >= 5:
            error, message = (fields[n].decode("utf-8", "replace") for n in (1, 3))
            return Answer("exception", "", error, message)
    except UnicodeDecodeError:
        pass
    raise StoragePoolException(
        f"{what}: qubesd's answer was cut off or is not of the Admin API ({data[:60]!r}); see"
        " journalctl -u qubesd, and run again"
    )


def lines(content, what):
    """The lines of a content, each with its new line; raises for one that was cut off."""
    if content and not content.endswith("\n"):
        raise StoragePoolException(
            f"{what}: qubesd's answer was cut off at {content[-40:]!r}; see journalctl -u qubesd,"
            " and run again"
        )
    return content.split("\n")[:-1]


def pairs(content, what):
    """``{key: value}`` of the lines ``key=value``."""
    return dict(line.partition("=")[::2] for line in lines(content, what))


class Property(NamedTuple):
    """A property: its value as text, its type, and whether the value is the default."""

    value: str
    type: str
    default: bool


def properties(content, what):
    r"""
    ``{name: Property}`` of a GetAll: lines of ``NAME default=True type=TYPE VALUE``, in which a
    value's new lines are ``\n`` and its backslashes doubled.
    """
    found = {}
    for line in lines(content, what):
        fields = line.split(" ", 3)
        if len(fields) < 3:
            raise StoragePoolException(
                f"{what}: qubesd's answer has a line that is no property ({line[:60]!r}); see"
                " journalctl -u qubesd, and run again"
            )
        name, default, kind, value = (*fields, "")[:4]
        value = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value)
        found[name] = Property(value, kind.partition("=")[2], default == "default=True")
    return found


def check_pool_name(name):
    """A pool's name as the Admin API takes it: ``[A-Za-z0-9_.-]+``."""
    if not isinstance(name, str) or not re.fullmatch(_SAFE, name, re.ASCII):
        raise InvalidInput(
            f"pool {name!r}: R4 takes letters, digits, _ . - in a pool's name; choose one such as"
            " 'ssd', in quotes if it is a number"
        )
    return name


def check_label(name, what):
    """A label's name as the Admin API takes it."""
    if not isinstance(name, str) or not re.fullmatch(_SAFE, name, re.ASCII) or name.isdigit():
        raise InvalidInput(
            f"{what}: {name!r} is no label; see the list of labels in dom0 (qvm-ls -O label)"
        )
    return name


def check_value(value, what):
    """A value that can be a line of a payload: printable ASCII."""
    if not value.isascii() or not value.isprintable():
        raise InvalidInput(
            f"{what}: {value!r} has a new line or a character that is not ASCII, which the Admin"
            " API cannot take; write it without"
        )
    return value


def forget_before(begins, done):
    """
    Forget what was read when a run begins, and if others have done something since: ``done`` is a
    number that tells of it. So a run that asks for many VMs still asks for each once.
    """
    if begins or done != _done.get("by others"):
        _kept.clear()
    _done["by others"] = done


class Client:
    """
    Calls to the qubesd that listens on a socket.

    Answers of reading calls are kept for all clients of that socket in this process, because each
    function of Salt makes a system of its own and a run asks the same again and again. A kept
    answer is used for at most :py:data:`KEEP` seconds, any writing call forgets them all, and so
    do :py:meth:`refresh` and :py:func:`forget_before`. Whoever writes refreshes first, and who
    refuses looks again, so only "there is nothing to do" and what a test run shows can rest on a
    kept answer.

    There is no timeout: a ``file`` pool that copies an image stops the whole daemon until it has
    finished, and giving up then would leave half a change.
    """

    def __init__(self, path=SOCKET):
        self.path = path

    def refresh(self):
        """Forget what was read."""
        _kept.pop(self.path, None)

    def has_kept(self):
        """Whether anything that was read is kept."""
        return bool(_kept.get(self.path))

    def call(self, method, dest="dom0", arg="", payload=b""):
        """
        Make a call and return its :py:class:`Answer`.

        Raises :py:class:`StoragePoolException` if qubesd is not there or its answer was cut off,
        :py:class:`InvalidInput` for what must not be sent.
        """
        data = request(method, dest, arg, payload)
        if not _READING.fullmatch(method):
            try:
                return self._send(data, method)
            finally:
                self.refresh()
        kept = _kept.setdefault(self.path, {})
        found = kept.get(data)
        if found and time.monotonic() - found[0] < KEEP:
            return found[1]
        answer = self._send(data, method)
        kept[data] = (time.monotonic(), answer)
        return answer

    def _send(self, data, method):
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.path)
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                return parse(b"".join(iter(lambda: sock.recv(MAX_BYTES), b"")), method)
        except PermissionError as err:
            raise StoragePoolException(
                f"{self.path}: {err.strerror}; run as root or as a member of group qubes"
            ) from err
        except (FileNotFoundError, ConnectionRefusedError) as err:
            raise StoragePoolException(
                f"{self.path}: qubesd does not listen there; start it with systemctl start qubesd,"
                " or set qubes_storage.socket"
            ) from err
        except OSError as err:
            raise StoragePoolException(
                f"{method}: the connection to qubesd broke ({err.strerror}); see journalctl -u"
                " qubesd, and run again: what was done is read anew"
            ) from err

    def read(self, method, dest="dom0", arg=""):
        """The content of a reading call; raises where qubesd does not give one."""
        answer = self.call(method, dest, arg)
        if not answer.ok:
            of = f" of {arg}" if arg else ""
            at = f" for VM {dest}" if dest != "dom0" else ""
            raise Unreadable(f"{method}{of}{at}: {answer}")
        return answer.content


def fresh_if_refused(verb):
    """
    Make a verb that only looks refuse nothing on kept answers: what it refuses may have been made
    since they were read, by a step of the same run that we know nothing of.
    """

    @functools.wraps(verb)
    def looked(self, *args, **kwargs):
        try:
            return verb(self, *args, **kwargs)
        except StoragePoolException:
            if not self.client.has_kept():
                raise
            self.refresh()
            return verb(self, *args, **kwargs)

    return looked


class Unreadable(StoragePoolException):
    """Something could not be read; whether it is there has to be looked up in a list."""
