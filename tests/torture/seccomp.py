"""
A child asks its parent before each call of a kind: the kernel's seccomp user notification.

Only those calls stop, so a run takes hardly longer than one that nobody watches.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct

# The numbers of x86-64; elsewhere what needs them is skipped.
NUMBERS = {
    "write": 1, "open": 2, "ioctl": 16, "pwrite64": 18, "writev": 20, "msync": 26, "sendfile": 40,
    "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77,
    "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132,
    "mknod": 133, "sync": 162, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "openat": 257,
    "mkdirat": 258, "mknodat": 259, "fchownat": 260, "futimesat": 261, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "splice": 275,
    "sync_file_range": 277, "vmsplice": 278, "utimensat": 280, "fallocate": 285, "pwritev": 296,
    "syncfs": 306, "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "openat2": 437,
    "fchmodat2": 452,
    # Those that only look.
    "stat": 4, "lstat": 6, "access": 21, "readlink": 89, "getdents64": 217, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "statx": 332, "faccessat2": 439,
}  # fmt: skip
_NAMES = {number: name for name, number in NUMBERS.items()}
_SECCOMP, _SET_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 317, 1, 8, 38
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECV, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTICE, _ANSWER = "=QIIiIQ6Q", "=QqiI"
# Which calls of a name are asked about, by an argument: those that calls.counts() counts.
_BITS = {"open": (1, 0o20001100), "openat": (2, 0o20001100)}  # O_CREAT, O_TRUNC, O_TMPFILE
_TCGETS = 0x5401  # what Python asks of each file that it opens as text
# BTRFS_IOC_FS_INFO, BTRFS_IOC_INO_LOOKUP, FS_IOC_GETVERSION, XFS_IOC_FSGEOMETRY_V4
_LOOKS = (0x8400941F, 0xD0009412, 0x80087601, 0x8070587C)
_VALUES = {"fcntl": (1, (6, 7, 37, 38))}  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW


def missing():
    """Why this cannot be done here, or None."""
    if platform.machine() != "x86_64":
        return f"the numbers of system calls of {platform.machine()} are not known here"
    return None


def counts(name, args):
    """Whether a call is one that calls.counts() counts, by its arguments as numbers."""
    if name == "ioctl":
        return args[1] != _TCGETS
    if name in _BITS:
        at, bits = _BITS[name]
        return bool(args[at] & bits)
    return name not in _VALUES or args[_VALUES[name][0]] in _VALUES[name][1]


def looks(name, args):
    """Whether a call that counts changes nothing on a disk."""
    return name in ("flock", "fcntl") or (name == "ioctl" and args[1] & 0xFFFFFFFF in _LOOKS)


def _program(name):
    """The filter: ask about calls of a name, allow the rest."""
    ask, allow = (_RETURN, 0, 0, _ASK), (_RETURN, 0, 0, _ALLOW)
    if name == "ioctl":
        rest = [(_LOAD, 0, 0, 24), (_EQUAL, 0, 1, _TCGETS), allow, ask]
    elif name in _BITS:
        at, bits = _BITS[name]
        rest = [(_LOAD, 0, 0, 16 + 8 * at), (_ANY_BIT, 0, 1, bits), ask, allow]
    elif name in _VALUES:
        at, values = _VALUES[name]
        tests = [(_EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
        rest = [(_LOAD, 0, 0, 16 + 8 * at), *tests, allow, ask]
    else:
        rest = [ask]
    head = [(_LOAD, 0, 0, 0), (_EQUAL, 1, 0, NUMBERS[name]), allow]
    return b"".join(struct.pack("=HBBI", *line) for line in (*head, *rest))


def _program_of_any(names):
    """The filter: ask about calls of some names, all of them."""
    tests = [(_EQUAL, len(names) - n, 0, NUMBERS[name]) for n, name in enumerate(names)]
    lines = [(_LOAD, 0, 0, 0), *tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ASK)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def ask_before(name, channel):
    """In the child: have the kernel ask at each call of a name; the listener goes to the parent."""
    _listen(_program(name), channel)


def ask_before_any(names, channel):
    """The same, at all calls of some names."""
    _listen(_program_of_any(names), channel)


def _listen(program, channel):
    libc = ctypes.CDLL(None, use_errno=True)
    lines = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("@HP", len(program) // 8, ctypes.addressof(lines))
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    fd = libc.syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER, argument)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    socket.send_fds(channel, [b"!"], [fd])
    os.close(fd)


def answer(channel, decide):
    """
    In the parent: let the child's calls go on, but for what ``decide(pid, args, name)`` says of
    each.

    It returns 0 to let it go on, the number of an errno for it to fail with, or None for a child
    that it has killed. Returns when the child is gone.
    """
    _, fds, _, _ = socket.recv_fds(channel, 1, 1)
    if not fds:
        return  # the child says why
    try:
        poll = select.poll()
        poll.register(fds[0], select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            notice = bytearray(struct.calcsize(_NOTICE))
            try:
                fcntl.ioctl(fds[0], _RECV, notice)
                found = struct.unpack(_NOTICE, notice)
                error = decide(found[1], found[6:], _NAMES[found[3]])
                if error is None:
                    return  # an answer now might still let it go on
                told = (-error, 0) if error else (0, _CONTINUE)
                fcntl.ioctl(fds[0], _SEND, struct.pack(_ANSWER, found[0], 0, *told))
            except OSError as err:
                if err.errno not in (errno.ENOENT, errno.EINTR):  # it was killed meanwhile
                    raise
    finally:
        os.close(fds[0])


def text(pid, address):
    """The text that an argument of a waiting child's call points to."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).split(b"\0")[0]
