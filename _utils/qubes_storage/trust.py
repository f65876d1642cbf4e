"""
What may be imported: code in a file, below directories, that root alone may write.

``class = a.b.C`` in storage.conf runs code as root, and who may write storage.conf (group qubes)
is not who may write any file that Python would find. A directory that others may write is safe to
lie below where it is sticky and root's, as /tmp: they can add names to it, but not change those of
others. The directory that holds the file itself is not safe so: there a name that is added may be
what Python takes. Links on the way count as what they lead to does, and so do compiled files beside
a source. The core's own directory is running already; a file in it has to be no more open than
that. Run as another user, that user's own files are as good as root's.
"""

import importlib.util
import os
import stat
import sys

from qubes_storage.exc import StoragePoolException

_ACCESS_LIST = "system.posix_acl_access"
_MAX_LINKS = 40


def _absolute(path):
    """A path from / on as the system reads it: ``..`` behind a link is not what its text says."""
    path = os.fspath(path)
    return path if path.startswith("/") else os.path.join(os.getcwd(), path)


_CORE = _absolute(os.path.dirname(__file__))


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
        spec = _find(name, path)
        if spec is None:
            return  # built in, or not there: the import will tell
        check_spec(spec, f"{who}module {module} ")
        path = spec.submodule_search_locations
        if path is None:
            return


def _find(name, path):
    """What Python would import, whichever of its finders knows it; nothing is imported."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path, None) if find else None
        if spec is not None:
            return spec
    return None


def check_spec(spec, who):
    """Refuse what a finder of Python found, if others may write it."""
    places = list(spec.submodule_search_locations or ())
    files = [place for place in (spec.origin, spec.cached) if place and spec.has_location]
    _check_places(places + files, files or places, who)  # some packages are found in no file


def _check_places(places, names, who):
    """Refuse some places, and what holds those of them that Python looks for by name."""
    for place in places:
        check_path(_there(place), who)
    for place in names:
        check_path(_there(os.path.dirname(place)), who, True)


def _there(path):
    """A path, or for one in a zip file that file."""
    while path != os.path.dirname(path) and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_path(path, who="", holds=False):
    """
    Refuse a file or directory that others may write, or one above it, or a link on the way.

    ``holds`` says that a name in that directory is imported: others may add none, sticky or not.
    """
    todo = _parts(_absolute(path))
    place, links = "/", 0
    _check(place, who)
    while todo:
        part = todo.pop()
        if part == "..":
            place = os.path.dirname(place)
            continue
        place = os.path.join(place, part)
        _check(place, who)
        if os.path.islink(place):
            links += 1
            if links > _MAX_LINKS:
                raise StoragePoolException(f"{who}is not imported: {path}: too many links; mend it")
            target = os.readlink(place)
            place = "/" if target.startswith("/") else os.path.dirname(place)
            todo += _parts(target)
    if holds:
        _check(place, who, holds=True)


def _parts(path):
    """The names of a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def check_driver(path, who=""):
    """Refuse the file of a driver: one in the core's directory that is more open than that."""
    places = [path, importlib.util.cache_from_source(path)]
    if not path.startswith(_CORE + "/"):
        _check_places(places, places, who)
        return
    core = os.stat(_CORE)
    for place in places:
        for each in (os.path.dirname(place), place):
            holds = each != place
            if os.path.lexists(each):
                _check(each, who, core, holds)
            if os.path.islink(each):
                check_path(each, who, holds)


def _check(place, who, core=None, holds=False):
    try:
        found = os.lstat(place)
    except OSError as err:
        raise StoragePoolException(
            f"{who}is not imported: {place}: {err.strerror}; mend it"
        ) from err
    if _is_open(found, core, holds) or _has_list(found, place):
        lists = f" and setfacl -b {place}" if _has_list(found, place) else ""
        raise StoragePoolException(
            f"{who}is not imported: others than root may write {place}; mend it with"
            f" chown -h root: {place} and chmod go-w {place}{lists}"
        )


def _is_open(found, core, holds):
    """Whether others may write a file of that stat; who may write the core may write it."""
    owners = {0, os.geteuid()} | ({core.st_uid} if core else set())
    if stat.S_ISLNK(found.st_mode):
        return found.st_uid not in owners
    known = core.st_mode & (stat.S_IWGRP | stat.S_IWOTH) if core else 0
    groups = {0} | ({os.getegid()} if os.geteuid() else set())
    if known & stat.S_IWGRP:
        groups.add(core.st_gid)
    shared = found.st_mode & stat.S_IWOTH & ~known
    if found.st_gid not in groups:
        shared |= found.st_mode & stat.S_IWGRP
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and not found.st_uid
    return found.st_uid not in owners or bool(shared and (holds or not sticky))


def _has_list(found, place):
    """Whether a list names users who may write: what it allows shows as the group's mode."""
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & stat.S_IWGRP:
        return False
    try:
        return _ACCESS_LIST in os.listxattr(place)
    except OSError:
        return False
