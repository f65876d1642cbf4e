"""
R4: moving a VM to another pool under its name.

The Admin API moves nothing, so a move is: a temporary VM in the new pool gets a copy; whatever
names the VM is pointed to the temporary one; the VM is removed, created again in the new pool and
gets the copy back; all it had is restored, and the temporary VM goes. At every moment one of the
two is a whole copy. A journal is on the disk before the first call and after each step, so a move
that was killed anywhere is finished by the next one; until the VM is removed an error undoes it.
"""

import contextlib

from qubes_storage.admin.copying import KEPT, MARK, PROHIBIT, AdminCopy
from qubes_storage.admin.journal import Journal
from qubes_storage.admin.shapes import STEPS
from qubes_storage.admin.vm_words import OWN
from qubes_storage.exc import NotSupported, StoragePoolException
from qubes_storage.values import check_vm_name, shown

# What a stand-in has to have for the properties that name it.
_ROLES = ("provides_network", "template_for_dispvms")
_UNDONE = STEPS[:3]  # while the original is there


class AdminMigrate(AdminCopy):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that moves VMs."""

    @property
    def journal(self):
        """The journals of moves."""
        return Journal(self.root)

    def pending_move(self, name):
        """The journal of a move of a VM that was cut off, or None."""
        return self.journal.read(name)

    def temporaries(self):
        """``{temporary VM: journal}`` of the moves that were cut off."""
        found = {}
        for name in self.journal.names():
            with contextlib.suppress(StoragePoolException):  # that VM's own verbs tell of it
                journal = self.journal.read(name)
                if journal:
                    found[journal["temporary"]] = journal
        return found

    def said_of_temporary(self, name):
        """What is to be told of a VM that has a copy of one whose move was cut off, or None."""
        other = self.temporaries().get(name)
        return other and (
            f"VM {name}: may be the only whole copy of {other['vm']}, whose move was cut off"
            f" ({other['path']}); finish that with qubes_vm.migrate {other['vm']} {other['pool']}"
        )

    def migrate_vm(self, name, pool, keep=False):
        """
        Move a halted VM to another pool, or finish a move that was cut off. Returns the changes,
        ``{}`` for a VM that lies there. What could not be restored is an error that names it.
        """
        if keep:
            raise NotSupported(
                f"VM {name}: backend admin keeps no old copy of a VM that moves; clone it with"
                " qubes_vm.clone first"
            )
        self.refresh()
        moving = self.pending_move(check_vm_name(name))
        if moving:  # what that move was to move, and nothing else
            changes = self._unfinished(name, moving, None, pool == moving["pool"])
            self.resume_move(name)
            return changes
        self.get_listed(name)
        return self.set_vm(name, pool=pool, migrate=True)

    def check_move(self, name, pools):
        """Refuse a move that cannot be: running VMs, those that name it too, and full pools."""
        there = self.get_listed(name)
        self.check_package(name, "for a move removes it")
        if not OWN.get(there.klass):
            raise NotSupported(
                f"VM {name}: a {there.klass} has no volumes of its own to move; move its template"
            )
        if there.state != "Halted":
            raise StoragePoolException(
                f"VM {name}: is {there.state}, and only a halted VM can be moved; shut it down"
            )
        listed = self.listed()
        users = {vm for vm, _ in self.named_by(name) if vm != name and vm in listed}
        states = {vm: listed[vm].state for vm in users if listed[vm].klass != "AdminVM"}
        running = [vm for vm, state in states.items() if state != "Halted"]
        if running:
            raise StoragePoolException(
                f"VM {name}: is named by VMs that are not halted ({shown(running)}); shut them"
                " down to move it"
            )
        needed = {}
        for volume, pool in pools.items():
            driver = self.check_pool(pool, f"VM {name}: volume {volume}")
            found = self.volume(name, volume)
            if found and found.save:
                # Only the file driver's second copy takes its space again.
                times = 2 if driver == "file" else 1
                needed[pool] = needed.get(pool, 0) + found.usage * times
        for pool, size in needed.items():
            self.check_growth(pool, size)

    def move(self, name, pools):
        """Move volumes of a VM, ``{volume: pool}``, once no other moves; everything was checked."""
        with self.journal.locked(name):
            self.refresh()
            moving = self.pending_move(name)
            if moving:  # one that was waited for
                self._unfinished(name, moving, None, False)
            pools = {v: pool for v, pool in pools.items() if self.get_volume(name, v).pool != pool}
            if not pools:
                return
            self.check_move(name, pools)
            there = self.get_listed(name)
            properties = self.get_properties(name)
            volumes = self.volumes(name, kernel=True)
            places = {v: volume.pool for v, volume in volumes.items() if v in OWN[there.klass]}
            places["volatile"] = pools.get("private", volumes["volatile"].pool)
            if volumes["kernel"].pool != self.default_pools().get("default_pool_kernel"):
                places["kernel"] = volumes["kernel"].pool
            journal = {
                "vm": name,
                "pool": next(iter(pools.values())),
                "step": STEPS[0],
                "temporary": self._unused_name(name),
                "uuid": properties["uuid"].value,
                "klass": there.klass,
                "template": properties["template"].value if "template" in properties else None,
                "label": properties["label"].value,
                "asked": pools,
                "pools": {**places, **pools},
                "volumes": {
                    v: {key: getattr(volumes[v], key) for key in KEPT} for v in OWN[there.klass]
                },
                "volatile": {key: getattr(volumes["volatile"], key) for key in KEPT},
                "whole": self.whole(name),
                "users": [user for user in self.named_by(name) if user[0] != name],
                "lost": [],
                "made": None,
            }
            self.journal.write(name, journal)
            self._run(name, journal)

    def resume_move(self, name):
        """
        Finish a move that was cut off. One that had not removed the original yet is undone and
        begun anew, for the VM may have changed since.
        """
        with self.journal.locked(name):
            journal = self.pending_move(name)
            if journal is None:  # the one that was waited for finished it
                self.refresh()
                return
            early = journal["step"] in _UNDONE
            begin = early and self._is_original(name, journal)
            if early and not begin:
                self._check_goes_on(name, journal)
            if begin:
                self._undo(name, journal)
            else:
                self.refresh()
                self._run(name, journal)
        if begin:
            self.move(name, journal["asked"])

    def _check_goes_on(self, name, journal):
        """Refuse to go on where the original went by another hand before it was to be removed."""
        if name in self.listed():
            what = "someone else made another one of that name; what was copied of the first is"
        elif journal["step"] == STEPS[0]:
            what = "was removed before it was copied; what there is of it is"
        else:
            return
        raise StoragePoolException(
            f"VM {name}: {what} in {journal['temporary']}: see what is to stay, then remove"
            f" {journal['path']}"
        )

    def _unused_name(self, name):
        names = {*self.listed(), *self.temporaries()}
        return next(n for n in (f"{name[:25]}-mv{i}" for i in range(1, 999)) if n not in names)

    def _run(self, name, journal):
        try:
            for step in STEPS[STEPS.index(journal["step"]) :]:
                if step != journal["step"]:
                    journal["step"] = step
                    self.journal.write(name, journal)
                getattr(self, f"_{step}")(name, journal)
        except StoragePoolException as err:
            raise StoragePoolException(f"{err}; {self._stopped(name, journal)}") from err
        if journal["lost"]:
            found = "; ".join(journal["lost"])
            raise StoragePoolException(
                f"VM {name}: is moved, but not all is as it was: {found}; mend it by hand"
            )

    def _stopped(self, name, journal):
        """Undo a move that failed, while that can be done; tells how things stand."""
        again = f"qubes_vm.migrate {name} {journal['pool']}"
        early = journal["step"] in _UNDONE
        try:
            if early and self._is_original(name, journal):
                self._undo(name, journal)
                return f"the move was undone, {name} is as it was"
        except StoragePoolException as err:
            return f"the move stopped and could not be undone now ({err}); run {again} later"
        return (
            f"the move stopped, and a whole copy of {name} is in {journal['temporary']}; run"
            f" {again} to finish it"
        )

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
        self._drop_ours(temporary, name)
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
        self._drop_ours(name, name, journal["made"])
        self._make(name, journal)
        journal["made"] = self.get_properties(name)["uuid"].value
        self.journal.write(name, journal)
        self._copy_volumes(journal["temporary"], name, journal)

    def _drop_ours(self, name, vm, *uuid):
        """
        Remove what a killed step of the move of ``vm`` made; someone else's VM is never removed,
        nor is a clone of ours, which has our mark and another ``uuid``.
        """
        self.refresh()
        there = self.listed().get(name)
        if there is None:
            return
        ours = self.features(name).get(MARK) == vm
        ours = ours and (not uuid or self.get_properties(name)["uuid"].value == uuid[0])
        fresh = not any(volume.usage for volume in self.volumes(name).values() if volume.save)
        if there.state != "Halted" or not (ours or fresh):
            raise StoragePoolException(
                f"VM {name}: is not of this move; rename or remove it to let the move go on"
            )
        self.drop_vm(name)

    def _restore(self, name, journal):
        self.restore(name, journal["whole"])
        volumes = {**journal["volumes"], "volatile": journal["volatile"]}
        self.restore_volumes(name, volumes)
        self._point(journal["users"], journal["temporary"], name)
        journal["lost"] = [*self.lost(name, journal["whole"]), *self.lost_volumes(name, volumes)]

    def _clean(self, name, journal):
        self._check_copy(name, journal)
        temporary = journal["temporary"]
        # Whoever was pointed to the temporary VM meanwhile goes with the others.
        self._point(self.named_by(temporary), temporary, name)
        self._drop_ours(temporary, name)

    def _finish(self, name, journal):
        self._unmark(name, journal["whole"]["features"])
        journal["lost"] += self.verify_vm(name, moving=False)
        self.journal.remove(name)

    def _undo(self, name, journal):
        """The original is there: point back to it, and remove the copy."""
        self._point(journal["users"], journal["temporary"], name)
        self._drop_ours(journal["temporary"], name)
        self._unmark(name, journal["whole"]["features"])
        self.journal.remove(name)
