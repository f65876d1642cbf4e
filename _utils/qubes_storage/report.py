"""A bird's-eye view: every pool, its filesystem, and the VMs in it with their sizes."""

from qubes_storage import files, image, mounts
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.pool import CONF
from qubes_storage.vm import VM

_SIZES = ("size", "used", "provisioned", "free")


class Report:
    """The part of :py:class:`~qubes_storage.system.System` that tells who lives where."""

    @looking
    def report(self):
        """
        ``{pool: {driver or class, dir_path, filesystem, size, used, provisioned, free, shared,
        vms: {VM: {volume: {size, allocated}}}, problems}}``, sizes in bytes, None where they cannot
        be told.

        ``shared`` is True where copies share blocks: what an image has allocated may then be
        another's too. A pool that VMs lie in and storage.conf lacks is there, as a problem.
        """
        found = {name: self._report(name) for name in self.sections()}
        for vm in self._vms():
            if vm.pool not in found:
                found[vm.pool] = self._lost(vm.pool)
            volumes = {}
            if vm.klass.name != "DispVM":  # which has those of its template's saved DispVM
                try:
                    volumes = self.vm_info(vm.name)["volumes"]
                except InvalidInput as err:  # its name leads out; the others are told all the same
                    found[vm.pool]["problems"].append(str(err))
            found[vm.pool]["vms"][vm.name] = {
                volume: {key: there[key] for key in ("size", "allocated")}
                for volume, there in volumes.items()
            }
        return found

    def _vms(self):
        """The VMs, dom0 left out: it has no images."""
        registry = self.registry()
        vms = (VM.of(entry, registry) for entry in registry.by_name.values())
        return [vm for vm in vms if vm and vm.klass.name != "AdminVM"]

    def _report(self, name):
        info = self.pool_info(name)
        kind, shared = self._filesystem(name)
        return {
            **{key: info[key] for key in ("driver", "class") if key in info},
            "dir_path": info.get("dir_path"),
            "filesystem": kind,
            **{key: info[key] for key in _SIZES},
            "shared": shared,
            "vms": {},
            "problems": info["problems"],
        }

    def _filesystem(self, name):
        """``(type, whether copies on it share blocks)`` of a pool's filesystem."""
        try:
            with files.closing(self.get_pool(name).open()) as fd:
                return mounts.filesystem(fd), image.shares_blocks(fd)
        except StoragePoolException:
            return None, None

    @staticmethod
    def _lost(name):
        problem = f"pool {name}: VMs lie in it, and {CONF} lacks it; add it with qubes_pool.add"
        keys = ("driver", "dir_path", "filesystem", *_SIZES, "shared")
        return {**dict.fromkeys(keys), "vms": {}, "problems": [problem]}
