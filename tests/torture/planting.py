"""What somebody who may write in a pool can put there, and where."""

import ctypes
import errno
import os
import shutil
import socket
import stat

from qubes_storage import files, markers

from tests.r32.machine import GID, LIB
from tests.torture.canary import UID, Canary, like_vm

_EXCHANGE = 2
MARKERS = (".{}.creating", ".{}.removing", ".{}.moving", ".{}.new")
TEMPORARY = (
    ".private.img.new", ".private.img.revision.new", ".root.img.revision.new",
    ".volatile.img.new", ".root-cow.img.new", ".root-cow.img.old", "root-cow.img.old",
    ".icon.png.new", "icon.png", ".snapshot", "kernels", "apps", "firewall.xml",
)  # fmt: skip
POOLS = (LIB, "/mnt/ssd/ssd", "/mnt/ssd/near", "/mnt/ssd/plain", "/mnt/ssd/spare")
SUBDIRS = ("appvms", "servicevms", "vm-templates")


def share(world):
    """Have everything in the pools be of group qubes, as a dom0 has it."""
    for here, dirs, names in os.walk(world.place / "disk/live"):
        for name in (".", *dirs, *names):
            os.chown(os.path.join(here, name), 0, GID, follow_symlinks=False)
        for name in dirs:
            if not os.path.islink(os.path.join(here, name)):
                os.chmod(os.path.join(here, name), 0o2770)
    os.chmod(world.place / "disk/live", 0o2770)
    world.save()


class Intruder:
    """
    Somebody who may write wherever group qubes may, and what he has brought.

    There is a canary on the filesystem of the default pool and one on that of the others.
    """

    def __init__(self, world):
        self.world = world
        self.disk = world.place / "disk"
        self.far = Canary(world.place / "canary")
        self.near = Canary(self.disk / "canary")

    def changes(self):
        """What is not as it was outside of the pools."""
        found = {"near": self.near.changes(), "far": self.far.changes()}
        return {where: wrong for where, wrong in found.items() if wrong}

    def real(self, path):
        """The path, as the filesystem's own mount has it, of a path of the machine."""
        if path.startswith("/mnt/ssd/"):
            return self.disk / "live" / path[len("/mnt/ssd/") :]
        return self.world.machine.path(path)

    def may_write(self, path):
        """Whether a name can be put there by a member of group qubes who is not root."""
        while True:
            path, last = os.path.split(path)
            found = os.lstat(self.real(path))
            if found.st_gid != GID or found.st_mode & 0o070 != 0o070 or not last:
                return False
            if path in POOLS:
                return True

    def make(self, path, kind):
        """What is to lie at a path of the machine, beside it; None for what cannot."""
        canary = self.near if path.startswith("/mnt/ssd/") else self.far
        at = self.real(path).parent / "it~"
        return at if KINDS[kind](self, path, canary.place, at) is not False else None

    def can(self, path):
        """Whether there is a directory for a name, and he may put the name there."""
        return os.path.isdir(self.real(os.path.dirname(path))) and self.may_write(path)

    def swap(self, path, kind):
        """Put something in a place and take what was there away, in one go; whether it could be."""
        made = self.make(path, kind)
        if made is None:
            return False
        flags = _EXCHANGE if os.path.lexists(self.real(path)) else 0
        texts = os.fsencode(made), os.fsencode(self.real(path))
        if ctypes.CDLL(None, use_errno=True).renameat2(-100, texts[0], -100, texts[1], flags):
            raise OSError(ctypes.get_errno(), f"{path}: cannot be swapped for a {kind}")
        return True

    def put_back(self, path):
        """Exchange what was taken away for what is in its place, and delete that."""
        there = self.real(path)
        kept = there.parent / "it~"
        if os.path.lexists(kept):
            os.rename(there, f"{there}~")
            os.rename(kept, there)
            there = there.parent / f"{there.name}~"
        if there.is_dir() and not there.is_symlink():
            shutil.rmtree(there)
        else:
            there.unlink()

    def plant(self, path, kind):
        """Put something in a place, and what was there beside it; whether it could be."""
        if not self.can(path):
            return False
        made = self.make(path, kind)
        if made is None:
            return False
        there = self.real(path)
        if os.path.lexists(there):
            os.rename(there, f"{there}~")
        os.rename(made, there)
        return True


def _like(path):
    """What of a canary is like what lies at a path."""
    parts = path.rsplit("/", 2)
    if path in POOLS:
        return "pool"
    if parts[2] in SUBDIRS:
        return f"pool/{parts[2]}"
    if parts[1] in SUBDIRS:
        name = f"pool/{parts[1]}/{parts[2].strip('.').removesuffix('.moving')}"
        return name if "." not in name else f"pool/{parts[1]}/{parts[2]}"
    return None


def _link(intruder, path, canary, at):
    like = _like(path)
    if like is None or not (canary / like).exists():
        like = "vm/kernels" if path.endswith(("kernels", "apps")) else "vm/private.img"
    at.symlink_to(canary / like)


def _link_to_file(intruder, path, canary, at):
    at.symlink_to(canary / "file")


def _hard_link(intruder, path, canary, at):
    try:
        os.link(canary / "file", at)
    except OSError as err:
        if err.errno != errno.EXDEV:  # another subvolume
            raise
        return False
    return None


def _pipe(intruder, path, canary, at):
    os.mkfifo(at, 0o666)


def _device(intruder, path, canary, at):
    os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # full: read as zeros, written as ENOSPC


def _socket(intruder, path, canary, at):
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(at.parent)  # its path is too long
        listening.bind(at.name)
        os.chdir("/")


def _directory(intruder, path, canary, at):
    at.mkdir(0o777)
    os.chown(at, UID, GID)


def _full_directory(intruder, path, canary, at):
    like_vm(at, "mine")
    (at / "work").symlink_to(canary / "vm")
    _hard_link(intruder, path, canary, at / "linked.img")
    os.chown(at, UID, GID)


def _deep_directory(intruder, path, canary, at):
    for _ in range(200):
        at.mkdir()
        at = at / "d"


def _file(intruder, path, canary, at):
    at.write_bytes(b"mine")
    os.chown(at, UID, GID)
    at.chmod(0o666)


def _marker(intruder, path, canary, at):
    """As a dead run leaves one, naming what lies outside."""
    parent, name = os.path.split(path)
    if not name.endswith(".creating"):
        return False
    vm = name[1 : -len(".creating")]
    at.mkdir(0o700)
    subdir = canary / "pool/appvms"
    old = os.lstat(subdir / ".work.removing")
    place = f"{parent}/{vm}"
    file = os.lstat(canary / "file")
    with files.closing(os.open(at, os.O_RDONLY)) as fd:
        markers.Origin(f"{subdir}/work", str(old.st_ino), False, place).write(fd)
        stamp = str(file.st_mtime_ns), str(file.st_ino)
        markers.Taken(f"{canary}/file", *stamp, place).write(fd)
    like_vm(at / vm, "mine")
    for made in (at, *at.iterdir()):
        os.chown(made, UID, GID, follow_symlinks=False)
    return None


def _moving(intruder, path, canary, at):
    """As a dead run leaves one, naming a directory outside with a marker that agrees."""
    name = os.path.basename(path)
    if not name.endswith(".moving"):
        return False
    vm = name[1 : -len(".moving")]
    at.symlink_to(canary / "pool/appvms" / vm)
    os.chown(at, UID, GID, follow_symlinks=False)
    return None


KINDS = {
    "link": _link, "link to a file": _link_to_file, "hard link": _hard_link, "pipe": _pipe,
    "device": _device, "socket": _socket, "directory": _directory,
    "full directory": _full_directory, "deep directory": _deep_directory, "file": _file,
    "forged marker": _marker, "forged link of a move": _moving,
}  # fmt: skip
