"""What all tests share: the core on the path, and machines to work on."""

import collections
import os
import pathlib
import shutil
import sys
import tempfile

import pytest
import salt._logging.impl

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
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
        place = pathlib.Path(tempfile.mkdtemp(prefix="qubes-storage-", dir=memory))
        made.append(place)
        place.chmod(0o755)
        (place / "root").mkdir(mode=0o755)
        return Machine(place / "root", *args, **kwargs)

    yield make
    for place in made:
        shutil.rmtree(place)


@pytest.fixture(scope="session", autouse=True)
def no_log_kept_for_later():
    """Salt keeps what it logs until a command line sets logging up, which never comes here."""
    salt._logging.impl.shutdown_temp_handler()


@pytest.fixture(scope="session")
def salt_factories_config(tmp_path_factory):
    """A root_dir of our own: the scripts in the shared one name another virtual environment."""
    return {"root_dir": str(tmp_path_factory.mktemp("salt"))}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """What a test has printed of text that is none can be sent from one process to another."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


_FIGURES = pytest.StashKey()


def _figures(config):
    return config.stash.setdefault(_FIGURES, collections.Counter())


@pytest.fixture(scope="session")
def figures(request):
    """``{what: how many}``, shown at the end of the run: what docs/reliability.md quotes."""
    return _figures(request.config)


def pytest_sessionfinish(session):
    """One of several processes tells its figures to that which shows them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = dict(_figures(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _figures(node.config).update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_terminal_summary(terminalreporter, config):
    for what, count in sorted(_figures(config).items()):
        terminalreporter.write_line(f"figures: {what}: {count:,}")
