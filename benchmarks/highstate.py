"""What pools and VMs cost a highstate, beside as many states that do nothing."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

TREE = pathlib.Path(__file__).resolve().parent.parent
POOLS = 4
ROUNDS = 4
MACHINE = ("etc/qubes", "var/lib/qubes", "opt")


class Minion:
    """A masterless minion on a fresh tmpfs where there is one: the disk is not what is measured."""

    def __init__(self, base, name, pillar, sls, extra=None):
        self.path = base / name
        self.root = self.path / "root"
        file_root = self.path / "salt"
        subprocess.run(
            ["make", "-s", "-C", str(TREE), "install", f"DESTDIR={file_root}"], check=True
        )
        (file_root / "top.sls").write_text(f"base: {{'*': [{sls}]}}\n")
        (file_root / "nothing.sls").write_text(extra or "{}\n")
        (self.path / "pillar").mkdir()
        (self.path / "pillar/top.sls").write_text("base: {'*': [machine]}\n")
        (self.path / "pillar/machine.sls").write_text(json.dumps(pillar) + "\n")
        config = {
            "id": name,
            "root_dir": str(self.path / "minion"),
            "file_client": "local",
            "file_roots": {"base": [str(file_root)]},
            "pillar_roots": {"base": [str(self.path / "pillar")]},
            "fileserver_list_cache_time": 0,
            "qubes_storage.root": str(self.root),
        }
        (self.path / "minion.d").mkdir()
        (self.path / "minion").mkdir()
        (self.path / "etc").mkdir()
        (self.path / "etc/minion").write_text(json.dumps(config))
        self.fresh()

    def fresh(self):
        """A machine with nothing in it."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in MACHINE:
            (self.root / name).mkdir(parents=True)

    def highstate(self, changes=None):
        """Seconds that a highstate takes; it must succeed, and change as many states as said."""
        salt_call = pathlib.Path(sys.executable).parent / "salt-call"
        command = [salt_call, f"--config-dir={self.path}/etc", "--out=json", "state.highstate"]
        start = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        taken = time.perf_counter() - start
        states = json.loads(run.stdout)["local"].values()
        assert all(state["result"] is True for state in states), run.stdout[-2000:]
        changed = sum(bool(state["changes"]) for state in states)
        assert changes is None or changed == changes, f"{changed} states changed, not {changes}"
        return taken


def layout(vms):
    """A pillar of POOLS pools, a template, and VMs spread over the pools."""
    pools = {f"pool{n}": {"dir_path": f"/opt/pool{n}"} for n in range(1, POOLS)}
    found = {"template": {"klass": "TemplateVM"}}
    for n in range(vms - 1):
        found[f"vm{n}"] = {"template": "template", "pool": ["default", *pools][n % POOLS]}
    return {"qubes_storage": {"pools": {"default": {"driver": "xen"}, **pools}, "vms": found}}


def nothing(count):
    """As many states that succeed without changes, each with a name and a require as ours have."""
    states = {"first": {"test.succeed_without_changes": [{"name": "first"}]}}
    for n in range(1, count):
        states[f"state {n}"] = {
            "test.succeed_without_changes": [{"name": f"state{n}"}, {"require": ["first"]}]
        }
    return json.dumps(states) + "\n"


def measure(base, vms):
    """Best times of ``{nothing, first, again}`` for a number of VMs, measured in turns."""
    ours = Minion(base, f"ours-{vms}", layout(vms), "qubes_storage")
    idle = Minion(base, f"idle-{vms}", {}, "nothing", nothing(POOLS + vms))
    ours.highstate()  # what a cold cache costs, both pay alike
    idle.highstate()
    times = {"nothing": [], "first": [], "again": []}
    for _ in range(ROUNDS):
        times["nothing"].append(idle.highstate(0))
        ours.fresh()
        times["first"].append(ours.highstate(POOLS + vms))
        times["again"].append(ours.highstate(0))
    return {what: min(taken) for what, taken in times.items()}


def main():
    """Print the ratios."""
    shm = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as base:
        few = measure(pathlib.Path(base), 20)
        many = measure(pathlib.Path(base), 200)
    print(
        f"highstate of {POOLS} pools and 200 VMs, warm cache, beside as many states that do nothing"
    )
    print(f"  which take                        {many['nothing']:.2f} s")
    print(f"  first, which makes them           {many['first'] / many['nothing']:.2f} x")
    print(f"  second, which changes nothing     {many['again'] / many['nothing']:.2f} x")
    work = (many["first"] - many["again"]) / (few["first"] - few["again"])
    print(f"  making 200 VMs instead of 20      {work:.1f} x the work")


if __name__ == "__main__":
    main()
