"""
What every driver has to do, as a pytest class. A driver's author subclasses it with one fixture::

    import pytest
    from mine import Pool
    from qubes_storage_testkit import DriverTests

    class TestMine(DriverTests):
        @pytest.fixture
        def pool(self, tmp_path):
            return Pool("test", dir_path=str(tmp_path / "pool"))

The pool is new and its directory is not there yet; its parent is, with a few hundred MiB free, and
becomes a machine's root for the tests of whole VMs. A driver that allocates more than is written
says ``keeps_holes = False`` in the class.
"""

import pytest

# Before it is imported: of an installed package pytest else tells only that something is not so.
pytest.register_assert_rewrite("qubes_storage_testkit.driver_tests")

from qubes_storage_testkit.driver_tests import DriverTests  # noqa: E402

__all__ = ["DriverTests"]
