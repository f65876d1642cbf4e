"""R3.2's driver: images are sparse files in a directory."""

from qubes_storage import pool


class Pool(pool.Pool):
    """``driver = xen``: DIR/{appvms,servicevms,vm-templates}/NAME/{private,root,volatile}.img."""
