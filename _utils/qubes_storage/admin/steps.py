"""
R4: the steps of a move of a VM, each of which a move that was killed in it does again.

See :py:mod:`qubes_storage.admin.migrate`, which says what a move is, and keeps its journal.
"""

from qubes_storage.admin.copying import MARK, PROHIBIT, AdminCopy
from qubes_storage.admin.journal import Journal
from qubes_storage.exc import StoragePoolException

# What a stand-in has to have for the properties that name it.
_ROLES = ("provides_network", "template_for_dispvms")


class AdminSteps(AdminCopy):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that a move consists of."""

    @property
    def journal(self):
        """The journals of moves."""
        return Journal(self.root)

    def _is_original(self, name, journal):
        self.refresh()
        found = name in self.listed() and self.vm_properties(name).get("uuid")
        return bool(found) and found.value == journal["uuid"]

    # the steps; each may find its own work done, in part or whole

    def _copy(self, name, journal):
        temporary = journal["temporary"]
        self._check_halted(name)
        if self.is_43():
            self._set_feature(name, PROHIBIT, f"it is being moved to pool {journal['pool']}")
        self._drop_ours(temporary, journal)
        self._make(temporary, journal)
        for role in _ROLES:
            value = journal["whole"]["properties"].get(role)
            if value is not None:
                self._set_property(temporary, role, value)
        self._copy_volumes(name, temporary, journal)

    def _make(self, name, journal):
        self.make_vm(
            name, journal["klass"], journal["template"], journal["label"], journal["pools"]
        )
        self._set_feature(name, MARK, journal["vm"])
        if self.is_43():
            self._set_feature(name, PROHIBIT, "it is part of a move of a VM")

    def _copy_volumes(self, source, target, journal):
        for volume, was in journal["volumes"].items():
            self._check_halted(source)
            self._check_halted(target)
            self._copy_volume(source, target, volume)
            self._check_halted(source)
            self._check_halted(target)
            now = self.volume(target, volume)
            if now is None or now.size < was["size"]:  # lvm_thin rounds up
                raise StoragePoolException(
                    f"VM {source}: copy of volume {volume} to {target} is smaller than it"
                )

    def _switch(self, name, journal):
        self._point(journal["users"], name, journal["temporary"])

    def _point(self, users, old, new):
        """Point what names a VM to another one; what names a third one meanwhile is left."""
        for vm, key in users:
            now = (self.vm_properties(vm) if vm else self.system_properties()).get(key)
            if now is None or now.value != old or now.default:
                continue
            if vm:
                self._set_property(vm, key, new)
                continue
            answer = self.client.call("admin.property.Set", arg=key, payload=new)
            if self.system_properties()[key].value != new:
                raise StoragePoolException(f"{key}: is {old}, not {new}: {answer}")

    def _remove(self, name, journal):
        if not self._is_original(name, journal):
            if name in self.listed():
                raise StoragePoolException(f"VM {name}: someone else made another one of that name")
            return
        self._check_halted(name)
        self._check_copy(journal["temporary"], journal)
        self.drop_vm(name)

    def _check_copy(self, name, journal):
        """See that a VM has the volumes of the one that moves, before another copy goes."""
        self.get_listed(name)
        for volume, was in journal["volumes"].items():
            now = self.volume(name, volume)
            if now is None or now.size < was["size"] or now.pool != journal["pools"].get(volume):
                raise StoragePoolException(f"VM {name}: its volume {volume} is no whole copy")

    def _recreate(self, name, journal):
        self._check_copy(journal["temporary"], journal)
        self._drop_ours(name, journal, journal["made"])
        self._make(name, journal)
        journal["made"] = self.get_properties(name)["uuid"].value
        self.journal.write(name, journal)
        self._copy_volumes(journal["temporary"], name, journal)

    def _drop_ours(self, name, journal, *uuid):
        """Remove what a killed step of a move made."""
        self.refresh()
        if name in self.listed():
            self._check_ours(name, journal, *uuid)
            self.drop_vm(name)

    def _check_ours(self, name, journal, *uuid):
        """
        Refuse to remove someone else's VM. Ours has our mark, or is as it was made and empty; a
        clone of ours has our mark too, and another ``uuid``.
        """
        marked = self.features(name).get(MARK) == journal["vm"]
        marked = marked and (not uuid or self.get_properties(name)["uuid"].value == uuid[0])
        ours = marked or self._is_fresh(name, journal)
        if self.get_listed(name).state != "Halted" or not ours:
            raise StoragePoolException(
                f"VM {name}: is not of this move; rename or remove it to let the move go on"
            )

    def _restore(self, name, journal):
        self.restore(name, journal["whole"])
        volumes = {**journal["volumes"], **journal["snapshots"], "volatile": journal["volatile"]}
        self.restore_volumes(name, volumes)
        self._point(journal["users"], journal["temporary"], name)
        journal["lost"] = [*self.lost(name, journal["whole"]), *self.lost_volumes(name, volumes)]

    def _clean(self, name, journal):
        self._check_copy(name, journal)
        temporary = journal["temporary"]
        # Whoever was pointed to the temporary VM meanwhile goes with the others.
        self._point(self.named_by(temporary), temporary, name)
        self._drop_ours(temporary, journal)

    def _finish(self, name, journal):
        self._unmark(name, journal["whole"]["features"])
        journal["lost"] += self.verify_vm(name, moving=False)
        creation = self.creations.read(name)
        if creation and creation["uuid"] == journal["uuid"]:  # it is another VM now
            self.creations.write(name, {**creation, "uuid": journal["made"]})
        self.journal.remove(name)

    def _undo(self, name, journal):
        """The original is there: point back to it, and remove the copy."""
        self._point(journal["users"], journal["temporary"], name)
        self._drop_ours(journal["temporary"], journal)
        self._unmark(name, journal["whole"]["features"])
        self.journal.remove(name)
