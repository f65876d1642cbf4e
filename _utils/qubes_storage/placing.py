"""Where pools and VMs may lie: not over another, not on a disk that is not there."""

import contextlib
import copy
import os
import stat

from qubes_storage import files, guards, mending, mounts, owning, registry
from qubes_storage.blame import of_driver
from qubes_storage.directories import Directories, is_empty
from qubes_storage.exc import OutOfStep, StoragePoolException
from qubes_storage.pool import CONF, in_force, is_place, make_pool
from qubes_storage.values import shown
from qubes_storage.vm import SUBDIRS, VM


class Placing(Directories):
    """The part of :py:class:`~qubes_storage.system.System` that is about where pools lie."""

    def is_absent_disk(self, pool, subdir=None):
        """
        Whether VMs are registered in a pool and not one of them is there; or in a directory of it,
        where there is no other directory either.
        """
        found = self.registry()
        some = False
        for entry in found.entries:
            if pool_of(entry) != pool.name:
                continue
            vm = VM.of(entry, found)
            if vm is None or vm.klass.name in ("AdminVM", "DispVM"):
                continue
            if subdir not in (None, vm.klass.subdir):
                continue
            some = True
            with contextlib.suppress(StoragePoolException):
                if mending.is_there(pool, vm):
                    return False
        return some and (subdir is None or not _has_dirs(pool, subdir))

    def check_disk(self, pool, subdir=None):
        """Refuse to make anything in a pool, or in one directory of it, whose disk is not there."""
        if self.is_absent_disk(pool, subdir):
            path = os.path.join(pool.dir_path, subdir) if subdir else pool.dir_path
            raise OutOfStep(
                f"pool {pool.name}: not one of its VMs is in {path}, so its disk is not mounted;"
                " mount it, or remove the VMs from the registry with qubes_vm.remove",
                waits_for=[("mount", path)],
            )

    def _check_setup(self, pool, try_out=False):
        """Ask the driver of a pool whether its place will do."""
        if pool is None:
            return
        for path in (pool.dir_path, os.path.dirname(pool.dir_path.rstrip("/"))):
            try:
                fd = files.open_dir(self.root, path)
                with files.closing(fd), of_driver(pool, "check_setup"):
                    pool.check_setup(fd, try_out)
                return
            except FileNotFoundError:
                continue  # it is made, where the next one is
            except OSError as err:
                raise StoragePoolException(
                    f"pool {pool.name}: {path}: {err.strerror}; mend it and try again"
                ) from err

    def _check_mount(self, name, exists, declared):
        kept = {**(self.guards(name) if exists else {}), **declared.guards}
        guards.check_mount(self.root, name, kept)

    def _check_parent(self, name, path):
        if os.path.normpath(path) == os.path.dirname(registry.PATH):
            return  # of the machine's own layout: the lock is there, and makes it
        parent = os.path.dirname(path.rstrip("/"))
        try:
            with files.closing(files.open_dir(self.root, parent)) as fd:
                found = files.exists(fd, os.path.basename(path.rstrip("/")))
        except OSError as err:
            raise StoragePoolException(
                f"pool {name}: {parent}: {err.strerror}; make it, or mount its disk, first: a"
                " parent is never made in silence",
                waits_for=[("path", parent)],
            ) from err
        if found:
            raise StoragePoolException(
                f"pool {name}: {path} is a link to what is not there; mount its disk, or delete the"
                " link"
            )

    def _check_way(self, name, paths):
        """Refuse what lies where directories are made before they get their names."""
        for path in paths:
            parent, last = os.path.split(path.rstrip("/"))
            way = owning.beside(last)
            try:
                fd = files.open_dir(self.root, parent)
            except FileNotFoundError:  # it is made first
                continue
            except OSError as err:
                raise StoragePoolException(
                    f"pool {name}: {parent}: {err.strerror}; mend it and try again"
                ) from err
            with files.closing(fd):
                if files.exists(fd, way) and not is_empty(fd, way):
                    raise StoragePoolException(
                        f"pool {name}: {os.path.join(parent, way)} is in the way of {path}, which"
                        " is made there; move it away"
                    )

    def _before(self, name):
        """The sections before a pool's: of two over one directory, the later one is wrong."""
        names = list(self.sections())
        return names[: names.index(name)]

    def _check_place(self, name, pool, among=None):
        """Two pools never share a directory, and none lies where another keeps its VMs."""
        here = self._real(pool.dir_path)
        for other, path in self._dir_paths(name, among):
            there = self._real(path)
            if here == there:
                problem = f"is the directory of pool {other} too"
            elif _inside_vms(here, there):
                problem = f"lies in the VM directories of pool {other} ({path})"
            elif _inside_vms(there, here):
                problem = f"has pool {other} ({path}) in its VM directories"
            else:
                continue
            raise _shares(pool, problem)

    def _check_apart(self, source, target):
        """Refuse to move a VM to a pool that lies where its own does: its place is taken by it."""
        if self._real(source.dir_path) == self._real(target.dir_path):
            raise _shares(target, f"is the directory of pool {source.name} too")

    def _dir_paths(self, but=None, among=None):
        """``(pool, dir_path)`` of the sections that have one, but of one pool."""
        names = self.sections() if among is None else among
        for name in names:
            path = None if name == but else self._dir_path(name)
            if path:
                yield name, path
        if among is None and "default" not in (but, *names) and self._begins():
            yield "default", in_force("default", {})["dir_path"]

    def _begins(self):
        """Whether storage.conf is not there yet: its first version has the pool default."""
        return files.read(self.root, CONF) is None

    def _check_new_vm(self, vm):
        """Refuse to make a VM, or bring one, on a disk that is away, or among another pool's."""
        pool = self.pool_of(vm)
        self.check_disk(pool, vm.klass.subdir)
        here = self._real(pool.dir_path)
        for other, path in self._dir_paths(pool.name):
            if _inside_vms(here, self._real(path)):
                raise _shares(pool, f"lies in the VM directories of pool {other} ({path})")

    def _check_nothing_inside(self, vm):
        """Refuse to delete or move a VM's directory while a pool or a mount lies in it."""
        path = self.pool_of(vm).vmdir(vm)
        here = os.path.join(self._real(os.path.dirname(path)), os.path.basename(path))
        for name, place in self._dir_paths():
            if _inside(self._real(place), here):
                raise StoragePoolException(
                    f"VM {vm.name}: pool {name} ({place}) lies in its directory {path};"
                    " migrate the VMs of that pool to another, and remove it, first"
                )
        for point in mounts.inside(here):
            raise StoragePoolException(
                f"VM {vm.name}: something is mounted at {path}{point[len(here) :]}, which can be"
                " neither moved nor deleted; unmount it"
            )

    def _dir_path(self, name):
        """Where a pool lies: its driver may have a default, or derive it from other options."""
        config = self.sections()[name]
        with contextlib.suppress(StoragePoolException):
            return self.get_pool(name).dir_path
        with contextlib.suppress(StoragePoolException):  # also of one that is still to be made
            return make_pool(name, config, self.root).dir_path
        path = in_force(name, config).get("dir_path")
        return path if path and is_place(path) else None

    def _real(self, path):
        """Where a directory really lies, also one that is not there yet."""
        known = {} if self._seen.versions is None else self._seen.real
        if path not in known:
            known[path] = self._find_real(os.path.normpath(path))
        return known[path]

    def _find_real(self, path):
        rest = []
        while True:
            try:
                with files.closing(files.open_dir(self.root, path)) as fd:
                    return os.path.join(os.readlink(f"/proc/self/fd/{fd}"), *reversed(rest))
            except OSError:
                path, last = os.path.split(path)
                if not last:
                    raise  # the root itself
                rest.append(last)

    def _refuse_move(self, name, moved, pool):
        """
        Nothing of a pool's place changes under its VMs. But what somebody wrote wrong may be put
        right, if all of them are in ``pool``: a section that cannot be loaded, and a dir_path where
        none of them is.
        """
        vms = self.vms_in(name)
        with_images = [vm for vm in vms if vm.klass.name != "DispVM"]
        try:
            old = self.get_pool(name)
        except StoragePoolException:
            old = None
        if type(old) is type(pool) and "dir_path" not in moved:
            return  # another word for the same class
        before = copy.copy(pool)
        before.dir_path = self._dir_path(name) or ""
        knows = before.dir_path and "dir_path" in moved
        there = knows and any(_holds(before, vm) for vm in with_images)
        wrong = old is None or (moved == ["dir_path"] and with_images)
        if vms and (there or not wrong):
            raise StoragePoolException(
                f"pool {name}: {', '.join(moved)} cannot change while VMs lie in it"
                f" ({shown(vm.name for vm in vms)}); migrate or remove them first, or"
                " declare another pool",
                waits_for=[("pool of", vm.name, name) for vm in vms],
            )
        lost = [vm.name for vm in with_images if not _holds(pool, vm)]
        if lost and "dir_path" not in moved:
            raise StoragePoolException(
                f"pool {name}: VMs are not in {pool.dir_path} ({shown(lost)}), so nobody can tell"
                f" whether this {' and '.join(moved)} is theirs; mount its disk first",
                waits_for=[("mount", pool.dir_path)],
            )
        if lost:
            raise StoragePoolException(
                f"pool {name}: VMs lie neither where {CONF} has it nor in {pool.dir_path}"
                f" ({shown(lost)}); mount its disk, or put the dir_path where they lie back into"
                f" {CONF}"
            )
        away = [vm.name for vm in with_images if knows and _is_of(vm, before, pool)]
        if away:  # nobody wrote it wrong, so what lies in the other place may be an old copy
            raise StoragePoolException(
                f"pool {name}: VMs are registered in {before.dir_path}, where {CONF} has it, and"
                f" not in {pool.dir_path} ({shown(away)}); mount its disk, or write dir_path ="
                f" {pool.dir_path} into {CONF} if that disk is there now"
            )


def _holds(pool, vm):
    """Whether a VM's directory is in a pool."""
    fd = pool.open_vm(vm)
    if fd is None:
        return False
    os.close(fd)
    return True


def _has_dirs(pool, subdir):
    """Whether a directory of a pool, as it is seen now, has any, be it what a dead run left."""
    try:
        fd = pool.open_subdir(subdir)
    except StoragePoolException:
        return False
    with files.closing(fd):
        return any(stat.S_ISDIR(there.st_mode) for _, there in files.entries(fd))


def _is_of(vm, pool, other):
    """Whether the registry has a VM in the place that it has in a pool, and not in another."""
    place = os.path.normpath(vm.entry.attrs.get("dir_path", "") if vm.entry else "")
    return place == os.path.normpath(pool.vmdir(vm)) != os.path.normpath(other.vmdir(vm))


def pool_of(entry):
    return entry.attrs.get("pool_name", "default")


def _inside(path, directory):
    return path == directory or path.startswith(directory + "/")


def _inside_vms(path, pool):
    """Whether a path is where the pool in a directory keeps its VMs."""
    return any(_inside(path, os.path.join(pool, subdir)) for subdir in SUBDIRS)


def _shares(pool, problem):
    return StoragePoolException(
        f"pool {pool.name}: dir_path {pool.dir_path} {problem}; give each a directory of its own"
    )
