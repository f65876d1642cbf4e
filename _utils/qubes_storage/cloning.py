"""VMs made of others: clones, and root images that the caller brings."""

import os

from qubes_storage import build, files, image, transfer
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.plan import Image, Outside, Plan
from qubes_storage.values import check_vm_name, whole_sectors
from qubes_storage.vm import IMAGES, VM

# What R3.2's clone_attrs copies; a VM of its own kernel has those of kernels, an HVM the last.
_ATTRS = (
    "netvm_qid", "uses_default_netvm", "memory", "maxmem", "services", "vcpus", "mac", "pcidevs",
    "include_in_backups", "default_user", "qrexec_timeout", "dispvm_netvm",
    "uses_default_dispvm_netvm",
)  # fmt: skip
_KERNEL_ATTRS = ("kernel", "uses_default_kernel", "kernelopts", "uses_default_kernelopts")
_HVM_ATTRS = ("timezone", "qrexec_installed", "guiagent_installed")
# Besides images: what the user or the template made, and nothing makes anew.
_FILES = (
    "kernels", "firewall.xml", "apps.templates", "apps.tempicons", "whitelisted-appmenus.list",
    "vm-whitelisted-appmenus.list", "netvm-whitelisted-appmenus.list",
)  # fmt: skip


def clone_attrs(source, registry):
    """The attributes that a clone has from its source, the default NetVM by its qid."""
    names = _ATTRS + (_HVM_ATTRS if source.klass.is_hvm else _KERNEL_ATTRS)
    attrs = {key: source.entry.attrs[key] for key in names if key in source.entry.attrs}
    if not source.klass.is_netvm and source.entry.flag("uses_default_netvm", True):
        attrs["netvm_qid"] = registry.get("default_netvm") or "none"
    return attrs


class Cloning:
    """The part of :py:class:`~qubes_storage.system.System` that clones and imports."""

    def clone_vm(self, name, new_name, pool=None):
        """
        Make a VM that is a copy of another, in any pool, by default that of the other.

        Returns the changes.
        """
        return self.create_vm(new_name, clone_from=name, pool=pool)

    def _plan_clone(self, name, clone_from, klass, template, label, pool, sizes):
        """``(changes, plan)`` of a VM that is to be a clone."""
        check_vm_name(name)
        source = self.find_vm(clone_from)
        if pool is None:  # as qvm-clone does
            pool = source.pool if source else "default"
        self._check_sources(name, clone_from, pool)
        self._check_own_directory(source)
        self._check_clone(name, source, klass, template)
        runs_on = source.template
        if template is not None:
            runs_on = self._template(name, source.klass, template).name
        elif source.based and not runs_on:
            raise StoragePoolException(
                f"VM {name}: the template of {clone_from} is not in qubes.xml; declare another"
            )
        if runs_on and "root" in sizes:
            raise self._root_is_templates(name, runs_on)
        vm = VM(
            name,
            source.klass,
            pool=pool,
            label=label or source.label,
            template=runs_on,
        )
        place = self.pool_of(vm)
        plan = Plan(vm, place)
        left = self._all_left(name)
        self._check_images(source, self.pool_of(source), [])
        self._plan_copies(plan, source, sizes)
        self._check_copied(plan)
        plan.attrs = clone_attrs(source, self.registry())
        self.check_growth(place, vm.klass.subdir, self._needed(plan))
        self._check_new_vm(vm)
        build.check_vacant(place, vm)
        self.registry().unused("qid")
        changes = self._created(plan, runs_on, sizes, left)
        return {**changes, "clone_from": {"old": None, "new": clone_from}}, plan

    @staticmethod
    def _check_clone(name, source, klass, template):
        if klass not in (None, source.klass.name):
            raise InvalidInput(
                f"VM {name}: a clone of {source.name} is of class {source.klass.name}, not {klass}"
            )
        if template is not None and not source.based:
            raise InvalidInput(
                f"VM {name}: clone_from and template both say what it is copied from; declare"
                " one of them"
            )

    def _check_sources(self, name, clone_from, pool):
        lacking = []
        if self.find_vm(clone_from) is None:
            lacking.append(
                StoragePoolException(
                    f"VM {name}: {clone_from}, of which it is to be a clone, is not in qubes.xml;"
                    " declare or create it first",
                    waits_for=[("VM", clone_from)],
                )
            )
        try:
            self.get_pool(pool)
        except StoragePoolException as err:
            if not err.waits_for:
                raise
            lacking.append(err)
        if lacking:
            waits_for = [pair for err in lacking for pair in err.waits_for]
            raise StoragePoolException("; ".join(map(str, lacking)), waits_for)

    def _plan_copies(self, plan, source, sizes):
        """R3.2 makes volatile.img when the VM starts; a clone has none."""
        root = 0
        for volume in plan.vm.images:
            if volume in ("root", "private"):
                size, copied = self._find_image(plan.vm, source, volume)
                size = max(size, sizes.get(volume, 0))
                plan.images.append(Image(IMAGES[volume], size, copied))
                root = size if volume == "root" else root
        if "root-cow" in plan.vm.images:
            plan.images.append(Image(IMAGES["root-cow"], root))
        pool = self.pool_of(source)
        names = list(_FILES)
        with self._writing(source, pool) as fd:
            if image.measure(fd, "icon.png"):  # one of the user's own
                names.append("icon.png")
            plan.takes = transfer.Take(pool, source, names=tuple(names))
            transfer.check(plan.takes, plan.pool)
        plan.texts = self._rules_elsewhere(source)
        plan.takes.but = frozenset(plan.texts)

    def _plan_import(self, plan, path, moved, size):
        """Have a new VM's root image be a copy of a file of the caller's."""
        vm = plan.vm
        word = "root_move_from" if moved else "root_copy_from"
        if "root" not in vm.images:
            raise InvalidInput(
                f"VM {vm.name}: {word} is for a root of its own, and it runs on that of"
                f" {vm.template}; declare klass: StandaloneVM"
            )
        if not path.startswith("/"):
            raise InvalidInput(f"VM {vm.name}: {word} {path!r} is not an absolute path")
        real = os.path.realpath(path)
        try:
            with image.pinned(real, anywhere=True) as (pin, found):
                os.close(image.reopen(pin))  # whether it can be read
                device = image.used_by_loop(found)
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: {word} {path}: {err.strerror}; name an image",
                waits_for=[("file", path)] if isinstance(err, FileNotFoundError) else (),
            ) from err
        if not found.st_size:
            raise StoragePoolException(f"VM {vm.name}: {word} {path} is empty; name an image")
        if device:
            raise StoragePoolException(
                f"VM {vm.name}: {word} {path} is in use by {device}; detach it first"
            )
        if moved:
            if not os.access(os.path.dirname(real), os.W_OK | os.X_OK, effective_ids=True):
                raise StoragePoolException(
                    f"VM {vm.name}: {word} {path} cannot be deleted there; mount its disk writable,"
                    " or use root_copy_from"
                )
            self._check_is_nobodys(vm, path, found)
        size = whole_sectors(max(found.st_size, size))
        outside = Outside(real, moved)
        for wanted in plan.images:
            if wanted.filename == IMAGES["root"]:
                wanted.source, wanted.size = outside, size
            elif wanted.filename == IMAGES["root-cow"]:
                wanted.size = max(wanted.size, size)
        return size

    def _check_is_nobodys(self, vm, path, found):
        """Refuse to take away, by whatever name, a file that is an image of another VM."""
        for other in (VM.of(entry, self.registry()) for entry in self.registry().entries):
            if other and self._is_image_of(other, path, found):
                raise StoragePoolException(
                    f"VM {vm.name}: root_move_from {path} is an image of VM {other.name}, which"
                    " would lose it; use root_copy_from"
                )

    def _is_image_of(self, vm, path, found):
        """Whether a file is an image of a VM; going by its names where the pool cannot be told."""
        try:
            fd = self.pool_of(vm).open_vm(vm)
        except StoragePoolException:
            place, name = os.path.split(os.path.realpath(path))
            return name in vm.images.values() and os.path.basename(place) == vm.dirname
        if fd is None:
            return False
        with files.closing(fd):
            there = [files.exists(fd, name) for name in vm.images.values()]
        return any(each and os.path.samestat(each, found) for each in there)
