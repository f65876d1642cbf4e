"""Each VM is a subvolume of btrfs: a copy is a snapshot, a removal deletes the subvolume."""

import os

from qubes_storage import files, image, mending, mounts, owning, revisions, trees
from qubes_storage.drivers import reflink
from qubes_storage.exc import StoragePoolException


class Pool(reflink.Pool):
    """``driver = btrfs``: the layout and revisions of reflink, a subvolume a VM."""

    def __init__(self, name, *, dir_path: str, revisions_to_keep: int = 1):
        super().__init__(name, dir_path=dir_path, revisions_to_keep=revisions_to_keep)

    def check_setup(self, fd, try_out):
        kind = mounts.filesystem(fd)
        if kind != "btrfs":
            raise StoragePoolException(
                f"pool {self.name}: {self.dir_path} lies on {kind}, not on btrfs; mount btrfs at"
                " it, or take driver reflink (on xfs) or xen (on any)"
            )

    def make_vmdir(self, fd, name, like=None, keep=()):
        if like is None or not image.is_subvolume(like) or not _same(fd, like):
            image.create_subvolume(fd, name)
            made = files.open_subdir(fd, name)
        else:
            image.snapshot_subvolume(like, fd, name)
            made = files.open_subdir(fd, name)
            for entry in set(os.listdir(made)) - set(keep):
                trees.remove(made, entry)
        owning.own(made, owning.DIR_MODE, owning.group_for(fd))
        return made

    def snapshot(self, fd, names):
        """All images are of one moment, whatever happens to them meanwhile."""
        if not self.revisions_to_keep or not image.is_subvolume(fd):
            return super().snapshot(fd, names)
        with owning.workshop(fd, mending.SNAPSHOT) as place:
            image.snapshot_subvolume(fd, place, "all")
            with files.closing(files.open_subdir(place, "all")) as old:
                return {name: revisions.add(self, fd, name, old) for name in names}


def _same(fd, other):
    return image.device(fd) == image.device(other)
