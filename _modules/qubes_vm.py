"""
VMs of Qubes OS and where their images lie: list, inspect, create, clone, move and remove them.

Settings are those of :py:mod:`qubes_pool <qubes_pool>`.
"""

import contextlib

import qubes_storage
from qubes_storage import foretelling, system, values
from qubes_storage.telling import Told, printable
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "qubes_vm"
__func_alias__ = {"list_": "list", "set_": "set"}
VERSION = "1.0.0"  # of the core that this module speaks to


def __virtual__():
    reason = system.why_not(lambda key: __opts__.get(key, __pillar__.get(key)), VERSION)
    return (False, f"qubes_vm: {reason}") if reason else __virtualname__


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
    Return the VMs of the registry: ``{name: {klass, pool, template, label}}``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.list
    """
    with _errors():
        return _looked().list_vms()


def removal_order(names):
    """
    Return names of VMs in an order in which they can be removed: those that use others (as
    template, NetVM, or whatever a property of R4 names) before these, else as they are given.

    They are as given where nothing can be read: the pillar's states are put in order by it.

    names
        Names of VMs.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.removal_order '[sys-net, work]'
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SaltInvocationError(
            f"names {names!r} is no list of names of VMs; write [work, vault]"
        )
    try:
        return _looked().removal_order(names)
    except (OSError, qubes_storage.StoragePoolException):
        return names


def info(name):
    """
    Return what there is of a VM, or None if there is none of that name.

    ``klass``, ``pool``, ``template``, ``label``, ``dir_path``, and ``volumes``: ``{private: {path,
    size, allocated, pool}}`` in bytes; None for the sizes of an image that is not there.

    name
        Name of the VM.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.info work
    """
    with _errors():
        return _looked().vm_info(name)


def diff(
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
    absent=False,
    purge=False,
    run=None,
):
    """
    Return what :py:func:`create`, :py:func:`set` or, with ``absent``, :py:func:`remove` would
    change.

    Entries are ``{key: {"old": ..., "new": ...}}``, with ``created`` for a VM that is not there;
    ``{}`` means that nothing would. Nothing is written. What they would refuse is an error here
    too.

    name
        Name of the VM.

    absent : False
        What removing it would change.

    purge : False
        As for :py:func:`remove`.

    klass, template, label, pool, volumes, clone_from, root_copy_from, root_move_from, create_only
        As for :py:func:`create`.

    migrate : False
        Move the VM if it lies in another pool, which is an error otherwise.

    run
        What a state hands over in test mode, so that what states before it in the run will make
        counts: its ``__lowstate__`` and ``__running__``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.diff work template=fedora-23 label=green pool=ssd
    """
    with _errors():
        if values.to_flag(absent, f"VM {name}: absent"):
            return _system(run).vm_remove_diff(name, purge)
        return _system(run).vm_diff(
            name,
            klass=klass,
            template=template,
            label=label,
            pool=pool,
            volumes=volumes,
            clone_from=clone_from,
            root_copy_from=root_copy_from,
            root_move_from=root_move_from,
            migrate=migrate,
            create_only=create_only,
        )


def create(
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
    Create a VM: its directory and images, and its entry in the registry; return the changes.

    name
        Name of the VM; it must not be there.

    klass : AppVM
        AppVM, StandaloneVM, TemplateVM, NetVM, ProxyVM, HVM or TemplateHVM.

    template
        The template it runs on, by default the system's; for a TemplateVM, TemplateHVM or
        StandaloneVM what it is copied from, by default nothing: its images start empty.

    label : red
        red, orange, yellow, green, gray, blue, purple or black (the default of templates).

    pool : default
        The pool that its images are made in.

    volumes
        Sizes of its images, at least: ``{private: 10GiB}``, short for ``{private: {size: 10GiB}}``.

    clone_from
        A VM that it is to be a clone of: of its class, label and pool, with its images, kernels,
        firewall rules and settings. A ``template`` beside it is what an AppVM's clone runs on.

    root_copy_from
        A file whose copy becomes its root image, for a VM that has one of its own; the path is the
        caller's, not below ``qubes_storage.root``.

    root_move_from
        The same, and the file goes once its copy stands and the VM is registered.

    migrate : False
        Means nothing for a new VM.

    create_only : False
        Means nothing for a new VM; one that is there is left as it is by
        ``qubes_vm.present``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.create work template=fedora-23 label=green pool=ssd
    """
    with _errors():
        return _system().create_vm(
            name,
            klass=klass,
            template=template,
            label=label,
            pool=pool,
            volumes=volumes,
            clone_from=clone_from,
            root_copy_from=root_copy_from,
            root_move_from=root_move_from,
            migrate=migrate,
            create_only=create_only,
        )


def set_(
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
    Change a VM and finish what a dead run left of it; return the changes.

    Only what is given and differs changes: label, the template an AppVM runs on, with ``migrate``
    the pool, and sizes, which only ever grow. A class never changes.

    name
        Name of the VM; it must be there.

    klass, template, label, pool, volumes, clone_from, root_copy_from, root_move_from, create_only
        As for :py:func:`create`.

    migrate : False
        Move the VM if it lies in another pool, which is an error otherwise.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.set work volumes='{private: 20GiB}'
    """
    with _errors():
        return _system().set_vm(
            name,
            klass=klass,
            template=template,
            label=label,
            pool=pool,
            volumes=volumes,
            clone_from=clone_from,
            root_copy_from=root_copy_from,
            root_move_from=root_move_from,
            migrate=migrate,
            create_only=create_only,
        )


def clone(name, new_name, pool=None):
    """
    Make a VM that is a copy of another; return the changes.

    It has its images, kernels, firewall rules and settings. A VM that runs is refused.

    name
        Name of the VM to copy.

    new_name
        Name of the new VM; it must not be there, nor a directory of that name.

    pool
        The pool that its images are made in, by default that of the VM to copy.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.clone work work-copy pool=ssd
    """
    with _errors():
        return _system().clone_vm(name, new_name, pool)


def rename(name, new_name):
    """
    Give a VM and its directory another name; return the changes.

    VMs that run on it or are connected to it stay so. A VM that runs, or that RPM has installed, is
    refused, and so is a name that is taken, be it by an empty directory.

    name
        Name of the VM.

    new_name
        The name it gets.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.rename work play
    """
    with _errors():
        return _system().rename_vm(name, new_name)


def resize(name, volume, size):
    """
    Grow an image of a VM, running or not; return the changes, ``{}`` for one of that size.

    Smaller is refused. The filesystem in the image grows when the VM does it (``resize2fs``).

    name
        Name of the VM.

    volume
        private, or root of a VM that has one of its own.

    size
        The new size: bytes, or with a unit such as GiB; it becomes whole sectors of 512 bytes.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.resize work private 20GiB
    """
    with _errors():
        return _system().resize_vm(name, volume, size)


def migrate(name, pool, keep=False):
    """
    Move a VM's directory to another pool; return the changes, ``{}`` for a VM that is there.

    Within a filesystem nothing is copied. Else holes stay holes, and the copy is compared with its
    source before the registry names it. Interrupted, it is finished or undone by the next run. A VM
    that runs is refused, and so is a pool with too little space.

    name
        Name of the VM.

    pool
        The pool it moves to.

    keep : False
        Leave the old copy, which :py:func:`qubes_pool.orphans` then lists.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.migrate work ssd
    """
    with _errors():
        return _system().migrate_vm(name, pool, keep)


def verify(name):
    """
    Return what is wrong with a VM's files, as a list of sentences, empty if nothing is.

    Images that are missing or of a wrong size, its template's root, its kernel, files that have no
    business in its directory, links, modes.

    name
        Name of the VM.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.verify work
    """
    with _errors():
        return _looked().verify_vm(name)


def commit(name):
    """
    Commit the changes of a template, so that VMs started from now on see them; return the changes.

    root-cow.img, by which the VMs that run still see the old root, becomes root-cow.img.old, and an
    empty one of root's size takes its place.

    name
        Name of the template.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.commit fedora-23
    """
    with _errors():
        return _system().commit_vm(name)


def reset(name):
    """
    Make a VM's volatile.img anew; return the changes.

    For a VM that runs on a template always, for others only where there is none, as R3.2 does when
    a VM starts.

    name
        Name of the VM.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.reset work
    """
    with _errors():
        return _system().reset_vm(name)


def remove(name, purge=False):
    """
    Remove a VM from the registry; return the changes, ``{}`` for one that is not there.

    A template that VMs run on, a NetVM that VMs are connected to and, without ``purge``, a VM that
    has images are refused.

    name
        Name of the VM.

    purge : False
        Also delete its images, for good.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.remove work purge=True
    """
    with _errors():
        return _system().remove_vm(name, purge)


def revisions(name, volume="private"):
    """
    Return the revisions of a volume that its driver keeps, the newest last.

    In R3.2's layout they are ``N@DATE``, where the driver of the VM's pool keeps any.

    name
        Name of the VM.

    volume : private
        Name of the volume.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.revisions work private
    """
    with _errors():
        return _looked().revisions(name, volume)


def revert(name, volume="private", revision=None):
    """
    Bring a volume of a halted VM back to a revision; return the changes.

    What the volume holds now becomes a revision, and its size stays.

    name
        Name of the VM.

    volume : private
        Name of the volume.

    revision
        One of :py:func:`revisions`, by default the newest.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.revert work private
    """
    with _errors():
        return _system().revert(name, volume, revision)


def disks(name):
    """
    Return the disks of a VM as libvirt XML: ``{rootdev, privatedev, volatiledev, otherdevs}``.

    Each is the text of its ``<disk>`` elements, empty for a disk that the VM does not have.

    name
        Name of the VM.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.disks work
    """
    with _errors():
        return _system().disks(name)


def report():
    """
    Return every pool and the VMs in it, with sizes in bytes.

    ``{pool: {driver, size, used, free, provisioned, vms: {VM: {volume: {size, allocated}}}}}``.

    In R3.2's layout also ``dir_path``, ``filesystem``, ``shared`` and ``problems``, and ``class``
    in place of ``driver`` where a pool has one. Where ``shared`` is True, copies share blocks: what
    an image has allocated may be another's too.

    On R4 also ``metadata_size`` and ``metadata_used`` where the driver has them. A snapshot is no
    image of its own and is left out; where a pool lies, and its problems, tells
    :py:func:`qubes_pool.info`.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.report
    """
    with _errors():
        return _looked().report()
