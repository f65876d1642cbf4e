"""
VMs of Qubes OS and where their images lie: list, inspect, create, change and remove them.

Settings are those of :py:mod:`qubes_pool <qubes_pool>`.
"""

import contextlib

import qubes_storage
from qubes_storage import system
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "qubes_vm"
__func_alias__ = {"list_": "list", "set_": "set"}
VERSION = "1.0.0"  # of the core that this module speaks to


def __virtual__():
    reason = system.why_not(lambda key: __opts__.get(key, __pillar__.get(key)), VERSION)
    return (False, f"qubes_vm: {reason}") if reason else __virtualname__


def _system():
    return system.connect_as(lambda key: __salt__["config.option"](key, None))


@contextlib.contextmanager
def _errors():
    try:
        yield
    except qubes_storage.InvalidInput as err:
        raise SaltInvocationError(str(err)) from err
    except (OSError, qubes_storage.StoragePoolException) as err:
        raise CommandExecutionError(str(err)) from err


def list_():
    """
    Return the VMs of the registry: ``{name: {klass, pool, template, label}}``.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.list
    """
    with _errors():
        return _system().list_vms()


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
        return _system().vm_info(name)


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
    create_only=False,
    absent=False,
    purge=False,
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

    klass, template, label, pool, volumes, clone_from, root_copy_from, migrate, create_only
        As for :py:func:`create`.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.diff work template=fedora-23 label=green pool=ssd
    """
    with _errors():
        if absent:
            return _system().vm_remove_diff(name, purge)
        return _system().vm_diff(
            name,
            klass=klass,
            template=template,
            label=label,
            pool=pool,
            volumes=volumes,
            clone_from=clone_from,
            root_copy_from=root_copy_from,
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
        A VM to copy it from.

    root_copy_from
        A file to copy its root image from.

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
    create_only=False,
):
    """
    Change a VM and finish what a dead run left of it; return the changes.

    Only what is given and differs changes: label, the template an AppVM runs on, and sizes, which
    only ever grow. A class never changes, and a VM found in another pool is an error.

    name
        Name of the VM; it must be there.

    klass, template, label, pool, volumes, clone_from, root_copy_from, migrate, create_only
        As for :py:func:`create`.

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
            migrate=migrate,
            create_only=create_only,
        )


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
    Return the revisions of a volume that its driver keeps, the newest last (R4).

    name
        Name of the VM.

    volume : private
        Name of the volume.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.revisions work private
    """
    with _errors():
        return _system().revisions(name, volume)


def revert(name, volume="private", revision=None):
    """
    Bring a volume of a halted VM back to a revision; return the changes (R4).

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

    ``{pool: {driver or class, dir_path, filesystem, size, used, provisioned, free, shared, vms:
    {VM: {volume: {size, allocated}}}, problems}}``. Where ``shared`` is True, copies share blocks:
    what an image has allocated may be another's too.

    CLI Example:

    .. code-block:: bash

        qubesctl qubes_vm.report
    """
    with _errors():
        return _system().report()
