"""The journal of a move or a copy: what has to be known to go on with it after a kill."""

import contextlib
import fcntl
import json
import os
import re

from qubes_storage import files, owning, replacing
from qubes_storage.exc import StoragePoolException

MOVES = "/var/lib/qubes/storage-moves"
COPIES = "/var/lib/qubes/storage-copies"


class Journal:
    """
    The journals below a root, one file a VM; replaced whole, so one is never half written.

    They are of group qubes, which may ask the daemon for all that is in them: whoever runs next
    has to read them.
    """

    def __init__(self, root, path=MOVES, what="move"):
        self.root = root
        self.path = path
        self.what = what

    def file(self, name):
        """The path of a VM's journal."""
        return f"{self.path}/{name}.json"

    def read(self, name):
        """The journal of a VM with its ``path``, or None."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            return None
        data = files.read(self.root, self.file(name))
        if data is None:
            return None
        try:
            return {**json.loads(data), "path": self.file(name)}
        except (TypeError, ValueError) as err:
            raise StoragePoolException(
                f"VM {name}: {self.file(name)}, the journal of its {self.what}, cannot be read:"
                f" {err}; no VM is touched until it is mended or removed by hand"
            ) from err

    def write(self, name, journal):
        """Put a journal on the disk."""
        data = json.dumps({k: v for k, v in journal.items() if k != "path"}, indent=1)
        with files.closing(files.make_dirs(self.root, self.path, owning.DIR_MODE)) as fd:
            replacing.replace(fd, f"{name}.json", data.encode())

    def remove(self, name):
        """Forget a move or a copy; there may be no journal of it."""
        with files.closing(files.open_dir(self.root, self.path)) as fd:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{name}.json", dir_fd=fd)
            os.fsync(fd)

    @contextlib.contextmanager
    def locked(self, name, wait=False):
        """One at a time; ``wait`` for the other rather than refuse."""
        with files.closing(files.make_dirs(self.root, self.path, owning.DIR_MODE)) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as err:
                raise StoragePoolException(
                    f"VM {name}: another {self.what} is under way ({self.path}); run again when it"
                    " is done"
                ) from err
            yield
