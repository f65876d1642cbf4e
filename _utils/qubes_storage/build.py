"""
A VM's directory, made whole and then renamed into place, or deleted.

Everything is built in ``.NAME.creating``, closed to others, beside the place of the VM's directory
NAME. While that marker is there and the registry does not know NAME, a run died. What is to be
deleted is first renamed to ``.NAME.removing``. The registry's lock is held all the while, so
whatever is found there is left by the dead: :py:mod:`mending` finishes or undoes it.
"""

import contextlib
import os

from qubes_storage import (
    files,
    image,
    markers,
    mending,
    owning,
    registry,
    transfer,
    trees,
    undoing,
)
from qubes_storage.exc import InvalidInput, OutOfStep, StoragePoolException
from qubes_storage.markers import creating, moving, removing
from qubes_storage.plan import Outside, Source
from qubes_storage.values import is_xml
from qubes_storage.vm import ICONS, KERNEL_FILES, KERNELS


def check_vacant(pool, vm):
    """Refuse a place where something is, even an empty directory, or that qubes.xml cannot tell."""
    for what, text in (("name of its pool", pool.name), ("directory", pool.vmdir(vm))):
        if not is_xml(text):
            raise InvalidInput(
                f"VM {vm.name}: the {what} {text!r} has a character that cannot be written in"
                f" {registry.PATH}; rename it"
            )
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        left = files.exists(fd, creating(vm.dirname)) or files.exists(fd, moving(vm.dirname))
        if files.exists(fd, vm.dirname) and not left:  # what a dead run left is looked at later
            raise _occupied(pool, vm)
        if left:
            mending.check(pool, vm, False)
            mended = pool.root, fd, vm.dirname, pool.vmdir(vm)
            if files.exists(fd, vm.dirname) and not undoing.takes_away(*mended):
                raise _occupied(pool, vm)


def _occupied(pool, vm):
    place, attrs = pool.vmdir(vm), vm.entry.attrs if vm.entry else {}
    if os.path.normpath(attrs.get("firewall_conf", "")) == f"{place}/firewall.xml":
        return OutOfStep(
            f"VM {vm.name}: {place} is there, where R3.2 keeps its firewall rules; copy"
            f" firewall.xml to {attrs.get('dir_path')} first, and then move {place} away"
        )
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
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(files.closing(pool.open_subdir(vm.klass.subdir)))
        mending.mend(pool, vm, False)
        if files.exists(fd, name):
            raise _occupied(pool, vm)
        marker, inode, left = None, None, plan.left
        try:
            for path in (w.source.path for w in plan.images if _is_taken_in(w)):
                left = stack.enter_context(files.closing(files.open_outside(path)))
            marker = stack.enter_context(
                files.closing(owning.make_dir(fd, creating(name), mode=owning.PRIVATE_MODE))
            )
            if plan.origin:
                plan.origin.write(marker)
            inode = _build(plan, marker)
            os.close(os.open(inode, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=marker))
            os.fsync(marker)
            os.fsync(fd)  # the marker is on the disk before what it marks is in its place
            trees.rename_new(marker, fd, name)
            os.fsync(fd)
            yield
        except BaseException as err:
            if inode and is_registered(pool, vm):
                raise  # interrupted: the next run finishes it
            undone = marker is None or _undo(fd, name, inode, marker)
            if isinstance(err, FileExistsError):
                raise _occupied(pool, vm) from err
            if isinstance(err, OSError):
                left = "nothing" if undone else f"{creating(name)} beside it"
                raise StoragePoolException(
                    f"VM {vm.name}: cannot be made in pool {pool.name} ({pool.vmdir(vm)}):"
                    f" {err.strerror or err}; {left} was left behind, mend it and try again"
                ) from err
            raise
        try:
            if registry.is_synced(pool.root):  # else the next run does that
                mending.finish(pool.root, fd, name, pool.vmdir(vm), left)
        except OSError as err:
            going = [w.source.path for w in plan.images if _is_taken_in(w)]
            going += [plan.origin.path] if plan.origin else []
            going.append(os.path.join(os.path.dirname(pool.vmdir(vm)), creating(name)))
            raise StoragePoolException(
                f"VM {vm.name}: is in {pool.vmdir(vm)}, but {' or '.join(going)} could not be"
                f" deleted: {err.strerror}; mend it, and the next change of the VM tries again"
            ) from err


def is_registered(pool, vm):
    """Whether qubes.xml has a VM in its place in a pool by now."""
    entry = registry.load(pool.root).by_name.get(vm.name)
    return entry is not None and entry.attrs.get("dir_path") == pool.vmdir(vm)


def _undo(fd, name, inode, marker):
    """
    Take away what was made, ``inode`` if it is in its place; whether that was possible. What a disk
    that fails does not let go is left as a dead run leaves it.
    """
    try:
        if inode and _is_it(fd, name, inode):
            os.rename(name, name, src_dir_fd=fd, dst_dir_fd=marker)
            os.fsync(fd)
        _take_away(fd, creating(name), marker)
    except OSError:
        return False
    return True


def _is_it(fd, name, inode):
    """Whether what is in a place is what was put there."""
    return files.exists(fd, name) is not None and image.identity(fd, name) == inode


def _take_away(fd, name, marker):
    """Delete a marker that is open, and what is in it, wherever it is now."""
    # Opened again, for btrfs lists what was there when a handle was opened.
    with files.closing(files.open_subdir(marker, ".")) as again:
        for entry in sorted(os.listdir(again)):
            trees.remove(again, entry)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rmdir(name, dir_fd=fd)


def _build(plan, marker):
    """Make the directory in ``marker`` and what is in it; returns its identity."""
    vm, pool = plan.vm, plan.pool
    with files.closing(_make_vmdir(plan, marker)) as fd:
        for wanted in plan.images:
            _put(pool, wanted, fd, marker, pool.vmdir(vm))
        if plan.kernels:
            with files.closing(owning.make_dir(fd, "kernels")) as kernels:
                _copy_kernels(plan, kernels)
        for filename, data in plan.texts.items():
            with open(files.at(fd, filename), "xb", opener=_private) as file:
                file.write(data)
            owning.finish(files.at(fd, filename))
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


def _put(pool, wanted, fd, marker, place):
    """Make an image in the open directory of a VM."""
    path = files.at(fd, wanted.filename)
    linked = False
    if files.exists(fd, wanted.filename):
        pass  # the driver brought it with the directory
    elif not wanted.source:
        pool.create_image(path, wanted.size)
    elif _is_taken_in(wanted):
        linked = _take_in(pool, wanted, fd, marker, place)
    else:
        with wanted.source.opened() as source:
            pool.clone_image(source, path)
    there = image.measure(fd, wanted.filename)
    if not there or there[0] < wanted.size:  # what somebody has put in its place is refused
        pool.resize_image(path, wanted.size)
    if not linked:
        owning.finish(path)


def _is_taken_in(wanted):
    """Whether an image is a file of the caller's, which goes."""
    return isinstance(wanted.source, Outside) and wanted.source.moved


def _take_in(pool, wanted, fd, marker, place):
    """
    Have a file of the caller's be an image, by a link if nobody else can write to it then; whether
    it was linked.
    """
    path = wanted.source.path
    with image.pinned(path, anywhere=True) as (pin, found):
        markers.Taken(path, str(found.st_mtime_ns), str(found.st_ino), place).write(marker)
        whole = found.st_nlink == 1 and found.st_size >= wanted.size
        if whole and owning.is_roots(pin) and transfer.link(pin, wanted.filename, fd):
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
            owning.finish(path)
    os.fsync(kernels)


@contextlib.contextmanager
def removed(pool, vm):
    """
    Take a VM's directory out of its place, put it back if the body fails, and then delete it.

    The body writes the registry.
    """
    with files.closing(pool.open_subdir(vm.klass.subdir)) as fd:
        mending.mend(pool, vm, True)
        there = files.exists(fd, vm.dirname)
        path = os.path.join(os.path.dirname(pool.vmdir(vm)), removing(vm.dirname))
        if there:
            os.rename(vm.dirname, removing(vm.dirname), src_dir_fd=fd, dst_dir_fd=fd)
        try:
            if there:
                os.fsync(fd)
            yield
        except BaseException as err:
            try:
                if there and vm.name in registry.load(pool.root).by_name:
                    os.rename(removing(vm.dirname), vm.dirname, src_dir_fd=fd, dst_dir_fd=fd)
            except OSError as why:
                raise StoragePoolException(
                    f"VM {vm.name}: is kept, but its directory is {path}: {why.strerror}; mend the"
                    f" disk, and qubes_vm.set {vm.name} puts it back"
                ) from err
            raise
        try:
            if there and registry.is_synced(pool.root):  # else the next run does that
                trees.remove(fd, removing(vm.dirname))
                os.fsync(fd)
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: it is done, but {path} could not be deleted: {err.strerror}; mend"
                " it, and remove the VM again"
            ) from err
