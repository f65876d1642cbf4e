"""A full disk for real, at every level of fullness; one out of inodes; one that is read-only."""

import pytest

from tests.torture import operations, small

KIB = 1024
SOME = {
    small.OneDisk: ("create copy", "migrate near, keep", "pool add", "commit"),
    small.PoolDisk: ("migrate from elsewhere", "pool add"),
}


@pytest.fixture(
    scope="module",
    params=[(disk, driver) for disk in SOME for driver in operations.DRIVERS],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def machine(request):
    there = small.made(*request.param)
    yield there
    there.close()


def chosen(there, everything):
    """The operations to walk."""
    found = operations.of_driver(there.driver)
    return [each for each in found if everything or each.name in SOME[type(there)]]


def levels(everything):
    """Bytes to leave free: every block, or some."""
    if everything:
        yield from range(0, 64 * KIB, 4 * KIB)
        yield from range(64 * KIB, 1024 * KIB, 64 * KIB)
        yield from range(1024 * KIB, 9 * 1024 * KIB, 1024 * KIB)
    else:
        yield from (0, 12 * KIB, 64 * KIB, 8192 * KIB)


def count(figures, what, told):
    """Add how many were refused and done."""
    figures[f"{what}: refused whole"] += told[False]
    figures[f"{what}: done"] += told[True]


def test_each_operation_on_a_full_disk_is_done_whole_or_not_at_all(machine, everything, figures):
    told = {False: 0, True: 0}
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
    count(figures, f"{machine.what} is full, {machine.driver}", told)
    assert told[True]
    assert told[False]


def test_each_operation_on_a_read_only_disk_is_refused_or_needs_none_of_it(
    machine, everything, figures
):
    told = {False: 0, True: 0}
    for operation in chosen(machine, everything):
        machine.restore()
        trial = small.Trial(machine, operation)
        with machine.read_only():
            done = trial.attempt()
        trial.check(done, "read-only")
        told[done] += 1
    count(figures, f"{machine.what} is read-only, {machine.driver}", told)
    assert told[False]
    assert not told[True] or type(machine) is small.PoolDisk


def test_each_operation_without_inodes_is_done_whole_or_not_at_all(everything, figures):
    told = {False: 0, True: 0}
    machine = small.made(small.OneDisk, "xen", "-N400")
    try:
        for operation in chosen(machine, everything):
            machine.restore()
            trial = small.Trial(machine, operation)
            done = False
            for inodes in range(100):
                machine.restore()
                with machine.with_inodes(inodes):
                    done = trial.attempt()
                trial.check(done, f"{inodes} inodes free")
                told[done] += 1
                if done:
                    break
            assert done, operation
    finally:
        machine.close()
    count(figures, "no inodes, xen", told)
    assert told[False]
