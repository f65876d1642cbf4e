"""Our drivers and the example of docs/ pass what every driver has to, on real filesystems."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import TREE
from tests.unit.test_image import mount

sys.path.insert(0, str(TREE / "packaging"))

from qubes_storage.exc import InvalidInput
from qubes_storage.finding import load_driver
from qubes_storage_testkit import DriverTests

PAIRS = [
    ("xen", "ext4"), ("xen", "xfs"), ("xen", "btrfs"),
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


def new_place(request, disks, kind):
    """Where a test makes its pool."""
    parent = disks(kind) / request.node.name.replace("/", "-")[:200]
    parent.mkdir()
    return str(parent / "pool")


class TestOurs(DriverTests):
    @pytest.fixture(params=PAIRS, ids="-".join)
    def pool(self, request, disks):
        driver, kind = request.param
        return load_driver(driver)("test", dir_path=new_place(request, disks, kind))


class TestExample(DriverTests):
    keeps_holes = False

    @pytest.fixture(params=["ext4", "btrfs"])
    def pool(self, request, disks, monkeypatch):
        klass = example(monkeypatch)
        return klass("test", dir_path=new_place(request, disks, request.param), most=16)


def example(monkeypatch):
    path = TREE / "docs/example_driver.py"
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(str(path.parent))
    return importlib.import_module("example_driver").Pool


@pytest.mark.parametrize("most", ["0", "-1"])
def test_the_example_refuses_what_nobody_can_allocate(scratch, monkeypatch, most):
    example(monkeypatch)
    system = scratch().connect()
    options = {"class": "example_driver.Pool", "dir_path": "/mnt/pre", "most": most}
    for verb in (system.pool_diff, system.add_pool):
        with pytest.raises(InvalidInput, match=f"pool pre: most {most} is below 1; write"):
            verb("pre", **options)


MINE = """
import pytest
from qubes_storage.drivers import xen
from qubes_storage_testkit import DriverTests

class Pool(xen.Pool):
    def __init__(self, name, *, dir_path: str, stripes: int):
        super().__init__(name, dir_path=dir_path)
        self.count = stripes

    def usage(self):
        return {"size": 4, "used": 3}

class TestMine(DriverTests):
    @pytest.fixture
    def pool(self, tmp_path):
        return Pool("test", dir_path=str(tmp_path / "pool"), stripes=4)
"""


def test_what_a_driver_does_wrong_is_told_with_its_content(tmp_path):
    (tmp_path / "test_mine.py").write_text(MINE)
    words = ["pytest", "-p", "no:cacheprovider", "-k", "usage or keywords or whole", "test_mine.py"]
    env = {**os.environ, "PYTHONPATH": f"{TREE / '_utils'}:{TREE / 'packaging'}"}
    run = subprocess.run(
        [sys.executable, "-m", *words, f"--basetemp={tmp_path}/tmp"],
        cwd=tmp_path, env=env, check=False, capture_output=True, text=True,
    )  # fmt: skip
    told = "AssertionError: keep each option as an attribute of its name: stripes"
    assert run.stdout.count(f"E       {told}") == 2, run.stdout
    assert re.search("E +AssertionError: assert {'size', 'used'} >= {", run.stdout), run.stdout
