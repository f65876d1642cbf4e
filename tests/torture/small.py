"""A machine with a disk of 64 MiB that can be full, out of inodes, or read-only."""

import contextlib
import os
import re
import shutil
import subprocess

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import Machine
from tests.torture import operations, world
from tests.torture.walking import sums

MIB = 1024**2
SIZE = 64 * MIB
PIECE = 4096
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m0", "-b4096"],
    "btrfs": ["mkfs.btrfs", "-q", "--mixed"],  # any other is too large for this
}
FILESYSTEMS = {"xen": "ext4", "reflink": "btrfs", "btrfs": "btrfs"}  # of a driver's pools
# An error names a pool or VM or the file it is about, a path, and after a semicolon the cure.
CLEAR = re.compile(r"(pool|VM) [\w-]+: .*/.*; |/(qubes\.xml|storage[a-z-]*\.conf): .*; ", re.S)
# What an error says where not all is as it was: the next run does the rest.
_PARTLY = ("is in ", "is done, but", " beside it was left behind")


class PoolDisk(world.World):
    """The pools of a driver, and the file of the caller's beside them, on one small filesystem."""

    what = "the pools' disk"

    def _mount_new(self, *options):
        if os.geteuid() or not shutil.which(MAKE[self.kind][0]):
            pytest.skip(f"only root, with {MAKE[self.kind][0]}, can make such a disk")
        image = self.place / "disk.img"
        with open(image, "wb") as file:
            file.truncate(SIZE)
        subprocess.run([*MAKE[self.kind], *options, image], check=True, capture_output=True)
        command = ["mount", "-o", "loop", image, self.disk]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip(f"{self.kind} cannot be mounted here")

    @contextlib.contextmanager
    def read_only(self):
        """The disk as the kernel leaves it after an error: readable, and nothing more."""
        subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)

    @contextlib.contextmanager
    def with_free(self, free):
        """No more than ``free`` bytes are free: small files take what is left."""
        fill = self.disk / "fill"
        fill.mkdir()
        try:
            found = os.statvfs(self.disk)
            most = found.f_bavail * found.f_frsize // MIB - 1 - free // MIB
            with open(fill / "most", "wb", buffering=0) as file, contextlib.suppress(OSError):
                for _ in range(most):
                    file.write(b"\xa5" * MIB)
            os.sync()
            made = 0
            with contextlib.suppress(OSError):
                while free < MIB or made < 2 * MIB // PIECE:  # of much, roughly
                    (fill / str(made)).write_bytes(b"\xa5" * PIECE)
                    made += 1
            os.sync()
            for number in range(max(made - free % MIB // PIECE, 0), made):
                (fill / str(number)).unlink()
            os.sync()
            yield
        finally:
            shutil.rmtree(fill)
            os.sync()

    @contextlib.contextmanager
    def with_inodes(self, count):
        """No more than ``count`` files can be made."""
        names = self.disk / "names"
        names.mkdir()
        made = 0
        try:
            with contextlib.suppress(OSError):
                while True:
                    os.close(os.open(names / str(made), os.O_CREAT | os.O_EXCL))
                    made += 1
            for number in range(max(made - count, 0), made):
                (names / str(number)).unlink()
            yield
        finally:
            shutil.rmtree(names)


class OneDisk(PoolDisk):
    """All of the machine, and the caller's directory, on it."""

    what = "the disk"
    require_mount = None

    def _lay_out(self):
        self.machine = Machine(self._dir("disk/live/root"))
        self.outside = self._dir("disk/live/outside")
        self.ssd = self.machine.mkdir("/mnt/ssd")
        self._saved = [(self.disk / "live", self.disk / "saved")]


class Trial:
    """One operation in trouble, and again without."""

    def __init__(self, there, operation):
        self.world = there
        self.operation = operation
        self.told = ""  # of the last trouble
        self.base = there.tree()
        there.restore()
        operation.run(there.connect(), there)
        self.done = there.tree()
        there.restore()

    def attempt(self):
        """Whether it was done; what is not done tells what it is about, where, and the cure."""
        try:
            changes = self.operation.run(self.world.connect(), self.world)
        except StoragePoolException as err:
            self.told = str(err)
            assert CLEAR.search(self.told), (str(self.operation), self.told)
            return False
        assert changes, str(self.operation)
        return True

    def check(self, done, where):
        """After trouble, and without: all or nothing, then what was asked for, and no stray."""
        where = (str(self.operation), where, "done" if done else f"not done: {self.told}")
        now = self.world.tree()
        different = differences(self.done if done else self.base, now)
        if not done and self.operation.name == "pool remove":
            # Its empty directories go first, and a disk with no block free takes none back.
            different = {p: d for p, d in different.items() if d[1] or d[0][0] != "directory"}
        # A verb is made of several steps, each of them whole: a revision may be kept already.
        partly = not done and self.operation.verb and different != {}
        if not done and any(word in self.told for word in _PARTLY):
            lost = sums(self.base) & sums(self.done) - sums(now)
            assert not lost, where
        elif partly:
            odd = {p: e for p, e in now.items() if e not in (self.base.get(p), self.done.get(p))}
            assert odd == {}, where
            assert {*self.base} & {*self.done} <= {*now}, where
        else:
            assert different == {}, where
        if not done:
            assert self.operation.run(self.world.connect(), self.world), where
            assert partly or differences(self.done, self.world.tree()) == {}, where
        if not self.operation.verb:
            assert self.operation.run(self.world.connect(), self.world) == {}, where
            assert differences(self.done, self.world.tree()) == {}, where


def differences(old, new):
    """``{path: (old, new)}`` of what is not the same."""
    return {p: (old.get(p), new.get(p)) for p in {*old, *new} if old.get(p) != new.get(p)}


def made(disk, driver, *options):
    """The machine of the catalogue with a small disk, a :py:class:`OneDisk` or PoolDisk."""
    there = disk(FILESYSTEMS[driver], *options)
    try:
        operations.build(there, driver)
    except BaseException:
        there.close()
        raise
    return there
