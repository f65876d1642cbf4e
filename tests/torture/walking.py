"""
An operation run from the same machine over and over, each time stopped elsewhere, and the rules
that what is left has to keep.
"""

import os
import re
import signal

from qubes_storage import conf, guards, registry
from qubes_storage.exc import StoragePoolException
from qubes_storage.pool import CONF

from tests.torture import strace
from tests.torture.world import content, same

ERRORS = ("ENOSPC", "EIO", "EACCES", "EROFS")
_DATA = ("root.img", "private.img")  # what is never lost; the others are made anew


class Broken(AssertionError):
    """A rule that does not hold."""


def need(holds, *told):
    """Break off with what is wrong, unless it holds."""
    if not holds:
        raise Broken(" ".join(map(str, told)))


class Walk:
    """One operation on one world: what there is before and after, and the calls between."""

    def __init__(self, world, operation):
        self.world = world
        self.operation = operation
        world.restore()
        self.before = world.tree()
        self.registered = vms(world)
        self.images = images(world, self.registered)
        self.changes = self.act()
        self.after = world.tree()
        self.kept = sums(self.before) & sums(self.after)
        self.known = set(self._verify())
        renamed = dict([operation.renames] if operation.renames else ())
        there = vms(world)
        found = {vm: renamed.get(vm, vm) for vm in self.registered}
        after = images(world, {vm: there[name] for vm, name in found.items() if name in there})
        self.allowed = {
            vm: {file: {sum_, after.get(vm, {}).get(file, sum_)} for file, sum_ in there.items()}
            for vm, there in self.images.items()
        }
        world.restore()
        self.calls = strace.record(self.act, world.place)

    def act(self):
        """Run the operation as the next call of the same state does."""
        return self.operation.run(self.world.connect(), self.world)

    def kill(self, call):
        """The machine as it is once the run was killed at a call."""
        self.world.restore()
        strace.interrupt(self.act, call)

    def interrupt(self, call):
        """The machine as it is once Ctrl-C came at a call."""
        self.world.restore()
        ending = strace.at(self.act, call, _ctrl_c)
        need(isinstance(ending.error, KeyboardInterrupt), ending)

    def fail(self, call, error):
        """The same, for a call that failed; returns how the run ended."""
        self.world.restore()
        return strace.interrupt(self.act, call, error)

    def fail_on(self, call, error):
        """The same, and all that is to be written on the disk after it fails too."""
        self.world.restore()
        return strace.interrupt_on(self.act, call, error, self.world.disk_of)

    def check_whole(self, *others, again=False, tree=None):
        """
        Both files parse, and no image is lost or changed but by an operation that does that;
        ``again`` after it was made once more, which may lose what the first run set aside.
        """
        world, walks = self.world, (self, *others)
        conf.loads(world.machine.path(CONF).read_bytes())
        if world.machine.path(guards.PATH).exists():
            conf.loads(world.machine.path(guards.PATH).read_bytes())
        there, tree = vms(world), tree or world.tree()
        need(len({e["qid"] for e in there.values()}) == len(there), "a qid is there twice")
        for vm in self.registered:
            self._check_vm(vm, there, walks, tree)
        for which, path in (("outside", world.outside), ("ssd", world.ssd)):
            disk = path / "disk.raw"
            if any(walk.operation.takes == which for walk in walks) and not disk.exists():
                disk = world.machine.path(there["new"]["dir_path"]) / "root.img"
            need(disk.exists(), disk, "is lost")
            need(content(disk) == self.before[_DISKS[which]][3], disk, "is changed")
        operations = [walk.operation for walk in walks]
        if again and self.operation.verb:
            return
        if any(o.drops for o in operations) and any(o.verb for o in operations):
            return  # what one keeps as a revision, the other drops
        lost = set.intersection(*(walk.kept for walk in walks)) - sums(tree)
        need(not lost, "images are lost:", *(_where(self.before, each) for each in lost))

    def _check_vm(self, vm, there, walks, tree):
        operations = [walk.operation for walk in walks]
        names = {vm, *(o.renames[1] for o in operations if o.renames and o.renames[0] == vm)}
        # By its uuid, for one that is removed or renamed may be declared, and so made, again.
        uuid = self.registered[vm]["uuid"]
        found = [name for name, attrs in there.items() if attrs.get("uuid") == uuid]
        removed = [o for o in operations if o.removes == vm]
        if not found:
            need(removed, "VM", vm, "is no longer in qubes.xml")
            return
        need(len(found) == 1 and found[0] in names, "VM", vm, "is in qubes.xml as", *found)
        place = self.world.machine.path(there[found[0]]["dir_path"])
        if not place.exists() and removed:
            place = place.with_name(f".{place.name}.removing")
        for file in self.images[vm]:
            need((place / file).exists(), place / file, "is lost")
            allowed = set().union(*(walk.allowed[vm][file] for walk in walks))
            need(content(place / file) in allowed, place / file, "is changed")
        if not any(vm in o.vms for o in operations):
            beneath = self.registered[vm]["dir_path"].strip("/")
            need(_part(tree, beneath) == _part(self.before, beneath), vm, "differs")

    def check_converges(self):
        """The next run makes what an undisturbed one makes; one more changes nothing at all."""
        self.act()
        found = self.world.tree()
        self.check_whole(again=True, tree=found)
        self.check_tidy(found)
        if self.operation.verb:
            return
        need(found == self.after, "the next run does not converge:", difference(found, self.after))
        stamps = self.world.stamps()
        again = self.act()
        need(again == {}, "one more run changes", again)
        need(self.world.stamps() == stamps, "one more run writes")

    def check_tidy(self, tree=None):
        """No stray file is there, and no VM is broken that was whole."""
        strays = [path for path in tree or self.world.tree() if "/." in path]
        need(not strays, "strays:", *strays)
        problems = [told for told in self._verify() if told not in self.known]
        need(not problems, *problems)

    def _verify(self):
        system = self.world.connect()
        return [told for vm in system.list_vms() for told in system.verify_vm(vm)]

    def check_failed(self, ending, call):
        """
        The error names what it is about, where, and the cure; all is as before, or done. What could
        not be deleted is there, of course, until the next run.
        """
        self.check_told(ending, call)
        found = self.world.tree()
        if call.name in ("unlinkat", "rmdir"):
            path = same(os.fsdecode(call.paths[0])).partition("/live/")[2]
            if path not in self.before:
                found.pop(path, None)
                workshop = os.path.dirname(path)  # nor could what it is in
                if workshop not in self.before and "/." in workshop:
                    found.pop(workshop, None)
        if not ending.error:
            need(found == self.after, "done, but not so:", difference(found, self.after))
            return
        told = str(ending.error)
        if self.operation.verb:
            # It is made of several, each of them whole: a revision may be kept already.
            between = (self.before, self.after)
            odd = {p: e for p, e in found.items() if e not in [t.get(p) for t in between]}
            need(not odd, told, difference(odd, {}))
            need({*self.before} & {*self.after} <= {*found}, told, difference(found, self.before))
        elif _known(found) != _known(self.before):
            need("is done" in told or "is in " in told, told, difference(found, self.before))

    def check_told(self, ending, call):
        """An error is one of ours, and names what it is about, where on that disk, and the cure."""
        if not ending.error:
            need(ending.value == self.changes, "changes tell", ending.value)
            return
        told = str(ending.error)
        need(isinstance(ending.error, StoragePoolException), "no error of ours:", ending.traceback)
        need(any(w in told for w in self.operation.words), "names no pool or VM:", told)
        disks = {self.world.disk_of(path) for path in strace.written(call)} - {None}
        named = {self._disk_of(path) for path in _PATH.findall(told)}
        need(not disks or disks & named, "names no path on that disk:", told)
        need(";" in told, "names no cure:", told)

    def _disk_of(self, told):
        """The disk of a path that an error tells, which is one of the machine's or of outside."""
        path = told if told.startswith(str(self.world.place)) else self.world.machine.path(told)
        return self.world.disk_of(os.fsencode(path))


def _ctrl_c(pid):
    os.kill(pid, signal.SIGINT)
    return 0


_PATH = re.compile(r"/[^\s:;,()]+")
_DISKS = {"outside": "outside/disk.raw", "ssd": "root/mnt/ssd/disk.raw"}


def vms(world):
    """``{name: attributes}`` of the VMs of qubes.xml that have a directory."""
    data = world.machine.path(registry.PATH).read_bytes()
    found = {e.attrs["name"]: e.attrs for e in registry.loads(data).entries}
    return {name: attrs for name, attrs in found.items() if name != "dom0"}


def images(world, registered):
    """``{VM: {file: content}}`` of the images that nothing makes anew."""
    found = {}
    for vm, attrs in registered.items():
        place = world.machine.path(attrs["dir_path"])
        found[vm] = {n: content(place / n) for n in _DATA if (place / n).exists()}
    return found


def _known(tree):
    """A tree without the sizes of root-cow.img: one that is too large does no harm."""
    return {p: (*e[:2], *e[3:]) if p.endswith("/root-cow.img") else e for p, e in tree.items()}


def difference(found, wanted):
    """What is in one tree and not in the other."""
    paths = sorted(p for p in {*found, *wanted} if found.get(p) != wanted.get(p))
    shown = [f"{p}: {found.get(p)}, not {wanted.get(p)}" for p in paths]
    return "\n  " + "\n  ".join(shown[:12])


def _part(tree, beneath):
    return {path: entry for path, entry in tree.items() if path.startswith(f"root/{beneath}/")}


def sums(tree):
    """The contents of the images in a tree."""
    return {entry[3] for path, entry in tree.items() if ".img" in path and len(entry[3]) == 64}


def _where(tree, sum_):
    return ", ".join(path for path, entry in tree.items() if entry[3] == sum_)


def problems_of(steps):
    """``(how many were taken, what was wrong)`` of ``(title, check)`` pairs; goes on after each."""
    count, problems = 0, []
    for title, check in steps:
        count += 1
        try:
            check()
        except Exception as err:
            problems.append(f"{title}: {type(err).__name__}: {err}")
    return count, problems


def hold(problems):
    """Fail with all that is wrong, if anything is."""
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:40]])


def take(steps):
    """Take ``(title, check)`` pairs, and fail with all that is wrong; returns how many they are."""
    count, problems = problems_of(steps)
    hold(problems)
    return count
