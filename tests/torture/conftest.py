"""What the torture tests share: how far to go."""

import os

import pytest

from tests.torture import strace


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
