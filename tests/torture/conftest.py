"""What the torture tests share: how far to go."""

import os

import pytest


@pytest.fixture(scope="session")
def everything():
    """Whether every step is walked, as ``make torture`` asks, or the part that CI has time for."""
    return bool(os.environ.get("TORTURE"))
