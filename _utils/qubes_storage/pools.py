"""The verbs on pools: list, info, diff, add, set, remove."""

import contextlib
import os
import stat

from qubes_storage import files, guards, owning
from qubes_storage.blame import of_driver
from qubes_storage.conf import Conf
from qubes_storage.declared import Declared, foreign
from qubes_storage.exc import AlreadyThere, InvalidInput, StoragePoolException
from qubes_storage.finding import describe_drivers
from qubes_storage.looking import looking
from qubes_storage.placing import Placing, pool_of
from qubes_storage.pool import (
    CONF,
    declared_pool,
    in_force,
    is_pool,
    make_pool,
    pool_class,
    schema,
    what_is,
)
from qubes_storage.registry import PATH
from qubes_storage.values import check_pool_name, normalise
from qubes_storage.vm import SUBDIRS, VM

_LOCKED_IN = os.path.dirname(PATH)  # which is made with the lock
_PLACE = ("driver", "class", "dir_path")  # what cannot change under the VMs in a pool


class Pools(Placing):
    """The part of :py:class:`~qubes_storage.system.System` that is about pools."""

    @looking
    def list_pools(self):
        """``{name: {option: value}}`` as storage.conf has it."""
        return {name: dict(config) for name, config in self.sections().items()}

    def list_drivers(self):
        """``{name: {options, from}}`` of the drivers that a pool can have."""
        return describe_drivers()

    def vms_in(self, pool):
        """
        The VMs that qubes.xml places in a pool, of whatever class; dom0 has no images and does not
        count.
        """
        found = self.registry()
        there = [entry for entry in found.entries if pool_of(entry) == pool]
        vms = (VM.of(entry, found) or VM.stranger(entry) for entry in there)
        return [vm for vm in vms if vm and vm.klass.name != "AdminVM"]

    @looking
    def pool_info(self, name):
        """
        What is in force for a pool, or None for none of that name.

        ``driver`` or ``class``, ``dir_path`` and other options, guards; ``size``, ``used``,
        ``free`` of its filesystem and ``provisioned``, the virtual sizes of its VMs' images, in
        bytes (None where they cannot be told); ``vms``; ``problems``, as sentences.
        """
        config = self.sections().get(name)
        if config is None:
            return None
        vms = self.vms_in(name)
        word = "class" if "class" in config else "driver"
        found = {
            **({word: config[word]} if word in config else {}),
            **in_force(name, config),
            **self.guards(name),
            **dict.fromkeys(("size", "used", "free", "provisioned")),
            "vms": sorted(vm.name for vm in vms),
            "problems": [*foreign(name, config), *guards.check_values(name, self.guards(name))],
        }
        try:
            strange = self._none_of_ours(name, config)
            if strange:
                found["problems"] += strange
                return found
            pool = self.get_pool(name)
            found["dir_path"] = pool.dir_path
            self._check_place(name, pool)
            guards.check_mount(self.root, name, self.guards(name))
            with of_driver(pool, "usage"):
                found.update(pool.usage())
            found["problems"] += self._on_disk(pool)
            self._check_setup(pool)
            found["provisioned"] = sum(
                size
                for vm in vms
                if vm.klass.name != "DispVM"  # which has those of its template's saved DispVM
                for size, _ in self.images_on_disk(vm).values()
            )
        except (OSError, StoragePoolException) as err:
            if str(err) not in found["problems"]:
                found["problems"].append(str(err))
        return found

    def _on_disk(self, pool):
        with of_driver(pool, "missing"):
            found = [f"directory {path} is missing" for path in pool.missing()]
        gid = owning.qubes_gid()
        with files.closing(pool.open()) as fd:
            for subdir in SUBDIRS:
                there = files.exists(fd, subdir)
                path = os.path.join(pool.dir_path, subdir)
                if there and not stat.S_ISDIR(there.st_mode):
                    found.append(f"{path} is no directory: move it away")
                if there and gid is not None and there.st_gid != gid:
                    found.append(f"{path} is not of group {owning.GROUP}: chgrp it")
        if self.is_absent_disk(pool):
            found.append(f"none of its VMs is in {pool.dir_path}: is its disk mounted?")
        return found

    def pool_diff(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """
        What :py:meth:`add_pool` or :py:meth:`set_pool` would change, ``{}`` for nothing.

        Entries are ``{"old": ..., "new": ...}``; ``created`` is there for a new pool. Raises what
        they would raise.
        """
        declared = Declared(name, driver, options, require_mount, min_free, config)
        return self._diff(name, declared)[0]

    @looking
    def pool_notes(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """What R3.2's own tools, or these, cannot do with a pool as declared, as sentences."""
        declared = Declared(name, driver, options, require_mount, min_free, config)
        after = self._after(name, declared.options)
        return [*foreign(name, after), *self._none_of_ours(name, after)]

    @staticmethod
    def _none_of_ours(name, config):
        if not {"driver", "class"} & set(config) or is_pool(pool_class(name, config)):
            return []
        return [f"{what_is(config)} is no qubes_storage.Pool: it can hold no VM here"]

    @looking
    def _diff(self, name, declared, try_out=False):
        """``(changes, options of the section to set)``; everything is validated here."""
        old = self.sections().get(name)
        if old is None:
            check_pool_name(name)
        new = self._section(name)
        if old is None and declared.options.get("class") is None:
            declared.options = {"driver": "xen", **declared.options}
        new.update((k, v) for k, v in declared.options.items() if v is not None)
        for key in [k for k, v in declared.options.items() if v is None]:
            new.pop(key, None)
        changes, options = self._compare(name, old, new, declared)
        pool = declared_pool(name, new, self.root)
        self._check_edit(CONF, name, options)
        self._check_edit(guards.PATH, name, declared.guards)
        if pool is None:
            return self._with_guards(name, old, declared, changes), options
        moved = set(changes) & set(_PLACE)
        place = normalise("dir_path", pool.dir_path)
        if old is not None and normalise("dir_path", self._dir_path(name)) != place:
            moved.add("dir_path")
        if old is not None and moved:
            self._refuse_move(name, sorted(moved), pool)
        moving = old is None or "dir_path" in moved
        if moving:
            files.check_dir_path(name, pool.dir_path)
        self._check_place(name, pool, among=None if moving else self._before(name))
        self._check_mount(name, old is not None, declared)
        with of_driver(pool, "missing"):
            missing = pool.missing()
        if missing:
            self._check_parent(name, missing[0])
            self._check_way(name, missing)
            self.check_disk(pool)
            if old is not None:
                changes["directories"] = {"old": [], "new": missing}
        if not try_out:
            self._check_setup(pool)
        return self._with_guards(name, old, declared, changes), options

    def _section(self, name):
        """What storage.conf says for a pool; for one that is not there, what [DEFAULT] says."""
        found = self.sections().get(name)
        return dict(found) if found is not None else self._conf(CONF).own("DEFAULT")

    def _conf(self, path):
        return Conf(files.read(self.root, path) or b"", path)

    def _check_edit(self, path, name, options):
        """Refuse, before anything is made, what could not be written so that it is read back."""
        if options:
            self._conf(path).edit(name, options)

    def _compare(self, name, old, new, declared):
        types = schema(pool_class(name, new))[0]
        before = in_force(name, old or {})
        before.update((k, v) for k, v in (old or {}).items() if k in ("driver", "class"))
        changes, options = {}, {}
        if old is None:
            changes["created"] = {"old": None, "new": name}
        for key, value in declared.options.items():
            is_ = before.get(key)
            if value is None:
                if key in (old or {}):
                    changes[key] = {"old": is_, "new": None}
                    options[key] = None
                continue
            what = f"pool {name}: {key}"
            wanted = normalise(key, value, types.get(key), what)
            if old is None or is_ is None or not _same(key, is_, wanted, types.get(key)):
                changes[key] = {"old": is_, "new": value}
                options[key] = value
        return changes, options

    def _with_guards(self, name, old, declared, changes):
        before = self.guards(name) if old is not None else {}
        for key, value in declared.guards.items():
            if not guards.same(key, before.get(key), value):
                changes[key] = {"old": before.get(key), "new": value}
        return changes

    def add_pool(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """
        Add a pool: its directories, its guards, and last its section in storage.conf.

        Returns the changes. Raises :py:class:`StoragePoolException` if it is there already.
        """
        return self._write(
            name, Declared(name, driver, options, require_mount, min_free, config), False
        )

    def set_pool(
        self, name, driver=None, options=None, require_mount=None, min_free=None, **config
    ):
        """Change a pool that is there: only what is declared; None removes an option."""
        return self._write(
            name, Declared(name, driver, options, require_mount, min_free, config), True
        )

    def _write(self, name, declared, exists):
        self._check_exists(name, exists)
        # Before the lock, which would make a missing qubes.xml, and the directory of it.
        lacking = self._diff(name, declared, True)[0].get("directories", {"new": []})["new"]
        with self.locked("pool", name):
            self._check_exists(name, exists)
            changes, options = self._diff(name, declared, True)
            if not changes:
                return changes
            told = changes.get("directories", {"new": lacking})["new"]
            told[:0] = [p for p in lacking if p.rstrip("/") == _LOCKED_IN and p not in told]
            pool = declared_pool(name, self._after(name, options), self.root)
            guarded = {k: v for k, v in declared.guards.items() if k in changes}
            if not exists:
                stale = set(self.guards(name)) - set(guarded)
                guarded.update(dict.fromkeys(stale))
            first = pool
            if name != "default" and files.read(self.root, CONF) is None:
                # Its first version has that pool too, whose directories are there before it is.
                first = make_pool("default", {"driver": "xen"}, self.root)
            with self._made(first), self._made(pool), self._put_back(guards.PATH):
                self._check_mount(name, exists, declared)  # the directories were made just now
                self._check_setup(pool, True)
                if guarded:
                    self.edit_conf(guards.PATH, name, guarded)
                if options:
                    self.edit_conf(CONF, name, options)
        return changes

    def _check_exists(self, name, exists):
        there = name in self.sections()
        if there and not exists:
            raise AlreadyThere(f"pool {name}: is in {CONF} already; change it with qubes_pool.set")
        if exists and not there:
            raise StoragePoolException(
                f"pool {name}: is not in {CONF}; add it with qubes_pool.add",
                waits_for=[("pool", name)],
            )

    def _after(self, name, options):
        after = {**self._section(name), **options}
        return {k: v for k, v in after.items() if v is not None}

    @looking
    def pool_remove_diff(self, name, purge=False):
        """What :py:meth:`remove_pool` would change; raises what it would raise."""
        found = {guard: {"old": value, "new": None} for guard, value in self.guards(name).items()}
        if name not in self.sections():
            return found  # those that a run left which died
        if name == "default":
            raise StoragePoolException(
                f"pool default: stays in {CONF}: R3.2's own tools load no VM without it"
            )
        vms = [vm.name for vm in self.vms_in(name)]
        # On a disk that is away nobody can tell which of its directories are empty.
        guards.check_left(self.root, name, self.guards(name) if purge else {}, vms)
        self._check_nothing_left(name)
        changes = {"removed": {"old": name, "new": None}, **found}
        empty = self._empty_dirs(name) if purge else []
        if empty:
            changes["directories"] = {"old": empty, "new": []}
        return changes

    def remove_pool(self, name, purge=False):
        """
        Remove a pool from storage.conf; images are never deleted.

        ``purge`` removes those of its directories that are empty, but no link and no mount point.
        Returns the changes, ``{}`` for a pool that is not there.
        """
        if not self.pool_remove_diff(name, purge):
            return {}
        with self.locked("pool", name):
            changes = self.pool_remove_diff(name, purge)
            if not changes:
                return {}
            empty = changes.get("directories", {"old": []})["old"]
            if purge:
                with contextlib.suppress(StoragePoolException):  # whose directories nobody knows
                    self._settle(self.get_pool(name).dir_path)
            with self._unmade(empty), self._put_back(CONF, guards.PATH):
                self.edit_conf(CONF, name)  # first: no pool is ever without its guards
                self.edit_conf(guards.PATH, name)
        return changes


def _same(key, old, wanted, type_):
    try:
        return normalise(key, old, type_) == wanted
    except InvalidInput:
        return False
