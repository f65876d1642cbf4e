"""
Qubes storage pools: which there are, and where each VM's images lie.

The core knows nothing of Salt. :py:func:`connect` is the way in; the other names are R3.2's own,
for those who know them from ``qubes.storage``.
"""

VERSION = "1.0.0"

from qubes_storage.conf import loads  # noqa: E402
from qubes_storage.exc import (  # noqa: E402
    InvalidInput,
    NotSupported,
    StoragePoolException,
)
from qubes_storage.pool import (  # noqa: E402
    Pool,
    defaults,
    list_drivers,
    load,
    pool_class,
)
from qubes_storage.r32 import dump, made_for  # noqa: E402
from qubes_storage.system import connect  # noqa: E402

__all__ = [
    "VERSION",
    "InvalidInput",
    "NotSupported",
    "Pool",
    "StoragePoolException",
    "add_pool",
    "connect",
    "defaults",
    "dump",
    "get_pool",
    "list_drivers",
    "load",
    "loads",
    "pool_exists",
    "remove_pool",
]


def get_pool(name, vm=None, root="/"):
    """
    The Pool of a name, as R3.2's ``get_pool``.

    ``vm`` is there for those who call it as R3.2 did; a pool here is not made for one VM. A class
    that is no Pool is made as R3.2 made it, if its first argument is ``vm``, and never called else.
    """
    system = connect(root, "local")
    config = system.sections().get(name, {})
    made = made_for(name, config, vm) if "class" in config else None
    return system.get_pool(name) if made is None else made


def pool_exists(name, root="/"):
    """Whether storage.conf has a pool of this name with a driver or class that can be loaded."""
    sections = connect(root, "local").sections()
    try:
        return name in sections and bool(pool_class(name, sections[name]))
    except StoragePoolException:
        return False


def add_pool(name, root="/", **config):
    """Add a pool, as R3.2's ``add_pool``; raises :py:class:`StoragePoolException`."""
    return connect(root, "local").add_pool(name, **config)


def remove_pool(name, root="/"):
    """Remove a pool, as R3.2's ``remove_pool``; one that is not there is no error."""
    return connect(root, "local").remove_pool(name)
