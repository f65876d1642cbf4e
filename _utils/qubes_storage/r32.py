"""R3.2's own calls that deal with classes which are no Pool of ours."""

import inspect

from qubes_storage.exc import StoragePoolException
from qubes_storage.pool import CONF, checked, is_pool, what_is


def dump(obj):
    """The dotted path of an object's class, as R3.2's ``dump``."""
    return obj.__module__ + "." + obj.__class__.__name__


def made_for(name, config, vm):
    """
    What a class that is no Pool makes for a VM, as R3.2's ``get_pool`` does: its first argument has
    to be ``vm``, as that of R3.2's own. None for anything else, which is not called.
    """
    klass, options = checked(name, config)
    if is_pool(klass) or not isinstance(klass, type) or _first_argument(klass) != "vm":
        return None
    try:
        return klass(vm, **options)
    except (Exception, SystemExit) as err:
        raise StoragePoolException(
            f"pool {name}: {what_is(config)} refuses its options: {type(err).__name__}: {err}; mend"
            f" them in {CONF}"
        ) from err


def _first_argument(klass):
    try:
        return next(iter(inspect.signature(klass).parameters), None)
    except (TypeError, ValueError):
        return None
