"""The system calls that change files, and the lines in which strace shows them."""

import os
import re
from typing import NamedTuple

# Name: where its paths are, as (argument of the directory's handle or None, argument of the name);
# a lone number is an argument that is a handle. In the order of their arguments.
CALLS = {
    "open": [(None, 0)], "openat": [(0, 1)], "openat2": [(0, 1)], "creat": [(None, 0)],
    "write": [0], "pwrite64": [0], "writev": [0], "pwritev": [0], "pwritev2": [0],
    "copy_file_range": [0, 2], "sendfile": [0, 1], "splice": [0, 2], "vmsplice": [0],
    "truncate": [(None, 0)], "ftruncate": [0], "fallocate": [0],
    "rename": [(None, 0), (None, 1)], "renameat": [(0, 1), (2, 3)], "renameat2": [(0, 1), (2, 3)],
    "link": [(None, 0), (None, 1)], "linkat": [(0, 1), (2, 3)],
    "symlink": [(None, 1)], "symlinkat": [(1, 2)],
    "unlink": [(None, 0)], "unlinkat": [(0, 1)], "rmdir": [(None, 0)],
    "mkdir": [(None, 0)], "mkdirat": [(0, 1)], "mknod": [(None, 0)], "mknodat": [(0, 1)],
    "chmod": [(None, 0)], "fchmod": [0], "fchmodat": [(0, 1)], "fchmodat2": [(0, 1)],
    "chown": [(None, 0)], "lchown": [(None, 0)], "fchown": [0], "fchownat": [(0, 1)],
    "utime": [(None, 0)], "utimes": [(None, 0)], "futimesat": [(0, 1)], "utimensat": [(0, 1)],
    "setxattr": [(None, 0)], "lsetxattr": [(None, 0)], "fsetxattr": [0],
    "removexattr": [(None, 0)], "lremovexattr": [(None, 0)], "fremovexattr": [0],
    "ioctl": [0], "fsync": [0], "fdatasync": [0], "sync_file_range": [0], "syncfs": [0],
    "sync": [], "msync": [], "flock": [0], "fcntl": [0],
}  # fmt: skip
_CREATES = ("O_CREAT", "O_TRUNC", "O_TMPFILE")
_LOOKS = (
    "FS_INFO", "INO_LOOKUP", "GETVERSION", "TCGETS", "FIGETBSZ", "GETFLAGS", "FIEMAP", "BLKGETSIZE",
    "0x58, 0x7c",  # XFS_IOC_FSGEOMETRY_V4
)  # fmt: skip
_LINE = re.compile(rb"(?:\d+ +)?(\w+)\((.*?)(?:\) += (.*)| <unfinished \.\.\.>)$")
_TOKEN = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?|(-?\d+|AT_FDCWD)<([^<>]*)>(?:\(deleted\))?')
_FD_PATH = re.compile(rb"/proc/(?:self|thread-self|\d+)/fd/(\d+)(/.*)?")


class Fd(NamedTuple):
    """An open file as an argument or a result; ``number`` is None for the current directory."""

    number: int
    path: bytes


def counts(name, args):
    """Whether a call is one of those that are counted: one that opens without creating is not."""
    if name in ("open", "openat", "openat2"):
        return any(word in arg for arg in args if isinstance(arg, str) for word in _CREATES)
    if name == "ioctl":  # Python asks so whether a file is a terminal, of each loop device's files
        return args[1] != "TCGETS"
    return name in CALLS and (name != "fcntl" or "SETLK" in args[1])


def changes_files(call):
    """Whether a counted call changes a file, a name or a lock, or brings changes to the disk."""
    return call.name != "ioctl" or not any(word in call.args[1] for word in _LOOKS)


def parse(lines):
    """``(name, args, result, error, paths)`` of each call in strace's lines."""
    handles = {}
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        name = match[1].decode()
        args = [_value(arg) for arg in _split(match[2])]
        result, error = _result(match[3])
        for each in args:
            if isinstance(each, Fd) and each.number is not None:
                handles[each.number] = each.path
        if name == "ioctl" and "FICLONE" in args[1]:  # strace shows its source as a number
            args[2] = Fd(int(args[2]), handles[int(args[2])])
        if counts(name, args):
            yield name, args, result, error, list(paths(name, args, handles))
        if isinstance(result, Fd):
            handles[result.number] = result.path


def _split(text):
    """The arguments of a call, at the commas that are in no structure."""
    args, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in b"{[(":
            depth += 1
        elif char in b"}])":
            depth -= 1
        elif char == 44 and not depth:
            args.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*args, last] if last else args


def _value(arg):
    match = _TOKEN.fullmatch(arg)
    if not match:
        return arg.decode()
    if match[3] is None:
        assert not match[2], "strace cut a text short"
        return _text(match[1])
    number = None if match[3] == b"AT_FDCWD" else int(match[3])
    return Fd(number, _text(match[4]))


def _text(shown):
    return re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), shown)


def _result(shown):
    if shown is None or shown.startswith(b"?"):
        return None, None
    word, _, rest = shown.partition(b" ")
    if word == b"-1":
        return -1, rest.split(b" ")[0].decode()
    value = _value(word)
    return (int(value, 0) if isinstance(value, str) else value), None


def paths(name, args, handles):
    """The absolute paths that a call names; ``handles`` are those of open files by their number."""
    for place in CALLS[name]:
        if isinstance(place, int):
            if isinstance(args[place], Fd):
                yield args[place].path
            continue
        handle, at = place
        base = b"" if handle is None else args[handle].path
        text = args[at]
        yield _resolved(base, text, handles) if isinstance(text, bytes) else base


def _resolved(base, text, handles):
    path = os.path.join(base, text)
    match = _FD_PATH.fullmatch(path)
    if match and int(match[1]) in handles:
        path = handles[int(match[1])] + (match[2] or b"")
    return os.path.normpath(path)
