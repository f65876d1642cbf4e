"""The verbs on VMs: list, info, diff, create, set, remove."""

import os

from qubes_storage import build, files, guards, image
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.planning import Planning
from qubes_storage.pool import Pool
from qubes_storage.registry import Registry
from qubes_storage.values import format_size, shown
from qubes_storage.vm import ICONS, IMAGES, VM


class VMs(Planning):
    """The part of :py:class:`~qubes_storage.system.System` that is about VMs."""

    def list_vms(self):
        """``{name: {klass, pool, template, label}}`` of the registry."""
        found = self.registry()
        vms = (VM.of(entry, found) for entry in found.by_name.values())
        return {vm.name: self._summary(vm) for vm in vms if vm}

    @staticmethod
    def _summary(vm):
        return {
            "klass": vm.klass.name,
            "pool": vm.pool,
            "template": vm.template,
            "label": vm.label,
        }

    def find_vm(self, name):
        """The VM of a name, or None."""
        found = self.registry()
        entry = found.by_name.get(name)
        return VM.of(entry, found) if entry else None

    def get_vm(self, name):
        """The VM of a name; raises where there is none."""
        vm = self.find_vm(name)
        if vm is None:
            raise StoragePoolException(
                f"VM {name}: is not in qubes.xml; create it with qubes_vm.create or"
                " qubes_vm.present",
                waits_for=("VM", name),
            )
        return vm

    def pool_of(self, vm):
        """The Pool that a VM lies in; raises for one that cannot hold VMs here."""
        pool = self.get_pool(vm.pool)
        if not isinstance(pool, Pool):
            raise NotSupported(
                f"pool {vm.pool}: its class is no qubes_storage.Pool, so it can hold no VM here;"
                " derive it from qubes_storage.Pool"
            )
        return pool

    def vm_info(self, name):
        """
        What there is of a VM, or None for none of that name: ``klass``, ``pool``, ``template``,
        ``label``, ``dir_path``, and ``volumes: {volume: {path, size, allocated, pool}}`` in bytes,
        size and allocated None for an image that is not there.
        """
        vm = self.find_vm(name)
        if vm is None:
            return None
        found = {**self._summary(vm), "dir_path": None, "volumes": {}}
        try:
            pool = self.pool_of(vm)
        except StoragePoolException:
            return found
        found["dir_path"] = pool.vmdir(vm)
        there = self.images_on_disk(vm)
        for volume, filename in vm.images.items():
            size, allocated = there.get(volume, (None, None))
            path = os.path.join(found["dir_path"], filename)
            found["volumes"][volume] = {
                "path": path,
                "size": size,
                "allocated": allocated,
                "pool": vm.pool,
            }
        return found

    def images_on_disk(self, vm):
        """``{volume: (size, allocated)}`` of the images that are there, in bytes."""
        try:
            fd = self.pool_of(vm).open_vm(vm)
        except StoragePoolException:
            fd = None
        if fd is None:
            return {}
        with files.closing(fd):
            found = {v: image.measure(fd, filename) for v, filename in vm.images.items()}
        return {volume: sizes for volume, sizes in found.items() if sizes}

    def vm_dir_is_gone(self, vm):
        """Whether a registered VM has no directory."""
        fd = self.pool_of(vm).open_vm(vm)
        if fd is None:
            return True
        os.close(fd)
        return False

    def vm_diff(self, name, **declared):
        """
        What :py:meth:`create_vm` or :py:meth:`set_vm` would change, ``{}`` for nothing; entries are
        ``{"old": ..., "new": ...}``, ``created`` for a new VM. Raises what they would raise.

        Keywords: klass, template, label, pool, volumes, clone_from, root_copy_from, migrate.
        """
        return self.plan(name, **declared)[0]

    def create_vm(self, name, **declared):
        """
        Create a VM: its directory and images, and last its entry in the registry.

        Returns the changes. A create that fails leaves nothing behind.
        """
        if self.find_vm(name) is not None:
            raise StoragePoolException(
                f"VM {name}: is in qubes.xml already; change it with qubes_vm.set"
            )
        self.plan(name, **declared)  # before the lock, which would make a missing qubes.xml
        with self.locked() as registry:
            changes, plan = self.plan(name, **declared)
            if "created" not in changes:
                raise StoragePoolException(f"VM {name}: was created by someone else meanwhile")
            vm = plan.vm
            entry = vm.new_entry(registry, plan.pool.vmdir(vm))
            if not plan.has_kernel and "kernel" in entry.attrs:
                entry = entry.changed(kernel="None")
            attrs = vm.defaults(registry, entry.attrs["qid"])
            with build.built(plan):
                self.save_registry(registry.added(entry).copy(attrs=attrs))
        return changes

    def set_vm(self, name, **declared):
        """
        Change a VM that is there, only what is declared and differs: label, template, and sizes,
        which only ever grow. Finishes what a dead run left. Returns the changes.
        """
        self.get_vm(name)
        with self.locked() as registry:
            vm = self.get_vm(name)
            changes, _ = self.plan(name, **declared)
            pool = self.pool_of(vm)
            if "unfinished" in changes:
                build.mend(pool, vm, True)
            grown = changes.get("volumes", {"new": {}})["new"]
            for volume, size in grown.items():
                self._grow(pool, vm, volume, size)
            attrs = {}
            if "label" in changes:
                attrs["label"] = changes["label"]["new"]
            if "template" in changes:
                attrs["template_qid"] = registry.by_name[changes["template"]["new"]].attrs["qid"]
            if attrs:
                self.save_registry(registry.replaced(vm.entry, vm.entry.changed(**attrs)))
            if "label" in changes:
                self._set_icon(pool, vm, attrs["label"])
        return changes

    def _set_icon(self, pool, vm, label):
        fd = pool.open_vm(vm)
        if fd is None:
            return
        with files.closing(fd):
            new = ".icon.png.new"
            for name in (new, "icon.png"):
                found = files.exists(fd, name)
                if found and not os.path.stat.S_ISLNK(found.st_mode):
                    return  # an icon of the user's own
            if files.exists(fd, new):
                os.unlink(new, dir_fd=fd)
            os.symlink(ICONS.format(label), new, dir_fd=fd)
            os.rename(new, "icon.png", src_dir_fd=fd, dst_dir_fd=fd)

    def _grow(self, pool, vm, volume, size):
        fd = pool.open_vm(vm)
        path = os.path.join(pool.vmdir(vm), IMAGES[volume])
        try:
            with files.closing(fd):
                pool.resize_image(files.at(fd, IMAGES[volume]), size)
                if volume == "root" and image.measure(fd, IMAGES["root-cow"]):
                    pool.resize_image(files.at(fd, IMAGES["root-cow"]), size)
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: {path} cannot grow to {format_size(size)}: {err.strerror}"
            ) from err

    def vm_remove_diff(self, name, purge=False):
        """What :py:meth:`remove_vm` would change; raises what it would raise."""
        found = self.registry()
        vm = self.find_vm(name)
        if vm is None:
            left = [path for _, _, paths in self._leftovers(name) for path in paths]
            return {"unfinished": {"old": left, "new": None}} if left else {}
        self._check_unused(found, vm)
        changes = {"removed": {"old": name, "new": None}}
        there, held = self._held(vm)
        if held and not purge:
            shown = ", ".join(f"{p} ({format_size(s)} in use)" for p, s in held.items())
            raise StoragePoolException(
                f"VM {name}: has images: {shown}; they are deleted only with purge: true"
            )
        if there:
            changes["deleted"] = {"old": sorted(held) or [there], "new": None}
        return changes

    def _leftovers(self, name):
        """``(pool, vm, paths)`` of what a dead run left of a VM that no registry knows."""
        if not isinstance(name, str) or "/" in name:
            return
        for pool_name in self.sections():
            try:
                pool = self.get_pool(pool_name)
            except StoragePoolException:
                continue
            for klass in self.places() if isinstance(pool, Pool) else ():
                vm = VM(name, klass, pool=pool_name)
                paths = build.unfinished(pool, vm)
                if paths:
                    yield pool, vm, paths

    def _check_unused(self, found: Registry, vm):
        if vm.klass.name == "AdminVM":
            raise InvalidInput("VM dom0: cannot be removed")
        qid = vm.entry.attrs.get("qid")
        for key, word in (("template_qid", "template"), ("netvm_qid", "NetVM")):
            users = [
                entry.attrs.get("name", "?")
                for entry in found.entries
                if entry is not vm.entry and self._uses(found, entry, key, qid)
            ]
            if users:
                raise StoragePoolException(
                    f"VM {vm.name}: is the {word} of {shown(users)}; give them another or"
                    " remove them first"
                )

    @staticmethod
    def _uses(found, entry, key, qid):
        if key == "netvm_qid" and entry.attrs.get("uses_default_netvm") == "True":
            return found.get("default_netvm") == qid
        return entry.attrs.get(key) == qid

    def _held(self, vm):
        """``(directory or None, {path: allocated})`` of what a VM's directory holds."""
        try:
            pool = self.pool_of(vm)
        except StoragePoolException:
            return None, {}
        if vm.klass.name == "DispVM":
            return None, {}
        fd = pool.open_vm(vm)
        if fd is None:
            return None, {}
        with files.closing(fd):
            path = pool.vmdir(vm)
            held = {
                os.path.join(path, name): files.tree_size(fd, name)
                for name in sorted(os.listdir(fd))
                if not os.path.stat.S_ISLNK(files.exists(fd, name).st_mode)
            }
            for name in vm.images.values():
                self._check_halted(vm, fd, name)
        return path, held

    @staticmethod
    def _check_halted(vm, fd, name):
        if not image.measure(fd, name):
            return
        with files.closing(image.open_image(files.at(fd, name))) as opened:
            device = image.used_by_loop(opened)
        if device:
            raise StoragePoolException(
                f"VM {vm.name}: {name} is in use by {device}; shut the VM down first"
            )

    def remove_vm(self, name, purge=False):
        """
        Remove a VM from the registry, and with ``purge`` its directory and images.

        Returns the changes, ``{}`` for a VM that is not there. A VM that others use, or one that
        has images while ``purge`` is off, is refused.
        """
        if not self.vm_remove_diff(name, purge):
            return {}
        with self.locked() as registry:
            changes = self.vm_remove_diff(name, purge)
            vm = self.find_vm(name)
            if vm is None:
                for pool, left, _ in list(self._leftovers(name)):
                    build.mend(pool, left, False)
            elif "deleted" in changes:
                with build.removed(self.pool_of(vm), vm):
                    self.save_registry(self._without(registry, vm))
            elif changes:
                self.save_registry(self._without(registry, vm))
        return changes

    @staticmethod
    def _without(registry, vm):
        """The registry without a VM; what it was the default of has none, as R3.2's ``pop``."""
        qid = vm.entry.attrs.get("qid")
        attrs = {
            k: "None" if v == qid and k != "default_kernel" else v
            for k, v in registry.attrs.items()
        }
        return registry.replaced(vm.entry).copy(attrs=attrs)

    def check_growth(self, pool, needed=0):
        """Refuse to make or grow anything where a guard of the pool forbids it."""
        kept = self.guards(pool.name)
        guards.check_mount(self.root, pool.name, kept)
        self.check_disk(pool)
        if needed or kept.get("min_free"):
            guards.check_free(pool.name, kept, pool.usage()["free"], needed)
