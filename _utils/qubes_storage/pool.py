"""
The Pool that a driver extends, and how a section of storage.conf becomes one.

A driver is a class whose keyword-only arguments of ``__init__`` are its options: they are the
schema. ``driver = NAME`` is the class ``Pool`` in ``drivers/NAME.py``; ``class = a.b.C`` is any
class that Python can import, and beats ``driver``.
"""

import importlib
import inspect
import os
import pkgutil

from qubes_storage import drivers, files, image, trust
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.values import normalise
from qubes_storage.vm import SUBDIRS

CONF = "/etc/qubes/storage.conf"
# R3.2's own names for the classes that are the bundled driver xen here.
_R32_CLASSES = {"qubes.storage.xen.XenStorage": "xen", "qubes.storage.xen.XenPool": "xen"}
_NOT_OPTIONS = ("driver", "class")
defaults = {"pool_config": {"dir_path": "/var/lib/qubes"}}


class Pool:
    """
    A directory of images. A driver overrides only what it does otherwise.

    Making the object touches nothing: :py:meth:`missing` tells which directories it lacks and
    :py:meth:`create` makes exactly those.
    """

    root = "/"  # where the machine's / lies
    can_revisions = False

    def __init__(self, name, *, dir_path):
        self.name = name
        self.dir_path = dir_path

    def __fspath__(self):
        return self.dir_path

    def vmdir(self, vm):
        """The directory of a VM, as the machine sees it."""
        return os.path.join(self.dir_path, vm.klass.subdir, vm.dirname)

    def open(self):
        """A handle of the pool's directory, which may be a link."""
        try:
            return files.open_dir(self.root, self.dir_path)
        except OSError as err:
            raise StoragePoolException(
                f"pool {self.name}: {self.dir_path}: {err.strerror}; mount its disk, or make it"
                f" with qubes_pool.set {self.name}",
                waits_for=[("pool", self.name)],
            ) from err

    def open_subdir(self, subdir):
        """A handle of the directory for a class of VMs."""
        with files.closing(self.open()) as fd:
            try:
                return files.open_subdir(fd, subdir)
            except OSError as err:
                path = os.path.join(self.dir_path, subdir)
                raise StoragePoolException(
                    f"pool {self.name}: {path}: {err.strerror}; make it a directory with"
                    f" qubes_pool.set {self.name}",
                    waits_for=[("pool", self.name)],
                ) from err

    def open_vm(self, vm):
        """A handle of a VM's directory, or None where there is none."""
        try:
            with files.closing(self.open_subdir(vm.klass.subdir)) as fd:
                return files.open_subdir(fd, vm.dirname)
        except (OSError, StoragePoolException):
            return None

    def missing(self):
        """The directories that the pool lacks, outermost first."""
        try:
            fd = files.open_dir(self.root, self.dir_path)
        except FileNotFoundError:
            return [self.dir_path, *(os.path.join(self.dir_path, s) for s in SUBDIRS)]
        except OSError as err:
            raise StoragePoolException(
                f"pool {self.name}: dir_path {self.dir_path}: {err.strerror}; name a directory"
            ) from err
        with files.closing(fd):
            return [os.path.join(self.dir_path, s) for s in SUBDIRS if not files.exists(fd, s)]

    def create(self):
        """Make the directories that are missing; never a parent of the pool's own."""
        for path in self.missing():
            parent, name = os.path.split(path.rstrip("/"))
            try:
                with files.closing(files.open_dir(self.root, parent)) as fd:
                    os.close(files.make_dir(fd, name))
                    os.fsync(fd)
            except OSError as err:
                raise StoragePoolException(
                    f"pool {self.name}: cannot make {path}: {err.strerror}; make {parent}, or mount"
                    " it, first"
                ) from err

    def create_image(self, path, size):
        """Make an image of ``size`` bytes at ``path``, where there is nothing."""
        image.create(path, size)

    def clone_image(self, source, path):
        """
        Make ``path``, where there is nothing, a copy of the image open as ``source``.

        Returns True if they share blocks, so that nothing was copied that could differ.
        """
        return image.clone(source, path)

    def resize_image(self, path, size):
        """Grow an image to ``size`` bytes."""
        image.resize(path, size)

    def usage(self):
        """``{size, used, free}`` of the pool's filesystem in bytes."""
        with files.closing(self.open()) as fd:
            found = os.fstatvfs(fd)
        unit = found.f_frsize
        used = (found.f_blocks - found.f_bfree) * unit
        return {"size": found.f_blocks * unit, "used": used, "free": found.f_bavail * unit}


def list_drivers():
    """The names of the drivers there are: one a file in ``qubes_storage/drivers``."""
    return sorted(module.name for module in pkgutil.iter_modules(drivers.__path__))


def _load_driver(driver, pool):
    if driver not in list_drivers():
        raise StoragePoolException(
            f"pool {pool}: unknown driver {driver!r}; there are {', '.join(list_drivers())}; for"
            " any other write class = package.module.Class of one that Python can import"
        )
    try:
        return importlib.import_module(f"qubes_storage.drivers.{driver}").Pool
    except Exception as err:
        raise StoragePoolException(
            f"pool {pool}: driver {driver} cannot be imported: {type(err).__name__}: {err}"
        ) from err


def load(string, pool=None):
    """
    The class of a dotted path, as R3.2's ``load``; what is not a string comes back as it is.

    Nothing is imported from a file that others than root may write: see :py:mod:`trust`.
    """
    if not isinstance(string, str):
        return string
    if string in _R32_CLASSES:
        return _load_driver(_R32_CLASSES[string], pool)
    module, _, name = string.rpartition(".")
    who = f"pool {pool}: " if pool else ""
    if not module or not all(part.isidentifier() for part in string.split(".")):
        raise StoragePoolException(
            f"{who}class {string!r} is no dotted path; write one such as package.module.Class"
        )
    trust.check_module(module, who)
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as err:
        raise StoragePoolException(
            f"{who}class {string} cannot be imported: {type(err).__name__}: {err}; install it where"
            " this Python finds it"
        ) from err


def dump(obj):
    """The dotted path of an object's class, as R3.2's ``dump``."""
    return obj.__module__ + "." + obj.__class__.__name__


def pool_class(name, config):
    """The class of a pool from what its section says: ``class``, else ``driver``."""
    if "class" in config:
        return load(config["class"], name)
    if "driver" in config:
        return _load_driver(config["driver"], name)
    raise StoragePoolException(
        f"pool {name}: has neither driver nor class in {CONF}; add driver = xen"
    )


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


def in_force(name, config):
    """The options that the class of a pool gets: the section's, and R3.2's for ``default``."""
    options = {k: v for k, v in config.items() if k not in _NOT_OPTIONS}
    if name == "default":
        options = {**defaults["pool_config"], **options}
    return options


def make_pool(name, config, root="/"):
    """
    The pool of a section; raises :py:class:`StoragePoolException` that names what is wrong.

    An option nobody takes, one that is missing and one of the wrong type are named.
    """
    klass = pool_class(name, config)
    options = in_force(name, config)
    types, anything, needed = schema(klass)
    what = f"class {config['class']}" if "class" in config else f"driver {config['driver']}"
    unknown = sorted(k for k in options if k not in types and not anything)
    if unknown:
        raise InvalidInput(
            f"pool {name}: {what} takes no option {', '.join(unknown)}; it takes"
            f" {', '.join(sorted(types)) or 'none'}"
        )
    lacking = sorted(needed - set(options))
    if lacking:
        raise InvalidInput(f"pool {name}: {what} needs option {', '.join(lacking)}")
    typed = {
        k: normalise(k, v, types[k], f"pool {name}: {k}") if types.get(k) else v
        for k, v in options.items()
    }
    try:
        pool = klass(name, **typed)
    except StoragePoolException:
        raise
    except Exception as err:
        raise StoragePoolException(
            f"pool {name}: {what} refuses its options: {type(err).__name__}: {err}"
        ) from err
    if isinstance(pool, Pool):
        if not is_place(pool.dir_path):
            raise InvalidInput(
                f"pool {name}: dir_path {pool.dir_path!r} is not an absolute path; write one such"
                " as /mnt/ssd/qubes"
            )
        pool.root = root
    return pool


def is_place(path):
    """Whether a path of storage.conf says where something lies, whoever reads it, from wherever."""
    return path.startswith("/") and "\0" not in path


def pick(pools, name):
    """The section of a pool, or an error that names what there is."""
    if name not in pools:
        there = ", ".join(sorted(pools)) or "none"
        raise StoragePoolException(
            f"pool {name}: unknown; {CONF} has {there}; add it with qubes_pool.add or"
            " qubes_pool.present",
            waits_for=[("pool", name)],
        )
    return pools[name]
