"""
The Pool that a driver extends, and how a section of storage.conf becomes one.

:py:mod:`~qubes_storage.finding` says where a driver's class comes from, docs/drivers.md how one is
written.
"""

import contextlib
import os

from qubes_storage import files, image, owning
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.finding import list_drivers, load, load_driver, schema
from qubes_storage.values import normalise
from qubes_storage.vm import SUBDIRS

CONF = "/etc/qubes/storage.conf"
__all__ = ["Pool", "list_drivers", "load", "make_pool", "pool_class", "schema"]
_NOT_OPTIONS = ("driver", "class")
defaults = {"pool_config": {"dir_path": "/var/lib/qubes"}}


class Pool:
    """
    A directory of images. A driver overrides only what it does otherwise.

    **What a driver has to say**: its options, as keyword-only arguments of ``__init__`` with their
    types (``str``, ``int``, ``bool``) and defaults; storage.conf's texts arrive as these types.
    Making the object touches nothing, for it is also made to look: :py:meth:`missing` tells which
    directories it lacks, :py:meth:`create` makes exactly those, :py:meth:`check_setup` refuses a
    place that will not do.

    **What it may do better**: make, clone and resize an image, make a VM's directory, keep
    revisions, tell usage, verify. Each has a working default here.

    Sizes are bytes. ``path`` is to be opened as it is; ``fd`` is an open directory of a VM, and
    names are those of files in it: ``root.img``, ``private.img``, ``volatile.img``,
    ``root-cow.img``. Nothing that is there is ever written over (FileExistsError). An OSError is
    told to the user with VM and path; a StoragePoolException as it is, so it names pool, path and
    cure. Group and mode are set, and files synced, by the caller.

    **Order of calls**: for a pool ``missing``, ``check_setup`` (looking), ``create``,
    ``check_setup`` (trying out). For a VM, under the lock: ``make_vmdir``, then for each image
    ``create_image`` or ``clone_image``, then ``resize_image`` if it is to be larger; the directory
    is then renamed into its place, and the registry written last.
    """

    root = "/"  # where the machine's / lies
    can_revisions = False  # whether snapshot, revisions and revert do anything
    revisions_to_keep = 0

    def __init__(self, name, *, dir_path: str):
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
                waits_for=self._made_if(err),
            ) from err

    def open_subdir(self, subdir):
        """A handle of the directory for a class of VMs."""
        with files.closing(self.open()) as fd:
            try:
                return files.open_subdir(fd, subdir)
            except OSError as err:
                path = os.path.join(self.dir_path, subdir)
                waits_for = self._made_if(err)
                cure = "make it" if waits_for else "move what is there away, and make it"
                raise StoragePoolException(
                    f"pool {self.name}: {path}: {err.strerror}; {cure} with qubes_pool.set"
                    f" {self.name}",
                    waits_for,
                ) from err

    def _made_if(self, err):
        """What is waited for: a directory that is missing is made with its pool, no other is."""
        return [("pool", self.name)] if isinstance(err, FileNotFoundError) else ()

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
        made = {}  # handles, so that the rest is made in what was made
        with contextlib.ExitStack() as stack:
            for path in self.missing():
                parent, name = os.path.split(path.rstrip("/"))
                try:
                    if parent not in made:
                        made[parent] = files.open_dir(self.root, parent)
                        stack.callback(os.close, made[parent])
                    made[path.rstrip("/")] = fd = owning.place_dir(made[parent], name)
                    stack.callback(os.close, fd)
                except OSError as err:
                    raise StoragePoolException(
                        f"pool {self.name}: cannot make {path}: {err.strerror}; make {parent}, or"
                        " mount it, first"
                    ) from err

    def check_setup(self, fd, try_out):
        """
        Refuse a directory, open as ``fd``, whose filesystem will not do for the pool.

        ``try_out`` allows to write and take away again; else nothing is written. Where the pool's
        directory is still to be made, ``fd`` is the one that it will be made in.
        """

    def make_vmdir(self, fd, name, like=None, keep=()):
        """
        Make the directory ``name`` of a VM in the open directory ``fd``; returns a handle of it.

        ``like`` is the open directory of a VM in a pool of the same class of which the images
        named in ``keep`` are to be copied. A driver may bring them along here, and then no
        :py:meth:`clone_image` is asked for them; anything else is not to be there.
        """
        del like, keep
        return owning.make_dir(fd, name)

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

    def snapshot(self, fd, names):
        """Keep images as they are as revisions; returns ``{name: revision}`` of those kept."""
        del fd, names
        return {}

    def revisions(self, fd, name):
        """The revisions of an image, the oldest first, by the names :py:meth:`revert` takes."""
        del fd
        raise NotSupported(
            f"pool {self.name}: its driver keeps no revisions ({name}); migrate the VM to a pool"
            " of driver reflink or btrfs, or clone it beforehand"
        )

    def revert(self, fd, name, revision):
        """
        Have an image be as it was in a revision; what it holds now becomes a revision.

        The image never shrinks: it keeps the size that it has. A crash leaves it as it was or as it
        is to be. The caller sets group and mode of it and of what :py:meth:`owns` names.
        """
        self.revisions(fd, name)

    def verify(self, fd):
        """What is wrong with the files of a VM, besides what is wrong anywhere, as sentences."""
        del fd
        return []

    def owns(self, name):
        """Whether a file of that name in a VM's directory is the driver's own, as a revision."""
        del name
        return False

    def usage(self):
        """``{size, used, free}`` of the pool's filesystem in bytes."""
        with files.closing(self.open()) as fd:
            found = os.fstatvfs(fd)
        unit = found.f_frsize
        used = (found.f_blocks - found.f_bfree) * unit
        return {"size": found.f_blocks * unit, "used": used, "free": found.f_bavail * unit}


def pool_class(name, config):
    """The class of a pool from what its section says: ``class``, else ``driver``."""
    if "class" in config:
        return load(config["class"], name)
    if "driver" in config:
        return load_driver(config["driver"], name)
    raise StoragePoolException(
        f"pool {name}: has neither driver nor class in {CONF}; add driver = xen"
    )


def in_force(name, config):
    """The options that the class of a pool gets: the section's, and R3.2's for ``default``."""
    options = {k: v for k, v in config.items() if k not in _NOT_OPTIONS}
    if name == "default":
        options = {**defaults["pool_config"], **options}
    return options


def is_pool(klass):
    """Whether what storage.conf names is a class of pools; nothing else is ever called."""
    return isinstance(klass, type) and issubclass(klass, Pool)


def make_pool(name, config, root="/"):
    """
    The pool of a section; raises :py:class:`StoragePoolException` that names what is wrong.

    An option nobody takes, one that is missing and one of the wrong type are named.
    """
    klass, options = checked(name, config)
    if not is_pool(klass):
        raise NotSupported(
            f"pool {name}: its {_word(config)} is no qubes_storage.Pool, so it can hold no VM here;"
            " derive it from qubes_storage.Pool"
        )
    try:
        pool = klass(name, **options)
    except StoragePoolException:
        raise
    except (Exception, SystemExit) as err:
        raise StoragePoolException(
            f"pool {name}: {what_is(config)} refuses its options: {type(err).__name__}: {err}"
        ) from err
    if getattr(pool, "name", None) != name or not isinstance(getattr(pool, "dir_path", 0), str):
        raise StoragePoolException(
            f"pool {name}: {what_is(config)} sets no name and dir_path; have its __init__ call"
            " super().__init__(name, dir_path=dir_path)"
        )
    if not is_place(pool.dir_path):
        raise InvalidInput(
            f"pool {name}: dir_path {pool.dir_path!r} is not an absolute path; write one such"
            " as /mnt/ssd/qubes"
        )
    pool.root = root
    return pool


def declared_pool(name, config, root="/"):
    """The same; None for a ``class`` that is no Pool, which can be declared and hold no VM."""
    if not callable(pool_class(name, config)):
        raise InvalidInput(
            f"pool {name}: {what_is(config)} is no class; write one such as package.module.Class"
        )
    if "class" in config and not is_pool(checked(name, config)[0]):
        return None
    return make_pool(name, config, root)


def checked(name, config):
    """``(class, its options in their types)`` of a section."""
    klass = pool_class(name, config)
    options = in_force(name, config)
    types, anything, needed = schema(klass)
    what = what_is(config)
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
    return klass, typed


def _word(config):
    return "class" if "class" in config else "driver"


def what_is(config):
    """What a section says that the pool is of, in words."""
    return f"{_word(config)} {config[_word(config)]}"


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
