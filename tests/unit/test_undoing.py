"""What a dead run made is taken away, unless it may be all that there is of a VM."""

import os
import signal
import sys
import time

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import LIB, XML
from tests.unit.test_build import EVENTS

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"
TURNED = "[foo]\ndriver=xen\ndir_path=/mnt/foo\n[default]\ndriver=xen\n"
HERE, THERE = f"{LIB}/appvms", "/mnt/foo/appvms"


def kill_when(there, function):
    """Make a call in a child that dies as soon as something holds."""
    child = os.fork()
    if not child:
        asking = []

        def hook(event, _):
            if event.startswith(EVENTS) and not asking:
                asking.append(event)
                if there():
                    os.kill(os.getpid(), signal.SIGKILL)
                asking.clear()

        sys.addaudithook(hook)
        try:
            function()
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it never comes to that"


@pytest.fixture
def killed(scratch, tmp_path):
    """``killed(call, when)``: a machine on which ``call(system)`` died once ``when(machine)``."""

    def make(call, when, conf=CONF, vms=("work",)):
        machine = scratch(conf)
        machine.add_pools()
        (tmp_path / "stick").mkdir()
        (tmp_path / "stick/disk.raw").write_bytes(b"BOOT" * 128)
        for vm in vms:
            machine.connect().create_vm(vm, klass="StandaloneVM")
        machine.old = machine.xml
        kill_when(lambda: when(machine), lambda: call(machine.connect()))
        return machine

    return make


def is_registered(machine):
    return b"work" in machine.xml and machine.xml != machine.old


def migrate(system):
    system.migrate_vm("work", "foo", keep=True)  # which copies, as to another disk


def is_at_its_end(machine):
    """The registry is written, and the marker is there."""
    places = (machine.path(f"{place}/.work.creating") for place in (HERE, THERE))
    return is_registered(machine) and any(place.exists() for place in places)


def use(machine, path, data=b"of weeks"):
    """Have a VM write to an image."""
    image = machine.path(path)
    with open(image, "r+b") as file:
        file.write(data)
    os.utime(image, (time.time() + 60,) * 2)


def restore(machine):
    """Put the qubes.xml of before back, as our errors advise where it is broken."""
    machine.path(XML).write_bytes(machine.old)


def refused(machine, why, *calls):
    before = machine.tree()
    for call in calls:
        with pytest.raises(StoragePoolException, match=f"VM work: .*{why}.*; mend that"):
            call()
    assert machine.tree() == before


def test_a_copy_that_was_used_stays_where_an_older_registry_was_put_back(killed):
    machine = killed(migrate, is_at_its_end)
    use(machine, f"{THERE}/work/private.img")
    restore(machine)
    system = machine.connect()
    refused(
        machine,
        f"{THERE}/work/private.img was used since a run made it: put the qubes.xml back",
        lambda: system.vm_diff("work", label="blue"),
        lambda: system.set_vm("work", label="blue"),
        lambda: system.vm_remove_diff("work", purge=True),
        lambda: system.remove_vm("work", purge=True),
        lambda: system.rename_vm("work", "job"),
    )
    machine.path(f"{THERE}/work").rename(machine.path("/mnt/newer"))
    assert "unfinished" in system.set_vm("work", label="blue")
    assert machine.path(f"{HERE}/work/private.img").exists()
    assert not machine.path(f"{THERE}/.work.creating").exists()


def test_a_copy_that_nobody_used_goes_then(killed):
    machine = killed(migrate, is_at_its_end)
    restore(machine)
    assert "unfinished" in machine.connect().set_vm("work", label="blue")
    assert not machine.path(f"{THERE}/work").exists()


def test_a_new_vm_that_was_used_stays_where_an_older_registry_was_put_back(killed):
    def create(system):
        system.create_vm("work", klass="StandaloneVM")

    machine = killed(create, is_at_its_end, vms=())
    use(machine, f"{HERE}/work/private.img")
    restore(machine)
    system = machine.connect()
    refused(
        machine,
        f"{HERE}/work/private.img was used since",
        lambda: system.vm_diff("work"),
        lambda: create(system),
        lambda: system.create_vm("work", klass="StandaloneVM", pool="foo"),
        lambda: system.vm_remove_diff("work"),
        lambda: system.remove_vm("work"),
    )


@pytest.mark.parametrize("unmounted", [False, True])
def test_a_file_that_was_moved_in_and_is_nowhere_else_stays(killed, tmp_path, unmounted):
    disk = tmp_path / "stick/disk.raw"

    def create(system):
        system.create_vm("work", klass="HVM", root_move_from=str(disk))

    machine = killed(create, lambda _: not disk.exists(), vms=())
    restore(machine)
    if unmounted:
        disk.parent.rename(tmp_path / "away")
    system = machine.connect()
    refused(
        machine,
        f"{HERE}/work has all that there is of {disk}",
        lambda: system.vm_remove_diff("work"),
        lambda: system.remove_vm("work"),
    )
    assert machine.path(f"{HERE}/work/root.img").read_bytes() == b"BOOT" * 128


@pytest.mark.parametrize("conf", [CONF, TURNED])
def test_neither_copy_of_a_vm_that_the_registry_does_not_know_is_deleted(killed, conf):
    machine = killed(migrate, lambda m: m.path(f"{THERE}/work").exists(), conf)
    assert machine.xml == machine.old
    machine.elements = []
    machine.write_registry()  # R3.2's qvm-remove --just-db
    system = machine.connect()
    refused(
        machine,
        f"{HERE}/work was copied to {THERE}/work, and qubes.xml knows neither",
        lambda: system.vm_remove_diff("work"),
        lambda: system.remove_vm("work"),
        lambda: system.create_vm("work", klass="StandaloneVM"),
        lambda: system.create_vm("work", klass="StandaloneVM", pool="foo"),
    )


def test_what_a_dead_run_left_is_mended_where_the_pool_lies_now(killed):
    machine = killed(migrate, is_at_its_end)
    machine.path("/mnt/foo").rename(machine.path("/mnt/new"))
    machine.path("/etc/qubes/storage.conf").write_text(CONF.replace("/mnt/foo", "/mnt//new/"))
    system = machine.connect()
    assert set(system.vm_diff("work", label="blue")) == {"unfinished", "label"}
    system.set_vm("work", label="blue")
    assert system.vm_diff("work", label="blue") == {}
    assert not machine.path("/mnt/new/appvms/.work.creating").exists()


def test_a_copy_of_an_image_from_the_future_is_not_taken_for_a_used_one(killed):
    tomorrow = time.time() + 86400

    def call(system):
        os.utime(f"{system.root}{HERE}/work/private.img", (tomorrow, tomorrow))
        migrate(system)

    machine = killed(call, is_at_its_end)
    restore(machine)
    assert "unfinished" in machine.connect().set_vm("work", label="blue")
    assert not machine.path(f"{THERE}/work").exists()
