"""What all tests share: the core on the path, and machines to work on."""

import pathlib
import shutil
import sys
import tempfile

import pytest

TREE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "_utils"))

from tests.r32.machine import Machine  # noqa: E402


@pytest.fixture
def root(tmp_path):
    """The root of a machine as an installed dom0 has it, before anyone declares a pool."""
    path = tmp_path / "root"
    for name in ("etc/qubes", "var/lib/qubes", "opt", "mnt"):
        (path / name).mkdir(parents=True)
    return path


@pytest.fixture
def scratch():
    """``scratch(conf, template)``: R3.2's scratch system, where any user can reach it."""
    made = []

    def make(*args, **kwargs):
        place = pathlib.Path(tempfile.mkdtemp(prefix="qubes-storage-"))
        made.append(place)
        place.chmod(0o755)
        (place / "root").mkdir(mode=0o755)
        return Machine(place / "root", *args, **kwargs)

    yield make
    for place in made:
        shutil.rmtree(place)
