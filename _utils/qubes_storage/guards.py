"""
Guards of pools: ``require_mount`` and ``min_free``, kept beside storage.conf.

R3.2 would choke on them in storage.conf, so they have a file of their own with the same syntax,
/etc/qubes/storage-guards.conf, on R4 too. Every writer reads them.
"""

import contextlib
import fcntl
import os
import time

from qubes_storage import files, owning, replacing
from qubes_storage.conf import Conf
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.values import format_size, parse_size, shown

PATH = "/etc/qubes/storage-guards.conf"
NAMES = ("require_mount", "min_free")
PATIENCE = 10  # s; a save takes milliseconds
_LOCKED = "/var/lib/qubes"
_PAUSE = 0.02


def clean(pool, guards):
    """``{guard: text or None}`` that can be written; bad ones raise :py:class:`InvalidInput`."""
    for name, value in guards.items():
        if value is not None:
            _check(pool, name, str(value) if name != "min_free" else value)
    return {name: value if value is None else str(value) for name, value in guards.items()}


def _check(pool, name, value, where=""):
    if name == "min_free":
        parse_size(value, f"pool {pool}: {where}min_free")
    else:
        files.check_dir_path(pool, value, f"{where}require_mount")


def _written(pool, guards, name):
    """A guard that the file has, or None; one that someone else wrote wrong is refused."""
    value = guards.get(name)
    if value:
        _check(pool, name, value, f"{PATH}: ")
    return value or None


def same(name, old, new):
    """Whether two values of a guard mean the same; one that was written wrong means nothing."""
    if old is None or new is None:
        return old == new
    if name == "min_free":
        try:
            return parse_size(old) == parse_size(new)
        except InvalidInput:
            return False
    return os.path.normpath(old) == os.path.normpath(new)


def check_mount(root, pool, guards):
    """Refuse while ``require_mount`` is not a mount point below root."""
    path = _written(pool, guards, "require_mount")
    if path and not files.is_mount(root, path):
        raise StoragePoolException(
            f"pool {pool}: {path} is not mounted, and require_mount asks for it; mount its disk",
            waits_for=[("mount", path)],
        )


def check_left(root, pool, kept, vms):
    """Refuse to remove a pool that VMs lie in, or whose ``kept`` guards are not kept."""
    waits_for = [("pool of", vm, pool) for vm in vms]
    try:
        check_mount(root, pool, kept)
    except StoragePoolException as err:
        raise StoragePoolException(str(err), [*err.waits_for, *waits_for]) from err
    if vms:
        raise StoragePoolException(
            f"pool {pool}: VMs lie in it ({shown(vms)}); migrate or remove them first", waits_for
        )


def check_free(pool, guards, free, needed=0, path=None):
    """Refuse to take ``needed`` bytes where fewer than ``min_free`` would stay free."""
    kept = _written(pool, guards, "min_free")
    least = parse_size(kept) if kept else 0
    if free - needed < least or (needed and free < needed):
        keeps = f" and min_free keeps {format_size(least)}" if least else ""
        where = f" in {path}" if path else ""
        wants = f", {format_size(needed)} are needed" if needed else ""
        raise StoragePoolException(
            f"pool {pool}: {format_size(free)} are free{where}{wants}{keeps}; free some"
            " space or take another pool"
        )


def check_values(pool, guards):
    """The guards of a pool as problems, for a file that someone else wrote."""
    found = []
    for name in guards:
        try:
            _written(pool, guards, name)
        except InvalidInput as err:
            found.append(str(err))
    return found


def load(root):
    """``{pool: {guard: value}}`` of the file."""
    return Conf(files.read(root, PATH) or b"", PATH).pools()


def save(root, pool, guards=None):
    """
    Set the guards of a pool in the file, the value None removes one; without ``guards`` all go.

    For a machine without R3.2's registry, whose lock guards the file elsewhere: here writers take
    turns by a lock on a directory that root and group qubes alone may open.
    """
    if not guards and pool not in load(root):
        return
    with contextlib.ExitStack() as stack:
        _lock(
            stack.enter_context(files.closing(files.make_dirs(root, _LOCKED, owning.DIR_MODE))),
            pool,
        )
        os.close(files.make_dirs(root, os.path.dirname(PATH)))
        fd, name = stack.enter_context(files.locate(root, PATH))
        data = files.read(root, PATH) or b""
        conf = Conf(data, PATH)
        if guards:
            conf.edit(pool, guards)
        if not guards or not conf.pools().get(pool):
            conf.remove(pool)
        if conf.dumps() != data:
            replacing.replace(fd, name, conf.dumps())


def _lock(fd, pool):
    """Wait for other writers, but not for one that never ends."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            if time.monotonic() > deadline:
                raise StoragePoolException(
                    f"pool {pool}: {PATH}: cannot be saved, for another process has locked"
                    f" {_LOCKED} for {PATIENCE} s; see which with lsof {_LOCKED}, and run again"
                ) from err
        time.sleep(_PAUSE)
