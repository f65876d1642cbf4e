"""
Looking, on a machine mounted read-only and watched, and with a daemon that tells what it is asked:
no write, no new file, no lock taken.
"""

import argparse
import ast
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from qubes_storage import cli
from salt.exceptions import CommandExecutionError

from tests.conftest import TREE
from tests.functional.conftest import snapshot
from tests.integration.conftest import Machine, installed, results  # noqa: F401
from tests.integration.test_salt_call import EXAMPLES
from tests.r4.machine import RELEASES, writes
from tests.r4.machine import machine as r4_machine
from tests.torture.watching import looked
from tests.unit.conftest import qubesadmin  # noqa: F401

READING = {
    "qubes_pool.list": (),
    "qubes_pool.info": ("ssd",),
    "qubes_pool.drivers": (),
    "qubes_pool.diff": ("new", "dir_path=/opt/new"),
    "qubes_pool.orphans": (),
    "qubes_pool.notes": ("ssd",),
    "qubes_pool.default_pools": (),
    "qubes_pool.default_pools_diff": ("default_pool=ssd",),
    "qubes_vm.list": (),
    "qubes_vm.info": ("work",),
    "qubes_vm.removal_order": (["work"],),
    "qubes_vm.diff": ("work", "label=blue"),
    "qubes_vm.verify": ("work",),
    "qubes_vm.revisions": ("work",),
    "qubes_vm.disks": ("work",),
    "qubes_vm.report": (),
}
CHANGING = {
    "qubes_pool": {"add", "set", "remove", "set_default_pools"},
    "qubes_vm": {
        "create", "set", "clone", "rename", "resize", "migrate", "commit", "reset", "remove",
        "revert",
    },
}  # fmt: skip
COMMANDS = {
    "ls": (),
    "verify": ("work",),
    "orphans": (),
    "disks": ("work",),
    "report": (),
    "pool list": (),
    "pool info": ("ssd",),
}
CHANGING_COMMANDS = {
    "create", "clone", "rename", "resize", "grow-private", "grow-root", "migrate", "remove",
    "commit", "reset", "pool add", "pool set", "pool remove",
}  # fmt: skip
CHANGED = {
    "pools": {"foo": {"dir_path": "/opt/foo"}},
    "vms": {
        "work": {"volumes": {"private": "30GiB"}, "label": "blue"},
        "new": {"pool": "foo"},
        "copy": {"clone_from": "work"},
        "personal": {"absent": True, "purge": True},
    },
}
TOLD = [
    ("qubes_pool.present", "new", {"dir_path": "/mnt/new", "min_free": "1MiB"}),
    ("qubes_pool.present", "ssd", {"min_free": "1MiB"}),
    ("qubes_pool.absent", "spare", {"purge": True}),
    ("qubes_pool.default", "default pools", {"default_pool": "ssd"}),
    ("qubes_vm.present", "work", {"label": "blue", "volumes": {"private": "30GiB"}}),
    ("qubes_vm.present", "work", {"pool": "spare", "migrate": True}),
    ("qubes_vm.present", "newvm", {"klass": "AppVM", "pool": "ssd"}),
    ("qubes_vm.present", "copy", {"clone_from": "work", "pool": "ssd"}),
    ("qubes_vm.absent", "work", {"purge": True}),
]
# What a backend has none of.
LACKING = {
    "local": {
        "qubes_pool.default_pools", "qubes_pool.default_pools_diff", "qubes_vm.revisions",
        "qubes_pool.default default pools",
    },
    "admin": {"qubes_pool.orphans", "qubes_vm.disks", "orphans", "disks"},
}  # fmt: skip
CALLS = """
import json, sys
import salt.client
caller = salt.client.Caller(c_path=sys.argv[1])
for function, args in json.loads(sys.argv[2]).items():
    try:
        named = dict(arg.split("=") for arg in args if "=" in arg)
        caller.cmd(function, *(arg for arg in args if "=" not in arg), **named)
    except Exception as err:
        print(function, err)
"""
WRITES = re.compile(
    r"\b(O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE|F_SETLKW?|F_OFD_SETLKW?|FICLONE\w*"
    r"|BTRFS_IOC_SNAP\w*|BTRFS_IOC_SUBVOL\w*)\b|^\d+ +(?! |open|fcntl|ioctl)"
)
TRACED = (
    "open,openat,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,link,linkat,"
    "symlink,symlinkat,chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,truncate,ftruncate,"
    "fallocate,mknod,mknodat,utimensat,setxattr,fsetxattr,flock,fcntl,ioctl,write,pwrite64,sendfile,"
    "copy_file_range"
)


def functions(module):
    """The public functions of an execution module, by the names that Salt gives them."""
    tree = ast.parse((TREE / f"_modules/{module}.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name.rstrip("_") for name in names if not name.startswith("_")}


def commands(parser, before=""):
    """The commands of the command line."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                below = list(commands(sub, f"{before}{name} "))
                yield from below or [f"{before}{name}"]


def test_every_function_and_command_either_looks_or_changes():
    for module, changing in CHANGING.items():
        looking = {name.split(".")[1] for name in READING if name.startswith(f"{module}.")}
        assert functions(module) == looking | changing
        assert not looking & changing
    assert set(commands(cli._parser())) == set(COMMANDS) | CHANGING_COMMANDS


@pytest.fixture
def minion(salt_factories, tmp_path, installed):  # noqa: F811
    """A machine as an example declares it, then read-only."""
    if os.geteuid() or not shutil.which("strace"):
        pytest.skip("only root can mount, and strace has to be there")
    made = Machine(salt_factories, tmp_path, installed)
    made.declare(EXAMPLES / "workstation.sls")
    assert set(results(made.highstate()).values()) == {True}
    subprocess.run(["mount", "--bind", made.root, made.root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", made.root], check=True)
        yield made
    finally:
        subprocess.run(["umount", "-l", made.root], check=True)


def watched(root, tmp_path, *command):
    """What a command does to what lies below the root, as strace saw it, and what it says."""
    log = tmp_path / "strace.log"
    strace = ["strace", "-f", "-y", "-e", f"trace={TRACED}", "-e", "signal=none", "-o", log]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*strace, *command], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    below = [line for line in log.read_text().splitlines() if f"{root}/" in line]
    assert below  # it was looked at
    wrong = [line for line in below if WRITES.search(line)]
    return wrong, done.stdout


def test_whoever_looks_writes_nothing_and_takes_no_lock(minion, tmp_path, everything):
    before = snapshot(minion.root)
    config = os.path.join(minion.cli.config_dir, "minion")
    wrong, said = watched(
        minion.root, tmp_path, sys.executable, "-c", CALLS, config, json.dumps(READING)
    )
    assert wrong == []
    refused = {line.split(" ")[0] for line in said.splitlines() if line.startswith("qubes_")}
    local = {"default_pools", "default_pools_diff"}  # R3.2 has none
    assert refused <= {*(f"qubes_pool.{name}" for name in local), "qubes_vm.revisions"}, said
    for command, args in COMMANDS.items() if everything else [("report", ()), ("orphans", ())]:
        words = ["--root", str(minion.root), *command.split(" "), *args]
        run = [sys.executable, "-c", "from qubes_storage.cli import main; main()", *words]
        os.environ["PYTHONPATH"] = str(TREE / "_utils")
        try:
            assert watched(minion.root, tmp_path, *run)[0] == [], command
        finally:
            del os.environ["PYTHONPATH"]
    assert snapshot(minion.root) == before


def test_a_highstate_in_test_mode_writes_nothing_and_takes_no_lock(minion, tmp_path, everything):
    before = snapshot(minion.root)
    salt_call = os.path.join(os.path.dirname(sys.executable), "salt-call")
    command = [salt_call, f"--config-dir={minion.cli.config_dir}", "--local", "--out=json"]
    changed = tmp_path / "changed.sls"
    changed.write_text(json.dumps({"qubes_storage": CHANGED}))
    examples = [EXAMPLES / "workstation.sls", EXAMPLES / "default.sls"] if everything else []
    for pillar in [changed, *examples]:
        minion.declare(pillar)
        wrong, said = watched(minion.root, tmp_path, *command, "state.highstate", "test=True")
        assert wrong == [], pillar
        states = json.loads(said)["local"]
        assert isinstance(states, dict), states
        told = {state["result"] for state in states.values()}
        assert told == ({None} if pillar is changed else {True}), states
    assert snapshot(minion.root) == before


@pytest.fixture(params=["local", *RELEASES])
def there(request, scratch, tmp_path, salted, salted_r4, qubesadmin):  # noqa: F811
    """``(root, Salt on it, the driver of its pools, words for the command line, daemon)``."""
    if request.param == "local":
        machine = scratch()
        system = machine.connect()
        for name in ("ssd", "spare"):
            system.add_pool(name, dir_path=f"/mnt/{name}")
        system.create_vm("work", pool="ssd")
        salted.on(machine.root)
        yield machine.root, salted, "xen", [], None
        return
    with r4_machine(request.param, tmp_path / "r4") as (daemon, _):
        daemon.add_pool("spare", "file-reflink", dir_path="/mnt/btrfs/spare")
        salted_r4.on(daemon.root)
        words = ["--backend", "admin", "--socket", f"{daemon.root}/qubesd.sock"]
        yield tmp_path / "r4", salted_r4, "file-reflink", words, daemon


def look(root, salted, driver, words):
    """Call all that looks, and each state with test=True; ``{what: what came of it}``."""
    found = {}
    salted.look_anew()
    for function, args in READING.items():
        named = dict(arg.split("=") for arg in args if "=" in arg)
        if "dir_path" in named:
            named = {"driver": driver, "dir_path": "/mnt/new"}
        try:
            salted.look(function, *(arg for arg in args if "=" not in arg), **named)
            found[function] = True
        except CommandExecutionError:
            found[function] = False
    for command, args in COMMANDS.items():
        given = [f"--root={root}", *words, *command.split(" "), *args]
        found[command] = cli.main(given) == 0
    for function, name, declared in TOLD:
        given = {"driver": driver, **declared} if "dir_path" in declared else declared
        key = f"{function} {name}"
        found[key] = found.get(key, True) and salted.call(function, name, True, **given)["result"]
    return found


@pytest.mark.usefixtures("tracing")
def test_whoever_looks_is_seen_to_write_nothing_on_either_backend(there, figures):
    root, *asked, daemon = there
    look(root, *asked)  # what is loaded at the first call is
    before = snapshot(root)
    ending, calls, events = looked(lambda: look(root, *asked), root)
    assert not ending.error, ending.traceback
    assert (calls, events) == ([], [])
    assert snapshot(root) == before
    assert daemon is None or (daemon.log and writes(daemon) == [])
    told = {key: ending.value.pop(key) for key in [*ending.value] if " " in key and "." in key}
    lacking = {key for key, result in {**ending.value, **told}.items() if result is False}
    assert lacking == LACKING["admin" if daemon else "local"]
    assert {result for key, result in told.items() if key not in lacking} == {None}
    figures["calls that look, seen to write nothing"] += len(READING) + len(COMMANDS) + len(TOLD)


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize(
    ("write", "call", "event"),
    [
        (lambda path: path.write_text("x"), "openat", "open"),
        (lambda path: path.mkdir(), "mkdir", "os.mkdir"),
        (lambda path: os.rename(path.parent / "a", path), "rename", "os.rename"),
        (lambda path: os.chmod(path.parent / "a", 0o600), "chmod", "os.chmod"),
        (lambda path: fcntl.flock(os.open(path.parent, os.O_RDONLY), fcntl.LOCK_SH), "flock",
         "fcntl.flock"),
    ],
)  # fmt: skip
def test_who_writes_is_seen_by_both(write, call, event, tmp_path):
    (tmp_path / "a").touch()
    ending, calls, events = looked(lambda: write(tmp_path / "b"), tmp_path)
    assert not ending.error, ending.traceback
    assert any(seen.startswith(f"{call} ") for seen in calls)
    assert any(seen.startswith(f"('{event}'") for seen in events)
