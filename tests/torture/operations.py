"""Every operation of the core, and the machine on which each of them can be made."""

import functools
import os
import shutil
import uuid
from dataclasses import dataclass

import pytest

from tests.r32.machine import LIB

MIB = 1024**2
GIB = 1024**3
FILESYSTEMS = {"xen": "ext4", "reflink": "xfs", "btrfs": "btrfs"}  # of a driver's pools
DRIVERS = tuple(FILESYSTEMS)
EVERYTHING = bool(os.environ.get("TORTURE"))  # all is walked, or the part that CI has time for


@dataclass(frozen=True)
class Operation:
    """
    Something to do, as a state does it: compare, and act where something differs.

    ``run(system, world)`` returns the changes, ``{}`` for none. A ``verb`` does it anew each time.
    """

    name: str
    run: object
    verb: bool = False
    vms: tuple = ()  # the VMs of the machine that it changes
    removes: str = None  # the VM that goes
    renames: tuple = ()  # (its name, its new name)
    takes: str = None  # the file of the caller's that goes, "outside" or "ssd"
    drivers: tuple = DRIVERS
    pool: str = None  # the pool that it is about
    drops: bool = False  # it moves a VM to where no revisions are kept

    def __str__(self):
        return self.name

    @property
    def words(self):
        """One of them is in each error: what it is about, or what all is kept in."""
        about = [f"VM {name}" for name in ("new", *self.vms, *self.renames)]
        return [*about, f"pool {self.pool}", "qubes.xml", "storage.conf"]


def build(world, driver):
    """
    Pools ``ssd``, ``near`` and ``spare`` of a driver, and ``plain`` of xen, on one filesystem, the
    default one on another; VMs with images of their own in them.
    """
    machine, system = world.machine, world.connect()
    world.driver = driver
    machine.elements[-1][1]["dir_path"] = f"{LIB}/vm-templates/fedora-23"
    machine.write_registry()
    keep = {"revisions_to_keep": 3} if driver != "xen" else {}
    for name in ("ssd", "near", "spare"):
        system.add_pool(
            name,
            driver=driver,
            dir_path=f"/mnt/ssd/{name}",
            require_mount=world.require_mount,
            min_free=1,
            **keep,
        )
    system.add_pool("plain", dir_path="/mnt/ssd/plain", require_mount=world.require_mount)
    system.create_vm("tpl", klass="TemplateVM", template="fedora-23", pool="ssd")
    system.create_vm("work", klass="StandaloneVM", template="fedora-23", pool="ssd", label="green")
    system.create_vm("app", template="tpl", pool="ssd")
    system.create_vm("home", klass="StandaloneVM", template="fedora-23")
    system.create_vm("gone", template="tpl", pool="ssd")
    for name in ("root", "private", "root-cow"):
        _fill(machine, f"/mnt/ssd/ssd/vm-templates/tpl/{name}.img", f"tpl {name}")
    for vmdir in ("/mnt/ssd/ssd/appvms/work", f"{LIB}/appvms/home"):
        for name in ("root", "private", "volatile"):
            _fill(machine, f"{vmdir}/{name}.img", f"{vmdir} {name} old")
        machine.mkdir(f"{vmdir}/apps")
        machine.write(f"{vmdir}/apps/menu.desktop", b"menu", 0o644)
        machine.write(f"{vmdir}/firewall.xml", b"<rules/>", 0o660)
        machine.write(f"{vmdir}/{os.path.basename(vmdir)}.conf", b"conf", 0o660)
    for name in ("private", "volatile"):
        _fill(machine, f"/mnt/ssd/ssd/appvms/app/{name}.img", f"app {name}")
    if driver != "xen":
        system.reset_vm("work")
        system.commit_vm("tpl")
        for name in ("root", "private"):
            _fill(machine, f"/mnt/ssd/ssd/appvms/work/{name}.img", f"work {name} new")
            _fill(machine, f"/mnt/ssd/ssd/vm-templates/tpl/{name}.img", f"tpl {name} new")
        _fill(machine, "/mnt/ssd/ssd/vm-templates/tpl/root-cow.img", "tpl root-cow new")
    shutil.rmtree(machine.path("/mnt/ssd/ssd/appvms/gone"))
    for place in (world.outside, world.ssd):
        path = place / "disk.raw"
        path.touch(0o600)
        _fill_at(path, "a disk", 5 * MIB)
    with system.locked() as registry:  # R3.2 gives a VM its uuid when it starts
        for entry in registry.entries:
            if entry.attrs.get("dir_path"):
                marked = entry.changed(uuid=str(uuid.uuid4()))
                system.save_registry(system.registry().replaced(entry, marked))
    os.sync()
    world.save()


def _fill(machine, path, word):
    _fill_at(machine.path(path), word, os.stat(machine.path(path)).st_size)


def _fill_at(path, word, size):
    """Data at the beginning, in the middle and at the end of an image, and holes between."""
    with open(path, "r+b") as file:
        file.truncate(size)
        for offset in (0, size // 2 // MIB * MIB + 4096, size - 4096):
            file.seek(offset)
            file.write(f"{word} {offset}\n".encode().ljust(4096, b"."))
        file.flush()
        os.utime(file.fileno(), (1479988800, 1479988800))


class Declared:
    """A state: its function, its name, and what is declared; what is callable is of the world."""

    def __init__(self, function, name, **declared):
        self.function, self.name, self.declared = function, name, declared

    def asked(self, world):
        """What is declared on a machine."""
        return {k: v(world) if callable(v) else v for k, v in self.declared.items()}

    def __call__(self, system, world):
        """What the state does."""
        kind = "pool" if self.function.startswith("qubes_pool") else "vm"
        asked = self.asked(world)
        if self.function.endswith("absent"):
            return getattr(system, f"remove_{kind}")(self.name, **asked)
        changes = getattr(system, f"{kind}_diff")(self.name, **asked)
        if not changes:
            return changes
        new = {"pool": "add", "vm": "create"}[kind] if "created" in changes else "set"
        return getattr(system, f"{new}_{kind}")(self.name, **asked)


vm_present = functools.partial(Declared, "qubes_vm.present")
vm_absent = functools.partial(Declared, "qubes_vm.absent")
pool_present = functools.partial(Declared, "qubes_pool.present")
pool_absent = functools.partial(Declared, "qubes_pool.absent")


def verb(method, *args, **kwargs):
    """A method of the system's."""
    return lambda system, world: getattr(system, method)(*args, **kwargs)


def rename(name, new_name):
    """``rename_vm``, which is done where only the new name is there and nothing is unfinished."""

    def run(system, world):
        done = system.find_vm(name) is None and system.find_vm(new_name) is not None
        return {} if done and not system.vm_diff(new_name) else system.rename_vm(name, new_name)

    return run


def _driver(world):
    return world.driver


def _required(world):
    return world.require_mount


def _outside(world):
    return str(world.outside / "disk.raw")


def _inside(world):
    return str(world.ssd / "disk.raw")


REVERTS = ("reflink", "btrfs")
_NEW = {"klass": "StandaloneVM", "pool": "ssd"}
OPERATIONS = {
    each.name: each
    for each in (
        Operation(
            "pool add",
            pool_present(
                "new",
                driver=_driver,
                dir_path="/mnt/ssd/new",
                require_mount=_required,
                min_free="1MiB",
            ),
            pool="new",
        ),
        Operation(
            "pool set",
            pool_present("spare", dir_path="/mnt/ssd/other", min_free="2MiB"),
            pool="spare",
        ),
        Operation("pool remove", pool_absent("spare", purge=True), pool="spare"),
        Operation(
            "create AppVM",
            vm_present("new", template="tpl", pool="ssd", volumes={"private": 3 * GIB}),
        ),
        Operation("create copy", vm_present("new", template="tpl", **_NEW)),
        Operation("create copy from afar", vm_present("new", template="fedora-23", **_NEW)),
        Operation("create TemplateVM", vm_present("new", klass="TemplateVM", pool="ssd")),
        Operation("create NetVM", vm_present("new", klass="NetVM", template="tpl", pool="ssd")),
        Operation("clone", vm_present("new", clone_from="work", pool="ssd")),
        Operation("clone elsewhere", vm_present("new", clone_from="work", pool="default")),
        Operation("clone template", vm_present("new", clone_from="tpl", pool="near")),
        Operation("resize", vm_present("work", volumes={"private": 3 * GIB}), vms=("work",)),
        Operation("resize root", vm_present("tpl", volumes={"root": 11 * GIB}), vms=("tpl",)),
        Operation("change", vm_present("app", label="blue", template="fedora-23"), vms=("app",)),
        Operation("rename", rename("work", "job"), vms=("work",), renames=("work", "job")),
        Operation("rename template", rename("tpl", "top"), vms=("tpl",), renames=("tpl", "top")),
        Operation("migrate near", vm_present("work", pool="near", migrate=True), vms=("work",)),
        Operation(
            "migrate to another driver",
            vm_present("work", pool="plain", migrate=True),
            vms=("work",),
            drops=True,
        ),
        Operation(
            "migrate elsewhere",
            vm_present("work", pool="default", migrate=True, label="blue"),
            vms=("work",),
            drops=True,
        ),
        Operation(
            "migrate and change",
            vm_present(
                "work",
                pool="near",
                migrate=True,
                label="blue",
                volumes={"private": 3 * GIB, "root": 11 * GIB},
            ),
            vms=("work",),
        ),
        Operation(
            "migrate from elsewhere", vm_present("home", pool="ssd", migrate=True), vms=("home",)
        ),
        Operation(
            "migrate near, keep", verb("migrate_vm", "work", "near", keep=True), vms=("work",)
        ),
        Operation(
            "migrate elsewhere, keep",
            verb("migrate_vm", "work", "default", keep=True),
            vms=("work",),
        ),
        Operation("import near", vm_present("new", root_move_from=_inside, **_NEW), takes="ssd"),
        Operation(
            "import from afar", vm_present("new", root_move_from=_outside, **_NEW), takes="outside"
        ),
        Operation(
            "import and grow",
            vm_present("new", root_move_from=_inside, volumes={"root": 20 * MIB}, **_NEW),
            takes="ssd",
        ),
        Operation("import copy", vm_present("new", root_copy_from=_outside, **_NEW)),
        Operation("remove", vm_absent("work", purge=True), vms=("work",), removes="work"),
        Operation("remove AppVM", vm_absent("app", purge=True), vms=("app",), removes="app"),
        Operation(
            "remove, keep", verb("remove_vm", "work", keep=True), vms=("work",), removes="work"
        ),
        Operation("remove what is gone", vm_absent("gone"), vms=("gone",), removes="gone"),
        Operation("commit", verb("commit_vm", "tpl"), verb=True, vms=("tpl",)),
        Operation("reset", verb("reset_vm", "app"), verb=True, vms=("app",)),
        Operation(
            "revert", verb("revert", "work", "private", "1"), True, ("work",), drivers=REVERTS
        ),
        Operation(
            "revert root", verb("revert", "tpl", "root", "1"), True, ("tpl",), drivers=REVERTS
        ),
    )
}


def of_driver(driver):
    """The operations that a driver can do."""
    return [each for each in OPERATIONS.values() if driver in each.drivers]


def walked(part, states=False):
    """
    Has a test walk operations of each driver, one at a time: those that ``part`` names,
    ``{driver: names}``, or all; with ``states`` all that a state makes.
    """
    chosen = [
        (driver, operation)
        for driver in DRIVERS
        for operation in of_driver(driver)
        if (EVERYTHING or operation.name in part[driver])
        and (isinstance(operation.run, Declared) or not states)
    ]
    return pytest.mark.parametrize(("built", "operation"), chosen, indirect=["built"], ids=str)
