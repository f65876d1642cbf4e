"""R4: a bird's-eye view of who lives where, and what is wrong with a VM."""

import os

from qubes_storage.admin.vm_words import OWN
from qubes_storage.adminapi import Unreadable
from qubes_storage.exc import StoragePoolException

_DIRTY = "-dirty.img"


class AdminReport:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that reports."""

    def report(self):
        """
        ``{pool: {driver, size, used, free, provisioned, vms: {VM: {volume: {size, allocated}}}}}``
        in bytes; a snapshot is no image of its own and is left out.
        """
        found = {}
        for name, config in self.list_pools().items():
            try:
                usage = self.usage(name)
            except Unreadable as err:  # its disk may be away; the others are told all the same
                usage = {**dict.fromkeys(("size", "used", "free")), "problems": [str(err)]}
            found[name] = {"driver": config.get("driver"), **usage, "provisioned": 0, "vms": {}}
        for vm in self.vm_names():
            for volume in self.volumes(vm).values():
                if volume.snap or volume.pool not in found:
                    continue
                place = found[volume.pool]
                place["provisioned"] += volume.size
                sizes = {"size": volume.size, "allocated": volume.usage}
                place["vms"].setdefault(vm, {})[volume.name] = sizes
        return found

    def verify_vm(self, name, moving=True):
        """What is wrong with a VM's volumes, as sentences; raises for none of that name."""
        journal = self.pending_move(name) if moving else None
        found = []
        if journal:
            found.append(
                f"VM {name}: its move to pool {journal['pool']} was cut off ({journal['path']});"
                f" finish it with qubes_vm.migrate {name} {journal['pool']}"
            )
            if name not in self.listed():
                return found
        problem = self.said_of_temporary(name) if moving else None
        if problem:
            found.append(problem)
        copying = self.pending_copy(name)
        there = self.get_listed(name)
        if copying:
            found.append(
                f"VM {name}: {self.said_of_copy(copying)}; declare it again with qubes_vm.present"
            )
        creation = self.pending_creation(name) if moving else None
        if creation:
            found.append(
                f"VM {name}: is not all that it was declared ({creation['path']}); declare it again"
                " with qubes_vm.present"
            )
        if there.klass not in OWN:
            return found
        pools = self.list_pools()
        for volume in self.volumes(name).values():
            what = f"VM {name}: volume {volume.name}"
            if volume.pool not in pools:
                found.append(f"{what}: its pool {volume.pool} is not there; add it again")
                continue
            image = self._image(volume, pools[volume.pool].get("driver"))
            if volume.save and image and not os.path.exists(self.path(image)):
                found.append(f"{what}: {image} is gone; is its disk mounted? bring it back")
            try:
                self.check_growth(volume.pool)
            except StoragePoolException as err:
                if str(err) not in found:
                    found.append(str(err))
        return found

    @staticmethod
    def _image(volume, driver):
        """
        The file of a volume, or None where it is no file. The file-reflink driver tells the path
        that a running VM writes to; the image that is kept lies beside it.
        """
        if driver == "file-reflink" and volume.path and volume.path.endswith(_DIRTY):
            return volume.path[: -len(_DIRTY)] + ".img"
        return volume.path if driver == "file" else None
