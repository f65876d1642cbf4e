"""What a driver's method raises is told of its pool, and ends no other's work."""

import contextlib

from qubes_storage.exc import OutOfStep, StoragePoolException


@contextlib.contextmanager
def of_driver(pool, method):
    """Tell what a method of a driver raises with pool, path and cure; its own words as they are."""
    who = f"pool {pool.name}: {pool.dir_path}: "
    try:
        yield
    except StoragePoolException:
        raise
    except OSError as err:
        raise OutOfStep(f"{who}{err.strerror or err}; mend it and try again") from err
    except (Exception, SystemExit) as err:
        raise StoragePoolException(
            f"{who}{method} of its driver fails: {type(err).__name__}: {err}; mend the driver"
        ) from err
