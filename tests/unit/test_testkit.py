"""Our drivers and the example of docs/ pass what every driver has to, on real filesystems."""

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import TREE
from tests.unit.test_image import mount

sys.path.insert(0, str(TREE / "packaging"))

from qubes_storage.finding import load_driver
from qubes_storage_testkit import DriverTests

PAIRS = [
    ("xen", "ext4"), ("xen", "xfs"), ("xen", "btrfs"), ("example", "ext4"), ("example", "btrfs"),
    ("reflink", "xfs"), ("reflink", "btrfs"), ("btrfs", "btrfs"),
]  # fmt: skip


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """``disks(kind)``: a filesystem of a kind, mounted once."""
    mounted = {}

    def get(kind):
        if kind not in mounted:
            place = tmp_path_factory.mktemp(kind) / "mnt"
            place.mkdir()
            mount(kind, place)
            mounted[kind] = place
        return mounted[kind]

    yield get
    for place in mounted.values():
        subprocess.run(["umount", place], check=True)


def driver_class(name):
    if name != "example":
        return load_driver(name)
    path = TREE / "docs/example_driver.py"
    assert len(path.read_text().splitlines()) < 40
    spec = importlib.util.spec_from_file_location("example_driver", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Pool


class TestOurs(DriverTests):
    @pytest.fixture(params=PAIRS, ids="-".join)
    def pool(self, request, disks):
        driver, kind = request.param
        parent = disks(kind) / request.node.name.replace("/", "-")[:200]
        parent.mkdir()
        return driver_class(driver)("test", dir_path=str(parent / "pool"))
