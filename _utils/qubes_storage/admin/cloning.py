"""
R4: a copy of a VM under a new name, and what is left of one that was cut off.

qubesadmin, which every dom0 has, makes the VM with all its settings, as qvm-clone does; it is
imported only for that. Its volumes are copied here, the private one first. A journal is on the disk
before the first call and goes after the last; while it is there the VM is unfinished, and who
declares the copy again has it removed and made anew.

It is only removed if nobody can have put anything into it. Before its uuid is in the journal
nothing was copied, so all its volumes have to be empty. Afterwards its uuid has to be that one, and
either R4.3 has kept it from being started, or the volume that is copied last is empty, which it is
in no VM that has run. In any case it has to be halted, and nobody may name it. A VM of another uuid
is someone else's, and the journal says nothing of it.
"""

import contextlib
import importlib

from qubes_storage.admin.copying import PROHIBIT, AdminCopy
from qubes_storage.admin.journal import Journal
from qubes_storage.admin.shapes import BEGUN
from qubes_storage.admin.vm_words import OWN
from qubes_storage.exc import AlreadyThere, NotSupported, StoragePoolException
from qubes_storage.values import check_admin_vm_name


class AdminClone(AdminCopy):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that clones VMs."""

    @property
    def copies(self):
        """The journals of copies."""
        return Journal(self.root, "copy")

    def pending_copy(self, name):
        """The journal of a copy of that name that was cut off, or None."""
        copying = self.copies.read(name)
        if copying and copying["uuid"] and self._uuid(name) not in (None, copying["uuid"]):
            return None
        return copying

    def _uuid(self, name):
        found = self.vm_properties(name).get("uuid") if name in self.listed() else None
        return found and found.value

    def check_hollow(self, name, copying):
        """Refuse to remove what a dead copy left where somebody may have put something into it."""
        self.vm_remove_diff(name, purge=True)  # raises for one that runs or that others name
        volumes = [volume for volume in self.volumes(name).values() if volume.save]
        if copying["uuid"] and self.features(name).get(PROHIBIT) == self._why(copying):
            volumes = []
        elif copying["uuid"]:
            volumes = [volume for volume in volumes if volume.name == "root"] or volumes
        if any(volume.usage for volume in volumes):
            raise StoragePoolException(
                f"VM {name}: {self.said_of_copy(copying)}, and something may have been put into it"
                " since; delete that file to keep the VM as it is, or remove it with"
                f" qubes_vm.remove {name} purge=true"
            )

    @staticmethod
    def _why(copying):
        return f"it is no whole copy of {copying['source']} yet"

    @staticmethod
    def said_of_copy(copying):
        """What the journal of a copy means, for a message."""
        return f"its copy of {copying['source']} was cut off ({copying['path']})"

    def drop_unfinished(self, name):
        """Remove what a dead copy left, if anything, and its journal."""
        with self.copies.locked(name):
            self.refresh()
            copying = self.pending_copy(name)
            if copying and name in self.listed():
                self.check_hollow(name, copying)
                self.drop_vm(name)
            self.copies.remove(name)

    def finish_copy(self, name):
        """Let a VM that is a whole copy be started."""
        with self.copies.locked(name):
            self.refresh()
            copying = self.pending_copy(name)
            if copying:
                self._unmark(name, copying["features"])
                self.copies.remove(name)

    def check_copying(self, name):
        """The module qubesadmin, which copies whole VMs; raises where it is missing."""
        try:
            return importlib.import_module("qubesadmin")
        except ImportError as err:
            raise NotSupported(
                f"VM {name}: a copy of a whole VM (clone, clone_from, or a template of a"
                " StandaloneVM or TemplateVM) is made by qubesadmin, and this Python has none;"
                " run it in dom0 with the system's Python, or clone it with qvm-clone"
            ) from err

    def copy_vm(self, source, name, klass, pools):
        """Clone a VM with all it has, its journal still there; whether it came to be is read."""
        with self.copies.locked(name):
            self.refresh()
            if name in self.listed():
                raise AlreadyThere(f"VM {name}: is there already; someone else made it")
            copying = {**BEGUN, "source": source}
            try:
                self.copies.write(name, copying)
                self._make_alike(source, name, klass, pools)
                self._fill(source, name, klass, copying)
            except Exception as err:  # qubesadmin's own are many, and a part of it may be missing
                raise StoragePoolException(
                    f"VM {name}: could not be cloned from {source}: {err}"
                    f"{self._give_up(name, copying)}"
                ) from err

    def _make_alike(self, source, name, klass, pools):
        """Have qubesadmin make a VM that has all but the content of another one's volumes."""
        module = self.check_copying(name)
        config = importlib.import_module("qubesadmin.config")
        config.QUBESD_SOCKET = self.client.path
        there = self.get_listed(source).klass
        new = None if there == klass else klass
        ours = list(OWN[klass])
        module.Qubes().clone_vm(source, name, new, pools=pools, ignore_volumes=ours)
        self.refresh()
        self.get_listed(name)

    def _fill(self, source, name, klass, copying):
        copying["features"] = {k: v for k, v in self.features(name).items() if k == PROHIBIT}
        if self.is_43():
            self._set_feature(name, PROHIBIT, self._why(copying))
        self._check_halted(name, "copy")
        copying["uuid"] = self._uuid(name)
        self.copies.write(name, copying)
        for volume in reversed(OWN[klass]):
            self._copy_volume(source, name, volume)
        self._check_halted(name, "copy")
        copying["whole"] = True
        self.copies.write(name, copying)

    def _give_up(self, name, copying):
        """After an error: remove what was made, or tell of it; with the journal of what is left."""
        with contextlib.suppress(OSError, StoragePoolException):
            self.refresh()
            there = name in self.listed()
            if there and copying["uuid"] and copying["uuid"] == self._uuid(name):
                self.drop_vm(name)
                there = False
            if not there:
                self.copies.remove(name)
                return ""
        return "; what is there of it can be removed, and is if the copy is declared again"

    def clone_vm(self, name, new_name, pool=None):
        """
        Clone a VM under a new name, with its properties, tags, features, notes, firewall and
        devices, its volumes into ``pool`` if one is given. Returns the changes.
        """
        self.refresh()
        self.get_listed(name)
        if check_admin_vm_name(new_name) in self.listed() and not self.pending_copy(new_name):
            raise StoragePoolException(f"VM {new_name}: is there already; take another name")
        return self.create_vm(new_name, clone_from=name, pool=pool)
