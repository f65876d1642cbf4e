"""
Where a driver's class comes from, and which options it takes.

``driver = NAME`` is the class ``Pool`` in the file NAME.py of ``qubes_storage/drivers``, whoever
put it there, else what an installed package has as NAME in the entry point group
``qubes_storage.drivers``. ``class = a.b.C`` is any class that Python can import, and beats both.
A driver's options are the keyword-only arguments of its ``__init__``.
"""

import importlib
import importlib.machinery
import importlib.metadata
import inspect
import os
import pkgutil

from qubes_storage import drivers, trust
from qubes_storage.exc import StoragePoolException

GROUP = "qubes_storage.drivers"
# R3.2's own names for the classes that are the bundled driver xen here.
_R32_CLASSES = {"qubes.storage.xen.XenStorage": "xen", "qubes.storage.xen.XenPool": "xen"}


def _in_files():
    """``{name: path}`` of the drivers in ``qubes_storage/drivers``."""
    names = {module.name for module in pkgutil.iter_modules(drivers.__path__)}
    return {name: path for name in names if (path := _file_of(name))}


def _file_of(name):
    """
    The file of a driver in ``qubes_storage/drivers``, or None.

    Only what Python imports from a plain NAME.py is one: of a package, compiled or machine code
    nobody would look at the files.
    """
    spec = importlib.machinery.PathFinder.find_spec(f"{drivers.__name__}.{name}", drivers.__path__)
    path = spec.origin if spec else None
    return path if path and name != "__init__" and os.path.basename(path) == f"{name}.py" else None


def _in_packages():
    """``{name: entry point}`` of the drivers that installed packages bring."""
    try:
        found = importlib.metadata.entry_points(group=GROUP)
    except TypeError:  # Python 3.9
        found = importlib.metadata.entry_points().get(GROUP, ())
    return {point.name: point for point in found}


def list_drivers():
    """The names of the drivers there are."""
    return sorted({*_in_files(), *_in_packages()})


def describe_drivers():
    """
    ``{name: {"options": {option: {"type", "default"}}, "from": path}}`` of the drivers there are.

    An option without a default has to be given, and has no ``default`` here. A driver that cannot
    be imported has no options but ``problem``, the reason.
    """
    places = {name: point.value for name, point in _in_packages().items()}
    places.update(_in_files())
    found = {}
    for name, place in sorted(places.items()):
        try:
            klass = load_driver(name)
            found[name] = {"options": _options(klass), "from": _source(klass, place)}
        except StoragePoolException as err:
            found[name] = {"options": {}, "from": place, "problem": str(err)}
    return found


def _source(klass, place):
    """The file of a class of a package; that of a file is known."""
    try:
        return place if os.path.isabs(place) else inspect.getfile(klass)
    except TypeError:
        return place


def _options(klass):
    found = {}
    try:
        parameters = list(inspect.signature(klass).parameters.values())[1:]
    except (TypeError, ValueError):
        return found  # of no Python class: it takes what it takes
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        given = parameter.annotation
        type_ = "str" if given is parameter.empty else getattr(given, "__name__", str(given))
        found[parameter.name] = {"type": type_}
        if parameter.default is not parameter.empty:
            default = parameter.default
            plain = default is None or isinstance(default, (bool, int, str))
            found[parameter.name]["default"] = default if plain else str(default)
    return found


def load_driver(driver, pool=None):
    """The class of a driver's name; the error of one that cannot be had names the reason."""
    who = f"pool {pool}: " if pool else ""
    path = _file_of(driver)
    point = None if path else _in_packages().get(driver)
    if not (path or point):
        raise StoragePoolException(
            f"{who}unknown driver {driver!r}; there are {', '.join(list_drivers())}; for"
            " any other write class = package.module.Class of one that Python can import"
        )
    try:
        if path:
            trust.check_driver(path, f"{who}driver {driver}: ")
            return importlib.import_module(f"{drivers.__name__}.{driver}").Pool
        module, _, name = point.value.partition(":")
        trust.check_module(module.strip(), f"{who}driver {driver}: ")
        return getattr(importlib.import_module(module.strip()), name.strip() or "Pool")
    except StoragePoolException:
        raise
    except (Exception, SystemExit) as err:
        raise StoragePoolException(
            f"{who}driver {driver} cannot be imported: {type(err).__name__}: {err}; mend it, or"
            " name another driver"
        ) from err


def load(string, pool=None):
    """
    The class of a dotted path, as R3.2's ``load``; what is not a string comes back as it is.

    Nothing is imported from a file that others than root may write: see :py:mod:`trust`.
    """
    if not isinstance(string, str):
        return string
    if string in _R32_CLASSES:
        return load_driver(_R32_CLASSES[string], pool)
    module, _, name = string.rpartition(".")
    who = f"pool {pool}: " if pool else ""
    if not module or not all(part.isidentifier() for part in string.split(".")):
        raise StoragePoolException(
            f"{who}class {string!r} is no dotted path; write one such as package.module.Class"
        )
    trust.check_module(module, who)
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as err:
        raise StoragePoolException(
            f"{who}class {string} cannot be imported: {type(err).__name__}: {err}; install it where"
            " this Python finds it"
        ) from err


def schema(klass):
    """
    ``({option: type or None}, whether it takes any other, the options it must have)`` of a class.
    """
    try:
        parameters = list(inspect.signature(klass).parameters.values())
    except (TypeError, ValueError):
        return {}, True, set()
    types, anything, needed = {}, False, set()
    for parameter in parameters[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            anything = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            given = parameter.annotation
            types[parameter.name] = {"bool": bool, "int": int}.get(given, given)
            if parameter.default is parameter.empty:
                needed.add(parameter.name)
    known = {k: t if t in (bool, int) else None for k, t in types.items()}
    return known, anything, needed
