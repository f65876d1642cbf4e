"""The directories of pools: made and removed, and put back if the section does not follow."""

import contextlib
import os
import re
import stat

from qubes_storage import files, owning
from qubes_storage.blame import of_driver
from qubes_storage.exc import StoragePoolException
from qubes_storage.pool import CONF
from qubes_storage.vm import SUBDIRS


class Directories:
    """The part of :py:class:`~qubes_storage.system.System` that makes and removes directories."""

    @contextlib.contextmanager
    def _made(self, pool):
        """Make the directories of a pool; if its section is not written then, take them away."""
        made = []
        if pool:
            with of_driver(pool, "missing"):
                made = pool.missing()
        stood = files.read(self.root, CONF)
        try:
            if pool:
                with of_driver(pool, "create"):
                    self._settle(pool.dir_path)
                    if made:
                        pool.create()
            yield
        except BaseException:
            if files.read(self.root, CONF) == stood:
                for path in reversed(made):
                    with contextlib.suppress(OSError):
                        self._rmdir(path)
            raise

    @contextlib.contextmanager
    def _unmade(self, paths):
        """Remove empty directories; if the section stays then, they come back."""
        paths = [path.rstrip("/") for path in paths]
        gone, parents = [], {}  # handles, so that they come back where they were
        stood = files.read(self.root, CONF)
        with contextlib.ExitStack() as stack:
            for parent in {os.path.dirname(path) for path in paths}:
                parents[parent] = files.open_dir(self.root, parent)
                stack.callback(os.close, parents[parent])
            try:
                for path in paths:
                    gone.append(path)
                    fd = parents[os.path.dirname(path)]
                    os.rmdir(os.path.basename(path), dir_fd=fd)
                    os.fsync(fd)
                yield
            except BaseException:
                for path in reversed(gone if files.read(self.root, CONF) == stood else ()):
                    parent, name = os.path.split(path)
                    with contextlib.suppress(OSError):
                        parents[path] = owning.place_dir(parents[parent], name)
                        stack.callback(os.close, parents[path])
                raise

    def _settle(self, path):
        """Bring what a dead run made or removed there to the disk, before anything relies on it."""
        for each in (os.path.dirname(path.rstrip("/")), path):
            with contextlib.suppress(FileNotFoundError):
                fd = files.open_dir(self.root, each)
                with files.closing(fd):
                    os.fsync(fd)

    def _empty_dirs(self, name):
        """
        The directories of a pool that hold nothing, the innermost first; a link and a mount point
        are left out, for they are the user's, and what is another pool's too.
        """
        try:
            pool = self.get_pool(name)
            fd = pool.open()
        except StoragePoolException:
            return []
        here = re.sub(r"(/\.?)+$", "", pool.dir_path)  # no directory is removed as "."
        others = {
            self._real(os.path.join(path, subdir))
            for _, path in self._dir_paths(name)
            for subdir in ("", *SUBDIRS)
        }
        with files.closing(fd):
            names = set(os.listdir(fd))
            found = []
            for subdir in SUBDIRS:
                path = os.path.join(here, subdir)
                kept = files.is_mount(self.root, path) or self._real(path) in others
                if not kept and is_empty(fd, subdir):
                    found.append(path)
            own = self._real(here) not in others and self._is_own_dir(here)
            if len(found) == len(names) and own:
                found.append(here)
        return found

    def _is_own_dir(self, path):
        """Whether a path is that of a directory, and neither of a link nor of a mount point."""
        parent, name = os.path.split(path.rstrip("/"))
        with files.closing(files.open_dir(self.root, parent)) as fd:
            found = files.exists(fd, name)
        directory = found is not None and stat.S_ISDIR(found.st_mode)
        return directory and not files.is_mount(self.root, path)

    def _rmdir(self, path):
        parent, name = os.path.split(path.rstrip("/"))
        with files.closing(files.open_dir(self.root, parent)) as fd:
            os.rmdir(name, dir_fd=fd)
            os.fsync(fd)


def is_empty(dir_fd, name):
    """Whether a name in a directory is that of a directory which holds nothing."""
    try:
        with files.closing(files.open_subdir(dir_fd, name)) as fd:
            return not os.listdir(fd)
    except OSError:
        return False
