"""
What may be imported: code in a file, below directories, that root alone may write.

``class = a.b.C`` in storage.conf runs code as root, and who may write storage.conf (group qubes)
is not who may write any file that Python would find. A directory that others may write is safe
where it is sticky and root's, as /tmp: they can add names to it, but not change those of others.
The core's own directory is running already. Run as another user, that user's own files are as good
as root's.
"""

import importlib.machinery
import os
import stat
import sys

from qubes_storage.exc import StoragePoolException


def check_module(module, who=""):
    """Refuse a module, before it is imported, if others may write it or what leads to it."""
    path = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        loaded = sys.modules.get(name)
        if loaded is not None:
            path = getattr(loaded, "__path__", None)
            continue
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return  # built in, of an importer of its own, or not there: the import will tell
        places = [spec.origin] if spec.has_location else []
        for place in [*places, *(spec.submodule_search_locations or ())]:
            check_path(place, f"{who}module {module} ")
        path = spec.submodule_search_locations
        if path is None:
            return


def check_path(path, who=""):
    """Refuse a file or directory that others may write, or one above it."""
    place = os.path.realpath(path)
    while True:
        found = os.stat(place)
        mine = found.st_gid in (0, os.getegid())
        shared = found.st_mode & (stat.S_IWOTH | (0 if mine else stat.S_IWGRP))
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and not found.st_uid
        if found.st_uid not in (0, os.geteuid()) or (shared and not sticky):
            raise StoragePoolException(
                f"{who}is not imported: others than root may write {place}; mend it with"
                f" chown root: {place} and chmod go-w {place}"
            )
        if place == "/":
            return
        place = os.path.dirname(place)
