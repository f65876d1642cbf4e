"""
R4: a VM as a whole: what it has besides its volumes, as plain data, and a copy of a volume.
"""

from qubes_storage.admin.pool_plan import check_revisions
from qubes_storage.adminapi import lines
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.values import is_true, to_int

# What a VM gets anew or at creation, and what is told of a running one.
_NOT_COPIED = {"name", "klass", "qid", "uuid", "label", "template", "xid", "start_time"}
_NOT_COPIED |= {"stubdom_xid", "stubdom_uuid", "icon"}

# What tells a VM that a move made from one that someone else made.
MARK = "qubes-storage-move"
PROHIBIT = "prohibit-start"  # a feature of R4.3 that keeps a VM halted

# The settings of a volume that a new one gets.
KEPT = ("size", "revisions_to_keep", "rw", "ephemeral")


class AdminCopy:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that copies a VM as a whole."""

    def features(self, name):
        """``{feature: value}`` of a VM."""
        names = lines(self.client.read("admin.vm.feature.List", name), f"VM {name}: features")
        return {key: self.client.read("admin.vm.feature.Get", name, key) for key in names}

    def _set_feature(self, name, key, value):
        answer = self.client.call("admin.vm.feature.Set", name, key, value)
        if self.features(name).get(key) != value:
            raise StoragePoolException(f"VM {name}: feature {key} is not {value!r}: {answer}")

    def tags(self, name):
        """The tags of a VM."""
        return lines(self.client.read("admin.vm.tag.List", name), f"VM {name}: tags")

    def devices(self, name):
        """``{class: {device: options}}`` that are assigned to a VM, also while it is halted."""
        verb = "Assigned" if self.is_43() else "List"
        found = {}
        for kind in lines(self.client.read("admin.deviceclass.List"), "admin.deviceclass.List"):
            content = self.client.read(f"admin.vm.device.{kind}.{verb}", name)
            there = lines(content, f"VM {name}: devices")
            found[kind] = dict(line.partition(" ")[::2] for line in there)
        return {kind: devices for kind, devices in found.items() if devices}

    def whole(self, name):
        """All that a VM has besides its volumes, as plain data."""
        return {
            "properties": {
                key: prop.value
                for key, prop in self.vm_properties(name).items()
                if not prop.default and key not in _NOT_COPIED
            },
            "tags": self.tags(name),
            "features": self.features(name),
            "notes": self.client.read("admin.vm.notes.Get", name) if self.is_43() else None,
            "firewall": self.client.read("admin.vm.firewall.Get", name),
            "devices": self.devices(name),
        }

    def restore(self, name, whole):
        """
        Give a VM what :py:meth:`whole` told of it, only where it differs; what could not be given
        is told by :py:meth:`lost` afterwards.
        """
        now = self.whole(name)
        call = self.client.call
        for key, value in whole["properties"].items():
            if now["properties"].get(key) != value:
                call("admin.vm.property.Set", name, key, value)
        for tag in set(whole["tags"]) - set(now["tags"]):
            call("admin.vm.tag.Set", name, tag)
        for key, value in whole["features"].items():
            if now["features"].get(key) != value:
                call("admin.vm.feature.Set", name, key, value)
        if whole["notes"] != now["notes"]:
            call("admin.vm.notes.Set", name, payload=whole["notes"] or "")
        if whole["firewall"] != now["firewall"]:
            call("admin.vm.firewall.Set", name, payload=whole["firewall"])
        verb = "Assign" if self.is_43() else "Attach"
        for kind, devices in whole["devices"].items():
            for device in set(devices) - set(now["devices"].get(kind, {})):
                call(f"admin.vm.device.{kind}.{verb}", name, device, devices[device])

    def lost(self, name, whole):
        """What a VM has not got of a :py:meth:`whole`, as sentences."""
        now = self.whole(name)
        found = []
        for part in ("properties", "features", "devices"):
            for key, value in whole[part].items():
                if now[part].get(key) != value:
                    found.append(f"{part}: {key} is {now[part].get(key)!r}, not {value!r}")
        found += [f"tag {tag} is missing" for tag in sorted(set(whole["tags"]) - set(now["tags"]))]
        for part in ("notes", "firewall"):
            if whole[part] != now[part]:
                found.append(f"{part}: not {whole[part]!r}")
        return found

    def _settings(self, name, volumes):
        """``(volume, what it was)``, revisions only where the driver of its new pool keeps them."""
        for volume, was in volumes.items():
            now = self.get_volume(name, volume)
            kept = dict(was)
            try:
                driver = self.check_pool(now.pool, name)
                revisions = to_int(was["revisions_to_keep"], volume)
                check_revisions(revisions, driver, volume)
                self.check_settable(revisions, volume)
            except InvalidInput:
                kept["revisions_to_keep"] = now.revisions_to_keep
            if was["ephemeral"] is None:
                kept["ephemeral"] = now.ephemeral
            yield volume, kept

    def settings(self, volume):
        """
        The settings (:py:data:`KEPT`) of a volume; ``ephemeral`` None for one that is not, like all
        in its pool, and follows the default of a new one.
        """
        found = {key: getattr(volume, key) for key in KEPT}
        encrypts = is_true((self.pool_config(volume.pool) or {}).get("ephemeral_volatile"))
        return found if volume.ephemeral or encrypts else {**found, "ephemeral": None}

    def restore_volumes(self, name, volumes):
        """Give volumes the settings (:py:data:`KEPT`) that they had."""
        for volume, was in self._settings(name, volumes):
            now = self.get_volume(name, volume)
            if now.size < was["size"]:
                self._grow(name, volume, was["size"])
            for key in KEPT[1:]:
                if getattr(now, key) != was[key]:
                    self.client.call(f"admin.vm.volume.Set.{key}", name, volume, str(was[key]))

    def lost_volumes(self, name, volumes):
        """What volumes have not got again, as sentences."""
        found = []
        for volume, was in self._settings(name, volumes):
            now = self.get_volume(name, volume)
            for key in KEPT:
                if key == "size" and now.size >= was["size"]:
                    continue
                if getattr(now, key) != was[key]:
                    found.append(f"volume {volume}: {key} is {getattr(now, key)}, not {was[key]}")
        return found

    # what a move and a copy have in common

    def _check_halted(self, name, during="move"):
        """Ask for the power state anew: before R4.3 nothing keeps a VM from being started."""
        self.refresh()
        state = self.get_listed(name).state
        if state != "Halted":
            raise StoragePoolException(f"VM {name}: is {state}, it was started during its {during}")

    def _copy_volume(self, source, target, volume):
        """Copy what a volume holds; only the answer says whether that was done."""
        what = f"VM {source}: copy of volume {volume} to {target}"
        token = self.client.call("admin.vm.volume.CloneFrom", source, volume)
        if not token.ok or not token.content:
            raise StoragePoolException(f"{what}: {token}")
        answer = self.client.call("admin.vm.volume.CloneTo", target, volume, token.content)
        if not answer.ok:
            raise StoragePoolException(f"{what}: {answer}")

    def _unmark(self, name, features):
        now = self.features(name)
        for key in (MARK, PROHIBIT):
            if key in features:
                self._set_feature(name, key, features[key])
            elif key in now:
                answer = self.client.call("admin.vm.feature.Remove", name, key)
                if key in self.features(name):
                    raise StoragePoolException(f"VM {name}: feature {key} stays: {answer}")
