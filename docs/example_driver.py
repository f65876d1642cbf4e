"""Images that own their blocks from the start: a full disk stops no running VM."""

import os

from qubes_storage import InvalidInput
from qubes_storage.drivers import xen


class Pool(xen.Pool):
    """``driver = prealloc``: the layout of xen, every new image allocated up to ``most`` MiB."""

    def __init__(self, name, *, dir_path: str, most: int = 1024):
        super().__init__(name, dir_path=dir_path)
        self.most = most
        if most < 1:
            raise InvalidInput(f"pool {name}: most {most} is below 1; write how many MiB")

    def create_image(self, path, size):
        super().create_image(path, size)
        self._allocate(path, size)

    def clone_image(self, source, path):
        shared = super().clone_image(source, path)
        self._allocate(path, os.fstat(source).st_size)
        return shared

    def resize_image(self, path, size):
        super().resize_image(path, size)
        self._allocate(path, size)

    def _allocate(self, path, size):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, min(size, self.most * 1024**2))
        finally:
            os.close(fd)
