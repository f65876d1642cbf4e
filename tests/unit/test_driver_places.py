"""Where a driver says that a pool lies counts, whatever its options are called."""

import importlib
import sys

import pytest
from qubes_storage import drivers
from qubes_storage.exc import StoragePoolException

DRIVERS = {
    "fixed": """
from qubes_storage.drivers import xen
class Pool(xen.Pool):
    def __init__(self, name, *, dir_path: str = "/mnt/third"):
        super().__init__(name, dir_path=dir_path)
""",
    "derived": """
from qubes_storage.drivers import xen
class Pool(xen.Pool):
    def __init__(self, name, *, disk: str):
        super().__init__(name, dir_path=f"/mnt/{disk}")
""",
}


@pytest.fixture
def machine(scratch, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("drivers")
    for name, text in DRIVERS.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(drivers, "__path__", [*drivers.__path__, str(folder)])
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield scratch()
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    "one, two",
    [
        ({"driver": "fixed"}, {"driver": "fixed"}),
        ({"driver": "fixed"}, {"dir_path": "/mnt/third"}),
        ({"driver": "derived", "disk": "d"}, {"driver": "derived", "disk": "d"}),
        ({"driver": "derived", "disk": "third"}, {"driver": "fixed"}),
        ({"driver": "derived", "disk": "d"}, {"dir_path": "/mnt/d/appvms/x"}),
    ],
)
def test_two_pools_over_one_directory_are_refused_whatever_names_it(machine, one, two):
    system = machine.connect()
    system.add_pool("one", **one)
    assert system.pool_info("one")["dir_path"] == system.get_pool("one").dir_path
    before = machine.tree()
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(StoragePoolException, match="pool two: dir_path .* pool one"):
            verb("two", **two)
    assert machine.tree() == before


def test_a_pool_that_cannot_be_made_lies_where_its_section_says(machine):
    with open(machine.path("/etc/qubes/storage.conf"), "a") as conf:
        conf.write("[lost]\nclass=io.StringIO\ndir_path=/mnt/lost\n[none]\ndriver=gone\n")
    with pytest.raises(StoragePoolException, match="is the directory of pool lost too"):
        machine.connect().add_pool("two", dir_path="/mnt/lost")
    assert "two" not in machine.connect().list_pools()
    machine.connect().add_pool("two", dir_path="/mnt/two")


def test_a_pool_is_made_anew_when_its_section_changes(machine):
    system = machine.connect()
    system.add_pool("one", driver="derived", disk="d")
    system.add_pool("two", driver="derived", disk="e")
    two = system.get_pool("two")
    system.set_pool("one", disk="f")
    assert system.get_pool("one").dir_path == "/mnt/f"
    assert system.get_pool("two") is two


def test_no_option_leads_a_pool_away_from_its_vms(machine):
    system = machine.connect()
    system.add_pool("one", driver="derived", disk="d")
    system.create_vm("work", pool="one")
    before = machine.tree()
    for verb in (system.pool_diff, system.set_pool):
        with pytest.raises(StoragePoolException, match="pool one: dir_path cannot change while"):
            verb("one", disk="e")
    assert machine.tree() == before
