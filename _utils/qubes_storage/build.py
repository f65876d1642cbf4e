"""
A VM's directory, made whole and then renamed into place, or deleted; a dead run is mended.

Everything is built in ``.NAME.creating``, closed to others, beside the place of the VM's directory
NAME. While that marker is there and the registry does not know NAME, a run died: the next one takes
away what it left. What is to be deleted is first renamed to ``.NAME.removing``: if the registry
still knows NAME, the next run renames it back, else it deletes on. The registry's lock is held all
the while, so whatever is found there is left by the dead. A VM that moves leaves the markers of
:py:mod:`markers`, one at either place.
"""

import contextlib
import os
from dataclasses import dataclass, field

from qubes_storage import files, image, markers, registry, transfer, trees
from qubes_storage.exc import OutOfStep, StoragePoolException
from qubes_storage.markers import creating, moving, removing
from qubes_storage.vm import ICONS, KERNEL_FILES, KERNELS


@dataclass
class Source:
    """An image of a VM in its pool, to be copied."""

    pool: object
    vm: object
    filename: str

    @property
    def path(self):
        """Where the machine sees it."""
        return os.path.join(self.pool.vmdir(self.vm), self.filename)

    @contextlib.contextmanager
    def opened(self):
        """A reading handle."""
        fd = self.pool.open_vm(self.vm)
        if fd is None:
            raise StoragePoolException(
                f"VM {self.vm.name}: {self.path}: is gone; mount its disk, or restore it from a"
                " backup"
            )
        with files.closing(fd):
            try:
                img = image.open_image(files.at(fd, self.filename))
            except OSError as err:
                raise StoragePoolException(
                    f"VM {self.vm.name}: {self.path}: {err.strerror}"
                    f"{left_behind(self.pool, self.vm)}"
                ) from err
        with files.closing(img):
            yield img


@dataclass
class Outside:
    """A file of the caller's, to become the root image; with ``moved`` it goes when that stands."""

    path: str
    moved: bool = False

    @contextlib.contextmanager
    def opened(self):
        """A reading handle."""
        with files.closing(image.open_image(self.path, anywhere=True)) as img:
            yield img


@dataclass
class Image:
    """An image to make: of ``size`` bytes, and a copy of ``source`` if there is one."""

    filename: str
    size: int
    source: Source = None


@dataclass
class Plan:
    """The directory to make for a VM."""

    vm: object
    pool: object
    images: list = field(default_factory=list)
    has_kernel: bool = True  # False where there is none to run it
    attrs: dict = field(default_factory=dict)  # of its entry, as a clone has them of its source
    kernels: str = None  # the version of the kernel to copy
    takes: object = None  # the transfer.Take of another VM's directory
    origin: object = None  # the markers.Origin, for a VM that moves
    texts: dict = field(default_factory=dict)  # {file name: bytes} of what nothing else brings


def unfinished(pool, vm):
    """The paths of what a dead run left of a VM in a pool."""
    try:
        with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
            names = [mark(vm.dirname) for mark in (creating, removing, moving)]
            found = [name for name in names if files.exists(fd, name)]
    except StoragePoolException:
        return []
    return [os.path.join(pool.dir_path, vm.klass.subdir, name) for name in found]


def left_behind(pool, vm):
    """What an error about a VM's files says besides, if a dead run left some of them."""
    paths = ", ".join(unfinished(pool, vm))
    return paths and f"; {paths} is left by a run that died: qubes_vm.set {vm.name} mends it"


def open_vm(pool, vm):
    """A handle of a VM's directory, also of one that a dead run was removing, or None."""
    fd = pool.open_vm(vm)
    if fd is None:
        try:
            with files.closing(pool.open_subdir(vm.klass.subdir)) as subdir:
                return files.open_subdir(subdir, removing(vm.dirname))
        except (OSError, StoragePoolException):
            return None
    return fd


def mend(pool, vm, registered):
    """Finish or undo what a dead run left of a VM."""
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        try:
            _mend(pool, vm, registered, fd)
        except OSError as err:
            place = os.path.dirname(pool.vmdir(vm))
            raise StoragePoolException(
                f"VM {vm.name}: {place}: what a dead run left cannot be mended: {err.strerror};"
                " mend the disk and try again"
            ) from err


def _mend(pool, vm, registered, fd):
    name, place = vm.dirname, pool.vmdir(vm)
    if not any(files.exists(fd, mark(name)) for mark in (creating, moving, removing)):
        return
    registry.sync(pool.root)  # the dead run may not have come to that
    if files.exists(fd, creating(name)):
        if registered:
            _finish(pool.root, fd, name, place)
        else:
            markers.undo(pool.root, fd, name, place)
    if files.exists(fd, moving(name)):
        markers.mend_moving(pool.root, fd, name, place, registered)
    if files.exists(fd, removing(name)):
        if registered and not files.exists(fd, name):
            os.close(files.open_subdir(fd, removing(name)))  # a link is nobody's directory
            os.rename(removing(name), name, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            files.remove(fd, removing(name))
    os.fsync(fd)


def _finish(root, fd, name, place):
    """A VM is made and registered: what it came from goes, and then the marker."""
    with markers.opened(fd, name) as marker:
        origin = markers.Origin.of(marker, place)
        if origin:
            origin.leave(root)
        outside = markers.read(marker, markers.OUTSIDE)
    if outside and outside.count(":") > 1:
        _remove_outside(*outside.split(":", 2))
        with files.closing(files.open_subdir(fd, name)) as vmdir:
            # A file that was linked has kept its mode till now.
            finish_image(files.at(vmdir, "root.img"))
    trees.remove_tree(fd, creating(name))


def _remove_outside(changed, inode, path):
    """Delete a file of the caller's if it is still the one that became an image."""
    parent, name = os.path.split(path)
    try:
        # The path had no links in it: one that is there now is of somebody who may write there.
        fd = files.open_inside("/", "/", *(part for part in parent.split("/") if part))
    except (FileNotFoundError, NotADirectoryError):
        return
    with files.closing(fd):
        found = files.exists(fd, name)
        if found and (str(found.st_mtime_ns), str(found.st_ino)) == (changed, inode):
            os.unlink(name, dir_fd=fd)
        os.fsync(fd)  # gone from the disk before the marker goes


def check_vacant(pool, vm):
    """Refuse a place where something is, even an empty directory."""
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        left = files.exists(fd, creating(vm.dirname)) or files.exists(fd, moving(vm.dirname))
        if files.exists(fd, vm.dirname) and not left:  # what a dead run left is looked at later
            raise _occupied(pool, vm)


def _occupied(pool, vm):
    return OutOfStep(
        f"VM {vm.name}: {pool.vmdir(vm)} is there, and the registry does not know it; move it away"
        " or take another name: it is left alone"
    )


@contextlib.contextmanager
def built(plan):
    """
    Build a VM's directory, put it in its place, and take it away again if the body fails.

    The body writes the registry. A place that is taken is refused and left alone.
    """
    vm, pool = plan.vm, plan.pool
    name = vm.dirname
    placed = False
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(files.closing(pool.open_subdir(vm.klass.subdir)))
        mend(pool, vm, False)
        if files.exists(fd, name):
            raise _occupied(pool, vm)
        marker = None
        try:
            marker = stack.enter_context(
                files.closing(files.make_dir(fd, creating(name), mode=files.PRIVATE_MODE))
            )
            if plan.origin:
                plan.origin.write(marker)
            inode = _build(plan, marker)
            os.close(os.open(inode, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=marker))
            os.fsync(marker)
            os.fsync(fd)  # the marker is on the disk before what it marks is in its place
            files.rename_new(marker, fd, name)
            placed = True
            os.fsync(fd)
            yield
        except BaseException as err:
            if placed and _is_it(fd, name, inode):
                os.rename(name, name, src_dir_fd=fd, dst_dir_fd=marker)
                os.fsync(fd)
            if marker is not None:  # else nothing was made
                _take_away(fd, creating(name), marker)
            if isinstance(err, FileExistsError):
                raise _occupied(pool, vm) from err
            if isinstance(err, OSError):
                raise StoragePoolException(
                    f"VM {vm.name}: cannot be made in pool {pool.name} ({pool.vmdir(vm)}):"
                    f" {err.strerror or err}; nothing was left behind, mend it and try again"
                ) from err
            raise
        try:
            if registry.is_synced(pool.root):  # else the next run does that
                _finish(pool.root, fd, name, pool.vmdir(vm))
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: is in {pool.vmdir(vm)}, but what it came from could not be taken"
                f" away: {err.strerror}; mend it, and the next change of the VM tries again"
            ) from err


def _is_it(fd, name, inode):
    """Whether what is in a place is what was put there."""
    return files.exists(fd, name) is not None and image.identity(fd, name) == inode


def _take_away(fd, name, marker):
    """Delete a marker that is open, and what is in it, wherever it is now."""
    # Opened again, for btrfs lists what was there when a handle was opened.
    with files.closing(files.open_subdir(marker, ".")) as again:
        for entry in os.listdir(again):
            files.remove(again, entry)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rmdir(name, dir_fd=fd)


def _build(plan, marker):
    """Make the directory in ``marker`` and what is in it; returns its identity."""
    vm, pool = plan.vm, plan.pool
    with files.closing(_make_vmdir(plan, marker)) as fd:
        for wanted in plan.images:
            _put(pool, wanted, fd, marker)
        if plan.kernels:
            with files.closing(files.make_dir(fd, "kernels")) as kernels:
                _copy_kernels(plan, kernels)
        for filename, data in plan.texts.items():
            with open(files.at(fd, filename), "xb", opener=_private) as file:
                file.write(data)
            finish_image(files.at(fd, filename))
        if plan.takes:
            transfer.take(plan.takes, pool, fd)
        if not plan.origin and not files.exists(fd, "icon.png"):
            os.symlink(ICONS.format(vm.label), "icon.png", dir_fd=fd)
        os.fsync(fd)
        return image.identity(marker, vm.dirname)


def _make_vmdir(plan, marker):
    """A driver may bring the images along that are copies of one VM's in a pool of its own kind."""
    copied = [wanted for wanted in plan.images if isinstance(wanted.source, Source)]
    origins = {(w.source.pool.name, w.source.vm.name) for w in copied}
    like = None
    if len(origins) == 1 and type(copied[0].source.pool) is type(plan.pool):
        like = copied[0].source.pool.open_vm(copied[0].source.vm)
    if like is None:
        return plan.pool.make_vmdir(marker, plan.vm.dirname)
    keep = [w.filename for w in copied if w.filename == w.source.filename]
    with files.closing(like):
        return plan.pool.make_vmdir(marker, plan.vm.dirname, like, keep)


def _private(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _put(pool, wanted, fd, marker):
    """Make an image in the open directory of a VM."""
    path = files.at(fd, wanted.filename)
    linked = False
    if files.exists(fd, wanted.filename):
        pass  # the driver brought it with the directory
    elif not wanted.source:
        pool.create_image(path, wanted.size)
    elif isinstance(wanted.source, Outside) and wanted.source.moved:
        linked = _take_in(pool, wanted, fd, marker)
    else:
        with wanted.source.opened() as source:
            pool.clone_image(source, path)
    if image.measure(fd, wanted.filename)[0] < wanted.size:
        pool.resize_image(path, wanted.size)
    if not linked:
        finish_image(path)


def _take_in(pool, wanted, fd, marker):
    """
    Have a file of the caller's be an image, by a link if nobody else can write to it then; whether
    it was linked.
    """
    path = wanted.source.path
    with image.pinned(path, anywhere=True) as (pin, found):
        text = f"{found.st_mtime_ns}:{found.st_ino}:{path}"
        os.symlink(text, markers.OUTSIDE, dir_fd=marker)
        whole = found.st_nlink == 1 and found.st_size >= wanted.size
        if whole and files.is_roots(found) and transfer.link(pin, wanted.filename, fd):
            return True
        with files.closing(image.reopen(pin)) as source:
            transfer.bring(source, pool, files.at(fd, wanted.filename), True)
    return False


def open_kernels(root, version=""):
    """A handle of the directory of kernels, or of one kernel."""
    top, name = os.path.split(KERNELS)
    return files.open_inside(root, top, name, *([version] if version else ()))


def _copy_kernels(plan, kernels):
    with files.closing(open_kernels(plan.pool.root, plan.kernels)) as source:
        for filename in KERNEL_FILES:
            path = files.at(kernels, filename)
            with files.closing(image.open_image(files.at(source, filename))) as kernel:
                image.clone(kernel, path)
            finish_image(path)
    os.fsync(kernels)


def finish_image(path):
    """Give a new file its group and mode, and bring it to the disk."""
    fd = image.open_image(path, os.O_RDWR)
    try:
        files.own(fd, files.FILE_MODE)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def removed(pool, vm):
    """
    Take a VM's directory out of its place, put it back if the body fails, and then delete it.

    The body writes the registry.
    """
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        mend(pool, vm, True)
        there = files.exists(fd, vm.dirname)
        if there:
            os.rename(vm.dirname, removing(vm.dirname), src_dir_fd=fd, dst_dir_fd=fd)
        try:
            if there:
                os.fsync(fd)
            yield
        except BaseException:
            if there:
                os.rename(removing(vm.dirname), vm.dirname, src_dir_fd=fd, dst_dir_fd=fd)
            raise
        try:
            if there and registry.is_synced(pool.root):  # else the next run does that
                files.remove(fd, removing(vm.dirname))
                os.fsync(fd)
        except OSError as err:
            path = os.path.join(os.path.dirname(pool.vmdir(vm)), removing(vm.dirname))
            raise StoragePoolException(
                f"VM {vm.name}: it is done, but {path} could not be deleted: {err.strerror}; mend"
                " it, and remove the VM again"
            ) from err
