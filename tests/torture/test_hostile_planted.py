"""
Whatever lies in a pool in place of what an operation expects there, nothing outside is touched.

Each operation is run with each kind of thing in each place that it uses or may use: the
directories, images and temporary names of its VMs. It is done, or it fails with an error that
names pool or VM, path and cure.
"""

import itertools
import os
import re
import signal

import pytest
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import LIB
from tests.torture import strace
from tests.torture.operations import of_driver
from tests.torture.planting import KINDS, MARKERS, POOLS, SUBDIRS, TEMPORARY, Intruder

pytestmark = pytest.mark.usefixtures("tracing")
CURE = re.compile(r"; |: .*: .*|qubes_\w+\.\w+")


@pytest.fixture(scope="module")
def world(shared_world):
    return shared_world


@pytest.fixture(scope="module")
def intruder(world):
    return Intruder(world)


def used(world, operation):
    """The paths of the machine in the pools that an operation uses, or may use after a dead run."""
    world.restore()
    base = os.fsencode(world.machine.root)
    calls = strace._traced(lambda: operation.run(world.connect(), world))[1]
    found = {f"{LIB}/vm-kernels", f"{LIB}/qubes.xml", f"{LIB}/.qubes.xml.new"}
    for path in {os.fsdecode(path[len(base) :]) for call in calls for path in call.paths}:
        pool = next((pool for pool in POOLS if path.startswith(f"{pool}/")), None)
        parts = path[len(pool) + 1 :].split("/") if pool else [""]
        if parts[0] not in SUBDIRS:
            continue
        found.add(f"{pool}/{parts[0]}")
        if len(parts) == 1:
            continue
        name = re.sub(r"^\.(.+)\.(creating|removing|moving|new)$", r"\1", parts[1])
        vmdir = f"{pool}/{parts[0]}/{name}"
        found.add(vmdir)
        found.update(f"{pool}/{parts[0]}/{mark.format(name)}" for mark in MARKERS)
        found.update(f"{vmdir}/{temporary}" for temporary in TEMPORARY)
        if len(parts) > 2 and parts[1] == name:
            found.add(f"{vmdir}/{parts[2]}")
    return sorted(found)


def attempt(world, operation):
    """An operation in a child that waits for nothing for ever."""

    def run():
        signal.alarm(60)
        return operation.run(world.connect(), world)

    return strace.run(run)


def problems(ending, intruder):
    """What is wrong with how a run ended: it is done or refused clearly, all outside as it was."""
    found = [f"outside: {changes}" for changes in [intruder.changes()] if changes]
    if ending.error is None:
        return found
    message = str(ending.error)
    if not isinstance(ending.error, StoragePoolException):
        found.append(" | ".join(ending.traceback.splitlines()[-9:]))
    elif not re.search(r"VM \w|pool \w|qubes\.xml|storage\.conf", message):
        found.append(f"names no pool, VM or path: {message}")
    elif not CURE.search(message) or "/proc/self" in message:
        found.append(f"names no cure: {message}")
    return found


def plants(world, operation, everything, counter):
    """``(path, kind)`` of all that can be planted, or of every 29th."""
    for path in used(world, operation):
        for kind in KINDS:
            if path == f"{LIB}/qubes.xml" and kind == "hard link":
                continue  # the registry is read whatever else it is called
            if everything or not next(counter) % 29:
                yield path, kind


def test_nothing_outside_is_touched(world, intruder, everything, figures):
    done = refused = 0
    wrong = []
    counter = itertools.count()
    for operation in of_driver(world.driver)[:: 1 if everything else 12]:
        for path, kind in plants(world, operation, everything, counter):
            world.restore()
            if not intruder.plant(path, kind):
                continue
            ending = attempt(world, operation)
            found = problems(ending, intruder)
            wrong += [f"{operation}, {kind} at {path}: {problem}" for problem in found]
            done, refused = done + (ending.error is None), refused + (ending.error is not None)
    figures[f"things planted, {world.driver}"] += done + refused
    assert not wrong, "\n".join(wrong)
    assert done
    assert refused
