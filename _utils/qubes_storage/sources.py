"""What the states before one in a run do to what it makes a VM of: a VM, or a file of one."""

import contextlib
import errno
import os

from qubes_storage.exc import StoragePoolException, Waits
from qubes_storage.planning import check_volumes
from qubes_storage.pool import in_force
from qubes_storage.vm import IMAGES, KLASSES, SUBDIRS, VM

_FILES = ("root_copy_from", "root_move_from")
_NO_MATTER = {"label"}  # of a template, to what is made of it


class Sources:
    """The part of a machine as it will be that looks at what VMs are made of."""

    def check_sources(self, name, declared, changes):
        """Raise for what goes before, or is not yet as it will be."""
        source = changes.get("clone_from", {}).get("new")
        if source and self.run.of("VM", source):
            raise StoragePoolException(
                f"VM {name}: {source}, of which it is to be a clone, is removed before; take"
                " another",
                waits_for=[("VM", source)],
            )
        template = changes.get("template", {}).get("new")
        if template and not source:
            self._check_template_stays(name, template, declared.get("template") is None)
            if "created" in changes and self.run.changes(template) - _NO_MATTER:
                raise Waits(f"VM {name} waits for template {template}")

    def refuse_gone(self, name, declared):
        """The same for what waits anyway: whether a source that is declared goes before."""
        words = ("template",) if name in self.list_vms() else ("template", "clone_from")
        for source in (declared.get(word) for word in words):
            if source and self.run.goes(source):
                raise StoragePoolException(f"VM {name}: {source} is removed before; take another")

    def _check_template_stays(self, name, template, is_default):
        gone = self.run.goes(template)
        if not gone:
            return
        there = self.list_vms()
        made = [
            what
            for what, function, tag in self.run.of("VM")
            if function == "present" and what not in there and self.run.is_after(tag, gone)
        ]
        if is_default and any("Template" in self.run.klass(what) for what in made):
            raise Waits(f"VM {name} waits for a default template")
        raise StoragePoolException(
            f"VM {name}: its template {template} is removed before; declare another"
        )


class Files(Sources):
    """The same in R3.2's layout: also files of the caller's, and the directories of pools."""

    def check_sources(self, name, declared, changes):
        """Raise for what goes before, or is not yet as it will be."""
        super().check_sources(name, declared, changes)
        self._check_file(name, declared)

    def refuse_gone(self, name, declared):
        """The same for what waits anyway: whether a source that is declared goes before."""
        super().refuse_gone(name, declared)
        with contextlib.suppress(Waits):
            self._check_file(name, declared)
        word, path = self._file(name, declared)
        if path and not self._is_there_then(path):
            raise StoragePoolException(
                f"VM {name}: {word} {path}: {os.strerror(errno.ENOENT)}; name an image"
            )

    def refuse_unfit(self, name, declared):
        """The same: whether the classes of what it is made of fit, and root is its own."""
        klass, template, source = (declared.get(w) for w in ("klass", "template", "clone_from"))
        vm = self.find_vm(name)
        if vm is None and source is not None:
            vm = self._find_then(source)
            if vm is None:
                return
            self._check_clone(name, vm, klass, template)
        vm = vm or VM(name, KLASSES[klass or "AppVM"])
        template = template or vm.template
        if not vm.klass.based_on or template is None:
            return
        runs_on = self._find_then(template)
        if runs_on:
            self._check_runs_on(name, vm.klass, runs_on)
        if "root" in check_volumes(name, declared.get("volumes")):
            raise self._root_is_templates(name, template)

    def _find_then(self, name):
        """A VM that is there or will be, as far as it is told; None where there is none."""
        vm = self.find_vm(name)
        if vm or name not in self.run.vms():
            return vm
        source = self.run.told(name, "clone_from")
        if source:
            like = self._find_then(source)
            return like and VM(name, like.klass, template=like.template, based=like.based)
        klass = KLASSES[self.run.klass(name)]
        template = self.run.told(name, "template") if klass.based_on else None
        return VM(name, klass, template=template, based=not klass.is_hvm and bool(klass.based_on))

    def _file(self, name, declared):
        """``(word, path)`` of the file that becomes the root of a new VM."""
        given = [(word, declared[word]) for word in _FILES if declared.get(word)]
        return given[0] if given and name not in self.list_vms() else (None, None)

    def _is_there_then(self, path):
        there = self.run.alone or os.path.lexists(path)
        return there or self.comes("file", path) or self.brings(path)

    def _check_file(self, name, declared):
        word, path = self._file(name, declared)
        if path is None:
            return
        real = os.path.realpath(path)
        self._check_not_taken(name, word, path, real)
        for vm in self._owners(real):
            if self.run.goes(vm.name) or self.run.leaves(vm.name, "pool", vm.pool):
                verb = "is removed" if self.run.goes(vm.name) else "moves to another pool"
                raise StoragePoolException(
                    f"VM {name}: {word} {path} is a file of VM {vm.name}, which {verb} before;"
                    " name an image"
                )
            if self.run.changes(vm.name) - _NO_MATTER - {"template"}:
                raise Waits(f"VM {name} waits for VM {vm.name}")

    def _check_not_taken(self, name, word, path, real):
        for other, taken, tag in self.run.taken():
            if other in self.list_vms() or os.path.realpath(taken) != real:
                continue
            if self.run.brings_back(real, tag):
                raise Waits(f"VM {name} waits for {path}")
            raise StoragePoolException(
                f"VM {name}: {word} {path} is taken by VM {other} before; name an image"
            )

    def _owners(self, real):
        """The VMs that a state is about and in whose directory a file lies."""
        for name in {what for what, _, _ in self.run.of("VM")}:
            vm = self.find_vm(name)
            try:
                place = self.pool_of(vm).vmdir(vm) if vm else None
            except StoragePoolException:
                continue
            if place and real.startswith(f"{os.path.realpath(self.below + place)}/"):
                yield vm

    def brings(self, path):
        """Whether a VM of the run will have an image of a path."""
        real = os.path.realpath(path)
        top, filename = os.path.split(real)
        name = os.path.basename(top)
        if name not in self.run.vms() or filename not in (IMAGES["root"], IMAGES["private"]):
            return False
        vm = self.find_vm(name)
        klass = vm.klass if vm else KLASSES[self.run.klass(name)]
        based = vm.based if vm else klass.based_on and not klass.is_hvm
        pool = self.run.told(name, "pool") or (vm.pool if vm else "default")
        place = in_force(pool, self.sections().get(pool, {})).get("dir_path")
        if not place or (based and filename == IMAGES["root"]):
            return False
        return top == os.path.realpath(os.path.join(self.below + place, klass.subdir, name))

    @property
    def below(self):
        """What the machine's own paths are below."""
        return self.root.rstrip("/")

    def check_purged(self, name, changes):
        """Raise for a pool that takes a directory which another leaves, and which goes then."""
        dir_path = changes.get("dir_path", {}).get("new")
        purged = self._purged() if dir_path else {}
        if not purged:
            return
        here = self._real(dir_path)
        if os.path.dirname(here) in purged:
            raise StoragePoolException(
                f"pool {name}: {os.path.dirname(dir_path.rstrip('/'))} is removed before, with pool"
                f" {purged[os.path.dirname(here)]}; make it first: a parent is never made in"
                " silence"
            )
        going = {purged.get(place) for place in (here, *(f"{here}/{each}" for each in SUBDIRS))}
        if "created" not in changes and going != {None}:
            going = next(pool for pool in going if pool)
            raise Waits(f"Pool {name} waits for pool {going} to leave {dir_path}")

    def _purged(self):
        """``{directory: pool}`` of those that go with their pools."""
        found = {}
        for pool, _, tag in self.run.purges():
            paths = self.run.changed(tag).get("directories", {}).get("old", [])
            if not self.run.changed(tag):  # it waits itself
                top = in_force(pool, self.list_pools_now().get(pool, {})).get("dir_path")
                paths = [top, *(os.path.join(top, each) for each in SUBDIRS)] if top else []
            found.update((self._real(path), pool) for path in paths)
        return found
