"""The verbs on VMs: list, info, diff, create, set."""

import contextlib
import os
import stat

from qubes_storage import build, files, guards, image, mending, mounts, owning
from qubes_storage.blame import of_driver
from qubes_storage.cloning import Cloning
from qubes_storage.comparing import Comparing
from qubes_storage.exc import AlreadyThere, NotSupported, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.plan import class_dir
from qubes_storage.planning import Planning, check_volumes
from qubes_storage.registry import PATH
from qubes_storage.values import format_size, parse_size
from qubes_storage.vm import ICONS, IMAGES, VM, start_attrs


class VMs(Planning, Comparing, Cloning):
    """The part of :py:class:`~qubes_storage.system.System` that is about VMs."""

    @looking
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
        """The VM of a name, or None; one of a class that is not known here is left alone."""
        vm, entry = self._find(name)
        if entry and VM.stranger(entry):
            raise NotSupported(
                f"VM {name}: is a <{entry.tag}> in {PATH}, a class that is not known here; take"
                " another name, or the tools that made it"
            )
        return vm

    def _find(self, name):
        """``(VM, its element)`` of a name, None where there is none."""
        found = self.registry()
        entry = found.by_name.get(name)
        return VM.of(entry, found) if entry else None, entry

    def get_vm(self, name):
        """The VM of a name; raises where there is none."""
        vm = self.find_vm(name)
        if vm is None:
            raise StoragePoolException(
                f"VM {name}: is not in qubes.xml; create it with qubes_vm.create or"
                " qubes_vm.present",
                waits_for=[("VM", name)],
            )
        return vm

    def pool_of(self, vm):
        """The Pool that a VM lies in; raises for one that cannot hold VMs here."""
        return self.get_pool(vm.pool)

    @looking
    def vm_info(self, name):
        """
        What there is of a VM, or None for none of that name: ``klass``, ``pool``, ``template``,
        ``label``, ``dir_path``, and ``volumes: {volume: {path, size, allocated, pool}}`` in bytes,
        size and allocated None for an image that is not there.
        """
        vm, _ = self._find(name)  # one of a class that is not known here is no VM
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

    def images_on_disk(self, vm, removing=False):
        """
        ``{volume: (size, allocated)}`` of the images that are there, in bytes; with ``removing``
        also of those that a dead run was removing.
        """
        try:
            pool = self.pool_of(vm)
            fd = mending.open_vm(pool, vm) if removing else pool.open_vm(vm)
        except StoragePoolException:
            fd = None
        if fd is None:
            return {}
        with files.closing(fd):
            found = {v: image.measure(fd, filename) for v, filename in vm.images.items()}
        return {volume: sizes for volume, sizes in found.items() if sizes}

    @looking
    def vm_diff(self, name, **declared):
        """
        What :py:meth:`create_vm` or :py:meth:`set_vm` would change, ``{}`` for nothing; entries are
        ``{"old": ..., "new": ...}``, ``created`` for a new VM. Raises what they would raise.

        Keywords: klass, template, label, pool, volumes, clone_from, root_copy_from,
        root_move_from, migrate.
        """
        return self.plan(name, **declared)[0]

    def create_vm(self, name, memory=None, vcpus=None, internal=None, **declared):
        """
        Create a VM: its directory and images, and last its entry in the registry.

        ``memory`` is in MiB. Returns the changes. A create that fails leaves nothing behind.
        """
        attrs = start_attrs(name, memory, vcpus, internal)
        self._check_new(name)
        self.vm_diff(name, **declared)  # before the lock, which would make a missing qubes.xml
        with self.locked("VM", name) as registry:
            self._check_new(name)  # another may have been first
            changes, plan = self.plan(name, **declared)
            self._clear_leftovers(name)  # it may have been declared elsewhere then
            vm = plan.vm
            entry = vm.new_entry(registry, plan.pool.vmdir(vm))
            if not plan.has_kernel and "kernel" in entry.attrs:
                entry = entry.changed(kernel="None")
            entry = entry.changed(**plan.attrs).changed(**attrs)
            defaults = vm.defaults(registry, entry.attrs["qid"])
            with build.built(plan):
                self._check_copied(plan)  # it may have been started while it was copied
                self.save_registry(registry.added(entry).copy(attrs=defaults))
        return changes

    def _check_new(self, name):
        if self.find_vm(name) is not None:
            raise AlreadyThere(f"VM {name}: is in qubes.xml already; change it with qubes_vm.set")

    def set_vm(self, name, *, keep=False, **declared):
        """
        Change a VM that is there, only what is declared and differs: label, template, with
        ``migrate`` the pool, and sizes, which only ever grow. Finishes what a dead run left.

        ``keep`` is :py:meth:`migrate_vm`'s. Returns the changes.
        """
        self.get_vm(name)
        with self.locked("VM", name):
            vm = self.get_vm(name)
            changes, _ = self.plan(name, keep=keep, **declared)
            pool = self.pool_of(vm)
            if "unfinished" in changes:
                mending.mend(pool, vm, True)
            if "pool" in changes:
                self._migrate(vm, changes["pool"]["new"], keep)
                vm = self.get_vm(name)
                pool = self.pool_of(vm)
            try:
                self._change(pool, vm, changes)
            except StoragePoolException as err:
                if "pool" not in changes:
                    raise
                raise StoragePoolException(f"{err}; it is in pool {vm.pool} already") from err
        return changes

    def _change(self, pool, vm, changes):
        """Change what needs no move; the lock is held."""
        for volume, size in changes.get("volumes", {"new": {}})["new"].items():
            self._grow(pool, vm, volume, size)
        attrs = {}
        registry = self.registry()
        if "label" in changes:
            attrs["label"] = changes["label"]["new"]
        if "template" in changes:
            attrs["template_qid"] = registry.by_name[changes["template"]["new"]].attrs["qid"]
        try:
            if "label" in changes:  # before the registry, by which the next run compares
                self._set_icon(pool, vm, attrs["label"])
            if attrs:
                self.save_registry(registry.replaced(vm.entry, vm.entry.changed(**attrs)))
        except BaseException:
            if "label" in changes and self.get_vm(vm.name).label != attrs["label"]:
                with contextlib.suppress(StoragePoolException):
                    self._set_icon(pool, vm, vm.label)
            raise

    def resize_vm(self, name, volume, size):
        """
        Grow an image of a VM; returns the changes, ``{}`` for one of that size.

        Smaller is refused. A loop device over the image, by which a running VM has it, grows too.
        """
        size = parse_size(size, f"VM {name}: volume {volume}")
        size = check_volumes(name, {volume: size})[volume]
        self.get_vm(name)  # the lock would make a qubes.xml where none is
        with self.locked("VM", name):
            vm = self.get_vm(name)
            self._check_own_directory(vm)
            changes, _ = self.plan(name, volumes={volume: size})
            pool = self.pool_of(vm)
            if "unfinished" in changes:
                mending.mend(pool, vm, True)
                changes.update(self.plan(name, volumes={volume: size})[0])
            there = self.images_on_disk(vm).get(volume, (0,))[0]
            if size < there:
                raise StoragePoolException(
                    f"VM {name}: {volume} has {there} bytes ({format_size(there)}) and never"
                    f" shrinks to {size}; take a larger size"
                )
            self._grow(pool, vm, volume, size)
        return changes

    def _set_icon(self, pool, vm, label):
        with self._writing(vm, pool) as fd:
            name = "icon.png"
            found = files.exists(fd, name)
            if found and not stat.S_ISLNK(found.st_mode):
                return  # an icon of the user's own
            with owning.workshop(fd, f".{name}.new") as new:
                os.symlink(ICONS.format(label), name, dir_fd=new)
                os.rename(name, name, src_dir_fd=new, dst_dir_fd=fd)

    def _check_grow(self, pool, vm, volumes):
        """Refuse images that cannot be opened to grow, before any does."""
        with self._writing(vm, pool) as fd:
            for volume in volumes:
                for path in _paths(fd, volume):
                    with image.pinned(path):
                        pass

    def _grow(self, pool, vm, volume, size):
        path = os.path.join(pool.vmdir(vm), IMAGES[volume])
        try:
            with files.closing(self._open_vm(vm, pool)) as fd:
                for each in _paths(fd, volume):
                    pool.resize_image(each, size)
                image.tell_loops(files.at(fd, IMAGES[volume]))
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: {path} cannot grow to {format_size(size)}: {err.strerror}; mend it"
                " and try again"
            ) from err

    def check_growth(self, pool, subdir, needed=0):
        """Refuse to make or grow a VM's images where a guard of the pool forbids it."""
        kept = self.guards(pool.name)
        guards.check_mount(self.root, pool.name, kept)
        self.check_disk(pool)
        if needed or kept.get("min_free"):
            path, free = self._free(pool, subdir)
            guards.check_free(pool.name, kept, free, needed, path)

    @staticmethod
    def _free(pool, subdir):
        """Where a VM's images lie, and how many bytes are free there."""
        with files.closing(pool.open()) as top, files.closing(class_dir(pool, subdir)) as fd:
            if mounts.mount_of(top) != mounts.mount_of(fd):  # a disk of the class's own
                found = os.fstatvfs(fd)
                return os.path.join(pool.dir_path, subdir), found.f_bavail * found.f_frsize
        with of_driver(pool, "usage"):
            return pool.dir_path, pool.usage()["free"]


def _paths(fd, volume):
    """The images in an open directory that grow with one, and then that."""
    if volume == "root" and image.measure(fd, IMAGES["root-cow"]):
        yield files.at(fd, IMAGES["root-cow"])
    yield files.at(fd, IMAGES[volume])
