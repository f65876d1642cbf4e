"""A machine that is the same before each run: what lies on it, and put back as it was."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile

from qubes_storage import image

from tests.r32.machine import Machine
from tests.unit.test_image import mount

_FICLONE = 0x40049409
_BLOCK = 4096
# What differs from one run to the next, and means the same.
_VARIABLE = (
    (re.compile(r"uuid=\"[0-9a-f-]{36}\""), 'uuid="U"'),
    (re.compile(r"@\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "@DATE"),
)


class World:
    """
    A :py:class:`Machine` on tmpfs with a filesystem of its own, of a kind, at ``/mnt/ssd``.

    Everything is below ``place``: the machine's ``root``, and ``outside``, the caller's directory.
    :py:meth:`save` keeps what is there, :py:meth:`restore` brings it back. The disk is away between
    :py:meth:`detach` and :py:meth:`attach`.
    """

    driver = None  # of its pools
    require_mount = "/mnt/ssd"  # of its pools, too

    def __init__(self, kind, *options):
        sweep()
        self.kind = kind
        prefix = f"qubes-torture-{os.getpid()}-"
        self.place = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=_memory()))
        self._mounted = []
        self._held = None  # a handle of the disk while it is away
        try:
            self.disk = self._dir("disk")
            self._mount_new(*options)
            self._mounted.append(self.disk)
            self._device = _device(self.disk)
            self._lay_out()
        except BaseException:
            self.close()
            raise

    def _mount_new(self):
        """Mount a fresh filesystem at ``disk``."""
        mount(self.kind, self.disk)

    def _lay_out(self):
        """Make the machine, and the caller's directory."""
        self.machine = Machine(self._dir("live/root"), template=True)
        self.outside = self._dir("live/outside")
        self.ssd = self.machine.mkdir("/mnt/ssd")
        self._dir("disk/live")
        self._mount_ssd()
        self._saved = [
            (self.machine.root, self.place / "saved/root"),
            (self.outside, self.place / "saved/outside"),
            (self.disk / "live", self.disk / "saved"),
        ]

    def _dir(self, name):
        path = self.place / name
        path.mkdir(parents=True)
        return path

    def _mount_ssd(self):
        subprocess.run(["mount", "--bind", self.disk / "live", self.ssd], check=True)
        self._mounted.append(self.ssd)

    def detach(self):
        """Unmount the disk lazily: what is open there goes on working, and no path leads there."""
        self._held = os.open(self.disk, os.O_PATH)  # it stays the same filesystem to the kernel
        subprocess.run(["umount", "-l", self.ssd, self.disk], check=True)
        self._mounted = []

    def attach(self):
        """Mount it again; returns the paths of what was made where it was to be, which goes."""
        made = sorted(str(path.relative_to(self.ssd)) for path in self.ssd.rglob("*"))
        empty(self.ssd)
        subprocess.run(["mount", self._device, self.disk], check=True)
        self._mounted.append(self.disk)
        self._mount_ssd()
        os.close(self._held)
        self._held = None
        return made

    def close(self):
        """Unmount and delete it all, whoever has something open there."""
        for place in reversed(self._mounted):
            subprocess.run(["umount", "-l", place], check=True)
        if self._held is not None:
            os.close(self._held)
        shutil.rmtree(self.place)

    def disk_of(self, path):
        """Which of the machine's disks a path is on, or None."""
        found = {"ssd": self.ssd, "dom0": self.place}
        return next((name for name, top in found.items() if _below(path, top)), None)

    def connect(self):
        """The core on the machine."""
        return self.machine.connect()

    def save(self):
        """Keep what is there now; saved before, it is forgotten."""
        for live, saved in self._saved:
            empty(saved)
            _copy_into(live, saved, self._mounted)

    def restore(self):
        """Have everything be as it was when it was saved; files are new ones, of the same times."""
        if self._held is not None:
            self.attach()
        for live, saved in self._saved:
            empty(live, self._mounted)
            _copy_into(saved, live)

    def tree(self):
        """``{path: (type, mode, size, content)}`` of all that is on the machine and outside."""
        start = len(str(self.place / "live/"))
        return {same(path[start:].lstrip("/")): look(path) for path in self._paths()}

    def stamps(self):
        """``{path: (inode, when it changed)}`` of the same, which any write changes."""
        return {path: (s.st_ino, s.st_ctime_ns) for path in self._paths() for s in [os.lstat(path)]}

    def _paths(self):
        for base in (self.machine.root, self.outside):
            for here, dirs, names in os.walk(base):
                for name in dirs + names:
                    yield os.path.join(here, name)


def _below(path, top):
    return f"{os.fsdecode(path)}/".startswith(f"{top}/")


def _memory():
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def _device(place):
    """The device that is mounted at a place."""
    with open("/proc/self/mounts", encoding="utf-8") as table:
        return next(line.split(" ")[0] for line in table if line.split(" ")[1] == str(place))


def sweep():
    """Unmount and delete the worlds of processes that died."""
    for place in pathlib.Path(_memory() or tempfile.gettempdir()).glob("qubes-torture-*-*"):
        if pathlib.Path(f"/proc/{place.name.split('-')[2]}").exists():
            continue
        with open("/proc/self/mounts", encoding="utf-8") as table:
            points = [line.split(" ")[1] for line in table]
        for point in reversed([p for p in points if p.startswith(f"{place}/")]):
            subprocess.run(["umount", point], check=False)
        shutil.rmtree(place, ignore_errors=True)


def same(text):
    """A text without what differs from one run to the next."""
    for pattern, word in _VARIABLE:
        text = pattern.sub(word, text)
    return text


def look(path):
    """What lies at a path; of an image the sum of what is not zero, so its size is told apart."""
    found = os.lstat(path)
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    if stat.S_ISLNK(found.st_mode):
        return "link", "", 0, re.sub(r"^\d+(\.\d+)?:", "INODE:", os.readlink(path))
    if stat.S_ISDIR(found.st_mode):
        return "directory", mode, 0, ""
    if not stat.S_ISREG(found.st_mode):
        return "special", mode, 0, ""
    if found.st_size < 1 << 16 and not path.endswith(".img"):
        with open(path, "rb") as file:
            text = same(file.read().decode("utf-8", "surrogateescape"))
        return "file", mode, len(text), text
    return "file", mode, found.st_size, content(path)


def content(path):
    """The sum of an image's blocks that are not zero, with their places."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for start, stop in data(file.fileno()):
            for offset in range(start - start % _BLOCK, stop, _BLOCK):
                block = os.pread(file.fileno(), _BLOCK, offset).rstrip(b"\0")
                if block:
                    found.update(b"%d:%d:" % (offset, len(block)) + block)
    return found.hexdigest()


def data(fd):
    """``(start, stop)`` of the parts of a file that hold data."""
    stop, size = 0, os.fstat(fd).st_size
    while stop < size:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return
            raise
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, stop


def empty(place, but=()):
    """Delete what is in a directory, and make one where there is none; ``but`` is a mount point."""
    place.mkdir(parents=True, exist_ok=True)
    for entry in place.iterdir():
        if entry in but:
            continue
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink()
        elif any(entry in kept.parents for kept in but):
            empty(entry, but)
        else:
            shutil.rmtree(entry)


def _copy_into(source, target, but=()):
    with os.scandir(source) as entries:
        for entry in list(entries):
            _copy(pathlib.Path(entry.path), target / entry.name, but)
    found = os.lstat(source)
    os.chown(target, found.st_uid, found.st_gid)
    os.chmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _copy(source, target, but):
    found = os.lstat(source)
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISDIR(found.st_mode):
        if found.st_ino == 256 and _snapshot(source, target):
            return
        target.mkdir(exist_ok=True)
        if source not in but:
            _copy_into(source, target, but)
    else:
        with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
            _copy_data(old.fileno(), new.fileno(), found.st_size)
            os.fchown(new.fileno(), found.st_uid, found.st_gid)
            os.fchmod(new.fileno(), stat.S_IMODE(found.st_mode))
            os.utime(new.fileno(), ns=(found.st_atime_ns, found.st_mtime_ns))


def _snapshot(source, target):
    with contextlib.ExitStack() as stack:
        fds = [os.open(path, os.O_RDONLY) for path in (source, target.parent)]
        for fd in fds:
            stack.callback(os.close, fd)
        if not image.is_subvolume(fds[0]):
            return False
        image.snapshot_subvolume(*fds, target.name)
    return True


def _copy_data(old, new, size):
    try:
        fcntl.ioctl(new, _FICLONE, old)
        return
    except OSError:
        os.ftruncate(new, size)
    for start, stop in data(old):
        os.pwrite(new, os.pread(old, stop - start, start), start)
