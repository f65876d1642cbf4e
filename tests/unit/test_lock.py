"""The one lock of the registry: taken from another process, waited for in vain, never left held."""

import contextlib
import os
import resource
import stat
import subprocess
import sys
import threading
import time

import pytest
from qubes_storage import registry
from qubes_storage.exc import StoragePoolException

from tests.conftest import TREE
from tests.r32.machine import LIB, XML, element

HOLDER = """
import sys
from qubes_storage import registry

root, clockvm = sys.argv[1:]
with registry.lock(root) as found:
    print("locked", flush=True)
    sys.stdin.readline()
    if clockvm:
        registry.save(root, found.copy(attrs={**found.attrs, "clockvm": clockvm}))
"""


def waits(machine):
    """Whether a process waits for the lock of the machine's registry, within 30 seconds."""
    inode = os.stat(machine.path(XML)).st_ino
    for _ in range(3000):
        with open("/proc/locks", encoding="ascii") as locks:
            if any("->" in line and f":{inode} " in line for line in locks):
                return True
        time.sleep(0.01)
    return False


@pytest.fixture
def holder(scratch):
    """``(machine, start)``: ``start(clockvm)`` is another process that holds the lock."""
    machine = scratch()
    started = []

    def start(clockvm=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, machine.connect().root, clockvm],
            env={**os.environ, "PYTHONPATH": str(TREE / "_utils")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield machine, start
    for process in started:
        process.communicate(timeout=30)
        assert process.returncode == 0


def handles(machine):
    """What this process has open below the machine's root, deleted files too."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the handle of that directory itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.startswith(str(machine.root))]


def when_waiting(machine, act):
    """Do something once this process waits for the lock."""
    thread = threading.Thread(target=lambda: waits(machine) and act())
    thread.start()
    return thread


def test_who_waited_gets_the_lock_of_the_file_that_came_instead(holder):
    machine, start = holder
    root = machine.connect().root
    registry.load(root)
    process = start("1")
    before = os.stat(machine.path(XML)).st_ino
    thread = when_waiting(machine, process.stdin.close)
    with registry.lock(root) as found:
        assert found.get("clockvm") == "1"
        assert os.stat(machine.path(XML)).st_ino != before
        registry.save(root, found.copy(attrs={**found.attrs, "clockvm": "None"}))
    thread.join()
    process.stdin = None  # for communicate, which would flush it
    assert registry.load(root).get("clockvm") is None
    assert handles(machine) == []


def test_an_interruption_while_it_waits_leaves_no_handle_and_no_lock(holder, interrupt):
    machine, start = holder
    root = machine.connect().root
    process = start()
    thread = when_waiting(machine, interrupt)
    with pytest.raises(KeyboardInterrupt), registry.lock(root):
        pass
    thread.join()
    assert handles(machine) == []
    process.communicate(timeout=30)
    with registry.lock(root) as found:
        assert "fedora-23" in found.by_name


def test_a_directory_in_place_of_the_registry_is_told(scratch):
    machine = scratch()
    machine.path(XML).unlink()
    machine.mkdir(XML)
    with (
        pytest.raises(
            StoragePoolException, match=f"{XML}: cannot be locked: .*put one in its place"
        ),
        registry.lock(machine.connect().root),
    ):
        pass
    assert handles(machine) == []


def test_links_that_lead_in_a_circle_are_told(scratch):
    machine = scratch()
    machine.path(XML).unlink()
    machine.path(XML).symlink_to(XML)
    machine.path(LIB).chmod(0o755)
    with (
        pytest.raises(StoragePoolException, match="too many links; put a file in its place"),
        registry.lock(machine.connect().root),
    ):
        pass
    assert handles(machine) == []


def test_a_save_that_fails_keeps_the_lock_and_the_file(scratch):
    machine = scratch()
    root = machine.connect().root
    before = machine.xml
    with registry.lock(root) as found:
        changed = found.copy(attrs={**found.attrs, "clockvm": "1"})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(StoragePoolException, match=f"{XML}: cannot be saved: File too la"):
                registry.save(root, changed)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert machine.xml == before
        registry.save(root, changed)
    assert registry.load(root).get("clockvm") == "1"


def test_what_someone_puts_in_place_of_a_save_is_read(scratch, monkeypatch):
    """A file of the same size, by who takes no lock, the moment that ours is in its place."""
    machine = scratch()
    root = machine.connect().root
    other = machine.path(f"{LIB}/other.xml")

    def fsync(fd, synced=os.fsync):
        synced(fd)
        if stat.S_ISDIR(os.fstat(fd).st_mode) and other.exists():
            os.rename(other, machine.path(XML))

    with registry.lock(root) as found:
        registry.save(root, found.copy(attrs={**found.attrs, "clockvm": "1"}))
        machine.write(f"{LIB}/other.xml", machine.xml.replace(b'clockvm="1"', b'clockvm="7"'))
        monkeypatch.setattr(os, "fsync", fsync)
        registry.save(root, found.copy(attrs={**found.attrs, "clockvm": "1"}))
    assert not other.exists()
    assert registry.load(root).get("clockvm") == "7"


def test_who_holds_the_lock_is_seen_without_taking_it(holder):
    machine, start = holder
    root = machine.connect().root
    assert not registry.others_work(root)
    process = start()
    assert registry.others_work(root)
    process.communicate(timeout=30)
    assert not registry.others_work(root)
    assert handles(machine) == []


def test_another_thread_is_one_of_the_others_and_oneself_is_not(scratch):
    machine = scratch()
    root = machine.connect().root
    seen = []
    with registry.lock(root):
        thread = threading.Thread(target=lambda: seen.append(registry.others_work(root)))
        thread.start()
        thread.join()
        seen.append(registry.others_work(root))
    assert seen == [True, False]


def test_where_there_is_no_registry_nobody_holds_its_lock(scratch):
    machine = scratch()
    machine.path(XML).unlink()
    assert not registry.others_work(machine.connect().root)
    assert not machine.path(XML).exists()


def test_a_pool_that_went_while_its_removal_waited_is_removed_without_a_word(holder):
    machine, start = holder
    system, conf = machine.connect(), machine.path("/etc/qubes/storage.conf")
    system.add_pool("foo", dir_path="/mnt/foo")
    process = start()

    def gone():
        conf.write_text("[default]\ndriver=xen\n")
        process.communicate(timeout=30)

    thread = when_waiting(machine, gone)
    assert system.remove_pool("foo", purge=True) == {}
    thread.join()
    assert conf.read_text() == "[default]\ndriver=xen\n"
    assert machine.path("/mnt/foo/appvms").exists()


LABELLER = """
import sys
import qubes_storage

system = qubes_storage.connect(sys.argv[1])
print("begun", flush=True)
number = 0
while True:
    number += 1
    system.set_vm("other", label=("blue", "green")[number % 2])
"""


def test_a_change_is_made_whoever_looks_and_changes_meanwhile(scratch):
    machine = scratch()
    machine.elements += [element("QubesNetVm", f"z{n}", n, template_qid="1") for n in range(9, 160)]
    machine.write_registry()
    system = machine.connect()
    for name in ("work", "other"):
        system.create_vm(name)
    over = threading.Event()

    def look():
        while not over.is_set():
            machine.connect().list_vms()

    threads = [threading.Thread(target=look) for _ in range(3)]
    environment = {**os.environ, "PYTHONPATH": str(TREE / "_utils")}
    command = [sys.executable, "-c", LABELLER, system.root]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            for thread in threads:
                thread.start()
            for label in ["red", "gray"] * 8:
                system.set_vm("work", label=label)
                assert machine.connect().list_vms()["work"]["label"] == label
        finally:
            over.set()
            other.kill()
    for thread in threads:
        thread.join()


def test_an_entry_is_replaced_as_another_reading_of_the_file_has_it(scratch):
    machine = scratch()
    machine.connect().create_vm("work")
    one, two = registry.loads(machine.xml), registry.loads(machine.xml)
    entry = one.by_name["work"]
    assert two.replaced(entry, entry.changed(label="blue")).by_name["work"].attrs["label"] == "blue"
    assert "work" not in two.replaced(entry).by_name
    with pytest.raises(StoragePoolException, match="VM work: .* was changed meanwhile by"):
        two.replaced(entry).replaced(entry)
