"""What all tests share: the core on the path, and machines to work on."""

import pathlib
import sys

import pytest

TREE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "_utils"))


@pytest.fixture
def root(tmp_path):
    """The root of a machine as an installed dom0 has it, before anyone declares a pool."""
    path = tmp_path / "root"
    for name in ("etc/qubes", "var/lib/qubes", "opt", "mnt"):
        (path / name).mkdir(parents=True)
    return path
