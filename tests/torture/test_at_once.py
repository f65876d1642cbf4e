"""Sixteen processes on one machine at once: nothing is lost, doubled or torn, and nobody waits."""

import collections
import json
import os
import re
import subprocess
import sys
import time

import pytest
from qubes_storage import conf, connect, registry
from qubes_storage.pool import CONF

from tests.conftest import TREE
from tests.integration.conftest import installed  # noqa: F401
from tests.torture import crews

CREW = {"salt": 3, "cli": 4, "core": 2, "r32": 3, "killed": 2, "look": 2}
DATA = bytes(range(256)) * 1024
ANYTHING = """
from qubes_storage.pool import Pool as Base

class Pool(Base):
    def __init__(self, name, *, dir_path: str, **options):
        super().__init__(name, dir_path=dir_path)
"""
# What may be refused because somebody else was first; nothing else may go wrong.
CLEAR = re.compile(
    r"VM [\w-]+: (is in qubes\.xml already|is not in qubes\.xml|is not there|lies in pool"
    r"|private has \d+ bytes .* and never shrinks)"
    r"|pool [\w-]+: (is in /etc/qubes/storage\.conf already|is not in /etc/qubes|is not there)"
    r"|One or more requisite failed: qubes_storage\.VM "  # which says why itself
)


@pytest.fixture
def machine(root, tmp_path, monkeypatch):
    """A root with pools, a template, a VM to clone and one to count in."""
    (tmp_path / "anything.py").write_text(ANYTHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    system = connect(root)
    for name, place in (("default", None), ("ssd", "/opt/ssd"), ("disk", "/mnt/disk")):
        system.add_pool(name, **({"dir_path": place} if place else {}))
    for name in ["common", *(f"own-{me}" for me in crews.names(CREW))]:
        system.add_pool(name, dir_path=f"/mnt/{name}", options={"class": "anything.Pool"})
    system.create_vm("fedora", klass="TemplateVM")
    for name in ("source", "counter"):
        system.create_vm(name)
    with open(root / "var/lib/qubes/appvms/source/private.img", "r+b") as image:
        image.write(DATA)
    yield root
    sys.modules.pop("anything", None)


def salt_words(tmp_path, me, root, file_root):
    """A minion of its own for the machine that all share: its command, and its pillar's file."""
    place = tmp_path / me
    (place / "pillar").mkdir(parents=True)
    (place / "pillar/top.sls").write_text("base:\n  '*':\n    - machine\n")
    config = {
        "id": me,
        "root_dir": str(place),
        "file_client": "local",
        "file_roots": {"base": [str(file_root)]},
        "pillar_roots": {"base": [str(place / "pillar")]},
        "clean_dynamic_modules": True,
        "qubes_storage.root": str(root),
    }
    (place / "minion").write_text(json.dumps(config))
    call = os.path.join(os.path.dirname(sys.executable), "salt-call")
    command = [call, f"--config-dir={place}", "--local", "--out=json", "--log-level=quiet"]
    return json.dumps(command), str(place / "pillar/machine.sls")


def look_at(root):
    """The files as they are at any moment: whole, and each number, name and uuid once."""
    assert conf.loads((root / CONF[1:]).read_bytes().decode())["default"]
    found = registry.loads((root / registry.PATH[1:]).read_bytes())
    for key in ("qid", "name", "uuid"):
        values = [entry.attrs[key] for entry in found.entries if key in entry.attrs]
        assert len(values) == len(set(values)), (key, values)


def test_sixteen_at_once(machine, tmp_path, installed, everything):  # noqa: F811
    def words(kind, me):
        return salt_words(tmp_path, me, machine, installed) if kind == "salt" else ()

    assert len(crews.names(CREW)) == 16
    with crews.working(CREW, tmp_path, machine, 60 if everything else 8, words) as running:
        looks = crews.watch(running, lambda: look_at(machine))
        told = crews.told(CREW, tmp_path, running)
    done = collections.Counter(line["did"] for line in told if "did" in line)
    refused = [line for line in told if "refused" in line]
    print(f"looked {looks} times; {dict(done)}; {len(refused)} refused")
    assert {line["error"] for line in refused if not CLEAR.search(line["error"])} == set()
    assert done["killed"] and done["state"] and done["r32"] and done["look"]
    check_told(machine, told)
    check_mended(machine)
    check_clones(machine, told)


def test_one_that_dies_with_the_lock_blocks_nobody(machine, tmp_path, installed):  # noqa: F811
    hold = "import sys, time\nfrom qubes_storage import connect\n"
    hold += "with connect(sys.argv[1]).locked():\n    print(1, flush=True)\n    time.sleep(600)\n"
    env = {**os.environ, "PYTHONPATH": str(TREE / "_utils")}
    command = [sys.executable, "-c", hold, str(machine)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        kinds = {"salt": 1, "cli": 1, "core": 1, "r32": 1}

        def words(kind, me):
            return salt_words(tmp_path, me, machine, installed) if kind == "salt" else ()

        before = (machine / registry.PATH[1:]).read_bytes()
        with crews.working(kinds, tmp_path, machine, 3, words) as running:
            time.sleep(1)
            assert (machine / registry.PATH[1:]).read_bytes() == before
            holder.kill()
            crews.watch(running, lambda: look_at(machine))
            told = crews.told(kinds, tmp_path, running)
    assert {line["did"] for line in told if "did" in line} >= {"r32", "state"}
    check_told(machine, told)


def check_told(root, told):
    """What is there is what was made and not removed, each as whoever did it was told."""
    system = connect(root)
    balance = collections.Counter()
    for line in told:
        balance[line.get("there")] += 1
        balance[line.get("gone")] -= 1
    balance.pop(None)
    there = {*system.list_vms(), *(f"pool {name}" for name in system.list_pools())}
    wrong = {name: count for name, count in balance.items() if count != (name in there)}
    assert wrong == {}
    kept = {"dom0", "fedora", "source", "counter", *(f"pool {name}" for name in ("default", "ssd"))}
    kept |= {
        f"pool {name}" for name in ("disk", "common", *(f"own-{me}" for me in crews.names(CREW)))
    }
    unknown = {name for name in there if "killed" not in name or "own-" in name} - kept - {*balance}
    assert unknown == set()
    counted = sum(line.get("counted", 0) for line in told)
    assert system.registry().by_name["counter"].attrs["backup_size"] == str(counted)
    options = {}
    for line in told:
        if "set" in line:
            pool, option, value = line["set"]
            options[pool, option.lower()] = str(value)
    pools = system.list_pools()
    assert {key: pools[key[0]].get(key[1]) for key in options} == options
    assert any(pool == "common" for pool, _ in options)


def check_mended(root):
    """What the killed left is taken away by the next run; what is left then is whole."""
    system = connect(root)
    for number in range(CREW["killed"]):
        if f"killed-{number}" not in system.list_pools():  # an add that died is done again
            system.add_pool(f"killed-{number}", dir_path=f"/mnt/killed-{number}")
        system.remove_vm(f"killed-{number}", purge=True)
        system.add_pool(f"mended-{number}", dir_path=f"/mnt/mended-{number}")
        system.remove_pool(f"mended-{number}", purge=True)
    for name, config in system.list_pools().items():
        if name.startswith("killed"):
            system.remove_pool(name, purge=True)
            assert not (root / config["dir_path"][1:]).exists()
    wrong = {name: system.verify_vm(name) for name in system.list_vms()}
    assert {name: problems for name, problems in wrong.items() if problems} == {}
    assert system.orphans() == []
    assert list(root.rglob(".*")) == []


def check_clones(root, told):
    """Each image is empty or the whole of what it was cloned from."""
    system = connect(root)
    images = {
        name: root / info["volumes"]["private"]["path"][1:]
        for name in system.list_vms()
        if "private" in (info := system.vm_info(name))["volumes"]
    }
    heads = {}
    for name, path in images.items():
        with open(path, "rb") as file:
            heads[name] = file.read(len(DATA) + 1024)
    whole = {name for name, head in heads.items() if head == DATA + bytes(1024)}
    assert all(not head.strip(b"\0") for name, head in heads.items() if name not in whole)
    assert {line["there"] for line in told if line.get("clone")} & {*images} <= whole
