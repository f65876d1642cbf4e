"""The catalogue: each operation does something on the machine, and a second run of it nothing."""

import pytest

from tests.torture.operations import OPERATIONS, of_driver


@pytest.mark.usefixtures("tracing")
def test_each_operation_is_done_once_and_then_changes_nothing(world):
    base = world.tree()
    for operation in of_driver(world.driver):
        world.restore()
        assert world.tree() == base
        changes = operation.run(world.connect(), world)
        assert changes, operation
        done = world.tree()
        assert done != base, operation
        if not operation.verb:
            assert operation.run(world.connect(), world) == {}, operation
            assert world.tree() == done, operation


def test_nothing_is_called_alike():
    assert all(name == str(operation) for name, operation in OPERATIONS.items())
