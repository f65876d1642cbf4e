"""R4: what a declared pool needs, compared with what the daemon has."""

import os

from qubes_storage import files, guards
from qubes_storage.adminapi import check_pool_name, check_value, fresh_if_refused
from qubes_storage.declared import Declared
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.values import normalise

SUBDIRS = ("appvms", "vm-templates")  # what the drivers with a dir_path make in it
# Of all options the daemon lets only these be set on a pool that is there.
SETTABLE = ("revisions_to_keep", "ephemeral_volatile")
# The file-reflink driver takes it and never reports it back.
_ADD_ONLY = ("setup_check",)
TYPES = {
    "revisions_to_keep": int,
    "ephemeral_volatile": bool,
    "setup_check": bool,
    "snap_on_start_forensics": bool,
}
# The options that say where a pool lies; each driver needs those of them that it takes.
PLACE = ("dir_path", "volume_group", "thin_pool", "container", "conf_id")


def refuse_old_words(name, options):
    """Name the words of R4 for R3.2's ``driver: xen`` and ``class``."""
    for word in ("class", "driver"):
        value = options.get(word)
        if value is not None and (word == "class" or value == "xen"):
            raise NotSupported(
                f"pool {name}: {word} {value} is R3.2's; backend admin (R4) has driver"
                " file-reflink (images on btrfs or xfs), lvm_thin, zfs and file: declare one of"
                " them and its options"
            )


def check_revisions(value, driver, what):
    """A number of revisions that a driver can keep; the daemon takes ``abc`` from some."""
    most = {"file": 1, "linux-kernel": 0}.get(driver)
    if value < -1 or (most is not None and value > most):
        limit = "a whole number from -1 (none are made)" + (f" to {most}" if most else "")
        raise InvalidInput(f"{what}: {value} is not what driver {driver} can keep; write {limit}")


class AdminPoolPlan:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that plans pools."""

    def list_drivers(self):
        """
        ``{name: {"options": {option: {"type"}}, "from": the daemon's socket}}``.

        The daemon tells no defaults.
        """

        def options(names):
            return {option: {"type": TYPES.get(option, str).__name__} for option in names}

        return {
            name: {"options": options(names), "from": self.client.path}
            for name, names in sorted(self.driver_options().items())
        }

    @fresh_if_refused
    def pool_diff(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """
        What :py:meth:`add_pool` or :py:meth:`set_pool` would change, ``{}`` for nothing.

        Entries are ``{"old": ..., "new": ...}``; ``created`` is there for a new pool. Raises what
        they would raise.
        """
        declared = Declared(name, driver, options, require_mount, min_free, config)
        return self._pool_diff(name, declared)

    def _pool_diff(self, name, declared):
        refuse_old_words(name, declared.options)
        old = self.pool_config(check_pool_name(name))
        before = self.guards(name)  # a file that cannot be read is found here, before the writing
        before = before if old is not None else {}
        kept = {**before, **declared.guards}
        if old is None:
            changes = self._new_pool(name, declared.options)
        else:
            changes = self._compare_pool(name, old, declared.options)
        guards.check_mount(self.root, name, kept)
        if old is None and "dir_path" in declared.options:
            self._check_parent(name, declared.options["dir_path"])
        for key, value in declared.guards.items():
            if not guards.same(key, before.get(key), value):
                changes[key] = {"old": before.get(key), "new": value}
        return changes

    def wanted_options(self, name, driver, options):
        """``{option: value}`` in the form that is compared; None stays None."""
        known = self.driver_options().get(driver)
        if known is None:
            raise InvalidInput(
                f"pool {name}: this Qubes has no driver {driver!r}; it has"
                f" {', '.join(self.list_drivers())}"
            )
        wanted = {}
        for key, value in options.items():
            if key == "driver":
                continue
            what = f"pool {name}: {key}"
            if key not in known:
                raise InvalidInput(
                    f"{what} is no option of driver {driver}; it takes {', '.join(sorted(known))}"
                )
            if value is None:
                wanted[key] = None
                continue
            check_value(value, what)
            if key == "dir_path":
                files.check_dir_path(name, value)
            wanted[key] = normalise(key, value, TYPES.get(key), what)
            if key == "revisions_to_keep":
                check_revisions(wanted[key], driver, what)
        return wanted

    def _new_pool(self, name, options):
        driver = options.get("driver")
        if driver is None:
            raise InvalidInput(
                f"pool {name}: is new and has no driver; declare one of"
                f" {', '.join(self.list_drivers())}"
            )
        wanted = self.wanted_options(name, driver, options)
        lacking = [
            key
            for key in self.driver_options()[driver]
            if key in PLACE and wanted.get(key) in (None, "")
        ]
        if lacking:
            raise InvalidInput(
                f"pool {name}: driver {driver} needs {', '.join(lacking)}; declare it"
            )
        for key, value in wanted.items():
            if value is None and key not in _ADD_ONLY:
                raise self._cannot_take(name, key, "its default")
        self._check_place(name, {"driver": driver, **wanted})
        changes = {"created": {"old": None, "new": name}, "driver": {"old": None, "new": driver}}
        for key, value in options.items():
            if key != "driver" and value is not None:
                changes[key] = {"old": None, "new": value}
        return changes

    def _compare_pool(self, name, old, options):
        driver = old.get("driver")
        if options.get("driver") not in (None, driver):
            raise StoragePoolException(self._cannot_set(name, "driver", driver, options["driver"]))
        changes = {}
        for key, value in self.wanted_options(name, driver, options).items():
            if key in _ADD_ONLY:
                continue
            try:
                is_ = normalise(key, old[key], TYPES.get(key)) if key in old else None
            except InvalidInput:
                is_ = old[key]
            if value is None and is_ is not None:
                raise self._cannot_take(name, key, old[key])
            if is_ == value:
                continue
            if key not in SETTABLE:
                raise StoragePoolException(self._cannot_set(name, key, old.get(key), value))
            if key == "revisions_to_keep":
                self.check_settable(value, f"pool {name}: {key}")
            changes[key] = {"old": old.get(key), "new": options[key]}
        return changes

    def check_settable(self, revisions, what):
        """R4.2 keeps -1, and lets nobody set it."""
        if revisions < 0 and not self.is_43():
            raise InvalidInput(
                f"{what}: {revisions} can be set from R4.3 on; write a whole number from 0"
            )

    @staticmethod
    def _cannot_take(name, key, value):
        return NotSupported(
            f"pool {name}: backend admin cannot take {key} ({value}) away; declare the value that"
            " it should have"
        )

    @staticmethod
    def _cannot_set(name, key, old, new):
        return (
            f"pool {name}: its {key} is {old}, not {new}, and the Admin API cannot change it later;"
            f" declare {key}: {old}, or move its VMs away, remove the pool and add it again"
        )

    def _check_place(self, name, config):
        """The daemon takes two pools over one place, where their images are each other's."""
        here = {key: config[key] for key in PLACE if config.get(key)}
        if not here:
            return
        for other, its in self.list_pools().items():
            if other == name:
                continue
            problem = None
            if "dir_path" in here and its.get("dir_path"):
                if config.get("driver") != "linux-kernel" and its.get("driver") != "linux-kernel":
                    problem = self._overlap(here["dir_path"], its["dir_path"])
            elif {key: its[key] for key in PLACE if its.get(key)} == here:
                problem = "is that"
            if problem:
                place = "/".join(here.values())
                raise StoragePoolException(
                    f"pool {name}: {place} {problem} of pool {other} too; give each a place of its"
                    " own"
                )

    def _overlap(self, here, there):
        here, there = (os.path.realpath(self.path(p)) for p in (here, there))
        if here == there:
            return "is the directory"
        if any(f"{here}/".startswith(f"{there}/{s}/") for s in SUBDIRS):
            return "lies in the VM directories"
        if any(f"{there}/".startswith(f"{here}/{s}/") for s in SUBDIRS):
            return "has in its VM directories the directory"
        return None

    def _check_parent(self, name, path):
        parent = os.path.dirname(os.path.normpath(path))
        if not os.path.isdir(self.path(parent)):
            raise StoragePoolException(
                f"pool {name}: {parent}, the parent of its dir_path, is not there; make it, or"
                " mount its disk",
                waits_for=[("path", parent)],
            )
        for place in (path, *(os.path.join(path, name) for name in SUBDIRS)):
            if os.path.lexists(self.path(place)) and not os.path.isdir(self.path(place)):
                raise StoragePoolException(
                    f"pool {name}: {place} is no directory; move it away, or declare another"
                    " dir_path"
                )
