"""Images that share blocks: copies cost no space and no time, and old images are kept."""

from qubes_storage import image, mounts, pool, revisions
from qubes_storage.exc import InvalidInput, StoragePoolException


class Pool(pool.Pool):
    """``driver = reflink``: the layout of xen on a filesystem that shares blocks."""

    can_revisions = True

    def __init__(
        self, name, *, dir_path: str, setup_check: bool = True, revisions_to_keep: int = 1
    ):
        super().__init__(name, dir_path=dir_path)
        self.setup_check = setup_check
        self.revisions_to_keep = revisions_to_keep
        if revisions_to_keep < 0:
            raise InvalidInput(f"pool {name}: revisions_to_keep {revisions_to_keep} is below 0")

    def check_setup(self, fd, try_out):
        if not self.setup_check:
            return
        if not (image.can_share(fd) if try_out else image.shares_blocks(fd)):
            raise StoragePoolException(
                f"pool {self.name}: {self.dir_path} lies on {mounts.filesystem(fd)}, which shares"
                " no blocks there; mount btrfs or xfs (made with reflink=1) at it, take driver xen,"
                " or set setup_check: false to live without"
            )

    def snapshot(self, fd, names):
        return {name: revisions.add(self, fd, name) for name in names if self.revisions_to_keep}

    def revisions(self, fd, name):
        return revisions.listed(fd, name)

    def revert(self, fd, name, revision):
        revisions.revert(self, fd, name, revision)

    def owns(self, name):
        return revisions.is_one(name)
