"""R4: what there is, pools and VMs, each read once until something is written."""

from typing import NamedTuple

from qubes_storage import guards
from qubes_storage.adminapi import (
    Unreadable,
    check_pool_name,
    lines,
    pairs,
    properties,
)
from qubes_storage.exc import StoragePoolException
from qubes_storage.values import is_true, shown, to_int

METADATA_FULL = 90  # per cent; a thin pool whose metadata is full is lost
_REPORTED = ("name", "size", "usage", "included_in")  # what admin.pool.Info adds to the options


class Volume(NamedTuple):
    """A volume of a VM, as admin.vm.volume.Info has it; sizes in bytes."""

    name: str
    pool: str
    size: int
    usage: int
    path: str
    revisions_to_keep: str
    rw: bool
    ephemeral: bool
    save: bool  # kept when the VM stops
    snap: bool  # a snapshot of another volume, made at each start

    @classmethod
    def of(cls, name, told, what):
        """The volume of what was told."""
        return cls(
            name,
            told.get("pool"),
            to_int(told.get("size") or 0, f"{what}: size"),
            to_int(told.get("usage") or 0, f"{what}: usage"),
            told.get("path") or None,
            told.get("revisions_to_keep"),
            told.get("rw") == "True",
            is_true(told.get("ephemeral")),  # R4.2 tells it as somebody wrote it
            told.get("save_on_stop") == "True",
            told.get("snap_on_start") == "True",
        )


class Listed(NamedTuple):
    """A line of admin.vm.List."""

    klass: str
    state: str
    uuid: str  # None before R4.3


def vanished(vm):
    """The error for a VM that was there a moment ago."""
    return StoragePoolException(f"VM {vm}: was removed by someone else meanwhile; run again")


class AdminReading:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that reads."""

    def pool_names(self):
        """The names of the pools, in the daemon's order."""
        return lines(self.client.read("admin.pool.List"), "admin.pool.List")

    def driver_options(self):
        """``{driver: [option, ...]}`` as the daemon has them."""
        content = self.client.read("admin.pool.ListDrivers")
        rows = (line.split() for line in lines(content, "admin.pool.ListDrivers"))
        return {row[0]: row[1:] for row in rows if row}

    def _reported(self, name):
        """What admin.pool.Info says, or None for a pool that is not in the list."""

        def read():
            return pairs(self.client.read("admin.pool.Info", arg=name), f"pool {name}")

        if name not in self.pool_names():
            return None
        try:
            return read()
        except Unreadable:
            self.refresh()  # it went away between the two calls, and may be back
        return read() if name in self.pool_names() else None

    def pool_config(self, name):
        """``{option: value}`` of a pool, its driver too, or None for none of that name."""
        found = self._reported(name)
        return found and {k: v for k, v in found.items() if k not in _REPORTED}

    def list_pools(self):
        """``{name: {option: value}}`` as the daemon has it."""
        found = {name: self.pool_config(name) for name in self.pool_names()}
        return {name: config for name, config in found.items() if config is not None}

    def check_pool(self, name, what):
        """The driver of a pool that something wants to use; raises where there is none."""
        config = self.pool_config(check_pool_name(name))
        if config is None:
            raise StoragePoolException(
                f"{what}: qubesd has no pool {name}; add it with qubes_pool.add",
                waits_for=[("pool", name)],
            )
        return config.get("driver")

    def usage(self, name):
        """
        ``size``, ``used``, ``free``, and ``metadata_size``, ``metadata_used`` where the driver
        has them apart, in bytes; None for what the daemon does not tell.
        """
        what = f"pool {name}"
        told = pairs(self.client.read("admin.pool.UsageDetails", arg=name), what)
        numbers = {key: to_int(value, f"{what}: {key}") for key, value in told.items() if value}
        size, used = numbers.get("data_size"), numbers.get("data_usage")
        found = {
            "size": size,
            "used": used,
            "free": None if size is None or used is None else size - used,
        }
        if "metadata_size" in numbers:
            found["metadata_size"] = numbers["metadata_size"]
            found["metadata_used"] = numbers.get("metadata_usage")
        return found

    @staticmethod
    def _metadata_problem(name, usage):
        size, used = usage.get("metadata_size"), usage.get("metadata_used")
        if size and used is not None and used * 100 > size * METADATA_FULL:
            return (
                f"pool {name}: its metadata is {used * 100 // size} % full, and a thin pool whose"
                " metadata is full is lost; extend it (lvextend --poolmetadatasize +1G VG/POOL)"
            )
        return None

    def check_growth(self, name, needed=0):
        """
        Refuse to make or grow anything in a pool where a guard forbids it, or whose metadata is
        more than 90 % full.
        """
        kept = self.guards(name)
        guards.check_mount(self.root, name, kept)
        usage = self.usage(name)
        problem = self._metadata_problem(name, usage)
        if problem:
            raise StoragePoolException(problem)
        if usage["free"] is not None:
            guards.check_free(name, kept, usage["free"], needed)
        elif kept.get("min_free"):
            raise StoragePoolException(
                f"pool {name}: qubesd does not tell what is free in it, and min_free asks for it;"
                " take min_free away or another pool"
            )

    def pool_info(self, name):
        """
        What is in force for a pool, or None for none of that name.

        ``driver`` and its options, guards; ``size``, ``used``, ``free``, where there are any
        ``metadata_size`` and ``metadata_used``, and ``provisioned``, the virtual sizes of the
        volumes in it that are no snapshots, in bytes (None where they cannot be told); ``vms`` with
        a volume in it, be it no kernel; ``problems``, as sentences.
        """
        config = self.pool_config(name)
        if config is None:
            return None
        kept = self.guards(name)
        there = [
            (vm, volume)
            for vm in self.vm_names()
            for volume in self.volumes(vm).values()
            if volume.pool == name
        ]
        found = {
            **config,
            **kept,
            **dict.fromkeys(("size", "used", "free")),
            "provisioned": sum(volume.size for _, volume in there if not volume.snap),
            "vms": sorted({vm for vm, _ in there}),
            "problems": guards.check_values(name, kept),
        }
        try:
            found.update(self.usage(name))
            metadata = self._metadata_problem(name, found)
            if metadata:
                found["problems"].append(metadata)
            self._check_place(name, config)
            to_int(config.get("revisions_to_keep", 0), f"pool {name}: revisions_to_keep")
            guards.check_mount(self.root, name, kept)
        except StoragePoolException as err:
            if str(err) not in found["problems"]:
                found["problems"].append(str(err))
        return found

    # VMs

    def listed(self):
        """``{name: Listed}`` of all VMs, dom0 too."""
        found = {}
        for line in lines(self.client.read("admin.vm.List"), "admin.vm.List"):
            name, *rest = line.split(" ")
            told = dict(word.partition("=")[::2] for word in rest)
            found[name] = Listed(told.get("class"), told.get("state"), told.get("uuid"))
        return found

    def vm_names(self):
        """The names of the VMs that have volumes: not dom0, and no RemoteVM."""
        return [n for n, vm in self.listed().items() if vm.klass not in ("AdminVM", "RemoteVM")]

    def is_43(self):
        """Whether it is R4.3 or later, which tells the uuids of VMs."""
        return all(vm.uuid for vm in self.listed().values())

    def _of_vm(self, name, read, gone):
        """What ``read`` gives of a VM, and ``gone`` if it went away meanwhile."""
        try:
            return read()
        except Unreadable:
            self.refresh()
            if name not in self.listed():
                return gone
        return read()  # it was made anew by the time it was looked for, or the error stands

    def vm_properties(self, name):
        """``{property: Property}`` of a VM, ``{}`` for one that is not there any more."""
        return self._of_vm(
            name,
            lambda: properties(
                self.client.read("admin.vm.property.GetAll", name), f"VM {name}: properties"
            ),
            {},
        )

    def system_properties(self):
        """``{property: Property}`` of the whole system."""
        return properties(self.client.read("admin.property.GetAll"), "admin.property.GetAll")

    def volume(self, vm, name):
        """The :py:class:`Volume` of a VM, or None for a VM that is not there any more."""
        what = f"VM {vm}: volume {name}"
        return self._of_vm(
            vm,
            lambda: Volume.of(
                name, pairs(self.client.read("admin.vm.volume.Info", vm, name), what), what
            ),
            None,
        )

    def get_volume(self, vm, name):
        """The :py:class:`Volume` of a VM; raises for a VM that is not there any more."""
        found = self.volume(vm, name)
        if found is None:
            raise vanished(vm)
        return found

    def get_properties(self, name):
        """``{property: Property}`` of a VM; raises for one that is not there any more."""
        found = self.vm_properties(name)
        if not found:
            raise vanished(name)
        return found

    def volumes(self, vm, kernel=False):
        """``{name: Volume}`` of a VM's volumes; the kernel's is left out unless it is asked for."""
        names = self._of_vm(
            vm,
            lambda: lines(self.client.read("admin.vm.volume.List", vm), f"VM {vm}: volumes"),
            [],
        )
        found = {name: self.volume(vm, name) for name in names if kernel or name != "kernel"}
        return {name: volume for name, volume in found.items() if volume}

    def named_by(self, name):
        """
        ``[(VM or None for the system, property)]`` that name a VM, defaults left out: they follow.
        """
        found = [
            (None, key)
            for key, prop in self.system_properties().items()
            if prop.type == "vm" and prop.value == name and not prop.default
        ]
        for vm in self.listed():  # dom0 names VMs too
            found += [
                (vm, key)
                for key, prop in self.vm_properties(vm).items()
                if prop.type == "vm" and prop.value == name and not prop.default
            ]
        return found

    @staticmethod
    def said(users):
        """What names a VM, for a message."""
        return shown(f"{vm}'s {key}" if vm else f"the system's {key}" for vm, key in users)
