"""Whether what lies on disk is what a VM needs; and the images that are made anew."""

import collections
import contextlib
import errno
import os
import stat

from qubes_storage import build, files, image, mending, owning, trees
from qubes_storage.blame import of_driver
from qubes_storage.exc import InvalidInput, OutOfStep, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.values import format_size
from qubes_storage.vm import IMAGES, KERNEL_FILES, KERNELS, template_qid

# What R3.2 and its tools put into a VM's directory; a .old is what one of them set aside.
_KNOWN = {
    "icon.png", "firewall.xml", "kernels", "apps", "apps.icons", "apps.templates",
    "apps.tempicons", "whitelisted-appmenus.list", "vm-whitelisted-appmenus.list",
    "netvm-whitelisted-appmenus.list", "dvm.conf", "updates.stat", "savefile.img",
    "netvm-savefile.img", "private-cow.img", "clean-volatile.img.tar", "dispvm.conf",
    "dvm-savefile", *IMAGES.values(),
}  # fmt: skip


class Checking:
    """The part of :py:class:`~qubes_storage.system.System` that verifies, commits and resets."""

    @looking
    def verify_vm(self, name):
        """
        What is wrong with a VM's files, as sentences: images that are missing or of a wrong size,
        its template's root, its kernel, files that have no business there, links, modes.

        volatile.img and root-cow.img may be missing: R3.2 makes them when the VM starts; and
        volatile.img may be of any size: R3.2 grows root without it.
        """
        vm = self.get_vm(name)
        if vm.klass.name in ("AdminVM", "DispVM"):
            return []
        try:
            pool = self.pool_of(vm)
        except StoragePoolException as err:
            return [str(err)]
        found = [f"{p}: is left by a run that died; qubes_vm.set {name} mends it"
                 for p in mending.unfinished(pool, vm)]  # fmt: skip
        fd = pool.open_vm(vm)
        place = pool.vmdir(vm)
        if fd is None:
            found += self._verify_place(vm, pool)
        else:
            with files.closing(fd):
                found += self._verify_dir(vm, pool, fd, place)
                found += self._verify_kernel(vm, fd, place)
        return found + self._verify_template(vm)

    @staticmethod
    def _verify_place(vm, pool):
        """What is wrong with where a VM's directory is not."""
        place = pool.vmdir(vm)
        try:
            if mending.is_there(pool, vm, dead=False):
                return [f"{place}: is no directory, and a link is not followed; put it there"]
            if mending.is_there(pool, vm):
                return []  # what mends that is told already
        except StoragePoolException as err:
            if not err.waits_for:
                return [str(err)]
        return [f"{place}: is gone; mount its disk or restore it from a backup"]

    def _verify_dir(self, vm, pool, fd, place):
        found = _wrong_mode(place, os.fstat(fd))
        sizes = {volume: image.measure(fd, name) for volume, name in vm.images.items()}
        for volume in ("root", "private"):
            if volume in sizes and not files.exists(fd, IMAGES[volume]):
                path = os.path.join(place, IMAGES[volume])
                found.append(f"{path}: is gone; restore it from a backup")
        known = {*_KNOWN, f"{vm.name}.conf"}
        entries = list(files.entries(fd))
        here = collections.Counter(there.st_ino for _, there in entries)
        for name, there in entries:
            path = os.path.join(place, name)
            if pool.owns(name):
                continue
            if name.removesuffix(".old") not in known:
                found.append(f"{path}: has no business here; move it away")
            elif stat.S_ISLNK(there.st_mode):
                if name != "icon.png":
                    found.append(f"{path}: is a link, which is not followed; put the file there")
            elif name.removesuffix(".old") in IMAGES.values():
                found += _wrong_image(path, there, here[there.st_ino])
        return [*found, *self._wrong_sizes(vm, place, sizes), *self._verify_by(pool, fd)]

    @staticmethod
    def _verify_by(pool, fd):
        try:
            with of_driver(pool, "verify"):
                return list(pool.verify(fd))
        except StoragePoolException as err:
            return [str(err)]

    @staticmethod
    def _wrong_sizes(vm, place, sizes):
        root, cow = sizes.get("root"), sizes.get("root-cow")
        if not root or not cow or cow[0] >= root[0]:
            return []
        return [
            f"{place}/{IMAGES['root-cow']}: is of {format_size(cow[0])}, too small for a root"
            f" of {format_size(root[0])}; make it anew with qubes_vm.commit {vm.name}"
        ]

    def _verify_template(self, vm):
        qid = template_qid(vm.entry)
        if qid is None:
            return []
        template = self.find_vm(vm.template) if vm.template else None
        if template is None:
            return [f"VM {vm.name}: its template (qid {qid}) is gone; give it another"]
        try:
            pool = self.pool_of(template)
        except StoragePoolException as err:
            return [str(err)]
        if "root" in self.images_on_disk(template):
            return []
        path = os.path.join(pool.vmdir(template), IMAGES["root"])
        return [f"{path}: is gone, the root of its template {template.name}; restore it"]

    def _verify_kernel(self, vm, fd, place):
        """R3.2 takes the kernel of the registry, or one in the VM's own directory."""
        if vm.klass.is_hvm:
            return []
        version = self._kernel_of(vm)
        own = version is None
        if own and not files.exists(fd, "kernels"):
            return []
        if not own and ("/" in version or version in (".", "..")):
            return [f"VM {vm.name}: kernel {version!r} is no name of one; set another"]
        path = os.path.join(place, "kernels") if own else os.path.join(KERNELS, version)
        there = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))
            kernels = (
                files.open_subdir(fd, "kernels") if own else build.open_kernels(self.root, version)
            )
            stack.enter_context(files.closing(kernels))
            there = [name for name in KERNEL_FILES if image.measure(kernels, name)]
        return [
            f"{path}/{name}: is gone, of the kernel it runs; install that kernel or set another"
            for name in KERNEL_FILES
            if name not in there
        ]

    def commit_vm(self, name):
        """
        Keep the changes that a template's VMs wait for: root-cow.img is set aside as
        root-cow.img.old, and a new one begins. Returns the changes.
        """
        self._plan_commit(name)
        with self.locked("VM", name):
            vm, pool, sizes = self._plan_commit(name)
            with self._writing(vm, pool) as fd:
                name = IMAGES["root-cow"]
                with self._new_image(pool, fd, name, sizes["root"][0]) as new:
                    kept = self._keep_revisions(vm, pool, fd)
                    if "root-cow" in sizes:
                        _set_aside(fd, name)
                    os.rename(name, name, src_dir_fd=new, dst_dir_fd=fd)
        before = sizes.get("root-cow", (None,))[0]
        return {"root-cow": {"old": before, "new": sizes["root"][0]}, **kept}

    @looking
    def _plan_commit(self, name):
        vm = self.get_vm(name)
        if not vm.klass.is_template:
            raise InvalidInput(
                f"VM {name}: is of class {vm.klass.name}; only a template has changes to commit"
            )
        pool = self.pool_of(vm)
        sizes = self._check_images(vm, pool, [])
        self.check_growth(pool, vm.klass.subdir)
        self._check_all_halted(vm, ("private",))  # those that run on it keep what they have open
        return vm, pool, sizes

    def reset_vm(self, name):
        """
        Make volatile.img anew, as R3.2 does when a VM starts: always for one that runs on a
        template, else only where there is none. Returns the changes.
        """
        self._plan_reset(name)
        with self.locked("VM", name):
            vm, pool, changes = self._plan_reset(name)
            if changes or pool.revisions_to_keep:
                with self._writing(vm, pool) as fd:
                    if not changes:
                        return self._keep_revisions(vm, pool, fd)
                    name = IMAGES["volatile"]
                    with self._new_image(pool, fd, name, changes["volatile"]["new"]) as new:
                        changes.update(self._keep_revisions(vm, pool, fd))
                        os.rename(name, name, src_dir_fd=new, dst_dir_fd=fd)
        return changes

    @looking
    def _plan_reset(self, name):
        vm = self.get_vm(name)
        self._check_own_directory(vm)
        pool = self.pool_of(vm)
        there = self._check_images(vm, pool, [])
        if vm.based and not vm.template:
            raise StoragePoolException(
                f"VM {name}: its template is not in qubes.xml; give it another with qubes_vm.set"
                f" {name} template=NAME"
            )
        unchanged = "volatile" in there and not vm.based
        if unchanged and not pool.revisions_to_keep:
            return vm, pool, {}
        self.check_growth(pool, vm.klass.subdir)
        self._check_all_halted(vm)
        if unchanged:
            return vm, pool, {}
        template = self.find_vm(vm.template) if vm.template else None
        root = (self.images_on_disk(template) if template else there).get("root", (0,))[0]
        size = vm.klass.volatile_size(root)
        before = there.get("volatile", (None,))[0]
        return vm, pool, {"volatile": {"old": before, "new": size}}

    @contextlib.contextmanager
    def _writing(self, vm, pool):
        """A handle of a VM's directory; errors name the VM."""
        try:
            with files.closing(self._open_vm(vm, pool)) as fd:
                yield fd
        except OSError as err:
            raise OutOfStep(
                f"VM {vm.name}: {pool.vmdir(vm)}: {err.strerror}; mend it and try again"
                f"{mending.left_behind(pool, vm)}"
            ) from err

    @staticmethod
    def _open_vm(vm, pool):
        """A handle of a VM's directory."""
        fd = pool.open_vm(vm)
        if fd is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return fd

    @staticmethod
    @contextlib.contextmanager
    def _new_image(pool, fd, name, size):
        """An open directory with an empty image that is to replace one in ``fd``."""
        with owning.workshop(fd, f".{name}.new") as new:
            pool.create_image(files.at(new, name), size)
            owning.finish(files.at(new, name))
            yield new


def _set_aside(fd, name):
    """``name.old`` is ``name``, and ``name`` stays until the new one replaces it."""
    beside, old = f".{name}.old", f"{name}.old"
    trees.clear(fd, beside)
    there, now = files.exists(fd, old), files.exists(fd, name)
    if not (there and now and os.path.samestat(there, now)):  # as a dead run left them
        try:
            os.link(name, beside, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        except OSError as err:
            if err.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.rename(name, old, src_dir_fd=fd, dst_dir_fd=fd)
            return
        try:
            os.rename(beside, old, src_dir_fd=fd, dst_dir_fd=fd)
        except OSError:
            os.unlink(beside, dir_fd=fd)
            raise
    os.fsync(fd)  # before a new one takes its name


def _wrong_image(path, there, names):
    if not stat.S_ISREG(there.st_mode):
        return [f"{path}: is no file; put the image in its place"]
    found = _wrong_mode(path, there)
    if there.st_nlink > names:
        found.append(f"{path}: has a name elsewhere too; put a copy in its place")
    if not there.st_size or there.st_size % 512:
        found.append(
            f"{path}: has {there.st_size} bytes, which is no disk of whole sectors (512 bytes);"
            " restore it from a backup"
        )
    return found


def _wrong_mode(path, there):
    """Group qubes has to read and write, and nobody else may write (R3.2 lets others read)."""
    wanted, never = (0o770, 0o002) if stat.S_ISDIR(there.st_mode) else (0o660, 0o7113)
    mode = stat.S_IMODE(there.st_mode)
    if mode & wanted == wanted and not mode & never:
        return []
    right = owning.DIR_MODE if stat.S_ISDIR(there.st_mode) else owning.FILE_MODE
    return [f"{path}: has mode {mode:04o}; give it {right:04o}"]
