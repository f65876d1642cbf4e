"""Looking takes no lock: a call sees one version of each file, whatever others do meanwhile."""

import collections
import os
import threading

import pytest
from qubes_storage import connect
from qubes_storage.exc import OutOfStep, StoragePoolException
from qubes_storage.pool import Pool

MEANWHILE = []  # what others do while somebody looks at the pool


class Watched(Pool):
    """A pool in which something is done, once, while it is looked at."""

    def usage(self):
        if MEANWHILE:
            MEANWHILE.pop()()
        return super().usage()


@pytest.fixture
def system(root):
    system = connect(root)
    system.add_pool("default")
    system.add_pool("watched", dir_path="/opt/w", options={"class": f"{__name__}.Watched"})
    system.add_pool("zoo", dir_path="/opt/zoo")
    system.create_vm("fedora", klass="TemplateVM")
    system.create_vm("work", pool="zoo")
    yield system
    MEANWHILE.clear()


def other(system):
    """Another who works on the machine."""
    return connect(system.root)


def test_a_report_is_of_one_moment(system):
    def meanwhile():
        other(system).remove_vm("work", purge=True)
        other(system).remove_pool("zoo", purge=True)

    MEANWHILE.append(meanwhile)
    found = system.report()
    assert not MEANWHILE
    assert list(found["zoo"]["vms"]) == ["work"]
    assert set(system.report()) == {"default", "watched"}


def test_an_error_that_came_of_others_is_not_told(system):
    system.create_vm("guarded", pool="watched")
    other(system).set_pool("watched", min_free="1MiB")
    declared = {"pool": "watched", "volumes": {"private": "3GiB"}}

    def meanwhile():
        other(system).migrate_vm("guarded", "zoo")
        other(system).migrate_vm("guarded", "watched")
        MEANWHILE.append(lambda: None)
        raise OutOfStep("VM guarded: is between two pools")

    MEANWHILE.append(meanwhile)
    assert set(system.vm_diff("guarded", **declared)) == {"volumes"}
    assert not MEANWHILE


def test_an_error_that_stands_is_told_at_once(system, root):
    os.unlink(root / "opt/zoo/appvms/work/private.img")
    asked = []
    system._newest = lambda path, newest=system._newest: asked.append(path) or newest(path)
    with pytest.raises(OutOfStep, match=r"VM work: .*private\.img is gone"):
        system.vm_diff("work", label="blue")
    assert max(collections.Counter(asked).values()) == 4  # to look, and to look for a change, twice


def test_disk_and_registry_are_awaited_while_somebody_holds_the_lock(system, root):
    image = root / "opt/zoo/appvms/work/private.img"
    aside = image.with_name("aside")
    there, back = threading.Event(), threading.Event()

    def work():
        with other(system).locked():
            image.rename(aside)
            there.set()
            back.wait(0.2)  # the other looks meanwhile
            aside.rename(image)

    thread = threading.Thread(target=work)
    thread.start()
    there.wait(10)
    try:
        assert set(system.vm_diff("work", label="blue")) == {"label"}
    finally:
        back.set()
        thread.join()


def test_a_vm_that_somebody_else_made_first_is_there_already(system):
    def meanwhile():
        other(system).create_vm("new", pool="default")

    other(system).set_pool("watched", min_free="1MiB")
    MEANWHILE.append(meanwhile)
    with pytest.raises(StoragePoolException, match=r"VM new: is in qubes\.xml already"):
        system.create_vm("new", pool="watched")
    assert system.list_vms()["new"]["pool"] == "default"
