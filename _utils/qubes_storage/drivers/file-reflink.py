"""The driver reflink under R4's name for it."""

from qubes_storage.drivers.reflink import Pool

__all__ = ["Pool"]
