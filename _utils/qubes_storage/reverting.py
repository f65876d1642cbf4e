"""Old images of a VM: kept, listed and brought back by the driver of its pool."""

import contextlib
import os
import stat

from qubes_storage import files, image, mending, owning, revisions
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.vm import IMAGES

_KEPT = ("root", "private")


class Reverting:
    """The part of :py:class:`~qubes_storage.system.System` that keeps revisions."""

    def _keep_revisions(self, vm, pool, fd):
        """Have the driver keep a VM's images as they are; the entry for ``changes``, or none."""
        names = [vm.images[v] for v in _KEPT if v in vm.images and image.measure(fd, vm.images[v])]
        with _finished(pool, fd):
            kept = pool.snapshot(fd, names)
        return {"revisions": {"old": None, "new": kept}} if kept else {}

    @looking
    def revisions(self, name, volume="private"):
        """The revisions of a volume, the oldest first, by the names :py:meth:`revert` takes."""
        vm, pool = self._with_revisions(name, volume)
        with self._writing(vm, pool) as fd:
            return pool.revisions(fd, IMAGES[volume])

    def _with_revisions(self, name, volume):
        vm = self.get_vm(name)
        self._check_own_directory(vm)
        there = [v for v in _KEPT if v in vm.images]
        if volume not in there:
            raise InvalidInput(
                f"VM {name}: volume {volume!r} has no revisions; it has {', '.join(there)} of its"
                " own"
            )
        pool = self.pool_of(vm)
        self._check_images(vm, pool, [])
        return vm, pool

    def revert(self, name, volume="private", revision=None):
        """
        Go back to a revision of a volume, the newest if none is named; what the volume holds now
        becomes a revision, and its size stays. Returns the changes.
        """
        self._plan_revert(name, volume, revision)
        with self.locked("VM", name):
            left = self._mended(name)
            vm, pool, found = self._plan_revert(name, volume, revision)
            with self._writing(vm, pool) as fd, contextlib.ExitStack() as stack:
                name = IMAGES[volume]
                size = os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
                if volume == "root" and "root-cow" in vm.images:
                    stack.enter_context(self._renewed_cow(pool, fd, size))
                with _finished(pool, fd, name):
                    pool.revert(fd, name, found)
                    if os.stat(name, dir_fd=fd, follow_symlinks=False).st_size < size:
                        pool.resize_image(files.at(fd, name), size)
        return {"revision": {"old": None, "new": found}, **left}

    def _mended(self, name):
        """Finish or undo what a dead run left of a VM, whose revisions count then; the changes."""
        vm = self.get_vm(name)
        left = self._left(vm)
        if left:
            mending.mend(self.pool_of(vm), vm, True)
        return {"unfinished": {"old": left, "new": None}} if left else {}

    @looking
    def _plan_revert(self, name, volume, revision):
        vm, pool = self._with_revisions(name, volume)
        with self._writing(vm, pool) as fd:
            if not pool.can_revisions:
                pool.revisions(fd, IMAGES[volume])  # says so, and the way there
                raise StoragePoolException(f"pool {pool.name}: its driver cannot revert")
            found = revisions.choose(
                pool.revisions(fd, IMAGES[volume]), revision, f"VM {name}: volume {volume}"
            )
        self.check_growth(pool, vm.klass.subdir)
        self._check_all_halted(vm, ("private",) if vm.klass.is_template else None)
        return vm, pool, found

    @contextlib.contextmanager
    def _renewed_cow(self, pool, fd, size):
        """
        VMs that run on a template see its root through root-cow.img, which begins anew while the
        body replaces the root; the old one is put back if it does not.
        """
        name, kept = IMAGES["root-cow"], "old"
        root = image.identity(fd, IMAGES["root"])
        with self._new_image(pool, fd, name, size) as new:
            there = files.exists(fd, name)
            if there:
                os.link(name, kept, src_dir_fd=fd, dst_dir_fd=new, follow_symlinks=False)
            os.rename(name, name, src_dir_fd=new, dst_dir_fd=fd)
            try:
                yield
            except BaseException:
                if image.identity(fd, IMAGES["root"]) == root:
                    if there:
                        os.rename(kept, name, src_dir_fd=new, dst_dir_fd=fd)
                    else:
                        os.unlink(name, dir_fd=fd)
                raise


@contextlib.contextmanager
def _finished(pool, fd, *names):
    """Give images, and what a driver makes meanwhile, group and mode, and bring all to the disk."""
    before = _own_files(pool, fd)
    yield
    made = {name for name, _ in _own_files(pool, fd) - before}
    for name in sorted({*names, *made}):
        owning.finish(files.at(fd, name))
    os.fsync(fd)


def _own_files(pool, fd):
    """``{(name, inode)}`` of the files in an open directory that are a driver's own."""
    with files.closing(files.open_subdir(fd, ".")) as now:  # as btrfs lists it now
        found = {name: there for name, there in files.entries(now) if pool.owns(name)}
    return {(name, there.st_ino) for name, there in found.items() if stat.S_ISREG(there.st_mode)}
