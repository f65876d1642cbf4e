"""
A machine as the states before one in a run will leave it: what test mode compares with.

Test mode makes nothing, so what those states will make is not there. Where pools will lie, their
guards, and how many numbers new VMs will take, counts as done. What else is in the way, and will
not be by then, is waited for.
"""

import contextlib
import os

from qubes_storage import files, guards, system
from qubes_storage.admin import AdminSystem
from qubes_storage.admin.then import AdminThen
from qubes_storage.blame import of_driver
from qubes_storage.exc import InvalidInput, StoragePoolException, Waits
from qubes_storage.pool import make_pool, pick
from qubes_storage.registry import MAX_ID, Entry
from qubes_storage.salt_run import Run
from qubes_storage.sources import Files, Sources
from qubes_storage.values import shown
from qubes_storage.vm import KLASSES, VM

_NETVMS = "default_netvm", "default_fw_netvm"  # the latter is that of ProxyVMs


def connect_as(option, run=None):
    """
    The machine that the settings name; in test mode as the states before one will leave it.

    ``run`` is then what Salt knows of the run: ``(low states, {tag: return} of those called)``.
    """
    there = system.connect_as(option)
    if run is None:
        return there
    if not isinstance(run, tuple) or len(run) != 2:
        raise InvalidInput(f"run {run!r} is none that a state has handed over; leave it out")
    if there.backend == "admin":
        return _Admin(Run(*run), there.client.path, there.root)
    return _Local(Run(*run), there.root)


class _Then(Sources):
    """A machine of either backend, as it will be."""

    def __init__(self, run, *where):
        super().__init__(*where)
        self.run = run

    def vm_diff(self, name, **declared):
        """As it will be; raises Waits for what cannot be told yet."""
        try:
            with self._waiting("VM", name, declared.get("template")):
                changes = super().vm_diff(name, **declared)
                self.check_sources(name, declared, changes)
                return changes
        except Waits:
            self.refuse_gone(name, declared)
            raise

    def vm_remove_diff(self, name, purge=False):
        """As it will be; raises Waits for what cannot be told yet."""
        with self._waiting("VM", name):
            return super().vm_remove_diff(name, purge)

    def pool_diff(self, name, *given, **config):
        """As it will be; raises Waits for what cannot be told yet."""
        with self._waiting("pool", name):
            return super().pool_diff(name, *given, **config)

    def pool_remove_diff(self, name, purge=False):
        """As it will be; raises Waits for what cannot be told yet."""
        with self._waiting("pool", name):
            return super().pool_remove_diff(name, purge)

    def default_pools_diff(self, **pools):
        """As it will be; raises Waits for what cannot be told yet."""
        with self._waiting():
            return super().default_pools_diff(**pools)

    @contextlib.contextmanager
    def _waiting(self, kind=None, name=None, template=None):
        who = {"pool": f"Pool {name} waits", "VM": f"VM {name} waits", None: "Default pools wait"}
        if kind and self.run.of(kind, name):
            raise Waits(f"{who[kind]} for an earlier state of {kind} {name}")
        try:
            yield
        except StoragePoolException as err:
            if not err.waits_for or not all(self.comes(*each) for each in err.waits_for):
                raise
            raise Waits(f"{who[kind]} for {_words(err.waits_for, template)}") from err

    def comes(self, kind, what, used=None):
        """Whether states before this one mend what ``waits_for`` of an error tells of."""
        if kind in ("path", "file", "mount"):
            return self._path_comes(kind, what)
        if used is not None:
            return self.run.leaves(what, kind.removesuffix(" of"), used)
        if self.run.alone:
            return True
        if kind == "pool":
            return self.run.pools.get(what) is not None
        if what is not None:
            return what in self.run.vms()
        new = self.run.vms() - set(self.list_vms())
        return any("Template" in self.run.klass(name) for name in new)

    def _path_comes(self, kind, path):
        """Whether it is made, or lies on what is mounted, or a pool makes it."""
        below = "" if kind == "file" else self.root.rstrip("/")
        real = os.path.realpath(below + path)
        comes = False
        for name, function, tag in self.run.paths():
            place, given = os.path.realpath(name), self.run.given(tag)
            mounts = tag.startswith("mount_|-") and given.get("mount", True)
            inside = real == place or real.startswith(f"{place}/")
            if function in ("absent", "unmounted"):
                comes = comes and not inside
            elif mounts:
                comes = comes or inside
            elif kind != "mount":  # who makes the mount point mounts nothing
                makes = given.get("makedirs") or function == "recurse"
                comes = comes or real == place or (makes and place.startswith(f"{real}/"))
        if comes or kind == "mount":
            return bool(comes)
        pools = self.list_pools()
        dirs = [pools[name].get("dir_path") for name in self.run.pools if name in pools]
        return real in [os.path.realpath(below + dir_path) for dir_path in dirs if dir_path]

    def _settled(self, pools):
        """Pools as they will be."""
        then = dict(pools)
        for name, new in self.run.pools.items():
            if new:  # in its place: of two over one directory the later one is wrong
                then[name] = _merged(then.get(name, {}), new[0])
            else:
                then.pop(name, None)
        return then

    def guards(self, pool):
        """The guards of a pool, as they will be."""
        new = self.run.pools.get(pool)
        return _merged(super().guards(pool), new[1] if new else {})


class _Local(_Then, Files, system.System):
    def vm_diff(self, name, **declared):
        """As it will be; raises Waits for what cannot be told yet."""
        try:
            return super().vm_diff(name, **declared)
        except Waits:
            if self.find_vm(name) is None:
                self.registry().unused("qid")
            if not self.run.of("VM", name):
                self.refuse_unfit(name, declared)
            self._check_room(name, declared.get("pool") or "default")
            raise
        except StoragePoolException as err:
            path = declared.get("root_copy_from")
            if err.waits_for == [("file", path)] and self.brings(path):
                raise Waits(f"VM {name} waits for {path}") from err
            raise

    def _check_room(self, name, pool):
        """Refuse what ``min_free`` of a pool that is to be made will; its disk has to be there."""
        vm = self.find_vm(name)
        kept, place = self.guards(pool), self.sections().get(pool, {}).get("dir_path")
        there = pool in super().sections() or (vm and vm.pool == pool) or self.run.of("path")
        if there or not place or not kept.get("min_free"):
            return
        guards.check_mount(self.root, pool, kept)
        path = place
        while True:
            try:
                with files.closing(files.open_dir(self.root, path)) as fd:
                    found = os.fstatvfs(fd)
                break
            except FileNotFoundError:
                path = os.path.dirname(path.rstrip("/"))
        guards.check_free(pool, kept, found.f_bavail * found.f_frsize, path=place)

    def pool_diff(self, name, *given, **config):
        """As it will be; raises Waits for what cannot be told yet."""
        if name == "default" and self._makes():
            raise Waits("Pool default waits for an earlier state, which makes it")
        changes = super().pool_diff(name, *given, **config)
        self.check_purged(name, changes)
        return changes

    def list_pools_now(self):
        """``{name: {option: value}}`` of storage.conf, as it is."""
        return super().sections()

    def sections(self):
        """``{pool: {option: value}}`` of storage.conf, as it will be."""
        found = super().sections()
        return self._settled({"default": {"driver": "xen"}, **found} if self._makes() else found)

    def _makes(self):
        """Whether the run makes storage.conf, whose first version has the pool default."""
        return self._begins() and any(self.run.pools.values())

    def comes(self, kind, what, used=None):
        """Whether states before this one mend what ``waits_for`` of an error tells of."""
        if kind == "left":
            return bool(self.run.of("VM", what))
        return ((kind, what) == ("pool", "default") and self._makes()) or super().comes(
            kind, what, used
        )

    def get_pool(self, name):
        """The Pool of a name, also one that is to be made, if nothing of it is missing."""
        config = pick(self.sections(), name)
        if super().sections().get(name) == config:
            return super().get_pool(name)
        if {"driver", "class"} & set(config):  # else it waits itself
            pool = make_pool(name, config, self.root)
            with of_driver(pool, "missing"):
                if not pool.missing():
                    return pool
        raise StoragePoolException(f"pool {name}: is to be made", waits_for=[("pool", name)])

    def vms_in(self, pool):
        """The VMs that a pool keeps or gets; those in it now, if all of them leave it."""
        there = {vm.name: vm for vm in super().vms_in(pool)}
        names = self._keeping(there, "pool", pool)
        return [there.get(name) or VM(name, KLASSES["AppVM"], pool=pool) for name in names]

    def _users(self, found, vm, word):
        users = set(super()._users(found, vm, word))
        if word == "NetVM":
            users |= self._following(found, vm)
        return self._keeping(users, word, vm.name)

    def _following(self, found, vm):
        """The new VMs of the run that will be connected to a VM because it is the default."""
        own = found.by_name.get(vm.name)
        new = {name: self.run.klass(name) for name in self.run.vms() - set(found.by_name)}
        defaults = {key: own and found.by_qid(found.get(key)) is own for key in _NETVMS}
        return {
            name
            for name, klass in new.items()
            if klass != "NetVM" and defaults[_NETVMS[1] if klass == "ProxyVM" else _NETVMS[0]]
        }

    def _keeping(self, users, key, used):
        then = [name for name in users if not self.run.leaves(name, key, used)]
        then += [name for name in self.run.vms() if self.run.comes(name, key, used)]
        return set(then) or users

    def registry(self):
        """What qubes.xml says; if numbers run short, as many are taken as new VMs will take."""
        found = super().registry()
        if len(found.entries) + len(self.run) <= MAX_ID:
            return found
        new = self.run.vms() - set(found.by_name)
        taken = {entry.attrs.get("qid") for entry in found.entries}
        free = [str(number) for number in range(1, MAX_ID + 1) if str(number) not in taken]
        return found.copy(
            [*found.entries, *(Entry("later", {"qid": qid}) for qid in free[: len(new)])]
        )


class _Admin(AdminThen, _Then, AdminSystem):
    def list_pools(self):
        """``{name: {option: value}}`` as the daemon will have it."""
        return self._settled(super().list_pools())


def _merged(old, new):
    return {key: value for key, value in {**old, **new}.items() if value is not None}


def _words(waits_for, template):
    """What is waited for."""
    users = [what for _, what, *used in waits_for if used]
    if users:
        return f"{shown(users)} to leave it"
    words = {"path": "", "file": "", "mount": "", "pool": "pool ", "VM": "VM ", "left": "VM "}
    templates = {template: f"template {template}", None: "a default template"}
    return " and ".join(
        templates[what] if kind == "VM" and what in templates else f"{words[kind]}{what}"
        for kind, what in waits_for
    )
