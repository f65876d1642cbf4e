"""A second operation on what a kill in the first one left."""

import hashlib
import re

from qubes_storage.exc import StoragePoolException

from tests.torture import strace
from tests.torture.walking import need


def states(walk):
    """``[call, ...]``: one for each state of the disk that kills of an operation leave."""
    found = {}
    for call in walk.calls:
        walk.kill(call)
        found.setdefault(digest(walk.world), call)
    return list(found.values())


def digest(world):
    """A sum of all that is there; inode numbers in names differ and mean the same."""
    tree = {re.sub(r"/\d+(\.\d+)?$", "/INODE", p): e for p, e in world.tree().items()}
    return hashlib.sha256(repr(sorted(tree.items())).encode()).digest()


def check_pair(first, second, call):
    """
    The first operation is killed at a call, and the second made; then the first, and once more.

    Each may be refused, with an error that tells why: the other may have taken away what it needs.
    """
    first.kill(call)
    left = _strays(first)
    _make(second)
    first.check_whole(second, again=first.operation == second.operation)
    done = _make(first)
    if not done:
        _make(second)
    first.check_whole(second, again=True)
    if done and not first.operation.verb:
        need(first.act() == {}, "one more run of the first changes something")
    strays = _strays(first) - (set() if done else left)  # a run that is refused mends nothing
    need(not strays, "strays:", *strays)


def _strays(walk):
    return {path for path in walk.world.tree() if "/." in path}


def _make(walk):
    """Run an operation in a child; whether it was done, and not refused."""
    ending = strace.run(walk.act)
    need(not ending.killed, walk.operation, "died")
    if ending.error:
        told = f"{walk.operation}: {ending.traceback}"
        need(isinstance(ending.error, StoragePoolException), told)
        need(";" in str(ending.error) or "," in str(ending.error), "tells no cure:", told)
    return not ending.error
