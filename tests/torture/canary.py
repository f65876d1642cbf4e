"""What lies outside of every pool, and is as it was whatever somebody plants in one."""

import os
import stat

UID, GID = 4242, 4343
OLD = 946684800 * 10**9  # atimes are older than mtimes, so that reading shows
IMAGES = ("root.img", "private.img", "volatile.img", "root-cow.img")
NAMES = ("work", "tpl", "app", "home", "new", "job", "top", "gone", "fedora-23")
SUBDIRS = ("appvms", "servicevms", "vm-templates")


class Canary:
    """
    A directory with a ``file``, a ``vm`` like the directory of one, and a ``pool`` like that of
    many, with all that a dead run may leave; a ``lone`` file of somebody who may write it.
    """

    def __init__(self, place):
        self.place = place
        place.mkdir()
        _file(place / "file", b"secret", 0o604)
        _file(place / "lone", b"lone", 0o666)
        like_vm(place / "vm", "work")
        for subdir in SUBDIRS:
            for name in NAMES:
                like_vm(place / "pool" / subdir / name, name)
                like_vm(place / "pool" / subdir / f".{name}.removing", name)
                (place / "pool" / subdir / f".{name}.creating").mkdir(0o700)
                (place / "pool" / subdir / f".{name}.moving").symlink_to("/nowhere/appvms/work")
        for here, dirs, names in os.walk(place):
            for name in dirs + names:
                path = os.path.join(here, name)
                os.chown(path, UID, GID, follow_symlinks=False)
        self.keep()

    def keep(self):
        """Take what is there now for what has to be there."""
        for path in self._paths():
            if not os.path.islink(path):
                found = os.lstat(path)
                os.utime(path, ns=(OLD, found.st_mtime_ns))
        self.before = self.look()

    def look(self):
        """``{path: what can be told of it}``; what it takes to tell is not seen in the atimes."""
        found = {}
        for path in self._paths():
            seen = os.lstat(path)
            told = [seen.st_mode, seen.st_uid, seen.st_gid, seen.st_size, seen.st_mtime_ns]
            if not stat.S_ISLNK(seen.st_mode):
                told.append(seen.st_atime_ns)
            found[os.path.relpath(path, self.place)] = told
        return found

    def changes(self):
        """What is not as it was: ``{path: (before, now)}``, and it is kept anew."""
        now = self.look()
        wrong = {
            path: (self.before.get(path), now.get(path))
            for path in sorted({*self.before, *now})
            if self.before.get(path) != now.get(path)
        }
        if wrong:
            self.keep()
        return wrong

    def _paths(self):
        yield str(self.place)
        yield from _below(str(self.place))


def _below(place):
    fd = os.open(place, os.O_RDONLY | os.O_NOATIME)
    try:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(fd)]
    finally:
        os.close(fd)
    for name, is_dir in entries:
        yield f"{place}/{name}"
        if is_dir:
            yield from _below(f"{place}/{name}")


def _file(path, word, mode):
    with open(path, "wb") as file:
        file.write(word.ljust(4096, b"."))
        file.truncate(1 << 20)
    path.chmod(mode)


def like_vm(path, name):
    """A directory such as a VM has."""
    path.mkdir(parents=True)
    for image in IMAGES:
        _file(path / image, f"{name} {image}".encode(), 0o600)
    _file(path / "firewall.xml", b"rules", 0o600)
    for kernel in ("kernels", "apps"):
        (path / kernel).mkdir()
        _file(path / kernel / "vmlinuz", b"kernel", 0o600)
