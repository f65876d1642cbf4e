"""
Declare storage pools of Qubes OS. ``qvm-pool`` is an alias of this module.

.. code-block:: yaml

    ssd:
      qubes_pool.present:
        - driver: xen
        - dir_path: /mnt/ssd/qubes
        - require_mount: /mnt/ssd

    old:
      qubes_pool.absent: []
"""

from qubes_storage import salt_run
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "qubes_pool"
__virtual_aliases__ = ("qvm-pool",)


def __virtual__():
    if "qubes_pool.diff" in __salt__:
        return __virtualname__
    return False, "qubes_pool: the execution module qubes_pool is not available here"


def present(name, driver=None, options=None, require_mount=None, min_free=None, **config):
    """
    Ensure a pool has these options and its directories exist.

    What is not declared is kept; None removes an option. ``driver``, ``class`` and ``dir_path``
    cannot change while VMs lie in the pool.

    name
        Name of the pool.

    driver, options, require_mount, min_free, config
        As :py:func:`qubes_pool.add` takes them.
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": f"Pool {name} is as declared"}
    config = {key: value for key, value in config.items() if not key.startswith("__")}
    declared = {
        "driver": driver,
        "options": options,
        "require_mount": require_mount,
        "min_free": min_free,
        **config,
    }
    changes = {}
    try:
        changes = __salt__["qubes_pool.diff"](name, **declared, run=salt_run.handed_over(globals()))
        notes = "".join(f" ({note})" for note in __salt__["qubes_pool.notes"](name, **declared))
        if not changes:
            return {**ret, "comment": ret["comment"] + notes}
        verb, done = ("add", "added") if "created" in changes else ("set", "set")
        if __opts__["test"]:
            comment = f"Pool {name} would be {done}{notes}"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__[f"qubes_pool.{verb}"](name, **declared)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, lambda: __salt__["qubes_pool.diff"](name, **declared))
        return salt_run.not_done({**ret, "changes": made}, err)
    return {**ret, "changes": changes, "comment": f"Pool {name} was {done}{notes}"}


def absent(name, purge=False):
    """
    Ensure there is no pool of this name.

    A pool that VMs lie in is an error that names them. Images are never deleted.

    name
        Name of the pool.

    purge : False
        Also remove those of its directories that are empty, but no link and no mount point; refused
        while ``require_mount`` is not mounted.
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": f"Pool {name} is absent"}
    asked = {"absent": True, "purge": purge}
    changes = {}
    try:
        changes = __salt__["qubes_pool.diff"](name, **asked, run=salt_run.handed_over(globals()))
        if not changes:
            return ret
        if __opts__["test"]:
            comment = f"Pool {name} would be removed"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__["qubes_pool.remove"](name, purge)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, lambda: __salt__["qubes_pool.diff"](name, **asked))
        return salt_run.not_done({**ret, "changes": made}, err)
    return {**ret, "changes": changes, "comment": f"Pool {name} was removed"}


def default(
    name,
    default_pool=None,
    default_pool_root=None,
    default_pool_private=None,
    default_pool_volatile=None,
    default_pool_kernel=None,
):
    """
    Ensure that the system takes these pools for new VMs (R4).

    name
        Anything; it only names the state.

    default_pool, default_pool_root, default_pool_private, default_pool_volatile,
    default_pool_kernel
        Names of pools; what is not declared is kept.
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": "Default pools are as declared"}
    pools = {
        "default_pool": default_pool,
        "default_pool_root": default_pool_root,
        "default_pool_private": default_pool_private,
        "default_pool_volatile": default_pool_volatile,
        "default_pool_kernel": default_pool_kernel,
    }
    changes = {}
    try:
        changes = __salt__["qubes_pool.default_pools_diff"](
            **pools, run=salt_run.handed_over(globals())
        )
        if not changes:
            return ret
        if __opts__["test"]:
            comment = "Default pools would be set"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__["qubes_pool.set_default_pools"](**pools)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, lambda: __salt__["qubes_pool.default_pools_diff"](**pools))
        return salt_run.not_done({**ret, "changes": made}, err)
    return {**ret, "changes": changes, "comment": "Default pools were set"}


def _made(err, changes, diff):
    """Of the changes that were to be made, those that an error did not prevent."""
    if getattr(err.__cause__, "untouched", False):
        return {}
    try:
        left = diff() if changes else {}
    except (CommandExecutionError, SaltInvocationError):
        return {}
    left = {*left, *getattr(err.__cause__, "not_done", ())}
    made = {key: value for key, value in changes.items() if key not in left}
    return {} if "created" in left or "removed" in left else made
