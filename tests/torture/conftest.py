"""What the torture tests share: how far to go."""

import os

import pytest

from tests.torture import operations, strace
from tests.torture.world import World


@pytest.fixture(scope="session")
def everything():
    """Whether every step is walked, as ``make torture`` asks, or the part that CI has time for."""
    return bool(os.environ.get("TORTURE"))


@pytest.fixture(scope="session")
def tracing():
    """Skips, with the reason, where no child can be traced."""
    reason = strace.missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=operations.DRIVERS)
def world(request):
    """The machine of the catalogue, for each driver on a filesystem that suits it."""
    made = World(operations.FILESYSTEMS[request.param])
    try:
        operations.build(made, request.param)
        yield made
    finally:
        made.close()
