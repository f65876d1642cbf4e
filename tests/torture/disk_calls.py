"""What each recorded system call does to the model of a disk."""

import os
import re
import stat

from tests.torture.calls import Fd

_MODE = re.compile(r"0[0-7]*")
_TIME = re.compile(r"tv_sec=(\d+), tv_nsec=(\d+)")
_NAME = re.compile(r'name="((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"fd=\d+<((?:\\x[0-9a-f]{2})*)>")


def replay(tree, calls):
    """Take the steps of recorded calls on the disk of a tree; returns that disk."""
    player = _Player(tree)
    for call in calls:
        tree.disk.calls += 1
        tree.disk.text = str(call)
        if call.error is None and call.result is not None:
            player.play(call)
    return tree.disk


class _Player:
    def __init__(self, tree):
        self.tree, self.disk = tree, tree.disk
        self.nameless = {}  # path by which a descriptor of O_TMPFILE is known: inode
        self.offsets = {}  # number of a descriptor: where the next write goes
        self.umask = os.umask(0)
        os.umask(self.umask)

    def play(self, call):
        """Do what a call did; one that nobody knows is an error, never left out."""
        getattr(self, f"_{call.name}")(call, *call.args)

    def _at(self, path):
        """``(directory, name)`` of a path, or None where it leads out of the tree."""
        path = os.fsdecode(path)
        if not path.startswith(self.tree.folder + "/"):
            return None
        *parents, name = os.path.relpath(path, self.tree.folder).split("/")
        inode = self.disk.root
        for parent in parents:
            inode = self._entry(inode, parent)
        return inode, self.tree.name(inode, name)

    def _entry(self, inode, name):
        return self.disk.get("entry", inode).get(self.tree.name(inode, name))

    def _inode(self, path):
        """The inode of a path or a descriptor, or None where it is not of the tree."""
        path = path.path if isinstance(path, Fd) else path
        if path in self.nameless:
            return self.nameless[path]
        if os.fsdecode(path) == self.tree.folder:
            return self.disk.root
        there = self._at(path)
        return there and self.disk.get("entry", there[0]).get(there[1])

    def _born(self, kind, parent, mode):
        """A new inode in a directory, of which it has the group if that says so."""
        group = self.disk.get("owner", parent)[1], self.disk.get("mode", parent) & stat.S_ISGID
        owner = os.geteuid(), group[0] if group[1] else os.getegid()
        if kind in ("file", "dir", "subvolume"):  # a link's mode is always the same
            mode &= ~self.umask
            mode |= group[1] if kind != "file" else 0
        return self.disk.born(kind, self.disk.places[parent], mode, owner)

    # Files and what is in them.

    def _openat(self, call, _, __, flags, mode="0"):
        self.offsets[call.result.number] = 0
        if "O_TMPFILE" in flags:
            parent = self._inode(call.paths[0])
            if parent:
                made = self._born("file", parent, int(mode, 8))
                self.nameless[call.result.path] = made
            return
        there = self._at(call.paths[0])
        if there is None:
            return
        inode = self.disk.get("entry", there[0]).get(there[1])
        if inode is None:
            self.tree.learn(*there)
            there = there[0], self.tree.name(*there)
            self.disk.enter(*there, self._born("file", there[0], int(mode, 8)))
        elif "O_TRUNC" in flags:
            self.disk.resize(inode, 0)

    def _write(self, call, fd, data, _):
        offset = self.offsets.get(fd.number, 0)
        self.offsets[fd.number] = offset + call.result
        self._put(fd, offset, data[: call.result])

    def _pwrite64(self, call, fd, data, _, offset):
        self._put(fd, int(offset), data[: call.result])

    def _copy_file_range(self, call, source, offset, target, to, *_):
        self._copy(source, _first(offset), target, _first(to), call.result)

    def _sendfile(self, call, target, source, offset, _):
        # Its own place in the target is not shown; the core copies to where it reads.
        self._copy(source, _first(offset), target, _first(offset), call.result)

    def _copy(self, source, offset, target, to, count):
        self._put(target, to, self.disk.read(self._inode(source), offset, count))

    def _put(self, fd, offset, data):
        inode = self._inode(fd)
        if inode:
            self.disk.write(inode, offset, data)

    def _ftruncate(self, call, fd, size):
        self.disk.resize(self._inode(fd), int(size))

    def _ioctl(self, call, fd, request, argument=None):
        if "CLONE" in request:
            self.disk.share(self._inode(fd), self._inode(argument))
            return
        name = re.search(_NAME, argument)
        name = name and bytes.fromhex(name[1].replace("\\x", "")).decode()
        parent = self._inode(fd)
        if "SUBVOL_CREATE" in request:
            self.disk.enter(parent, name, self._born("subvolume", parent, 0o755))
        elif "SNAP_CREATE_V2" in request:
            source = bytes.fromhex(_FD.search(argument)[1].replace("\\x", ""))
            self.disk.snapshot(self._inode(source), parent, name)
        elif "SNAP_DESTROY" in request:
            self.disk.enter(parent, name, None)
        else:
            raise AssertionError(f"the model of a disk does not know {call}")

    # Names.

    def _mkdirat(self, call, _, __, mode):
        there = self._at(call.paths[0])
        self.disk.enter(*there, self._born("dir", there[0], int(mode, 8)))

    def _symlinkat(self, call, target, *_):
        there = self._at(call.paths[0])
        target = self.tree.target(os.fsdecode(target))
        self.disk.enter(*there, self._born(target, there[0], 0o777))

    def _linkat(self, call, *_):
        self.disk.enter(*self._at(call.paths[1]), self._inode(call.paths[0]))

    def _unlinkat(self, call, *_):
        there = self._at(call.paths[0])
        if there:
            self.disk.enter(*there, None)

    def _renameat2(self, call, *args):
        old, new = map(self._at, call.paths)
        self.disk.rename(old, new, "RENAME_EXCHANGE" in str(args[-1]))

    _renameat = _rename = _renameat2
    _link, _unlink, _rmdir = _linkat, _unlinkat, _unlinkat

    def _open(self, call, path, *args):
        self._openat(call, None, path, *args)

    def _mkdir(self, call, path, mode):
        self._mkdirat(call, None, path, mode)

    def _symlink(self, call, target, _):
        self._symlinkat(call, target)

    # What an inode looks like.

    def _fchmod(self, call, fd, mode):
        self._change("mode", fd, int(mode, 8))

    def _fchmodat(self, call, *args):
        mode = next(arg for arg in args if isinstance(arg, str) and _MODE.fullmatch(arg))
        self._change("mode", call.paths[0], int(mode, 8))

    _chmod = _fchmodat

    def _fchown(self, call, fd, uid, gid):
        inode = self._inode(fd)
        asked = zip((uid, gid), self.disk.get("owner", inode), strict=True)
        self._change("owner", fd, tuple(old if new == "-1" else int(new) for new, old in asked))

    def _utimensat(self, call, fd, path, times, _):
        written = _TIME.findall(times)[-1]
        self._change("times", call.paths[0], int(written[0]) * 10**9 + int(written[1]))

    def _change(self, kind, where, value):
        inode = self._inode(where)
        if inode:
            self.disk.change(kind, inode, value)

    # What brings all this to the disk.

    def _fsync(self, call, fd):
        inode = self._inode(fd)
        if inode:
            self.disk.sync(lambda step: inode in step)

    def _syncfs(self, call, fd):
        place = self.disk.places[self._inode(fd)]
        self.disk.sync(
            lambda step: any(self.disk.places[there[1]] == place for there, _, _ in step.facts)
        )

    def _fcntl(self, call, *_):
        """A lock is on no disk."""

    _flock = _fcntl


def _first(shown):
    return int(re.search(r"\d+", shown)[0])
