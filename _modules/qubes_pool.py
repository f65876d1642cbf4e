"""
Storage pools of Qubes OS: list, inspect, add, change and remove them.

A pool is a section of ``/etc/qubes/storage.conf`` (R3.2). ``qvm-pool`` is an alias of this module.

:configuration: read from minion config or pillar, all optional:

    .. code-block:: yaml

        qubes_storage.root: /            # everything lives below it
        qubes_storage.backend: auto      # auto, local (R3.2's files) or admin (R4's Admin API)
        qubes_storage.socket: /var/run/qubesd.sock
"""

import contextlib

import qubes_storage
from qubes_storage import foretelling, system, values
from qubes_storage.telling import Told, printable
from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.utils.args import clean_kwargs

__virtualname__ = "qubes_pool"
__virtual_aliases__ = ("qvm-pool",)
__func_alias__ = {"list_": "list", "set_": "set"}
VERSION = "1.0.0"  # of the core that this module speaks to


def __virtual__():
    reason = system.why_not(lambda key: __opts__.get(key, __pillar__.get(key)), VERSION)
    return (False, f"qubes_pool: {reason}") if reason else __virtualname__


def _system(run=None):
    return Told(foretelling.connect_as(lambda key: __salt__["config.option"](key, None), run))


def _looked():
    """The machine as it is now, whatever the states of this run have read of it before."""
    there = foretelling.connect_as(lambda key: __salt__["config.option"](key, None))
    if there.backend == "admin":
        there.refresh()
    return Told(there)


@contextlib.contextmanager
def _errors():
    try:
        yield
    except qubes_storage.InvalidInput as err:
        raise SaltInvocationError(printable(str(err))) from err
    except (OSError, qubes_storage.StoragePoolException) as err:
        raise CommandExecutionError(printable(str(err))) from err


def list_():
    """
    Return the pools as they are written: ``{name: {option: value}}``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.list
    """
    with _errors():
        return _looked().list_pools()


def info(name):
    """
    Return what is in force for a pool, or None if there is none of that name.

    ``driver`` or ``class``, ``dir_path`` and the other options, the guards ``require_mount`` and
    ``min_free``; ``size``, ``used`` and ``free`` of its filesystem and ``provisioned``, the sum of
    the virtual sizes of its images, in bytes; ``vms``, the names of the VMs in it; ``problems``, a
    list of sentences.

    name
        Name of the pool.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.info default
    """
    with _errors():
        return _looked().pool_info(name)


def drivers():
    """
    Return the drivers that a pool can have, ``{name: {options, from}}``.

    ``options`` has the type and default of each option, ``from`` is the file it comes from; on R4
    it is qubesd's socket, and defaults are not told. A driver that cannot be imported has
    ``problem``, the reason, and harms no other.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.drivers
    """
    with _errors():
        return _looked().list_drivers()


def diff(
    name,
    driver=None,
    options=None,
    require_mount=None,
    min_free=None,
    absent=False,
    purge=False,
    run=None,
    **config,
):
    """
    Return what :py:func:`add`, :py:func:`set` or, with ``absent``, :py:func:`remove` would change.

    Entries are ``{option: {"old": ..., "new": ...}}``, with ``created`` for a pool that is not
    there and ``directories`` for those that are missing; ``{}`` means that nothing would. Nothing
    is written. What they would refuse is an error here too.

    name
        Name of the pool.

    absent : False
        What removing it would change.

    purge : False
        As for :py:func:`remove`.

    driver, options, require_mount, min_free, config
        As for :py:func:`add`.

    run
        What a state hands over in test mode, so that what states before it in the run will make
        counts: its ``__lowstate__`` and ``__running__``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.diff ssd dir_path=/mnt/ssd/qubes
    """
    with _errors():
        if values.to_flag(absent, f"pool {name}: absent"):
            return _system(run).pool_remove_diff(name, purge)
        return _system(run).pool_diff(
            name, driver, options, require_mount, min_free, **clean_kwargs(**config)
        )


def add(name, driver=None, options=None, require_mount=None, min_free=None, **config):
    """
    Add a pool to storage.conf and create its directories; return the changes.

    name
        Name of the pool; it must not be there.

    driver : xen
        Driver of the pool, one of :py:func:`drivers`.

    options
        Options as a map, or a list of maps of one key, instead of as keywords.

    require_mount
        Refuse whatever would write to the pool while this path is not a mount point.

    min_free
        Refuse to create, clone or grow an image while less is free: bytes, or 20GiB.

    config
        Options of the pool: ``dir_path``, its directory, whose parent must exist; ``class``, the
        dotted path of a driver class, which beats ``driver``; what else the driver takes.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.add ssd driver=xen dir_path=/mnt/ssd/qubes
    """
    with _errors():
        return _system().add_pool(
            name, driver, options, require_mount, min_free, **clean_kwargs(**config)
        )


def set_(name, driver=None, options=None, require_mount=None, min_free=None, **config):
    """
    Change a pool and create the directories it lacks; return the changes.

    Only what is given changes. In ``options``, None removes an option or a guard. ``driver``,
    ``class`` and ``dir_path`` cannot change while VMs lie in the pool.

    name
        Name of the pool; it must be there.

    driver, options, require_mount, min_free, config
        As for :py:func:`add`.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.set ssd min_free=20GiB
    """
    with _errors():
        return _system().set_pool(
            name, driver, options, require_mount, min_free, **clean_kwargs(**config)
        )


def remove(name, purge=False):
    """
    Remove a pool from storage.conf; return the changes, ``{}`` for one that is not there.

    A pool that VMs lie in is refused. Images are never deleted.

    name
        Name of the pool.

    purge : False
        Also remove those of its directories that are empty, but no link and no mount point; refused
        while ``require_mount`` is not mounted.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.remove ssd
    """
    with _errors():
        return _system().remove_pool(name, purge)


def orphans():
    """
    Return what no VM owns and what VMs lack: a list of ``{pool, path, size}``.

    ``size`` is in bytes, as allocated; None for a VM whose directory is gone (``path`` says which)
    and for a pool that VMs are registered in and storage.conf lacks.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.orphans
    """
    with _errors():
        return _system().orphans()


def notes(name, driver=None, options=None, require_mount=None, min_free=None, **config):
    """
    Return what R3.2's own tools, or these modules, cannot do with a pool as declared, a list of
    sentences.

    It can be declared all the same: ``qubes_pool.present`` names them in its comment.

    name
        Name of the pool.

    driver, options, require_mount, min_free, config
        As for :py:func:`add`.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.notes default dir_path=/mnt/ssd/qubes
    """
    with _errors():
        return _system().pool_notes(
            name, driver, options, require_mount, min_free, **clean_kwargs(**config)
        )


def default_pools():
    """
    Return the pools that the system takes for new VMs (R4): ``{default_pool: ...}``, and one for
    each kind of volume.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.default_pools
    """
    with _errors():
        return _looked().default_pools()


def default_pools_diff(
    default_pool=None,
    default_pool_root=None,
    default_pool_private=None,
    default_pool_volatile=None,
    default_pool_kernel=None,
    run=None,
):
    """
    Return what :py:func:`set_default_pools` would change, ``{}`` for nothing.

    default_pool, default_pool_root, default_pool_private, default_pool_volatile,
    default_pool_kernel
        Names of pools; what is not given is kept.

    run
        As for :py:func:`diff`.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.default_pools_diff default_pool=ssd
    """
    with _errors():
        return _system(run).default_pools_diff(
            default_pool=default_pool,
            default_pool_root=default_pool_root,
            default_pool_private=default_pool_private,
            default_pool_volatile=default_pool_volatile,
            default_pool_kernel=default_pool_kernel,
        )


def set_default_pools(
    default_pool=None,
    default_pool_root=None,
    default_pool_private=None,
    default_pool_volatile=None,
    default_pool_kernel=None,
):
    """
    Set the pools that the system takes for new VMs (R4); return the changes.

    default_pool, default_pool_root, default_pool_private, default_pool_volatile,
    default_pool_kernel
        Names of pools; what is not given is kept.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_pool.set_default_pools default_pool=ssd
    """
    with _errors():
        return _system().set_default_pools(
            default_pool=default_pool,
            default_pool_root=default_pool_root,
            default_pool_private=default_pool_private,
            default_pool_volatile=default_pool_volatile,
            default_pool_kernel=default_pool_kernel,
        )
