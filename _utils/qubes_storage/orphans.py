"""What the registry, storage.conf and the disks do not agree on."""

import contextlib
import os

from qubes_storage import files, mending, trees
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.markers import removing
from qubes_storage.vm import KLASSES, SUBDIRS, VM


class Orphans:
    """The part of :py:class:`~qubes_storage.system.System` that looks for what nobody owns."""

    @looking
    def orphans(self):
        """
        ``[{pool, path, size}]`` of directories that no VM owns; ``size`` in bytes as allocated.

        A VM whose directory is gone, and a pool that the registry names and storage.conf lacks, are
        in it with size None.
        """
        found = []
        registry = self.registry()
        vms = [vm for vm in (VM.of(e, registry) for e in registry.entries) if vm]
        vms = [vm for vm in vms if vm.klass.name != "AdminVM"]
        pools = self._pools()
        others = [vm for vm in map(VM.stranger, registry.entries) if vm]
        others.append(VM("dom0", KLASSES["AdminVM"]))  # R3.2 keeps its icon and rules there
        owned = {self._owned(vm) for vm in vms + others}
        owned |= {(own[0], removing(own[1])) for own in owned if own}  # a removal that died
        # R3.2 keeps the rules of a VM of another pool in the default one.
        rules = {os.path.dirname(e.attrs.get("firewall_conf", "")) for e in registry.entries}
        for pool in pools.values():
            found += [row for row in self._unowned(pool, owned) if row["path"] not in rules]
        for vm in vms:
            if vm.pool not in self.sections():
                found.append({"pool": vm.pool, "path": None, "size": None})
            elif vm.pool in pools and vm.klass.name != "DispVM" and self._is_gone(vm):
                path = pools[vm.pool].vmdir(vm) if self._owned(vm) else None
                found.append({"pool": vm.pool, "path": path, "size": None})
        first = {}
        for row in found:
            first.setdefault((row["pool"], row["path"]), row)
        return [*first.values()]

    def _is_gone(self, vm):
        """Whether a VM has no directory, also none that a dead run was removing."""
        try:
            return not mending.is_there(self.pool_of(vm), vm)
        except (InvalidInput, StoragePoolException):  # nowhere that can be looked into
            return True

    def _owned(self, vm):
        """What tells a VM's directory from others; None for a name that leads out of its pool."""
        try:
            return self._place_of(vm), vm.dirname
        except InvalidInput:
            return None

    def _place_of(self, vm):
        """What tells the directory that a VM's directory is in from others, by whatever path."""
        try:
            fd = self.pool_of(vm).open_subdir(vm.klass.subdir)
        except StoragePoolException:
            return None
        with files.closing(fd):
            return _key(fd)

    def _pools(self):
        """``{name: Pool}`` of those that can be looked into; of the others, ``pool_info`` tells."""
        found = {}
        for name in self.sections():
            with contextlib.suppress(StoragePoolException):
                found[name] = self.get_pool(name)
        return found

    def _unowned(self, pool, owned):
        found = []
        for subdir in SUBDIRS:
            try:
                fd = pool.open_subdir(subdir)
            except StoragePoolException:
                continue
            with files.closing(fd):
                place = _key(fd)
                for name, _ in files.entries(fd):
                    if (place, name) not in owned:
                        path = os.path.join(pool.dir_path, subdir, name)
                        size = trees.tree_size(fd, name)
                        found.append({"pool": pool.name, "path": path, "size": size})
        return found


def _key(fd):
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
