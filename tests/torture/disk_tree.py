"""
A real directory tree and the model of a disk: one read from the other, and laid out again.

Markers hold the identities of directories and files, which are others in a tree laid out anew. The
model has a :py:class:`Number` in their place, and the tree what is the identity there.
"""

import contextlib
import os
import re
import stat
from typing import NamedTuple

from qubes_storage import image

from tests.torture.disk import BLOCK, Disk

_IDENTITY = re.compile(r"\d+(\.\d+)?")
_TARGET = re.compile(rf"(?P<before>(\d+:)?)(?P<identity>{_IDENTITY.pattern})(?P<rest>:.*)")
_DIRS = ("dir", "subvolume")
_SUBVOLUME = 256
_NOBODY = "1"  # the identity of what is not there: no file has it


class Number(NamedTuple):
    """The identity of an inode, between other text, as a name or in a link's target."""

    inode: int
    rest: str = ""
    before: str = ""


class Tree:
    """A model read from a folder, with the inodes of what lies there."""

    def __init__(self, folder, root):
        self.folder, self.root = os.path.realpath(folder), os.path.realpath(root)
        self.disk = Disk()
        self.identities = {}  # text: the inodes of that identity, of one filesystem each
        self.marked = {}  # (directory, name that is an identity): inode
        self._known = {}
        self._mounts = mounts()
        found = os.stat(self.folder)
        self._read_dir(self.folder, self.disk.root, found.st_dev)
        for kind, value in _looks(found):
            self.disk.before[kind, self.disk.root][None] = value
            self.disk.now[kind, self.disk.root][None] = value
        self._put_numbers()

    def _read_dir(self, path, inode, place):
        entries = {}
        with os.scandir(path) as found:
            for entry in found:
                entries[entry.name] = self._read(entry, place)
        if entries:
            self._fact("entry", inode, entries)

    def _fact(self, kind, inode, values):
        self.disk.before[kind, inode] = dict(values)
        self.disk.now[kind, inode] = dict(values)

    def _read(self, entry, place):
        found = entry.stat(follow_symlinks=False)
        key = found.st_dev, found.st_ino
        if key in self._known and not stat.S_ISDIR(found.st_mode):
            return self._known[key]
        if stat.S_ISLNK(found.st_mode):
            kind = os.readlink(entry.path)
        elif stat.S_ISREG(found.st_mode):
            kind = "file"
        elif entry.path in self._mounts:
            kind, place = "mount", found.st_dev
        else:
            kind = "subvolume" if found.st_ino == _SUBVOLUME else "dir"
        looks = dict(_looks(found))
        inode = self.disk.born(kind, place, looks["mode"], looks["owner"], looks["times"])
        self._known[key] = inode
        if kind == "file":
            self._fact("size", inode, {None: found.st_size})
            self._fact("data", inode, blocks(entry.path))
            self._knows(str(found.st_ino), inode)
        elif stat.S_ISDIR(found.st_mode):
            self._knows(identity(entry.path), inode)
            self._read_dir(entry.path, inode, place)
        return inode

    def _knows(self, text, inode):
        self.identities.setdefault(text, []).append(inode)

    def _put_numbers(self):
        """Have numbers in the place of the identities that markers hold."""
        disk = self.disk
        for inode, kind in disk.kinds.items():
            disk.kinds[inode] = self.target(kind)
        for (kind, inode), entries in list(disk.before.items()):
            if kind == "entry":
                for name in list(entries):
                    self.learn(inode, name)
                named = {self.name(inode, name): there for name, there in entries.items()}
                self._fact("entry", inode, named)

    def learn(self, directory, name):
        """A file in ``.NAME.creating`` is called after the identity of NAME beside it."""
        if isinstance(name, str) and _IDENTITY.fullmatch(name):
            beside = self.disk.get("entry", directory).values()
            dirs = [inode for inode in beside if self.disk.kinds[inode] in _DIRS]
            if len(dirs) == 1:
                self.marked[directory, name] = dirs[0]

    def follow(self, paths):
        """Take the identities of a tree that was laid out anew, as ``{inode: path}``."""
        self.identities.clear()
        for inode, path in paths.items():
            if not os.path.islink(path):
                self._knows(identity(path), inode)
        for (kind, inode), entries in self.disk.now.items():
            for name in entries if kind == "entry" and inode in paths else ():
                if isinstance(name, Number):
                    there = paths.get(name.inode)
                    self.marked[inode, identity(there) if there else _NOBODY] = name.inode

    def name(self, directory, name):
        """A name in a directory, with a :py:class:`Number` for an identity."""
        inode = self.marked.get((directory, name))
        return name if inode is None else Number(inode)

    def target(self, text):
        """A link's target, with a :py:class:`Number` for an identity before a path."""
        match = _TARGET.fullmatch(text)
        if not match:
            return text
        for inode in self.identities[match["identity"]]:
            path = self.folder + self.path(inode)
            if path in match["rest"] or path.removeprefix(self.root) in match["rest"]:
                return Number(inode, match["rest"], match["before"])
        raise AssertionError(f"{text} is of nothing that was there before")

    def path(self, inode):
        """The path of an inode in the folder."""
        todo = [(self.disk.root, "")]
        while todo:
            there, path = todo.pop()
            if there == inode:
                return path
            entries = self.disk.get("entry", there)
            todo += [(i, f"{path}/{name}") for name, i in entries.items()]
        raise KeyError(inode)


def _looks(found):
    yield "mode", stat.S_IMODE(found.st_mode)
    yield "owner", (found.st_uid, found.st_gid)
    yield "times", None if stat.S_ISLNK(found.st_mode) else found.st_mtime_ns


def mounts():
    """Where something is mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        return {line.split(" ")[4] for line in table}


def identity(path):
    """What tells a directory or file from another, as the core writes it into markers."""
    with _opened(os.path.dirname(path)) as fd:
        return image.identity(fd, os.path.basename(path))


@contextlib.contextmanager
def _opened(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def blocks(path):
    """``{number: bytes}`` of the blocks of a file that hold more than zeros."""
    found = {}
    with open(path, "rb") as file:
        size, stop = os.fstat(file.fileno()).st_size, 0
        while stop < size:
            try:
                start = os.lseek(file.fileno(), stop, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for number in range(start // BLOCK, -(-stop // BLOCK)):
                block = os.pread(file.fileno(), BLOCK, number * BLOCK).ljust(BLOCK, b"\0")
                if block.strip(b"\0"):
                    found[number] = block
    return found


def clear(folder, mounted):
    """Take away all that lies in a folder, but for mount points."""
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
            continue
        clear(entry.path, mounted)
        if not any((point + "/").startswith(entry.path + "/") for point in mounted):
            os.rmdir(entry.path)


def lay_out(disk, facts, folder):
    """
    Have a folder, which may hold what was laid out before, hold what facts say.

    Returns ``{inode: path}``.
    """
    clear(folder, mounts())
    layer = _Layer(disk, facts)
    layer.fill(disk.root, folder)
    layer.finish()
    return layer.paths


def listing(disk, facts):
    """``{path: what is there}`` of facts, whatever inodes they are of."""
    found, paths = {}, {}

    def text(shown):
        if not isinstance(shown, Number):
            return shown
        return f"{shown.before}({paths.get(shown.inode)}){shown.rest}"

    def walk(directory, parent):
        entries = facts.get(("entry", directory), {}).items()
        for name, inode in sorted(entries, key=lambda e: (isinstance(e[0], Number), str(e[0]))):
            path, kind = f"{parent}/{text(name)}", disk.kinds[inode]
            first = paths.setdefault(inode, path)
            looks = [facts[what, inode][None] for what in ("mode", "owner")]
            if kind == "file":
                size = facts["size", inode][None]
                looks += [size, first if first != path else _sum(facts, inode, size)]
            elif kind in (*_DIRS, "mount"):
                walk(inode, path)
            found[path] = (text(kind), *looks)

    walk(disk.root, "")
    return found


def _sum(facts, inode, size):
    data = facts.get(("data", inode), {}).items()
    parts = ((n, b[: size - n * BLOCK].rstrip(b"\0")) for n, b in data if n * BLOCK < size)
    return hash(frozenset((number, part) for number, part in parts if part))


class _Layer:
    def __init__(self, disk, facts):
        self.disk, self.facts = disk, facts
        self.paths = {}
        self.later = []  # names and links that hold a number

    def fill(self, inode, path):
        self.paths[inode] = path
        for name, entry in sorted(self.facts.get(("entry", inode), {}).items(), key=str):
            if isinstance(name, Number) or isinstance(self.disk.kinds[entry], Number):
                self.later.append((path, name, entry))
            else:
                self._make(entry, os.path.join(path, name))

    def _make(self, inode, path):
        kind = self.disk.kinds[inode]
        if inode in self.paths:
            os.link(self.paths[inode], path, follow_symlinks=False)
            return
        if kind == "subvolume":
            with _opened(os.path.dirname(path)) as fd:
                image.create_subvolume(fd, os.path.basename(path))
        elif kind in ("dir", "mount"):
            with contextlib.suppress(FileExistsError):  # one that leads to a mount point
                os.mkdir(path, 0o700)
        if kind in ("dir", "subvolume", "mount"):
            self.fill(inode, path)
            return
        self.paths[inode] = path
        if kind == "file":
            with open(path, "xb", buffering=0) as file:
                for number, block in self.facts.get(("data", inode), {}).items():
                    os.pwrite(file.fileno(), block, number * BLOCK)
                file.truncate(self.facts["size", inode][None])
        else:
            os.symlink(kind, path)

    def _text(self, number):
        path = self.paths.get(number.inode)
        return number.before + (identity(path) if path else _NOBODY) + number.rest

    def finish(self):
        for parent, name, inode in self.later:
            shown = self._text(name) if isinstance(name, Number) else name
            path, kind = os.path.join(parent, shown), self.disk.kinds[inode]
            if isinstance(kind, Number):
                self.paths[inode] = path
                os.symlink(self._text(kind), path)
            else:
                self._make(inode, path)
        for inode, path in reversed(self.paths.items()):
            self._dress(inode, path)

    def _dress(self, inode, path):
        owner, mode = (self.facts[kind, inode][None] for kind in ("owner", "mode"))
        os.chown(path, *owner, follow_symlinks=False)
        if not os.path.islink(path):
            os.chmod(path, mode)
            times = self.facts["times", inode][None]
            if times is not None:
                os.utime(path, ns=(times, times))
