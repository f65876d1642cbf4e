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
        changes = __salt__["qubes_vm.diff"](name, **declared)
        if not changes:
            return ret
        verb, done = ("create", "created") if "created" in changes else ("set", "set")
        if __opts__["test"]:
            comment = f"VM {name} would be {done}"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__[f"qubes_vm.{verb}"](name, **declared)
    except (CommandExecutionError, SaltInvocationError) as err:
        waits = _waits_for(name, err)
        if waits:
            return {**ret, "result": None, "comment": f"VM {name} waits for {waits}"}
        made = _made(err, changes, name, declared)
        return {**ret, "changes": made, "result": False, "comment": str(err)}
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
        changes = __salt__["qubes_vm.diff"](name, absent=True, purge=purge)
        if not changes:
            return ret
        if __opts__["test"]:
            comment = f"VM {name} would be removed"
            return {**ret, "changes": changes, "result": None, "comment": comment}
        changes = __salt__["qubes_vm.remove"](name, purge)
    except (CommandExecutionError, SaltInvocationError) as err:
        made = _made(err, changes, name, {"absent": True, "purge": purge})
        return {**ret, "changes": made, "result": False, "comment": str(err)}
    return {**ret, "changes": changes, "comment": f"VM {name} was removed"}


def _waits_for(name, err):
    """In test mode, the pools and VMs that earlier states of this run are going to make."""
    lacking = getattr(err.__cause__, "waits_for", ())
    if not __opts__["test"] or not lacking:
        return None
    lowstate = globals().get("__lowstate__")
    # A single state, run on its own: nothing tells what else will be.
    if lowstate and not all(_is_declared(name, *pair, lowstate) for pair in lacking):
        return None
    words = {"pool": "pool", "VM": "template", "path": "path"}
    return " and ".join(
        f"{words[kind]} {needed}" if needed else "a default template" for kind, needed in lacking
    )


def _is_declared(name, kind, needed, lowstate):
    """Whether a state of this run makes a pool, a VM, or for None any template."""
    states = {"pool": ("qubes_pool", "qvm-pool"), "VM": ("qubes_vm",)}.get(kind, ())
    for low in lowstate:
        if low["state"] not in states or low["fun"] != "present" or low.get("name") == name:
            continue
        if low.get("name") == needed or (not needed and "Template" in str(low.get("klass"))):
            return True
    return False


def _made(err, changes, name, declared):
    """Of the changes that were to be made, those that an error did not prevent."""
    if not changes or getattr(err.__cause__, "untouched", False):
        return {}
    try:
        left = __salt__["qubes_vm.diff"](name, **declared)
    except (CommandExecutionError, SaltInvocationError):
        return {}
    if "created" in left or "removed" in left:
        return {}
    made = {key: value for key, value in changes.items() if key not in left}
    if "unfinished" in left:
        made.pop("deleted", None)  # not all of it
    if "volumes" in changes and "volumes" in left:
        grown = set(changes["volumes"]["new"]) - set(left["volumes"]["new"])
        if grown:
            made["volumes"] = {
                side: {volume: changes["volumes"][side][volume] for volume in grown}
                for side in ("old", "new")
            }
    return made
