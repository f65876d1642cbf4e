"""
R4: a VM as a whole: what it has besides its volumes, and a copy of it.

A clone under a new name is what qubesadmin does in every dom0 (qvm-clone); it is imported only for
that. A move keeps the name and has to survive a kill, so it takes down what a VM has as plain data.
"""

import importlib

from qubes_storage.admin.pool_plan import check_revisions
from qubes_storage.adminapi import lines
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.values import check_vm_name, to_int

# What a VM gets anew or at creation, and what is told of a running one.
_NOT_COPIED = {"name", "klass", "qid", "uuid", "label", "template", "xid", "start_time"}
_NOT_COPIED |= {"stubdom_xid", "stubdom_uuid", "icon"}

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
                check_revisions(to_int(was["revisions_to_keep"], volume), driver, volume)
            except InvalidInput:
                kept["revisions_to_keep"] = now.revisions_to_keep
            if volume == "volatile":
                kept["revisions_to_keep"] = now.revisions_to_keep  # it has none
            yield volume, kept

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

    # a clone

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
        """Clone a VM with all it has; whether it came to be is read afterwards."""
        module = self.check_copying(name)
        failed = None
        try:
            config = importlib.import_module("qubesadmin.config")
            config.QUBESD_SOCKET = self.client.path
            there = self.get_listed(source).klass
            new = None if there == klass else klass
            module.Qubes().clone_vm(source, name, new, pools=pools or None)
        except Exception as err:  # qubesadmin's own are many, and a part of it may be missing
            failed = err
        self.refresh()
        if failed is not None or name not in self.listed():
            left = "; what is there of it can be removed" if name in self.listed() else ""
            raise StoragePoolException(
                f"VM {name}: could not be cloned from {source}: {failed}{left}"
            ) from failed

    def clone_vm(self, name, new_name, pool=None):
        """
        Clone a VM under a new name, with its properties, tags, features, notes, firewall and
        devices, its volumes into ``pool`` if one is given. Returns the changes.
        """
        self.refresh()
        self.get_listed(name)
        if check_vm_name(new_name) in self.listed():
            raise StoragePoolException(f"VM {new_name}: is there already; take another name")
        return self.create_vm(new_name, clone_from=name, pool=pool)
