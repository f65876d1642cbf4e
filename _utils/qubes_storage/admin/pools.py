"""R4: the verbs that change pools, and the system's default pools."""

import contextlib
import os

from qubes_storage import files, guards
from qubes_storage.admin.journal import Journal
from qubes_storage.admin.pool_plan import PLACE, SETTABLE, SUBDIRS, TYPES, AdminPoolPlan
from qubes_storage.adminapi import check_pool_name, fresh_if_refused
from qubes_storage.declared import Declared
from qubes_storage.exc import AlreadyThere, InvalidInput, NotSupported, StoragePoolException
from qubes_storage.values import normalise, shown

DEFAULTS = tuple(f"default_pool{end}" for end in ("", "_root", "_private", "_volatile", "_kernel"))
FOLLOWING = DEFAULTS[1:4]  # where they are not set, they are what default_pool is


class NotAllGone(StoragePoolException):
    """
    A pool is removed, but a directory of it or its guards are still there; ``not_done`` has the
    keys of the changes that may not have been made.
    """

    def __init__(self, pool, path, err):
        super().__init__(
            f"pool {pool}: it is done, but {path} could not be cleared: {err.strerror}; mend that,"
            " and run again"
        )
        self.not_done = (*guards.NAMES, *(("directories",) if path != guards.PATH else ()))


class AdminPools(AdminPoolPlan):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that changes pools."""

    @property
    def removals(self):
        """The journals of pools whose directories are to go; the daemon forgets where they lie."""
        return Journal(self.root, "removal")

    def add_pool(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """
        Add a pool: its guards first, then the pool.

        Returns the changes. Raises :py:class:`StoragePoolException` if it is there already, or if
        it is not there afterwards, whatever the daemon answered.
        """
        declared = Declared(name, driver, options, require_mount, min_free, config)
        self.refresh()
        if self.pool_config(check_pool_name(name)) is not None:
            raise AlreadyThere(f"pool {name}: is there already; change it with qubes_pool.set")
        changes = self._pool_diff(name, declared)
        self.removals.remove(name)  # of one that was there before
        before = self.guards(name)
        self.save_guards(name, {**dict.fromkeys(before), **declared.guards})
        driver = declared.options["driver"]
        wanted = {"name": name, **self.wanted_options(name, driver, declared.options)}
        if wanted.get("ephemeral_volatile") is False:
            del wanted["ephemeral_volatile"]  # R4.2 keeps the text, and no text is false to it
        payload = "".join(f"{k}={v}\n" for k, v in wanted.items() if v is not None)
        answer = self.client.call("admin.pool.Add", arg=driver, payload=payload)
        there = self.pool_config(name) is not None
        if not there or answer.kind == "exception":
            self.save_guards(name, {**dict.fromkeys(declared.guards), **before})
        if not there:
            raise StoragePoolException(
                f"pool {name}: was not added: {answer}; {self._cure(declared.options)}"
            )
        self._check_pool(name, declared, answer)
        if answer.kind == "exception":
            raise AlreadyThere(f"pool {name}: is there already; someone else added it")
        return changes

    @staticmethod
    def _cure(options):
        """What to look at when the daemon would not make a pool."""
        places = [f"{key} {options[key]}" for key in PLACE if options.get(key)]
        cure = f"look at {', '.join(places)}"
        if options.get("driver") == "file-reflink":
            cure += ", which has to be on btrfs or xfs (setup_check: false if it cannot be)"
        return cure

    def _check_pool(self, name, declared, answer):
        """Read a pool after a change; what is not as declared is an error."""
        left = self._pool_diff(name, declared)
        if left:
            different = ", ".join(f"{k} is {v['old']}, not {v['new']}" for k, v in left.items())
            raise StoragePoolException(f"pool {name}: {different} after the change: {answer}")

    def set_pool(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """
        Change a pool that is there, only what is declared: guards, and of the options
        ``revisions_to_keep`` and ``ephemeral_volatile``, for the daemon lets no other be set.
        """
        declared = Declared(name, driver, options, require_mount, min_free, config)
        self.refresh()
        self.check_pool(name, f"pool {name}")
        changes = self._pool_diff(name, declared)
        self.save_guards(name, {k: v for k, v in declared.guards.items() if k in changes})
        answer = None
        for key in SETTABLE:
            if key in changes:
                value = normalise(key, declared.options[key], TYPES[key])
                answer = self.client.call(f"admin.pool.Set.{key}", arg=name, payload=str(value))
        if changes:
            self._check_pool(name, declared, answer)
        return changes

    @fresh_if_refused
    def pool_remove_diff(self, name, purge=False):
        """What :py:meth:`remove_pool` would change; raises what it would raise."""
        config = self.pool_config(check_pool_name(name))
        if config is None:  # a run that died may have left some of it
            config = (self.removals.read(name) if purge else None) or {}
            changes, vms = {}, []
        else:
            self._check_spare(name)
            changes, vms = {"removed": {"old": name, "new": None}}, self.vms_in(name)
        guards.check_left(self.root, name, self.guards(name) if purge else {}, vms)
        for guard, value in self.guards(name).items():
            changes[guard] = {"old": value, "new": None}
        empty = self._empty_dirs(name, config.get("dir_path")) if purge else []
        if empty:
            changes["directories"] = {"old": empty, "new": []}
        return changes

    def _check_spare(self, name):
        """Refuse to remove a pool that the system needs, and any where the daemon cannot."""
        used_as = [key for key, pool in self.default_pools().items() if pool == name]
        if used_as:
            raise StoragePoolException(
                f"pool {name}: is the {', '.join(used_as)}; set another with qubes_pool.default"
            )
        remote = [vm for vm, there in self.listed().items() if there.klass == "RemoteVM"]
        if remote:
            raise StoragePoolException(
                f"pool {name}: R4.3 removes no pool at all while there is a RemoteVM"
                f" ({shown(remote)}); remove that first",
                waits_for=[("use of", vm, name) for vm in remote],
            )

    def vms_in(self, pool):
        """The names of the VMs that have a volume in a pool."""
        return [
            vm
            for vm in self.vm_names()
            if any(volume.pool == pool for volume in self.volumes(vm, kernel=True).values())
        ]

    def _empty_dirs(self, name, path):
        """
        The directories of a pool that hold nothing but empty directories, innermost first. A link,
        and what a disk is mounted on, cannot be removed and counts as something; of those that
        are another pool's too none is told.
        """
        names = self._listed_dir(path) if path else None
        others = [its.get("dir_path") for pool, its in self.list_pools().items() if pool != name]
        if names is None or any(self._overlap(path, other) for other in others if other):
            return []
        subdirs = [os.path.join(path, name) for name in SUBDIRS if name in names]
        found = [sub for sub in subdirs if self._can_go(sub) and self._listed_dir(sub) == []]
        if len(found) == len(names) and self._can_go(path):
            found.append(path)
        return found

    def _listed_dir(self, path):
        """What a directory holds, or None for what cannot be looked into."""
        try:
            return os.listdir(self.path(path))
        except OSError:
            return None

    def _can_go(self, path):
        is_link = os.path.islink(self.path(path).rstrip("/"))
        return not is_link and not files.is_mount(self.root, path)

    def remove_pool(self, name, purge=False):
        """
        Remove a pool; the daemon deletes nothing on disk.

        ``purge`` removes those of its directories that are empty. Returns the changes, ``{}`` for a
        pool that is not there.
        """
        self.refresh()
        changes = self.pool_remove_diff(name, purge)
        directories = changes.get("directories", {"old": []})["old"]
        if "removed" in changes:
            self._drop_pool(name, self.pool_config(name) if directories else None)
        if changes:
            self._clear_pool(name, directories)
        return changes

    def _drop_pool(self, name, config):
        """Have the daemon remove a pool; ``config`` if directories of it are to go then."""
        self.removals.remove(name)
        if config:
            self.removals.write(name, {"dir_path": config["dir_path"]})
        answer = self.client.call("admin.pool.Remove", arg=name)
        if name in self.pool_names():
            self.removals.remove(name)
            raise StoragePoolException(
                f"pool {name}: was not removed: {answer}; run again once nothing uses it"
            )

    def _clear_pool(self, name, directories):
        """Remove what the daemon leaves of a pool; its guards hold until its directories went."""
        path = guards.PATH
        try:
            for path in directories:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(self.path(path))
            path = guards.PATH
            self.save_guards(name)
        except OSError as err:
            raise NotAllGone(name, path, err) from err
        self.removals.remove(name)

    # the system's default pools

    def default_pools(self):
        """``{property: pool}`` of ``default_pool`` and of those for each volume."""
        found = self.system_properties()
        return {key: found[key].value or None for key in DEFAULTS if key in found}

    @fresh_if_refused
    def default_pools_diff(self, **pools):
        """
        What :py:meth:`set_default_pools` would change. Keywords are ``default_pool``,
        ``default_pool_root``, ``_private``, ``_volatile`` and ``_kernel``; None is not declared.
        One that has followed ``default_pool`` and is to stay where it is has ``old: None``.
        """
        unknown = sorted(set(pools) - set(DEFAULTS))
        if unknown:
            raise InvalidInput(
                f"default pools: {', '.join(unknown)} is no property; there are"
                f" {', '.join(DEFAULTS)}"
            )
        now = self.default_pools()
        lacking = sorted(key for key in pools if pools[key] is not None and key not in now)
        if lacking:
            raise NotSupported(
                f"default pools: this qubesd has no {', '.join(lacking)}; leave it out"
            )
        then = {**now, **self._following(pools.get("default_pool"))}
        changes = {}
        for key, pool in pools.items():
            if pool is None:
                continue
            driver = self.check_pool(pool, key)
            if (driver == "linux-kernel") != (key == "default_pool_kernel"):
                raise InvalidInput(
                    f"{key}: pool {pool} has driver {driver}; kernels go into a pool of driver"
                    " linux-kernel, and nothing else does"
                )
            if then.get(key) != pool:
                changes[key] = {"old": now.get(key) if now.get(key) != pool else None, "new": pool}
        return changes

    def _following(self, pool):
        """``{property: pool}`` of those that change with ``default_pool``; None is no change."""
        found = self.system_properties()
        keys = (key for key in FOLLOWING if key in found and found[key].default)
        return dict.fromkeys(keys if pool is not None else (), pool)

    def set_default_pools(self, **pools):
        """Set the system's default pools, only those that are declared. Returns the changes."""
        self.refresh()
        changes = self.default_pools_diff(**pools)
        # default_pool first: those that follow it change with it.
        for key in sorted(changes):
            pool = changes[key]["new"]
            answer = self.client.call("admin.property.Set", arg=key, payload=pool)
            now = self.default_pools().get(key)
            if now != pool:
                raise StoragePoolException(
                    f"{key}: is {now}, not {pool}, after the change: {answer}"
                )
        return changes
