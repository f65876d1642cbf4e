"""
Declare VMs of Qubes OS: where their images lie, and how large they are at least.

.. code-block:: yaml

    work:
      qubes_vm.present:
        - template: fedora-23
        - label: green
        - pool: ssd
        - volumes:
            private: 10GiB
        - require:
            - ssd
"""

from qubes_storage import salt_run, values
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "qubes_vm"


def __virtual__():
    if "qubes_vm.diff" in __salt__:
        return __virtualname__
    return False, "qubes_vm: the execution module qubes_vm is not available here"


def present(
    name,
    klass=None,
    template=None,
    label=None,
    pool=None,
    volumes=None,
    clone_from=None,
    root_copy_from=None,
    migrate=False,
    root_move_from=None,
    create_only=False,
):
    """
    Ensure there is a VM as declared. What is not declared is kept, and chosen when it is created.

    A VM whose class or, without ``migrate``, pool differs from what is declared is an error that
    says so, and so is one whose private or root image is gone: it is never made anew. An image
    smaller than declared grows; none ever shrinks.

    name
        Name of the VM.

    klass, template, label, pool, volumes, clone_from, root_copy_from, root_move_from
        As :py:func:`qubes_vm.create` takes them.

    migrate : False
        Move the VM if it lies in another pool than declared, which is an error otherwise.

    create_only : False
        Leave a VM that is there as it is, whatever it is.
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": f"VM {name} is as declared"}
    declared = {
        "klass": klass,
        "template": template,
        "label": label,
        "pool": pool,
        "volumes": volumes,
        "clone_from": clone_from,
        "root_copy_from": root_copy_from,
        "root_move_from": root_move_from,
        "migrate": migrate,
        "create_only": create_only,
    }
    changes = {}
    try:
        changes = __salt__["qubes_vm.diff"](name, **declared, run=salt_run.handed_over(globals()))
        if not changes and values.to_flag(create_only, name):  # nothing was compared
            return {**ret, "comment": f"VM {name} is there and is left as it is (create_only)"}
        if not changes:
            return ret
        verb, done = ("create", "created") if "created" in changes else ("set", "set")
        if __opts__["test"]:
            comment = f"VM {name} would be {done}"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__[f"qubes_vm.{verb}"](name, **declared)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, name, declared)
        return salt_run.not_done({**ret, "changes": made}, err)
    return {**ret, "changes": changes, "comment": f"VM {name} was {done}"}


def absent(name, purge=False):
    """
    Ensure there is no VM of this name in the registry.

    A VM that has images is an error that names them and what they hold, unless ``purge`` is set; so
    is a template or NetVM that others use.

    name
        Name of the VM.

    purge : False
        Delete its images, for good.
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": f"VM {name} is absent"}
    changes = {}
    try:
        changes = __salt__["qubes_vm.diff"](
            name, absent=True, purge=purge, run=salt_run.handed_over(globals())
        )
        if not changes:
            return ret
        if __opts__["test"]:
            comment = f"VM {name} would be removed"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__["qubes_vm.remove"](name, purge)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, name, {"absent": True, "purge": purge})
        return salt_run.not_done({**ret, "changes": made}, err)
    return {**ret, "changes": changes, "comment": f"VM {name} was removed"}


def _made(err, changes, name, declared):
    """Of the changes that were to be made, those that an error did not prevent."""
    if not changes or getattr(err.__cause__, "untouched", False):
        return {}
    try:
        # create_only leaves a VM alone that is there; this one was made just now.
        new = {"create_only": False} if "created" in changes else {}
        left = __salt__["qubes_vm.diff"](name, **{**declared, **new})
    except (CommandExecutionError, SaltInvocationError):
        return {}
    if "created" in left or "removed" in left:
        return {}
    made = {key: value for key, value in changes.items() if key not in left}
    if "unfinished" in left:
        made.pop("deleted", None)  # not all of it
    for key in {"volumes", "revisions_to_keep"} & set(changes) & set(left):
        done = set(changes[key]["new"]) - set(left[key]["new"])
        if done:
            made[key] = {side: _of(changes[key][side], done) for side in ("old", "new")}
    return made


def _of(values, volumes):
    """What is told of some volumes; None where nothing is, as of those of a new VM."""
    return {volume: values[volume] for volume in values or () if volume in volumes} or None
