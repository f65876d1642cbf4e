"""A declared VM that is there: what differs, and what cannot be changed."""

import contextlib
import os
import stat

from qubes_storage import files, guards, mending
from qubes_storage.exc import InvalidInput, OutOfStep, StoragePoolException


class Comparing:
    """The part of :py:class:`~qubes_storage.system.System` that compares VMs."""

    def _compare_vm(self, vm, klass, template, label, pool, sizes, migrate, keep):
        if vm.klass.name == "AdminVM":
            raise InvalidInput("VM dom0: is not made of images; declare other VMs")
        if klass not in (None, vm.klass.name):
            raise StoragePoolException(
                f"VM {vm.name}: is of class {vm.klass.name}, not {klass}; a class never changes:"
                f" declare {vm.klass.name}, or remove the VM first"
            )
        moves = pool not in (None, vm.pool)
        if moves and not migrate:
            raise StoragePoolException(
                f"VM {vm.name}: lies in pool {vm.pool}, not in {pool}; declare pool: {vm.pool}, or"
                " migrate: true to move it"
            )
        place = self.pool_of(vm)
        changes = {}
        left = mending.unfinished(place, vm)
        if left:
            mending.check(place, vm, True)
            changes["unfinished"] = {"old": left, "new": None}
        there = self._check_images(vm, place, left)
        if moves:
            self.check_move(vm, pool, keep)
            changes["pool"] = {"old": vm.pool, "new": pool}
        if label not in (None, vm.label):
            changes["label"] = {"old": vm.label, "new": label}
        if vm.klass.based_on and template not in (None, vm.template):
            if not vm.based:
                raise InvalidInput(
                    f"VM {vm.name}: has a root of its own, which template {template} would hide;"
                    " leave template out, or remove the VM first"
                )
            self._template(vm.name, vm.klass, template)
            changes["template"] = {"old": vm.template, "new": template}
        small = {v: s for v, s in sizes.items() if v in there and there[v][0] < s}
        if "root" in sizes and "root" not in vm.images:
            raise self._root_is_templates(vm.name, template or vm.template)
        if small:
            self.check_growth(self.get_pool(pool) if moves else place, vm.klass.subdir)
            if not left:
                self._check_grow(place, vm, small)
            old = {volume: there[volume][0] for volume in small}
            changes["volumes"] = {"old": old, "new": small}
        if changes:
            self._check_own_directory(vm)
        return changes

    @staticmethod
    def _root_is_templates(name, template):
        if template is None:
            return InvalidInput(
                f"VM {name}: its root is that of its template, which is gone; give it another"
            )
        return InvalidInput(
            f"VM {name}: its root is that of its template {template}; declare its size there"
        )

    def _check_images(self, vm, pool, left):
        """A registered VM whose private or root image is gone is never made anew."""
        there = self.images_on_disk(vm, any(path.endswith(".removing") for path in left))
        gone = [f for v, f in vm.images.items() if v in ("private", "root") and v not in there]
        if gone:
            guards.check_mount(self.root, pool.name, self.guards(pool.name))
            self._check_no_image_is_link(vm, pool, gone)
            paths = ", ".join(os.path.join(pool.vmdir(vm), name) for name in gone)
            self.check_disk(pool)
            self.check_disk(pool, vm.klass.subdir)
            raise OutOfStep(
                f"VM {vm.name}: {paths} is gone; bring it back, or remove the VM with"
                f" qubes_vm.remove: it is never made anew{mending.left_behind(pool, vm)}",
                waits_for=[("mount", pool.vmdir(vm))],
            )
        return there

    @staticmethod
    def _check_no_image_is_link(vm, pool, names):
        """What is a link is not gone, but whoever follows it may be led anywhere."""
        linked, fd = False, pool.open_vm(vm)
        if fd is None:
            with contextlib.suppress(StoragePoolException):
                linked = mending.is_there(pool, vm, dead=False)
            if linked:
                raise OutOfStep(
                    f"VM {vm.name}: {pool.vmdir(vm)} is no directory, and a link is not followed;"
                    " put its directory there"
                )
            return
        with files.closing(fd):
            there = {name: files.exists(fd, name) for name in names}
        links = [name for name in names if there[name] and stat.S_ISLNK(there[name].st_mode)]
        if links:
            paths = ", ".join(os.path.join(pool.vmdir(vm), name) for name in links)
            raise StoragePoolException(
                f"VM {vm.name}: {paths} is a link, which is not followed; put the image in its"
                " place"
            )
