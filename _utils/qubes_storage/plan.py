"""The directory to make for a VM, and where its images come from."""

import contextlib
import os
from dataclasses import dataclass, field

from qubes_storage import files, image
from qubes_storage.exc import StoragePoolException
from qubes_storage.mending import left_behind


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
    left: int = None  # the open directory of what goes in the end, where it is known
    texts: dict = field(default_factory=dict)  # {file name: bytes} of what nothing else brings


def class_dir(pool, subdir):
    """A handle of the directory where VMs of a class lie, or of the pool's while it lacks that."""
    try:
        return pool.open_subdir(subdir)
    except StoragePoolException:
        return pool.open()
