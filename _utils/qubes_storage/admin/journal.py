"""
The journal of a move, copy or creation of a VM, or of the removal of a pool: what has to be known
to go on with it after a kill.
"""

import contextlib
import errno
import fcntl
import json
import os
import re

from qubes_storage import files, owning, replacing
from qubes_storage.admin import shapes
from qubes_storage.exc import StoragePoolException

MOVES = "/var/lib/qubes/storage-moves"
COPIES = "/var/lib/qubes/storage-copies"
CREATIONS = "/var/lib/qubes/storage-creations"
REMOVALS = "/var/lib/qubes/storage-removals"
_KINDS = {
    "move": (MOVES, shapes.MOVE, {"made": None, "snapshots": {}}),
    "copy": (COPIES, shapes.COPY, shapes.BEGUN),
    "creation": (CREATIONS, shapes.CREATION, {}),
    "removal": (REMOVALS, shapes.REMOVAL, {}),
}


class Journal:
    """
    The journals below a root, one file a VM or pool; replaced whole, so one is never half written.

    They are of group qubes, which may ask the daemon for all that is in them: whoever runs next
    has to read them.
    """

    def __init__(self, root, what="move"):
        self.root = root
        self.what = what
        self.of = "pool" if what == "removal" else "VM"
        self.path, self.checks, self.begun = _KINDS[what]

    def file(self, name):
        """The path of the journal of a VM or pool."""
        return f"{self.path}/{name}.json"

    def read(self, name):
        """The journal of a VM or pool with its ``path``, or None."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            return None
        try:
            with self._told(name), files.closing(self._open()) as fd:
                data = files.read_in(fd, f"{name}.json", self.file(name))
        except FileNotFoundError:
            return None
        try:
            journal = {**self.begun, **json.loads(data)}
            json.dumps(journal, ensure_ascii=False).encode()  # no half of a character
            wrong = shapes.wrong(journal, self.checks)
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: not there, or not what it should be")
        except (TypeError, ValueError, RecursionError) as err:
            raise StoragePoolException(
                f"{self.of} {name}: {self.file(name)}, the journal of its {self.what}, cannot be"
                f" read: {err}; no {self.of} is touched until it is mended or removed by hand"
            ) from err
        return {**journal, "path": self.file(name)}

    def names(self):
        """The VMs that there are journals of."""
        try:
            with self._told("*"), files.closing(self._open()) as fd:
                found = os.listdir(fd)
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))

    def write(self, name, journal):
        """Put a journal on the disk."""
        data = json.dumps({k: v for k, v in journal.items() if k != "path"}, indent=1)
        with self._told(name), files.closing(self._open(make=True)) as fd:
            replacing.replace(fd, f"{name}.json", data.encode(), owning.FILE_MODE)

    def remove(self, name):
        """Forget what a journal is of; there may be none."""
        absent = contextlib.suppress(FileNotFoundError)
        with absent, self._told(name), files.closing(self._open()) as fd:
            for each in (f".{name}.json.new", f"{name}.json"):  # as a run left that died writing it
                with absent:
                    os.unlink(each, dir_fd=fd)
            os.fsync(fd)

    @contextlib.contextmanager
    def locked(self, name):
        """One at a time; the next waits."""
        with self._told(name):
            fd = self._open(make=True)
        with files.closing(fd):
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield

    def _open(self, make=False):
        """A handle of the directory of the journals, a link in its place not followed."""
        parent, name = os.path.split(self.path)
        if not make:
            return files.open_inside(self.root, parent, name)
        with files.closing(files.make_dirs(self.root, parent)) as fd:
            if not files.exists(fd, name):
                with contextlib.suppress(FileExistsError, FileNotFoundError):  # others make it too
                    return owning.place_dir(fd, name)
            return files.open_subdir(fd, name)

    @contextlib.contextmanager
    def _told(self, name):
        """Errors name whose it is, the path and the cure; what is not there the caller tells."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as err:
            path, cure = self.file(name), "mend the disk and run again"
            if err.errno in (errno.ENOTDIR, errno.ELOOP):
                if err.errno == errno.ENOTDIR:
                    path = self.path
                cure = "no link is followed there: look who put it there, and remove it"
            elif isinstance(err, PermissionError):
                cure = f"run as root or as a member of group {owning.GROUP}"
            raise StoragePoolException(f"{self.of} {name}: {path}: {err.strerror}; {cure}") from err
