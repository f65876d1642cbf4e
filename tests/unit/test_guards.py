"""The guards of pools on R4, where no registry's lock makes writers take turns."""

import fcntl
import os
import signal

import pytest
from qubes_storage import guards
from qubes_storage.exc import StoragePoolException

LIB = "/var/lib/qubes"


@pytest.fixture
def holding():
    """``holding(path, uid)``: a process of a user that holds a lock on a directory."""
    children = []

    def hold(path, uid):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)
                os.write(writing, b"1")
                signal.pause()
            finally:
                os._exit(1)
        children.append(child)
        os.close(writing)
        assert os.read(reading, 1) == b"1"
        os.close(reading)

    yield hold
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another")
def test_who_may_look_into_etc_qubes_stops_nobody(scratch, holding):
    machine = scratch()
    for name in ("/etc", "/etc/qubes"):
        os.chmod(machine.path(name), 0o755)  # as R4 installs it
    holding(machine.path("/etc/qubes"), 65534)
    guards.save(str(machine.root), "ssd", {"min_free": "1GiB"})
    assert guards.load(str(machine.root)) == {"ssd": {"min_free": "1GiB"}}
    assert sorted(os.listdir(machine.path("/etc/qubes"))) == ["storage-guards.conf", "storage.conf"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another")
def test_who_holds_the_lock_for_ever_is_told_of(scratch, holding, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE", 0.2)
    machine = scratch()
    holding(machine.path(LIB), 0)
    before = machine.tree()
    with pytest.raises(StoragePoolException) as err:
        guards.save(str(machine.root), "ssd", {"min_free": "1GiB"})
    assert str(err.value) == (
        "pool ssd: /etc/qubes/storage-guards.conf: cannot be saved, for another process has locked"
        " /var/lib/qubes for 0.2 s; see which with lsof /var/lib/qubes, and run again"
    )
    assert machine.tree() == before
