"""Those who work on one machine at once through the core and its command line."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from qubes_storage import connect
from qubes_storage.exc import StoragePoolException

POOLS = ("default", "ssd", "disk")
VMS = ("shared-0", "shared-1", "shared-2", "shared-3")


class Worker:
    """A process with a seed, an end and a log."""

    def __init__(self, kind, number, root, seconds, log, *words):
        self.me = f"{kind}-{number}"
        self.root = root
        self.words = words
        self.random = random.Random(self.me)
        self.end = time.monotonic() + float(seconds)
        self.log = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.number = int(number)
        self.own = []  # VMs that only this one touches
        self.made = 0

    def note(self, **line):
        """Say what was done."""
        self.log.write(json.dumps(line) + "\n")

    def new(self):
        """A name for a VM of its own."""
        self.made += 1
        return f"{self.me}-{self.made}"

    def run(self):
        """Work until the end."""
        while time.monotonic() < self.end:
            self.turn()

    def verbs(self):
        """Something to do: ``(verb, arguments)``, on VMs and pools of one's own and on shared."""
        rng = self.random
        pool, shared = rng.choice(POOLS), rng.choice(VMS)
        own = rng.choice(self.own) if self.own else None
        some = [
            ("create", shared, pool),
            ("create", shared, pool),
            ("remove", shared),
            ("migrate", shared, pool),
            ("resize", shared, rng.randrange(3, 9)),
            ("add", f"p{rng.randrange(3)}"),
            ("drop", f"p{rng.randrange(3)}"),
            ("set", f"own-{self.me}", rng.randrange(1, 1000)),
            ("set", "common", rng.randrange(1, 1000)),
            ("create" if len(self.own) < 4 else "remove", own or self.new(), pool),
            ("clone", "source", self.new(), pool),
        ]
        if own:
            some += [("remove", own), ("rename", own, self.new()), ("migrate", own, pool)]
        verb, *args = rng.choice(some)
        return verb, args[:1] if verb == "remove" else args

    def told(self, verb, args):
        """Note a verb that was done."""
        if verb in ("create", "clone", "rename"):
            name = args[0] if verb == "create" else args[1]
            self.note(there=name, clone=verb == "clone")
            if name.startswith(self.me):
                self.own.append(name)
        if verb in ("remove", "rename"):
            self.note(gone=args[0])
            if args[0] in self.own:
                self.own.remove(args[0])
        if verb in ("add", "drop"):
            self.note(**{"there" if verb == "add" else "gone": f"pool {args[0]}"})
        if verb == "set":
            self.note(set=[args[0], f"x{self.me}", args[1]])
        self.note(did=verb)

    def refused(self, verb, args, error):
        """Note what was not done, and why."""
        self.note(refused=verb, name=args[0], error=error)


class Cli(Worker):
    """``qubes-storage``, a process for each command."""

    ARGS = {
        "create": ["create", "-l", "red", "-P{2}", "{1}"],
        "clone": ["clone", "{1}", "{2}", "-P{3}"],
        "remove": ["remove", "-f", "{1}"],
        "rename": ["rename", "{1}", "{2}"],
        "migrate": ["migrate", "{1}", "{2}"],
        "resize": ["resize", "{1}", "private", "{2}GiB"],
        "add": ["pool", "add", "{1}", "dir_path=/mnt/{1}", "min_free=1MiB"],
        "drop": ["pool", "remove", "{1}", "--purge"],
        "set": ["pool", "set", "{1}", "x{0}={2}"],
    }

    def command(self, verb, args):
        """The command line of a verb."""
        words = [word.format(self.me, *args) for word in self.ARGS[verb]]
        return [sys.executable, "-m", "qubes_storage", *self.words, "--root", self.root, *words]

    def turn(self):
        verb, args = self.verbs()
        command = self.command(verb, args)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode == 0:
            self.told(verb, args)
        else:
            self.refused(verb, args, done.stderr)


class Core(Worker):
    """A process that goes on, as a minion does: what it has loaded may be old."""

    def __init__(self, *args):
        super().__init__(*args)
        self.system = connect(self.root, *self.words)

    def call(self, verb, args):
        """Have the core do it."""
        system, name, *rest = self.system, *args
        if verb == "create":
            system.create_vm(name, label="red", pool=rest[0])
        elif verb == "clone":
            system.clone_vm(name, rest[0], pool=rest[1])
        elif verb == "remove":
            return system.remove_vm(name, purge=True) != {}
        elif verb == "rename":
            system.rename_vm(name, rest[0])
        elif verb == "migrate":
            system.migrate_vm(name, rest[0])
        elif verb == "resize":
            system.resize_vm(name, "private", f"{rest[0]}GiB")
        elif verb == "add":
            system.add_pool(name, dir_path=f"/mnt/{name}", min_free="1MiB")
        elif verb == "drop":
            return system.remove_pool(name, purge=True) != {}
        elif verb == "set":
            system.set_pool(name, options={f"x{self.me}": rest[0]})
        return True

    def turn(self):
        verb, args = self.verbs()
        try:
            if self.call(verb, args):
                self.told(verb, args)
        except StoragePoolException as err:
            self.refused(verb, args, str(err))


class Looking(Core):
    """Reads everything there is to read, again and again."""

    def turn(self):
        for verb in ("list_pools", "list_vms", "report", "orphans"):
            getattr(self.system, verb)()
        for name in (*VMS, "source"):
            self.system.vm_info(name)
            with contextlib.suppress(StoragePoolException):
                self.system.verify_vm(name)
        for name in self.system.list_pools():
            self.system.pool_info(name)
        self.note(did="look")


class Killed(Core):
    """Has a child do it and kills it in the midst, whatever it holds."""

    def turn(self):
        verb = self.random.choice(("create", "remove", "migrate", "clone", "resize", "drop", "add"))
        name = f"killed-{self.number}"
        args = {
            "create": [name, "ssd"],
            "clone": ["source", name, "disk"],
            "resize": [name, self.random.randrange(3, 9)],
            "migrate": [name, self.random.choice(POOLS)],
            "add": [name],
            "drop": [name],
        }.get(verb, [name])
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                self.call(verb, args)
            os._exit(0)
        time.sleep(self.random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self.note(did="killed" if os.WIFSIGNALED(status) else "too late")


class R4:
    """The verbs of R4, where a pool has no options of one's own: a guard is set instead."""

    POOLS = ("varlibqubes", "ssd", "btrfs")

    def verbs(self):
        rng = self.random
        pool, shared = rng.choice(self.POOLS), rng.choice(VMS)
        own = rng.choice(self.own) if self.own else None
        return rng.choice(
            [
                ("create", [shared, pool]),
                ("remove", [shared]),
                ("create", [self.new(), pool]) if len(self.own) < 3 else ("remove", [own]),
                ("migrate", [own or shared, pool]),
                ("resize", [shared, rng.randrange(3, 9)]),
                ("add", [f"p{rng.randrange(9)}"]),
                ("add", [f"pool-{self.me}"]),
                ("drop", [f"pool-{self.me}"]),
                ("set", [f"own-{self.me}", rng.randrange(1, 1000)]),
            ]
        )

    def told(self, verb, args):
        if verb == "set":
            self.note(set=[args[0], "min_free", f"{args[1]}MiB"], did=verb)
        else:
            super().told(verb, args)

    def refused(self, verb, args, error):
        """What was made, and removed by another before it was told, was there."""
        super().refused(verb, args, error)
        gone = re.search("removed by someone else|gone with the VM|is not there", error)
        if verb == "create" and gone:
            self.note(there=args[0])


class R4Cli(R4, Cli):
    """``qubes-storage`` on R4."""

    ARGS = {**Cli.ARGS, "add": ["pool", "add", "{1}", "driver=file", "dir_path=/mnt/{1}"]}
    ARGS["set"] = ["pool", "set", "{1}", "min_free={2}MiB"]


class R4Core(R4, Core):
    """The core on R4."""

    def call(self, verb, args):
        name, *rest = args
        if verb == "add":
            return self.system.add_pool(name, driver="file", dir_path=f"/mnt/{name}")
        if verb == "set":
            return [self.system.set_pool(name, min_free=f"{rest[0]}MiB")]
        return super().call(verb, args)
