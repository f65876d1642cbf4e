"""The removal of VMs: refused while others use one, or while it has images and no purge."""

import os
import stat

from qubes_storage import build, files, guards, image, mending, trees
from qubes_storage.exc import InvalidInput, OutOfStep, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.pool import is_place
from qubes_storage.registry import Registry
from qubes_storage.turns import turns
from qubes_storage.values import format_size, shown
from qubes_storage.vm import VM

# The attributes of the collection that name a VM by its qid.
_DEFAULTS = ("clockvm", "default_fw_netvm", "default_netvm", "default_template", "updatevm")


class Removal:
    """The part of :py:class:`~qubes_storage.system.System` that removes VMs."""

    @looking
    def vm_remove_diff(self, name, purge=False, keep=False):
        """What :py:meth:`remove_vm` would change; raises what it would raise."""
        found = self.registry()
        vm = self.find_vm(name)
        left = self._all_left(name)
        if vm is None:
            return {"unfinished": {"old": left, "new": None}} if left else {}
        if vm.klass.name == "AdminVM":
            raise InvalidInput("VM dom0: cannot be removed")
        if vm.entry.flag("installed_by_rpm", False) and not keep:
            raise StoragePoolException(
                f"VM {name}: is installed by RPM; remove its package with dnf, which removes it, or"
                f" forget it and leave its images where they are: {_forget(vm)}"
            )
        if not keep:
            self._check_mounted(vm)
        changes = {"removed": {"old": name, "new": None}}
        if not keep and vm.klass.name != "DispVM":
            self._check_pool_of(vm)
        there, held = self._held(vm)
        if not (there or keep) and self._is_in_the_way(vm):
            raise StoragePoolException(
                f"VM {name}: {self.pool_of(vm).vmdir(vm)} is no directory that can be opened, so"
                " nobody can tell which images it has; put its directory there, or move this away"
            )
        if there and not keep:
            self._check_nothing_inside(vm)
        if held and not purge and not keep:
            images = ", ".join(f"{p} ({format_size(s)} in use)" for p, s in held.items())
            raise StoragePoolException(
                f"VM {name}: has images: {images}; they are deleted only with purge: true"
            )
        if there and not keep:
            changes["deleted"] = {"old": sorted(held) or [there], "new": None}
        own = self._left(vm)
        if purge and not (there or own) and vm.klass.name != "DispVM":
            self._check_not_away(vm)
        left = own + left
        if left:
            changes["unfinished"] = {"old": left, "new": None}
        self._check_unused(found, vm)  # last: whoever waits for this waits for nothing else
        return changes

    def _check_mounted(self, vm):
        """Refuse while a disk that has to be there is away: nobody can tell what is on it."""
        try:
            guards.check_mount(self.root, vm.pool, self.guards(vm.pool))
        except StoragePoolException as err:
            raise StoragePoolException(
                f"VM {vm.name}: {err}, or forget the VM and leave its images where they are:"
                f" {_forget(vm)}",
                waits_for=err.waits_for,
            ) from err

    def _check_pool_of(self, vm):
        """Refuse a VM of a pool that cannot be loaded: nobody can tell which images it has."""
        try:
            self.pool_of(vm)
        except StoragePoolException as err:
            raise StoragePoolException(
                f"VM {vm.name}: {err}; mend the pool, or forget the VM and leave its images where"
                f" they are: {_forget(vm)}",
                waits_for=err.waits_for,
            ) from err

    def _check_not_away(self, vm):
        """Refuse to delete images on a disk that is away: they would be there when it is back."""
        pool = self.pool_of(vm)
        # Of one VM alone nobody can tell whether it is away or deleted, as which R3.2 takes it.
        for subdir in (None,) if self._is_alone(vm) else (None, vm.klass.subdir):
            if self.is_absent_disk(pool, subdir):
                path = os.path.join(pool.dir_path, subdir) if subdir else pool.dir_path
                raise OutOfStep(
                    f"VM {vm.name}: not one of the VMs of pool {pool.name} is in {path}, so its"
                    " disk is not mounted, and no image can be deleted; mount it, or remove the VM"
                    f" without purge ({_forget(vm)})",
                    waits_for=[("mount", path)],
                )

    def _is_alone(self, vm):
        """Whether no other VM is registered in the directory of a pool where one is."""
        found = self.registry()
        others = (VM.of(entry, found) for entry in found.entries if entry is not vm.entry)
        place = vm.pool, vm.klass.subdir
        return not any(other and (other.pool, other.klass.subdir) == place for other in others)

    def _left(self, vm):
        """The paths of what a dead run left of a registered VM with a directory of its own."""
        if vm.klass.name == "DispVM":
            return []
        try:
            pool = self.pool_of(vm)
        except StoragePoolException:
            return []
        left = mending.unfinished(pool, vm)
        if left:
            mending.check(pool, vm, True)
        return left

    def _leftovers(self, name):
        """
        ``(pool, vm, paths)`` of what a dead run left where the registry has no VM of a name; while
        nobody can tell where it has one, nothing is.
        """
        if not isinstance(name, str) or "/" in name or name in (".", ".."):
            return
        sections = self.sections()
        entry, there = self.registry().by_name.get(name), self.find_vm(name)
        place = there and self._place_of(there)
        if entry and place is None:
            return
        home = entry.attrs.get("dir_path", "") if entry else ""
        home = self._real(home) if is_place(home) else None
        for pool_name in sections:
            try:
                pool = self.get_pool(pool_name)
            except StoragePoolException:
                continue
            for klass in self.places():
                vm = VM(name, klass, pool=pool_name)
                if there and (self._place_of(vm) == place or self._real(pool.vmdir(vm)) == home):
                    continue
                paths = mending.unfinished(pool, vm, registered=False)
                if paths:
                    yield pool, vm, paths

    def _all_left(self, name):
        """The paths of the same, wherever they are; raises what mending them would."""
        left = []
        for pool, vm, paths in self._leftovers(name):
            mending.check(pool, vm, False)
            left += paths
        return left

    def _check_nothing_left(self, pool_name):
        """Refuse to take a pool away with what a dead run left in it, which nobody would find."""
        try:
            pool = self.get_pool(pool_name)
        except StoragePoolException:
            return
        vms = [
            VM(name, klass, pool=pool_name)
            for klass in self.places()
            for name in mending.marked(pool, klass.subdir)
        ]
        left = [(vm.name, path) for vm in vms for path in mending.unfinished(pool, vm, False)]
        if left:
            name, path = left[0]
            verb = "set" if self.find_vm(name) else "remove"
            raise StoragePoolException(
                f"pool {pool_name}: {path} is left by a run that died; qubes_vm.{verb} {name} mends"
                " that",
                waits_for=[("left", vm) for vm in dict(left)],
            )

    def _clear_leftovers(self, name):
        """Undo the same; the lock is held."""
        for pool, left, _ in list(self._leftovers(name)):
            mending.mend(pool, left, False)

    @looking
    def removal_order(self, names):
        """The names of VMs in an order in which they can go: those that use others before these."""
        found, users = self.registry(), {}
        for entry in found.entries:
            for used in found.uses(entry).values():
                if used is not None:
                    users.setdefault(used.attrs.get("name"), []).append(entry.attrs.get("name"))
        return turns(names, users)

    def _check_unused(self, found: Registry, vm):
        for word in ("template", "NetVM", "NetVM of the DispVMs"):
            users = self._users(found, vm, word)
            if users:
                raise StoragePoolException(
                    f"VM {vm.name}: is the {word} of {shown(users)}; give them another or"
                    " remove them first",
                    waits_for=[(f"{word} of", user, vm.name) for user in users],
                )

    def _users(self, found, vm, word):
        """The names of the other VMs that have a VM as their ``word``."""
        own = found.by_name.get(vm.name)
        users = (e for e in found.entries if e is not own and found.uses(e).get(word) is own)
        return [entry.attrs.get("name", "?") for entry in users if own]

    def _held(self, vm):
        """``(directory or None, {path: allocated})`` of what a VM's directory holds."""
        try:
            pool = self.pool_of(vm)
        except StoragePoolException:
            return None, {}
        if vm.klass.name == "DispVM":
            return None, {}
        fd = mending.open_vm(pool, vm)
        if fd is None:
            return None, {}
        with files.closing(fd):
            path = pool.vmdir(vm)
            held = {
                os.path.join(path, name): trees.tree_size(fd, name)
                for name, there in files.entries(fd)
                if name != "icon.png" or not stat.S_ISLNK(there.st_mode)
            }
            for name in vm.images.values():
                self._check_halted(vm, fd, name)
        return path, held

    def _is_in_the_way(self, vm):
        """Whether something is in the place of the directory that a VM has for itself."""
        if vm.klass.name == "DispVM":
            return False
        try:
            return mending.is_there(self.pool_of(vm), vm, dead=False)
        except InvalidInput:  # a name that leads out of the pool
            return False
        except StoragePoolException as err:
            return not err.waits_for  # a link, say, and not a directory that is missing

    @staticmethod
    def _check_halted(vm, fd, name):
        found = files.exists(fd, name)
        device = image.used_by_loop(found) if found else None
        if device:
            raise StoragePoolException(
                f"VM {vm.name}: {name} is in use by {device}; shut the VM down first"
            )

    def remove_vm(self, name, purge=False, keep=False):
        """
        Remove a VM from the registry, and with ``purge`` its directory and images; ``keep`` leaves
        them where they are, for :py:meth:`orphans` to list.

        Returns the changes, ``{}`` for a VM that is not there. A VM that others use, or one that
        has images while both are off, is refused.
        """
        if purge and keep:
            raise InvalidInput(f"VM {name}: its images cannot be both deleted and kept; say one")
        if not self.vm_remove_diff(name, purge, keep):
            return {}
        with self.locked("VM", name) as registry:
            changes = self.vm_remove_diff(name, purge, keep)
            vm = self.find_vm(name)
            self._clear_leftovers(name)
            if vm is None:
                return changes
            if keep:
                if self._left(vm):
                    mending.mend(self.pool_of(vm), vm, True)
                self.save_registry(self._without(registry, vm))
            elif "deleted" in changes or self._left(vm):
                with build.removed(self.pool_of(vm), vm):
                    self.save_registry(self._without(registry, vm))
            else:
                self.save_registry(self._without(registry, vm))
        return changes

    @staticmethod
    def _without(registry, vm):
        """The registry without a VM; what it was the default of has none, as R3.2's ``pop``."""
        own = registry.by_name.get(vm.name)
        gone = {k: "None" for k in _DEFAULTS if own and registry.by_qid(registry.get(k)) is own}
        return registry.replaced(vm.entry).copy(attrs={**registry.attrs, **gone})


def _forget(vm):
    """How the command line takes a VM out of the registry alone."""
    return f"qubes-storage remove --just-db {vm.name}"
