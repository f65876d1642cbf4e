"""A full disk for real, at every level of fullness; one out of inodes; one that is read-only."""

import collections

import pytest

from tests.torture import operations, small

KIB = 1024
SOME = ("create copy", "migrate near, keep", "pool add", "commit")


@pytest.fixture(scope="module", params=operations.DRIVERS)
def machine(request):
    there = small.made(request.param)
    yield there
    there.close()


def chosen(there, everything):
    """The operations to walk."""
    found = operations.of_driver(there.driver)
    return [each for each in found if everything or each.name in SOME]


def levels(everything):
    """Bytes to leave free: every block, or some."""
    if everything:
        yield from range(0, 64 * KIB, 4 * KIB)
        yield from range(64 * KIB, 1024 * KIB, 64 * KIB)
        yield from range(1024 * KIB, 9 * 1024 * KIB, 1024 * KIB)
    else:
        yield from (0, 12 * KIB, 64 * KIB, 8192 * KIB)


def test_each_operation_on_a_full_disk_is_done_whole_or_not_at_all(machine, everything):
    told = collections.Counter()
    for operation in chosen(machine, everything):
        machine.restore()
        trial = small.Trial(machine, operation)
        in_a_row = 0
        for free in levels(everything):
            machine.restore()
            with machine.with_free(free):
                done = trial.attempt()
            trial.check(done, f"{free} bytes free")
            told[done] += 1
            in_a_row = in_a_row + 1 if done else 0
            if in_a_row == 3:
                break
    print(f"{machine.driver} on {machine.kind}: {told[False]} refused, {told[True]} done")
    assert told[True]
    assert told[False]


def test_each_operation_on_a_read_only_disk_is_refused(machine, everything):
    for operation in chosen(machine, everything):
        machine.restore()
        trial = small.Trial(machine, operation)
        with machine.read_only():
            done = trial.attempt()
        assert not done, operation
        trial.check(done, "read-only")


def test_each_operation_without_inodes_is_done_whole_or_not_at_all(everything):
    told = collections.Counter()
    machine = small.made("xen", "-N400")
    try:
        for operation in chosen(machine, everything):
            machine.restore()
            trial = small.Trial(machine, operation)
            done = False
            for count in range(100):
                machine.restore()
                with machine.with_inodes(count):
                    done = trial.attempt()
                trial.check(done, f"{count} inodes free")
                told[done] += 1
                if done:
                    break
            assert done, operation
    finally:
        machine.close()
    print(f"{told[False]} refused, {told[True]} done")
    assert told[False]
