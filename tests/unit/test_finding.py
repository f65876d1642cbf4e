"""Drivers are found in files, in installed packages and by class; a broken one harms no other."""

import importlib
import importlib.metadata
import sys

import pytest
import qubes_storage
from qubes_storage import drivers, finding
from qubes_storage.exc import StoragePoolException

DRIVER = '''
from qubes_storage.drivers import xen

class Pool(xen.Pool):
    """A driver of somebody's own."""

    def __init__(self, name, *, dir_path: str, depth: int = 3, fast: bool = False):
        super().__init__(name, dir_path=dir_path)
        self.depth, self.fast = depth, fast
'''
OPTIONS = {
    "dir_path": {"type": "str"},
    "depth": {"type": "int", "default": 3},
    "fast": {"type": "bool", "default": False},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of drivers beside the bundled ones, as a second file_root's is merged into ours."""
    monkeypatch.setattr(drivers, "__path__", [*drivers.__path__, str(tmp_path)])
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(name, value, text)``: an installed package with an entry point."""
    before = set(sys.modules)

    def make(name, value, text):
        module = value.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{finding.GROUP}]\n{name} = {value}\n")
        return tmp_path / f"{module}.py"

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_is_a_driver_with_options_of_their_types(folder, scratch):
    (folder / "mine.py").write_text(DRIVER)
    assert "mine" in qubes_storage.list_drivers()
    found = finding.describe_drivers()
    assert found["mine"] == {"options": OPTIONS, "from": str(folder / "mine.py")}
    assert found["xen"]["options"] == {"dir_path": {"type": "str"}}
    system = scratch("[default]\ndriver=xen\n").connect()
    system.add_pool("ssd", driver="mine", dir_path="/mnt/ssd", depth="7", fast="yes")
    assert (system.get_pool("ssd").depth, system.get_pool("ssd").fast) == (7, True)


@pytest.mark.parametrize("text", ["import no_such_module", "Poo = 1", "x = (", "raise SystemExit"])
def test_a_driver_that_cannot_be_imported_is_named_and_harms_no_other(folder, scratch, text):
    (folder / "broken.py").write_text(text)
    found = finding.describe_drivers()
    assert "driver broken cannot be imported: " in found["broken"]["problem"]
    assert found["broken"]["from"] == str(folder / "broken.py")
    assert "problem" not in found["xen"]
    conf = "[default]\ndriver=xen\n[bad]\ndriver=broken\ndir_path=/mnt/bad\n"
    system = scratch(conf).connect()
    system.create_vm("work", template="fedora-23")
    assert "cannot be imported" in system.pool_info("bad")["problems"][-1]
    assert system.pool_info("default")["problems"] == []
    with pytest.raises(StoragePoolException, match="pool more: driver broken cannot be imported"):
        system.add_pool("more", driver="broken", dir_path="/mnt/more")


@pytest.mark.parametrize("value", ["their_driver:Pool", "their_driver"])
def test_an_installed_package_brings_a_driver(package, scratch, value):
    path = package("theirs", value, DRIVER)
    assert finding.describe_drivers()["theirs"] == {"options": OPTIONS, "from": str(path)}
    system = scratch().connect()
    system.add_pool("ssd", driver="theirs", dir_path="/mnt/ssd")
    system.create_vm("work", template="fedora-23", pool="ssd")
    assert system.verify_vm("work") == []


LOOSE = """
from qubes_storage.drivers import xen

class Pool(xen.Pool):
    def __init__(self, name, *_, dir_path: str, **rest):
        super().__init__(name, dir_path=dir_path)
        self.rest = rest
"""


def test_a_driver_may_take_any_option(folder, scratch):
    (folder / "loose.py").write_text(LOOSE)
    assert finding.describe_drivers()["loose"]["options"] == {"dir_path": {"type": "str"}}
    system = scratch().connect()
    system.add_pool("ssd", driver="loose", dir_path="/mnt/ssd", colour="blue")
    assert system.get_pool("ssd").rest == {"colour": "blue"}


def test_a_driver_that_is_no_class_of_python_is_listed_without_options(package):
    package("built", "built_in:Pool", "Pool = dict\n")
    assert finding.describe_drivers()["built"] == {"options": {}, "from": "built_in:Pool"}


def test_packages_are_found_as_python_3_9_tells_of_them(package, monkeypatch):
    path = package("theirs", "old_driver:Pool", DRIVER)
    points = importlib.metadata.entry_points
    told = {finding.GROUP: list(points(group=finding.GROUP))}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: told)
    assert finding.describe_drivers()["theirs"] == {"options": OPTIONS, "from": str(path)}
    told.clear()
    assert "theirs" not in finding.list_drivers()


def test_a_package_that_others_may_write_is_not_imported(package):
    path = package("theirs", "open_driver:Pool", DRIVER)
    path.chmod(0o666)
    assert "others than root may write" in finding.describe_drivers()["theirs"]["problem"]
    assert "open_driver" not in sys.modules


def test_no_package_takes_the_name_of_a_file(package):
    package("xen", "false_driver:Pool", DRIVER)
    assert finding.load_driver("xen").__module__ == "qubes_storage.drivers.xen"
    assert "false_driver" not in sys.modules
