"""
R4: moving a VM to another pool under its name.

The Admin API moves nothing, so a move is: a temporary VM in the new pool gets a copy; whatever
names the VM is pointed to the temporary one; the VM is removed, created again in the new pool and
gets the copy back; all it had is restored, and the temporary VM goes. At every moment one of the
two is a whole copy. A journal is on the disk before the first call and after each step, so a move
that was killed anywhere is finished by the next one; until the VM is removed an error undoes it.
"""

import contextlib

from qubes_storage.admin.copying import KEPT
from qubes_storage.admin.shapes import STEPS
from qubes_storage.admin.steps import AdminSteps
from qubes_storage.admin.vm_words import OWN, Seen
from qubes_storage.adminapi import Property
from qubes_storage.exc import NotSupported, StoragePoolException
from qubes_storage.values import check_admin_vm_name, shown

_UNDONE = STEPS[:3]  # while the original is there


class AdminMigrate(AdminSteps):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that moves VMs."""

    def pending_move(self, name):
        """The journal of a move of a VM that was cut off, or None."""
        return self.journal.read(name)

    def temporaries(self):
        """``{temporary VM: journal}`` of the moves that were cut off."""
        found = {}
        for name in self.journal.names():
            with contextlib.suppress(StoragePoolException):  # that VM's own verbs tell of it
                journal = self.journal.read(name)
                found.update({journal["temporary"]: journal} if journal else {})
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
        moving = self.pending_move(check_admin_vm_name(name))
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
                "volumes": {v: self.settings(volumes[v]) for v in OWN[there.klass]},
                "volatile": self.settings(volumes["volatile"]),
                # Snapshots are as large as what they are of.
                "snapshots": {
                    volume.name: {**self.settings(volume), "size": 0}
                    for volume in volumes.values()
                    if volume.snap
                },
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
                self._check_gone(name, journal)
            if begin:
                self._undo(name, journal)
            else:
                self.refresh()
                self._run(name, journal)
        if begin:
            self.move(name, journal["asked"])

    def as_moved(self, name, journal):
        """A VM as it will be once its move that was cut off is finished."""
        asked, pools = journal["asked"], journal["pools"]
        if journal["step"] in _UNDONE and name in self.listed():  # it is moved as it is then
            there = self.get_listed(name)
            pools = {"volatile": asked["private"], **asked} if "private" in asked else asked

            def now(volume):
                found = self.get_volume(name, volume)
                return found._replace(pool=pools.get(volume, found.pool))

            return Seen(there.klass, there.state, self.get_properties(name), now, True)
        found = {"label": journal["label"], "template": journal["template"]}
        properties = {key: Property(v, "", False) for key, v in found.items() if v is not None}
        kept = {**journal["volumes"], **journal["snapshots"], "volatile": journal["volatile"]}
        holder = name if journal["temporary"] not in self.listed() else journal["temporary"]

        def then(volume):
            found = self.get_volume(holder, volume)
            was = {key: kept[volume][key] for key in KEPT} if volume in kept else {}
            size = max(found.size, was.pop("size", 0))
            return found._replace(pool=pools.get(volume, found.pool), size=size, **was)

        return Seen(journal["klass"], "Halted", properties, then, True)

    def check_goes_on(self, name, journal):
        """Refuse what is in the way of the rest of a move that was cut off."""
        again = f"qubes_vm.migrate {name} {journal['pool']} undoes it if {name} is there"
        for pool in filter(None, journal["pools"].values()):
            self.check_pool(pool, f"VM {name}: its move was cut off ({journal['path']}; {again})")
        if journal["step"] in _UNDONE and not self._is_original(name, journal):
            self._check_gone(name, journal)
        if journal["step"] == "recreate" and name in self.listed():
            self._check_ours(name, journal, journal["made"])
        if journal["step"] != "finish" and journal["temporary"] in self.listed():
            self._check_ours(journal["temporary"], journal)

    def _check_gone(self, name, journal):
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
