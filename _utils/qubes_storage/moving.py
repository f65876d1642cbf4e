"""
VMs that move: to another pool, or to another name.

The new directory is made beside the old one, of the same files where the kernel lets two
directories have them, so the registry names a whole copy at every moment; the old one goes last.
"""

import contextlib
import copy
import os

from qubes_storage import build, files, guards, image, markers, mending, mounts, transfer, trees
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.plan import Plan, class_dir
from qubes_storage.pool import in_force
from qubes_storage.registry import PATH
from qubes_storage.values import check_vm_name, normalise
from qubes_storage.vm import SUBDIRS


class Moving:
    """The part of :py:class:`~qubes_storage.system.System` that moves VMs."""

    def migrate_vm(self, name, pool, keep=False):
        """
        Move a VM's directory to another pool; returns the changes, ``{}`` for a VM that is there.

        ``keep`` leaves the old copy in its place, where nobody owns it.
        """
        return self.set_vm(name, keep=keep, pool=pool, migrate=True)

    def rename_vm(self, name, new_name):
        """Give a VM and its directory another name; returns the changes."""
        self._plan_rename(name, new_name)
        with self.locked("VM", name):
            changes, vm, renamed = self._plan_rename(name, new_name)
            if vm is None:
                mending.mend(self.pool_of(renamed), renamed, True)
                return changes
            mending.mend(self.pool_of(vm), vm, True)
            self._clear_leftovers(new_name)
            self._move(vm, renamed, {"name": new_name, "conf_file": f"{new_name}.conf"})
        return changes

    @looking
    def _plan_rename(self, name, new_name):
        """``(changes, vm, renamed)``; ``vm`` is None where a dead run has renamed it already."""
        check_vm_name(new_name)
        vm, there = self.find_vm(name), self.find_vm(new_name)
        if vm is None and there is not None:
            left = mending.unfinished(self.pool_of(there), there)
            if self._came_from(there, name):
                return {"unfinished": {"old": left, "new": None}}, None, there
        vm = self.get_vm(name)
        if there is not None:
            raise StoragePoolException(f"VM {new_name}: is in qubes.xml already; take another name")
        self._check_own_directory(vm)
        self._check_nothing_inside(vm)
        if vm.entry.flag("installed_by_rpm", False):
            raise StoragePoolException(
                f"VM {name}: is installed by RPM, which knows it by its name; clone it instead, and"
                " remove its package"
            )
        renamed = copy.copy(vm)
        renamed.name = new_name
        pool = self.pool_of(vm)
        guards.check_mount(self.root, pool.name, self.guards(pool.name))
        left = mending.unfinished(pool, vm) + self._all_left(new_name)
        self._check_images(vm, pool, left)
        self._check_all_halted(vm)
        self._check_writable(vm, pool)
        build.check_vacant(pool, renamed)
        if not mending.unfinished(pool, vm):
            self._rules_elsewhere(vm)
        changes = {"name": {"old": name, "new": new_name}}
        if left:
            changes["unfinished"] = {"old": left, "new": None}
        return changes, vm, renamed

    def _came_from(self, vm, name):
        """Whether a dead run has renamed a VM that was, or may have been, called ``name``."""
        with files.closing(self.pool_of(vm).open_subdir(vm.klass.subdir)) as fd:
            try:
                with markers.opened(fd, vm.dirname) as marker:
                    origin = markers.Origin.read(marker)
            except OSError:
                return False
        return origin is None or os.path.basename(origin.path) == name

    @staticmethod
    def _check_own_directory(vm):
        """Refuse dom0, which has no directory, and a DispVM, whose directory is its template's."""
        if vm.klass.name == "AdminVM":
            raise InvalidInput("VM dom0: is not made of images; take another VM")
        if vm.klass.name == "DispVM":
            raise InvalidInput(
                f"VM {vm.name}: is a DispVM, which goes when it is shut down; take its template"
            )

    def _check_all_halted(self, vm, volumes=None):
        """Refuse a VM one of whose images is in use."""
        fd = self.pool_of(vm).open_vm(vm)
        if fd is None:
            return
        with files.closing(fd):
            for volume, filename in vm.images.items():
                if volumes is None or volume in volumes:
                    self._check_halted(vm, fd, filename)

    @staticmethod
    def _check_writable(vm, pool):
        """Refuse to move a VM away from where nothing can be marked as moving."""
        with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
            if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
                raise StoragePoolException(
                    f"VM {vm.name}: {pool.vmdir(vm)} is on a disk that is mounted read-only, which"
                    " nothing can leave; mount it writable, or clone the VM"
                )

    def check_move(self, vm, pool, keep):
        """Refuse to move a VM to another pool where it cannot be done; ``keep`` copies it."""
        self._check_own_directory(vm)
        self._check_nothing_inside(vm)
        moved = copy.copy(vm)
        moved.pool = pool
        source, target = self.pool_of(vm), self.pool_of(moved)
        self._check_apart(source, target)
        self._check_all_halted(vm)
        self._check_writable(vm, source)
        needed = self._to_copy(vm, source, target, keep)
        self.check_growth(target, vm.klass.subdir, needed)
        self._check_new_vm(moved)
        build.check_vacant(target, moved)
        if not mending.unfinished(source, vm):  # else its files may lie in two places, till then
            with self._writing(vm, source):
                transfer.check(transfer.Take(source, vm), target)
            self._rules_elsewhere(vm)

    @staticmethod
    def _links(source, target):
        """Whether the images of one pool are as good in another."""
        return type(source) is type(target)

    def _to_copy(self, vm, source, target, keep):
        """The bytes that a move writes."""
        fd = source.open_vm(vm)
        if fd is None:
            return 0
        with files.closing(fd), files.closing(class_dir(target, vm.klass.subdir)) as there:
            near = mounts.mount_of(fd) == mounts.mount_of(there)
            links = near and self._links(source, target) and not keep
            if image.device(fd) == image.device(there) and (links or image.shares_blocks(there)):
                return 0
            return trees.tree_size(fd, ".")

    def _migrate(self, vm, pool, keep=False):
        """Move a VM to another pool; the lock is held, and what a dead run left is mended."""
        moved = copy.copy(vm)
        moved.pool = pool
        self._move(vm, moved, {"pool_name": pool}, keep)

    def _move(self, vm, moved, attrs, keep=False):
        source, target = self.pool_of(vm), self.pool_of(moved)
        place = target.vmdir(moved)
        attrs = {**attrs, "dir_path": place, "firewall_conf": "firewall.xml"}
        plan = Plan(moved, target)
        plan.takes = transfer.Take(source, vm, keep=True)
        plan.takes.link = not keep and self._links(source, target)
        plan.takes.renamed = {f"{vm.name}.conf": f"{moved.name}.conf"}
        plan.texts = self._rules_elsewhere(vm)
        plan.takes.but = frozenset(plan.texts)
        with files.closing(source.open_subdir(vm.klass.subdir)) as fd:
            plan.left = fd
            inode = image.identity(fd, vm.dirname)
            plan.origin = markers.Origin(source.vmdir(vm), inode, keep, place)
            mark = markers.moving(vm.dirname)
            mending.mend(target, moved, False)  # first: it takes away the mark of a dead run's move
            os.symlink(place, mark, dir_fd=fd)
            try:
                os.fsync(fd)
                with build.built(plan):
                    self._check_all_halted(vm)  # it may have been started while it was copied
                    registry = self.registry()
                    self.save_registry(registry.replaced(vm.entry, vm.entry.changed(**attrs)))
            except BaseException:
                with contextlib.suppress(OSError):
                    # What is left at the new place, as of a dead run, is mended by the mark.
                    if not mending.unfinished(target, moved, registered=False):
                        os.unlink(mark, dir_fd=fd)
                raise

    def _rules_elsewhere(self, vm):
        """
        ``{"firewall.xml": bytes}`` of rules that lie outside the VM's directory, where R3.2 keeps
        those of a VM in another pool than the default one.
        """
        path = vm.entry.attrs.get("firewall_conf", "")
        with self._writing(vm, self.pool_of(vm)) as fd:
            own = files.exists(fd, "firewall.xml") is not None
        if not path.startswith("/"):
            return {}
        place, filename = os.path.split(normalise("dir_path", path))
        place, name = os.path.split(place)
        top, subdir = os.path.split(place)
        tops = [in_force(n, config).get("dir_path") for n, config in self.sections().items()]
        tops.append(os.path.dirname(PATH))  # where R3.2 has them, whether a pool is there or not
        if filename != "firewall.xml" or subdir not in SUBDIRS or not _is_in(top, tops):
            if own:
                return {}
            raise StoragePoolException(
                f"VM {vm.name}: firewall_conf {path} lies in no VM's directory; copy it to"
                f" {self.pool_of(vm).vmdir(vm)}/firewall.xml"
            )
        try:
            with contextlib.ExitStack() as stack:
                fd = files.open_inside(self.root, top, subdir, name)
                stack.enter_context(files.closing(fd))
                file = stack.enter_context(files.closing(image.open_image(files.at(fd, filename))))
                return {filename: os.pread(file, os.fstat(file).st_size, 0)}
        except FileNotFoundError:
            return {}
        except OSError as err:
            raise StoragePoolException(f"VM {vm.name}: {path}: {err.strerror}") from err


def _is_in(path, paths):
    return any(each and normalise("dir_path", each) == path for each in paths)
