"""
Looking while others work: no lock is taken, and yet what is seen is of one moment.

A call sees one version of each file from its beginning to its end. An error that came of the work
of others is not told: if a file was replaced meanwhile, or if disk and registry are out of step
while somebody holds the lock, the call looks again.
"""

import functools
import threading
import time

from qubes_storage import registry
from qubes_storage.exc import OutOfStep, StoragePoolException

_PATIENCE = 2  # s; whoever is between the disk and the registry is there for the time of a save
_PAUSE = 0.01
_IN_BETWEEN = (OSError, OutOfStep)  # what comes of it that somebody is between disk and registry


def looking(method):
    """A method that sees one version of each file; for whatever reads without the lock."""

    @functools.wraps(method)
    def look(self, *args, **kwargs):
        if self._seen.versions is not None:
            return method(self, *args, **kwargs)
        deadline = time.monotonic() + _PATIENCE
        again = True  # once: who was between disk and registry may be done before it is asked for
        while True:
            self._seen.versions, self._seen.real = {}, {}
            try:
                return method(self, *args, **kwargs)
            except (OSError, StoragePoolException) as err:
                passes = self._may_pass(err)
                once = again and isinstance(err, _IN_BETWEEN)
                if time.monotonic() > deadline or not (passes or once):
                    raise
                again = again and passes
            finally:
                self._seen.versions = None
            time.sleep(_PAUSE)

    return look


class _Seen(threading.local):
    versions = None  # {path: what is loaded of it}, while a call looks
    real = None  # {directory: where it really lies}, likewise


class Looking:
    """The part of :py:class:`~qubes_storage.system.System` that sees one version of each file."""

    def __init__(self, root):
        self.root = root
        self._seen = _Seen()

    def _version(self, path):
        """What is loaded of a file: its newest version, or the one that this call sees."""
        if self._seen.versions is None:
            return self._newest(path)
        if path not in self._seen.versions:
            self._seen.versions[path] = self._newest(path)
        return self._seen.versions[path]

    def _may_pass(self, err):
        """Whether an error may come of what others are doing right now."""
        seen = self._seen.versions
        if any(self._newest(path) is not seen[path] for path in seen):
            return True
        return isinstance(err, _IN_BETWEEN) and registry.others_work(self.root)
