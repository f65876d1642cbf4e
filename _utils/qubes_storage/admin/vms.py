"""R4: the verbs on VMs that are there: list, info, set, remove, resize, revert."""

from qubes_storage.admin.making import AdminMaking
from qubes_storage.admin.reading import vanished
from qubes_storage.admin.vm_plan import unfinished_told
from qubes_storage.admin.vm_words import OWN
from qubes_storage.adminapi import fresh_if_refused, lines
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.turns import turns
from qubes_storage.values import check_admin_vm_name, format_size, parse_size, shown, whole_sectors


class AdminVMs(AdminMaking):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that is about VMs."""

    def _summary(self, name, klass):
        properties = self.vm_properties(name)
        value = {key: properties[key].value for key in ("template", "label") if key in properties}
        private = self.volume(name, "private") if klass in OWN else None
        return {
            "klass": klass,
            "pool": private.pool if private else None,
            "template": value.get("template") or None,
            "label": value.get("label"),
        }

    def list_vms(self):
        """``{name: {klass, pool, template, label}}``; ``pool`` is where the private volume lies."""
        return {name: self._summary(name, vm.klass) for name, vm in self.listed().items()}

    def get_listed(self, name):
        """What admin.vm.List says of a VM; raises where there is none."""
        found = self.listed().get(check_admin_vm_name(name))
        if found is None:
            raise StoragePoolException(
                f"VM {name}: is not there; create it with qubes_vm.create or qubes_vm.present",
                waits_for=[("VM", name)],
            )
        return found

    def vm_info(self, name):
        """
        What there is of a VM, or None for none of that name: ``klass``, ``pool``, ``template``,
        ``label``, ``state``, ``dir_path`` (None: only the daemon knows), and ``volumes: {volume:
        {path, size, allocated, pool, revisions_to_keep}}`` in bytes.
        """
        there = self.listed().get(name)
        if there is None:
            return None
        found = {**self._summary(name, there.klass), "state": there.state, "dir_path": None}
        volumes = self.volumes(name) if there.klass in OWN else {}
        found["volumes"] = {
            volume.name: {
                "path": volume.path,
                "size": volume.size,
                "allocated": volume.usage,
                "pool": volume.pool,
                "revisions_to_keep": volume.revisions_to_keep,
            }
            for volume in volumes.values()
        }
        return found

    def set_vm(self, name, **declared):
        """
        Change a VM that is there, only what is declared and differs: label, template, revisions to
        keep, sizes, which only ever grow, and with ``migrate`` its pool. Finishes a move or a copy
        that was cut off. Returns the changes.
        """
        self.refresh()
        moving = self.pending_move(check_admin_vm_name(name))
        if not moving:
            self.get_listed(name)
        plan = self.vm_plan(name, **declared)
        changes = dict(plan.changes)
        if "created" in changes and "unfinished" in changes:
            return self.create_vm(name, **declared)
        if "created" in changes:
            raise vanished(name)
        if moving:
            self.resume_move(name)
        elif self.pending_copy(name):
            once = declared.get("create_only")
            self.release(name, self._creation(name, plan, declared, True) if once else None)
        if "unfinished" in changes:
            plan = self.vm_plan(name, **declared)
            changes = {**changes, **plan.changes, "unfinished": changes["unfinished"]}
        begun = self.pending_creation(name)
        if begun and plan.pools:  # a move knows a VM by its uuid
            self.creations.write(name, {**begun, "uuid": self._uuid(name)})
        with unfinished_told(begun):
            self._carry_out(name, plan)
        if "unfinished" in changes:
            self.creations.remove(name)
        return changes

    def _carry_out(self, name, plan):
        if plan.pools:
            self.move(name, plan.pools)
        for key in ("label", "template"):
            if key in plan.changes:
                self._set_property(name, key, plan.changes[key]["new"])
        for volume, keep in plan.revisions.items():
            self._set_revisions(name, volume, keep)
        for volume, size in plan.sizes.items():
            self._grow(name, volume, size)

    def _set_property(self, name, key, value):
        answer = self.client.call("admin.vm.property.Set", name, key, value)
        now = self.vm_properties(name).get(key)
        if now is None or now.value != value:
            is_ = now.value if now else "gone with the VM"
            raise StoragePoolException(f"VM {name}: {key} is {is_}, not {value}: {answer}")

    def _set_revisions(self, name, volume, keep):
        answer = self.client.call("admin.vm.volume.Set.revisions_to_keep", name, volume, str(keep))
        now = self.volume(name, volume)
        if now is None or now.revisions_to_keep != str(keep):
            is_ = now.revisions_to_keep if now else "gone with the VM"
            raise StoragePoolException(
                f"VM {name}: revisions_to_keep of volume {volume} is {is_}, not {keep}: {answer}"
            )

    def _grow(self, name, volume, size):
        """Grow a volume; the daemon would shrink one, so its size is read right before."""
        self.refresh()
        now = self.volume(name, volume)
        if now is not None and now.size >= size:
            return
        answer = self.client.call("admin.vm.volume.Resize", name, volume, str(size))
        now = self.volume(name, volume)
        if now is None or now.size < size:
            is_ = format_size(now.size) if now else "gone with the VM"
            raise StoragePoolException(
                f"VM {name}: volume {volume} is {is_}, not {format_size(size)}: {answer}"
            )

    def resize_vm(self, name, volume, size):
        """
        Grow a volume to ``size`` (bytes, or with a unit). Returns the changes, ``{}`` for a volume
        of that size. Never shrinks: the daemon would cut off what is beyond.
        """
        wanted = whole_sectors(parse_size(size, f"VM {name}: volume {volume}"))
        self.refresh()
        self.get_listed(name)
        changes = self.vm_diff(name, volumes={volume: wanted})
        now = self.get_volume(name, volume)
        if now.size > wanted:
            raise StoragePoolException(
                f"VM {name}: volume {volume} is {format_size(now.size)} already and never shrinks;"
                " take that size or more"
            )
        return self.set_vm(name, volumes={volume: wanted}) if changes else {}

    @fresh_if_refused
    def vm_remove_diff(self, name, purge=False):
        """What :py:meth:`remove_vm` would change; raises what it would raise."""
        moving = self.pending_move(name)
        if moving:
            self._unfinished(name, moving, None, False)
        problem = self.said_of_temporary(name)  # it may be all that there is of another VM
        if problem:
            raise StoragePoolException(problem)
        there = self.listed().get(name)
        left = self.copies.read(name) or self.creations.read(name)
        changes = {"unfinished": {"old": left["path"], "new": None}} if left else {}
        if there is None:
            return changes
        if there.klass == "AdminVM":
            raise InvalidInput("VM dom0: cannot be removed")
        if there.state != "Halted" and there.klass in OWN:
            raise StoragePoolException(f"VM {name}: is {there.state}; shut it down first")
        self.check_package(name, "or remove its package")
        changes["removed"] = {"old": name, "new": None}
        volumes = self.volumes(name) if there.klass in OWN else {}
        held = [v for v in volumes.values() if v.save]
        if held and not purge:
            what = ", ".join(
                f"{v.name} in pool {v.pool} ({format_size(v.usage)} in use)" for v in held
            )
            raise StoragePoolException(
                f"VM {name}: has images: {what}; they are deleted only with purge: true"
            )
        if held:
            changes["deleted"] = {"old": sorted(f"{v.pool}:{v.name}" for v in held), "new": None}
        users = [user for user in self.named_by(name) if user[0] != name]
        if users:  # last: whoever waits for this waits for nothing else
            raise StoragePoolException(
                f"VM {name}: is named by {self.said(users)}; give them another or remove them"
                " first",
                waits_for=[(f"{key} of", user or "", name) for user, key in users],
            )
        return changes

    def removal_order(self, names):
        """The names of VMs in an order in which they can go: those that use others before these."""
        users = {}
        for vm in self.listed():
            for prop in self.vm_properties(vm).values():
                if prop.type == "vm" and not prop.default:
                    users.setdefault(prop.value, []).append(vm)
        return turns(names, users)

    def check_package(self, name, why):
        """The daemon removes no VM that a package installed."""
        flag = self.vm_properties(name).get("installed_by_rpm")
        if flag and flag.value == "True":
            raise StoragePoolException(
                f"VM {name}: a package installed it, and qubesd removes no such VM; set its"
                f" installed_by_rpm to False with qvm-prefs, {why}"
            )

    def remove_vm(self, name, purge=False):
        """
        Remove a VM and, as the daemon does no other, its volumes: so ``purge`` has to say so where
        there are any. Returns the changes, ``{}`` for a VM that is not there.
        """
        self.refresh()
        changes = self.vm_remove_diff(name, purge)
        done = self.drop_vm(name) if "removed" in changes else True
        if "unfinished" in changes:
            self.copies.remove(name)
            self.creations.remove(name)
        return changes if done else {}

    def drop_vm(self, name):
        """Remove a VM and see that it is gone; False if another was first."""
        answer = self.client.call("admin.vm.Remove", name)
        if name in self.listed():
            raise StoragePoolException(f"VM {name}: was not removed: {answer}")
        return answer.error != "QubesVMNotFoundError"

    def revisions(self, name, volume="private"):
        """The revisions of a volume, the oldest first, by the names :py:meth:`revert` takes."""
        self.get_listed(name)
        what = f"VM {name}: revisions of volume {volume}"
        if volume not in self.volumes(name):
            raise InvalidInput(f"{what}: it has volumes {', '.join(self.volumes(name))}")
        return lines(self.client.read("admin.vm.volume.ListSnapshots", name, volume), what)

    def revert(self, name, volume="private", revision=None):
        """
        Go back to a revision of a volume, the latest if none is named; what the volume holds now
        becomes a revision. Returns the changes.
        """
        self.refresh()
        what = f"VM {name}: volume {volume}"
        there = self.get_listed(name)
        found = self.revisions(name, volume)
        if not found:
            raise StoragePoolException(f"{what}: has no revisions to go back to")
        revision = found[-1] if revision is None else str(revision)
        if revision not in found:
            raise InvalidInput(f"{what}: has no revision {revision!r}; it has {shown(found)}")
        driver = self.check_pool(self.get_volume(name, volume).pool, what)
        if driver == "file":
            raise NotSupported(
                f"{what}: driver file keeps a revision but cannot go back to it; migrate the VM to"
                " a pool of driver file-reflink or lvm_thin"
            )
        if there.state != "Halted":
            raise StoragePoolException(f"{what}: the VM is {there.state}; shut it down first")
        answer = self.client.call("admin.vm.volume.Revert", name, volume, revision)
        if not answer.ok and self.revisions(name, volume) == found:
            raise StoragePoolException(f"{what}: was not reverted to {revision}: {answer}")
        return {"revision": {"old": None, "new": revision}}
