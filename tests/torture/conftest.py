"""What the torture tests share: how far to go."""

import contextlib

import pytest

from tests.functional.conftest import (  # noqa: F401
    loaders,
    machine,
    minion_config,
    minion_opts,
    modules,
    run,
    session_loaders,
    session_run,
    states,
    testmode,
)
from tests.torture import operations, strace
from tests.torture.planting import share
from tests.torture.salted import Salted
from tests.torture.world import World

pytest.register_assert_rewrite("tests.torture.small")  # so that it tells what differs


@pytest.fixture(scope="session")
def everything():
    """Whether every step is walked, as ``make torture`` asks, or the part that CI has time for."""
    return operations.EVERYTHING


@pytest.fixture(scope="session")
def tracing():
    """Skips, with the reason, where no child can be traced."""
    reason = strace.missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def salted(session_loaders, machine):  # noqa: F811
    """States as a run of Salt calls them; ``salted.on(root)`` is the machine."""
    return Salted(session_loaders.opts, machine)


@pytest.fixture(scope="session")
def salted_r4(session_loaders, machine):  # noqa: F811
    """The same, over the Admin API of the daemon that listens there."""
    settings = {
        "qubes_storage.backend": "admin",
        "qubes_storage.socket": str(machine / "qubesd.sock"),
    }
    return Salted(session_loaders.opts, machine, **settings)


@contextlib.contextmanager
def _built(driver):
    made = World(operations.FILESYSTEMS[driver])
    try:
        operations.build(made, driver)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session", params=operations.DRIVERS)
def built(request):
    """The machine of the catalogue, for each driver on a filesystem that suits it."""
    with _built(request.param) as made:
        yield made


@pytest.fixture
def world(built):
    """The same, as it was built."""
    built.restore()
    return built


@pytest.fixture(scope="module", params=operations.DRIVERS)
def shared_world(request):
    """Such a machine of a module's own, its pools open to whom they should not be."""
    with _built(request.param) as made:
        share(made)
        yield made
