"""Machines that things befall, by chance, in R3.2's layout and with R4's daemon."""

import os
import pathlib
import shutil
import signal

from qubes_storage import adminapi, guards, registry
from qubes_storage.admin.journal import COPIES, MOVES
from qubes_storage.pool import CONF

from tests.functional.conftest import snapshot
from tests.r4.machine import writes
from tests.r4.qubesd import Call
from tests.torture import strace, watching
from tests.torture.declaring import Declaring

# Those of a run that is killed at one of them; whoever gets by with fewer is done.
CALLS = [name for name in watching.CHANGING if name not in ("open", "openat", "ioctl", "fcntl")]
MOST_CALLS = 40


class Local(Declaring):
    """The machine of the catalogue, on which others were before."""

    pools = (["default", "ssd", "ssd", "near", "spare", "plain", "new"], ["nowhere"])
    vms = (["work", "work", "app", "home", "tpl", "gone", "fedora-23"], ["nowhere"])
    templates = (["tpl", "fedora-23"], ["work", "nowhere"])
    klasses = (
        ["AppVM", "AppVM", "StandaloneVM", "StandaloneVM", "TemplateVM", "NetVM", "HVM"],
        ["ProxyVM", "TemplateHVM", "Nothing"],
    )
    places = (
        ["/mnt/ssd/new", "/mnt/ssd/new", "/mnt/ssd/other", "/mnt/far", "/mnt/ssd/spare/"],
        ["/mnt/ssd/ssd/appvms/x", "/mnt/not/there", "relative", "/var/lib/qubes"],
    )

    def __init__(self, random, world, salted):
        super().__init__(random)
        self.world, self.salted = world, salted
        self.drivers = ([world.driver, world.driver, "xen", "reflink", "btrfs"], ["nothing"])
        there = [str(place / "disk.raw") for place in (world.outside, world.ssd)]
        self.disks = (there, ["/nowhere/disk.raw", "disk.raw", str(world.ssd)])

    def accident(self):
        """Have something befall the machine; returns what."""
        kinds = [self._killed, self._lost, self._renamed, self._written, self._put, self._unplugged]
        return self.random.choices(kinds, [12, 4, 2, 4, 2, 1])[0]()

    def _killed(self):
        function, name, declared = self.declare()
        left = number = self.random.randint(1, MOST_CALLS)

        def decide(pid, args, called):
            nonlocal left
            left -= 1
            if left:
                return 0
            os.kill(pid, signal.SIGKILL)
            return None

        watching.watch(lambda: self.salted.call(function, name, **declared), CALLS, decide)
        return f"{function} {name} {declared} is killed at call {number}"

    def _vmdirs(self):
        """The directories of the VMs of qubes.xml that are there."""
        data = self.world.machine.path(registry.PATH).read_bytes()
        found = [
            self.world.machine.path(each.attrs["dir_path"])
            for each in registry.loads(data).entries
            if each.attrs["name"] != "dom0"
        ]
        return [path for path in found if path.is_dir()]

    def _lost(self):
        """A file of a VM, or all."""
        places = self._vmdirs()
        if not places:
            return "nothing"
        place = self.random.choice(places)
        names = sorted(os.listdir(place))
        if not names or self.random.random() < 0.3:
            shutil.rmtree(place)
            return f"{place} is gone"
        path = place / self.random.choice(names)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return f"{path} is gone"

    def _renamed(self):
        """A pool's directory, or that of a kind of VMs in it, is elsewhere."""
        place = self.world.ssd / self.random.choice(["ssd", "near", "spare", "plain"])
        place /= self.random.choice(["", "appvms", "vm-templates"])
        if not place.exists():
            return "nothing"
        place.rename(self.world.ssd / f"was-{place.name}-{self.random.random()}")
        return f"{place} is renamed"

    def _written(self):
        """What other tools and hands write into the files."""
        path, old, new = self.random.choice(
            [
                (CONF, b"", b"\n[nowhere]\ndriver = nothing\n"),
                (CONF, b"", b"\n[odd]\ndir_path = /mnt/ssd/spare/appvms\n"),
                (CONF, b"driver=reflink", b"driver = xen"),
                (CONF, b"[spare]", b"[spare]\nodd = 1"),
                (CONF, b"[near]", b"[nearer]"),
                (CONF, b"[plain]", b"[plain"),
                (guards.PATH, b"[near]", b"[near]\nrequire_mount = /mnt/away"),
                (guards.PATH, b"min_free = 1", b"min_free = 900TiB"),
                (guards.PATH, b"min_free = 1", b"min_free = little"),
                (registry.PATH, b'default_template="1"', b'default_template="None"'),
                (registry.PATH, b'pool_name="ssd"', b'pool_name="nowhere"'),
                (registry.PATH, b'pool_name="ssd"', b'pool_name="near"'),
                (registry.PATH, b'label="green"', b'label="odd"'),
                (registry.PATH, b'netvm_qid="none"', b'netvm_qid="1"'),
            ]
        )
        path = self.world.machine.path(path)
        data = path.read_bytes() if path.exists() else b""
        path.write_bytes(data.replace(old, new, 1) if old else data + new)
        return f"{path} has {new} for {old}"

    def _put(self):
        """Something lies where a VM, a pool or what marks an unfinished VM is to be."""
        names = ("new", "work", ".work.moving", ".work.creating", ".work.removing", ".new.creating")
        places = [f"{pool}/appvms/{name}" for pool in ("ssd", "near") for name in names]
        path = self.world.ssd / self.random.choice(["new", "ssd/appvms", *places])
        if path.exists() or path.is_symlink() or not path.parent.is_dir():
            return "nothing"
        self.random.choice([path.mkdir, path.touch, lambda: path.symlink_to("/nowhere")])()
        return f"{path} is put there"

    def _unplugged(self):
        self.world.detach() if os.path.ismount(self.world.ssd) else self.world.attach()
        return "the disk is unmounted, or back"

    def stamps(self):
        """What differs once anything is written."""
        return self.world.stamps()


class Remote(Declaring):
    """A machine of R4."""

    pools = (["ssd", "ssd", "btrfs", "btrfs", "varlibqubes", "new"], ["linux-kernel", "nowhere"])
    vms = (["work", "work", "vault", "fedora"], ["nowhere"])
    templates = (["fedora"], ["work", "nowhere"])
    klasses = (
        ["AppVM", "AppVM", "StandaloneVM", "TemplateVM", "DispVM"],
        ["NetVM", "HVM", "Nothing"],
    )
    drivers = (["file-reflink", "file", "lvm_thin"], ["xen", "zfs", "linux-kernel", "nothing"])
    places = (
        ["/mnt/ssd/new", "/mnt/ssd/new", "/mnt/btrfs/other", "/mnt/ssd/qubes"],
        ["/mnt/ssd/qubes/appvms/x", "/mnt/not/there", "relative", "/var/lib/qubes"],
    )
    disks = (["/nowhere/disk.raw"], [])

    def __init__(self, random, daemon, salted):
        super().__init__(random)
        self.daemon, self.salted = daemon, salted

    def accident(self):
        """Have something befall the machine; returns what."""
        kinds = [self._killed, self._started, self._removed, self._set, self._filled, self._written]
        return self.random.choices(kinds, [8, 2, 1, 2, 1, 1])[0]()

    def _killed(self):
        function, name, declared = self.declare()
        number, after = self.random.randint(1, 25), self.random.choice([True, False])
        strace.run(lambda: _dying(number, after) or self.salted.call(function, name, **declared))
        return f"{function} {name} {declared} is killed at writing call {number}, {after}"

    def _started(self):
        vm = self.daemon.vms[self.random.choice(list(self.daemon.vms))]
        if vm.klass != "AdminVM":
            vm.running = not vm.running
        return f"{vm.name} is started or stopped"

    def _removed(self):
        name = self.random.choice(list(self.daemon.vms))
        if name == "dom0" or self.daemon.uses(name):
            return "nothing"
        del self.daemon.vms[name]
        return f"{name} is removed"

    def _set(self):
        key, value = self.random.choice(
            [
                ("default_template", ""),
                ("default_template", "fedora"),
                ("default_pool", "ssd"),
                ("default_pool_private", "btrfs"),
            ]
        )
        if value in ("", *self.daemon.vms, *self.daemon.pools):
            self.daemon.globals.set[key] = value
        return f"{key} is {value!r}"

    def _filled(self):
        name = self.random.choice(list(self.daemon.pools))
        free = self.random.choice([0, 4096, 1 << 20, 1 << 40])
        self.daemon.usage[name] = {"data_size": 1 << 40, "data_usage": (1 << 40) - free}
        return f"pool {name} has {free} bytes left"

    def _written(self):
        path, text = self.random.choice(
            [
                (guards.PATH, "[ssd]\nrequire_mount = /mnt/away\n"),
                (guards.PATH, "[ssd]\nmin_free = 900TiB\n"),
                (guards.PATH, "[btrfs]\nmin_free = little\n"),
                (guards.PATH, "[btrfs"),
                (f"{MOVES}/work.json", "{"),
                (f"{COPIES}/new.json", "{"),
                (f"{COPIES}/new.json", '{"source": "work"}'),
                (f"{COPIES}/work.json", '{"source": "vault", "uuid": "1", "whole": true}'),
            ]
        )
        path = self.daemon.path(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return f"{path} has {text!r}"

    def stamps(self):
        """What differs once anything is written."""
        return len(writes(self.daemon)), snapshot(pathlib.Path(self.daemon.root))


def _dying(number, after):
    """In a child: die at its writing call of that number, before or after it."""
    made, send = 0, adminapi.Client._send

    def dying(client, data, method):
        nonlocal made
        made += Call(method, "", "", "", b"").writes
        if made < number:
            return send(client, data, method)
        if after:
            send(client, data, method)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    adminapi.Client._send = dying
