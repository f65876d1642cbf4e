"""
Those who work on one machine at once: each a process of its own that notes what it was told.

``python -m tests.torture.crew KIND NUMBER ROOT SECONDS LOG [WORD...]``. The log has a line of JSON
for each thing that was done, as whoever asked for it was told, and for each refusal.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from xml.etree import ElementTree

from tests.torture import workers

XML = "var/lib/qubes/qubes.xml"


def _private(path, flags):
    return os.open(path, flags, 0o660)


class R32(workers.Worker):
    """
    R3.2's own way: the lock on qubes.xml, opened again if it was replaced; the whole file read; a
    new one written beside, locked, and renamed over it.
    """

    def run(self):
        os.umask(0o007)
        super().run()

    def lock(self):
        """A handle of the registry that it has locked, as ``lock_db_for_writing``."""
        path = os.path.join(self.root, XML)
        store = open(path, "r+b")  # noqa: SIM115
        while True:
            fcntl.lockf(store, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(store.fileno()), os.stat(path)):
                return store
            store.close()
            store = open(path, "r+b")  # noqa: SIM115

    def save(self, store, tree):
        """Replace the registry, keeping the lock, as ``save``."""
        path = os.path.join(self.root, XML)
        new = tempfile.NamedTemporaryFile(prefix=path, delete=False)  # noqa: SIM115
        tree.write(new, encoding="us-ascii")
        new.flush()
        os.chmod(new.name, 0o660)
        fcntl.lockf(new, fcntl.LOCK_EX)
        os.rename(new.name, path)
        store.close()
        return new

    def turn(self):
        store = self.lock()
        try:
            store.seek(0)
            tree = ElementTree.parse(store)
            verb, name = self.change(tree.getroot())
            store = self.save(store, tree)
        finally:
            store.close()
        self.note(did="r32", counted=1, **{verb: name})
        time.sleep(self.random.uniform(0, 0.05))

    def change(self, collection):
        """Count in ``counter``, and add or remove VMs of its own, or a shared one."""
        by_name = {element.get("name"): element for element in collection}
        counter = by_name["counter"]
        counter.set("backup_size", str(int(counter.get("backup_size")) + 1))
        name = self.random.choice([f"{self.me}-{n}" for n in range(3)])
        place = f"/var/lib/qubes/appvms/{name}"
        if name in by_name:
            collection.remove(by_name[name])
            shutil.rmtree(self.root + place)
            return "gone", name
        used = {element.get("qid") for element in collection}
        qid = next(str(n) for n in range(1, 254) if str(n) not in used)
        attrs = {"name": name, "qid": qid, "dir_path": place, "uuid": str(uuid.uuid4())}
        ElementTree.SubElement(collection, "QubesAppVm", {**counter.attrib, **attrs})
        os.mkdir(self.root + place, 0o770)
        with open(f"{self.root}{place}/private.img", "xb", opener=_private) as image:
            image.truncate(2 << 30)
        return "there", name


class Salt(workers.Worker):
    """``salt-call``: a highstate of VMs and pools that may be there or not."""

    def turn(self):
        command, pillar = self.words
        wanted = {}
        for _ in range(4):
            verb, args = self.verbs()
            name = args[-1] if verb == "rename" else args[0]
            if verb in ("remove", "rename"):
                wanted.setdefault("vms", {})[name] = {"absent": True, "purge": True}
            elif verb in ("create", "migrate"):
                declared = {"label": "red", "pool": args[1], "migrate": True}
                wanted.setdefault("vms", {})[name] = declared
            elif verb == "resize":
                declared = {"volumes": {"private": f"{args[1]}GiB"}}
                wanted.setdefault("vms", {})[name] = declared
            elif verb == "clone":
                declared = {"clone_from": args[0], "pool": args[2]}
                wanted.setdefault("vms", {})[args[1]] = declared
            elif verb == "set":
                declared = {f"x{self.me}": args[1]}
                wanted.setdefault("pools", {})[name] = declared
            else:
                declared = {"absent": True, "purge": True}
                declared = {"dir_path": f"/mnt/{name}"} if verb == "add" else declared
                wanted.setdefault("pools", {})[name] = declared
        with open(pillar, "w", encoding="utf-8") as file:
            json.dump({"qubes_storage": wanted}, file)
        done = subprocess.run(
            [*json.loads(command), "state.highstate"],
            env={**os.environ, "PYTHONPATH": os.path.dirname(self.root)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        states = json.loads(done.stdout)["local"]
        if not isinstance(states, dict):
            self.note(refused="highstate", error=str(states))
            return
        for state in states.values():
            self.say(state, wanted)

    def say(self, state, wanted):
        """Note what a state says that it changed."""
        kind, _, name = state["__id__"].partition(" ")
        shown = f"pool {name}" if kind == "pool" else name
        if state["result"] is False:
            self.note(refused="state", error=state["comment"])
        if "created" in state["changes"]:
            self.told("create", [name]) if kind == "VM" else self.told("add", [name])
        if "removed" in state["changes"]:
            self.told("remove", [name]) if kind == "VM" else self.told("drop", [name])
        option = f"x{self.me}"
        if state["result"] is True and option in wanted.get("pools", {}).get(name, {}):
            self.note(set=[name, option, wanted["pools"][name][option]])
        self.note(did="state", name=shown)


KINDS = {
    "cli": workers.Cli,
    "core": workers.Core,
    "killed": workers.Killed,
    "look": workers.Looking,
    "r32": R32,
    "r4cli": workers.R4Cli,
    "r4core": workers.R4Core,
    "salt": Salt,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](*sys.argv[1:]).run()
