"""R4: this machine's pools and VMs, over the Admin API."""

from qubes_storage import asking, guards
from qubes_storage.admin.cloning import AdminClone
from qubes_storage.admin.migrate import AdminMigrate
from qubes_storage.admin.pools import AdminPools
from qubes_storage.admin.reading import AdminReading
from qubes_storage.admin.report import AdminReport
from qubes_storage.admin.vms import AdminVMs
from qubes_storage.adminapi import SOCKET, Client
from qubes_storage.exc import NotSupported

# What only R3.2's files can tell or do, and the way there on R4.
_LOCAL_ONLY = {
    "orphans": "the daemon tells of no image without a VM; look into the pool's dir_path",
    "rename_vm": "the Admin API renames no VM; clone it with qubes_vm.clone, then remove it",
    "commit_vm": "the daemon commits when a VM stops; see qubes_vm.revisions",
    "reset_vm": "the daemon drops what is not kept when a VM stops; see qubes_vm.revert",
    "disks": "the daemon hands libvirt its disks; see virsh dumpxml in dom0",
}


def _local_only(verb, way):
    def refuse(self, *args, **kwargs):
        raise NotSupported(f"{verb.replace('_', ' ')}: backend admin has no such thing: {way}")

    refuse.__name__ = verb
    refuse.__doc__ = f"Not on R4: {way}."
    return refuse


@asking.checked
class AdminSystem(AdminReading, AdminPools, AdminVMs, AdminClone, AdminMigrate, AdminReport):
    """
    The machine whose qubesd listens on ``socket``, with the verbs of
    :py:class:`~qubes_storage.system.System`.

    What was read is kept for a few seconds, for every AdminSystem of that socket in this process
    (see :py:class:`~qubes_storage.adminapi.Client`), so a run that asks for the same VM again, or
    for the pools with each VM, asks the daemon once. Whatever writes reads anew first, and reads
    again afterwards what it changed: whether it succeeded is told by that, not by the answer.

    root
        Below it lie the guards, the journals, and what is looked at on disk.
    """

    backend = "admin"

    def __init__(self, socket=SOCKET, root="/"):
        self.client = Client(str(socket))
        self.root = str(root)

    def refresh(self):
        """Forget what was read: someone else may have changed something."""
        self.client.refresh()

    def path(self, path):
        """Where a path of the machine lies for us."""
        return self.root.rstrip("/") + path

    def pool_notes(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """What R3.2's own tools cannot do with a pool: nothing to tell of on R4."""
        return []

    def guards(self, pool):
        """The guards of a pool."""
        return guards.load(self.root).get(pool, {})

    def save_guards(self, pool, values=None):
        """Keep guards of a pool, None removes one; without values all go."""
        if values is None or values:
            guards.save(self.root, pool, values)


for _verb, _way in _LOCAL_ONLY.items():
    setattr(AdminSystem, _verb, _local_only(_verb, _way))
