"""
R3.2's command lines, run as ``qubes-storage`` with the same arguments: exit code, files, registry.

Each case is a process of its own. ``like`` in ``ours`` names the case whose outcome ours is. R3.2
also rewrites the NetVM of other VMs whenever it saves; we leave their elements as they are.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import TREE
from tests.r32.cases import cases, load
from tests.r32.machine import GIB, GID, LIB, USER, XML, element

CONF = load("I_cli")[0]["input"]["conf"]
BY_ID = {case["id"]: case for case in load("I_cli")}
COMMANDS = [case for case in cases("I_cli") if "tool" in case.values[0]["input"]]
PARALLEL = [case for case in cases("I_cli") if case.id.startswith("parallel")]
THEN = [case for case in cases("I_cli") if case.id.startswith("then_any_tool")]
TOOLS = {"qvm-template-commit": "commit"}
COLUMNS = ("label", "pool_name", "template_qid", "memory", "vcpus", "internal", "netvm_qid")
OTHER_TEMPLATES = {"fedora-23", "wint"}
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(TREE / "_utils"), "LC_ALL": "C"}


def test_every_case_is_run():
    others = {"pool_removed_while_in_use", "pool_dir_changed_while_in_use"}
    assert len(COMMANDS) + len(PARALLEL) + len(THEN) + len(others) == len(BY_ID)
    assert others <= set(BY_ID)


# Not by subprocess, whose child would do it between fork and exec: where there are threads, such a
# child may wait for ever for a lock that one of them had.
AS_USER = """
import os, sys
umask, user, group = int(sys.argv[1], 8), *map(int, sys.argv[2:4])
os.umask(umask)
if user:
    os.setgroups([group])
    os.setgid(group)
    os.setuid(user)
os.execv(sys.argv[4], sys.argv[4:])
"""


def as_user(command, user, umask):
    """A command that runs another as the user of a case."""
    ids = (USER, GID) if user == "user" and not os.geteuid() else (0, 0)
    return [sys.executable, "-ISc", AS_USER, umask, *map(str, ids), *command]


@pytest.fixture(scope="module")
def user():
    """Who runs the cases of ``user``: they, unless this Python lies where they cannot reach it."""
    command = [sys.executable, "-c", "import qubes_storage.cli"]
    with contextlib.suppress(OSError):
        command = as_user(command, "user", "022")
        done = subprocess.run(command, env=ENV, capture_output=True, check=False)
        if done.returncode == 0:
            return "user"
    return "root"


@pytest.fixture
def start(user):
    """``start(machine, case, *args)``: a running process of ours."""

    def run(machine, given, *args):
        command = [sys.executable, "-m", "qubes_storage", "--root", str(machine.root), *args]
        who = user if given.get("user", "user") == "user" else "root"
        return subprocess.Popen(
            as_user(command, who, given.get("umask", "002")),
            env=ENV,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    return run


@pytest.fixture
def call(start):
    """``call(machine, case, *args)``: exit code, standard output and standard error."""

    def run(machine, given, *args):
        process = start(machine, given, *args)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


@pytest.fixture
def base(scratch):
    """``base(conf)``: the system that every case starts with, its pool foo made."""

    def make(conf=CONF):
        machine = scratch(conf)
        machine.attrs["default_netvm"] = "3"
        netvm = {"memory": "300", "netid": "2", "template_qid": "1"}
        net = element("QubesNetVm", "sys-net", 2, **netvm)
        net[1].pop("netvm_qid")
        firewall = element("QubesProxyVm", "sys-firewall", 3, **netvm, netvm_qid="2")
        firewall[1]["uses_default_netvm"] = "False"
        work = element("QubesAppVm", "work", 4, template_qid="1", netvm_qid="3")
        for entry, subdir in ((net, "servicevms"), (firewall, "servicevms"), (work, "appvms")):
            stand(machine, f"{LIB}/{subdir}/{entry[1]['name']}")
            machine.elements.append(entry)
        wint = element("QubesTemplateHVm", "wint", 5, memory="512", label="black")
        for key in ("kernel", "kernelopts", "uses_default_kernel", "uses_default_kernelopts"):
            wint[1].pop(key)
        machine.add_template(wint, LIB, 20 * GIB, marked=False)
        machine.write_registry()
        if conf:
            machine.connect().set_pool("foo")
        return machine

    return make


def stand(machine, vmdir):
    """The directory of a VM that runs on a template."""
    machine.mkdir(vmdir)
    machine.image(f"{vmdir}/private.img", 2 * GIB, f"PRIV:{os.path.basename(vmdir)}")
    machine.image(f"{vmdir}/volatile.img", 23 * GIB // 2)
    os.symlink("/nowhere", machine.path(f"{vmdir}/icon.png"))


def prepare(machine, name, given, tmp_path):
    """What stands before a case, as its id tells; returns its arguments, and the file it names."""
    if name == "no_default_template":
        machine.attrs["default_template"] = "None"
        machine.write_registry()
    elif name in ("no_qubes_xml", "init_storage"):
        machine.path(XML).unlink()
    elif name == "dir_exists":
        machine.mkdir(f"{LIB}/appvms/vm1")
    elif name == "template_private_missing":
        machine.path(f"{LIB}/vm-templates/fedora-23/private.img").unlink()
    elif name.startswith("clone_dir_exists"):
        machine.mkdir(f"{LIB}/appvms/w2")
        if name.endswith("with_data"):
            machine.image(f"{LIB}/appvms/w2/private.img", 100, "precious")
    elif name == "remove_dir_missing":
        shutil.rmtree(machine.path(f"{LIB}/appvms/work"))
    args, file = list(given["args"]), None
    for n, arg in enumerate(args):
        if arg.endswith("/r.img"):
            file = machine.path(arg) if arg.startswith(LIB) else tmp_path / "r.img"
            file.write_bytes(b"ROOT\n\n")
            os.chmod(file, 0o666)
            args[n] = str(file)
    return args, file


def outcome(case):
    """The recorded outcome by our rules: exit code, ``{path: entry}`` made, paths gone, rows."""
    ours = case.get("ours", {})
    if "like" in ours:
        return {**outcome(BY_ID[ours["like"]]), "removed": ours.get("removed", [])}
    found = {**case["observed"]["result"], **ours}
    made = {}
    for entry in found["created"] if found["exit"] == 0 else ():
        if entry["path"] in ours.get("not_made", ()):
            continue
        keys = {"type", "target", "size", "blocks_zero"} & set(entry)
        made[entry["path"]] = {key: entry[key] for key in keys}
        if entry["type"] != "link":
            made[entry["path"]]["mode"] = ours["modes"][entry["type"]]
        if entry["path"] in ours.get("sizes", ()):
            made[entry["path"]]["size"] = ours["sizes"][entry["path"]]
    rows = {}
    for key in ("vms_added", "vms_removed"):
        rows[key] = [row for row in found[key] if row[2] not in OTHER_TEMPLATES]
        rows[key] = rows[key] if found["exit"] == 0 else []
    removed = found["removed"] if found["exit"] == 0 else []
    return {"exit": found["exit"], "made": made, "removed": removed, **rows}


def row(entry):
    """An element as the cases show it."""
    attrs = entry.attrs
    shown = [attrs.get(key) for key in COLUMNS]
    return [attrs["qid"], entry.tag, attrs["name"], *shown, attrs.get("kernel")]


def registered(machine):
    """``{name: (element's bytes, row)}``."""
    if not machine.path(XML).exists():
        return {}
    return {name: (e.raw, row(e)) for name, e in machine.entries().items() if name != "dom0"}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_line_does_what_it_did(base, call, tmp_path, case):
    given = case["input"]
    machine = base(given.get("conf"))
    tmp_path.chmod(0o777)
    args, file = prepare(machine, case["id"], given, tmp_path)
    before, vms = machine.tree(but=[XML]), registered(machine)
    wanted = outcome(case)

    command = TOOLS.get(given["tool"], given["tool"].replace("qvm-", "", 1))
    code, out, err = call(machine, given, command, *args)

    assert "Traceback" not in err
    told = wanted["exit"] != 0 or (command == "clone" and "-p" in args)  # that -p is ignored
    assert (code, bool(err)) == (wanted["exit"], told), err
    after = machine.tree(but=[XML])
    inside = {str(file).removeprefix(str(machine.root))} if file else set()
    gone = set(before) - set(after)
    if case["id"] != "grow_private_help" and code == 0 and command.startswith("grow"):
        before, after = check_grown(machine, command, args, before, after)
    if code == 0 and given["tool"] == "qvm-template-commit":  # a new one takes its place
        cow = f"/var/lib/qubes/vm-templates/{args[-1]}/root-cow.img"
        assert after.pop(cow)["blocks_zero"]
        before.pop(cow)
    assert {p: e for p, e in after.items() if p in before} == {
        p: e for p, e in before.items() if p not in gone
    }
    moved = inside if "-R" in args and code == 0 else set()
    assert gone - moved == set(wanted["removed"]) - moved
    made = {path: entry for path, entry in after.items() if path not in before}
    expected = {path: entry for path, entry in wanted["made"].items() if path not in before}
    shown = {p: {k: e.get(k) for k in expected.get(p, e)} for p, e in made.items()}
    assert shown == expected
    now = registered(machine)
    assert [now[name][1] for name in now if name not in vms] == wanted["vms_added"]
    assert [vms[name][1] for name in vms if name not in now] == wanted["vms_removed"]
    assert {n: now[n] for n in now if n in vms} == {n: vms[n] for n in vms if n in now}
    if file:
        assert file.exists() is not bool("-R" in args and code == 0)
    if code == 0 and wanted["vms_added"]:
        assert f"{wanted['vms_added'][0][2]} was created" in out or command == "clone"


def check_grown(machine, command, args, before, after):
    """The image has the size that was asked for; what is left is to be as it was."""
    volume = command.replace("grow-", "")
    found = machine.connect().vm_info(args[0])["volumes"]
    assert found[volume]["size"] == int(args[1].rstrip("G")) * GIB
    grown = {found[v]["path"] for v in found if v in (volume, "root-cow", "volatile")}
    return tuple({p: e for p, e in tree.items() if p not in grown} for tree in (before, after))


@pytest.mark.parametrize("case", PARALLEL)
def test_many_at_once_get_along(base, start, case):
    observed, given = case["observed"]["result"], case["input"]
    machine = base()
    several = given["names"] > 1
    names = [f"p{n}" if several else "p" for n in range(len(observed["exits_sorted"]))]
    pool = "foo" if case["id"].endswith("foo") else "default"
    processes = [start(machine, given, "create", name, "-l", "red", "-P", pool) for name in names]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == observed["exits_sorted"]
    there = machine.entries()
    assert len([name for name in there if re.fullmatch(r"p\d?", name)]) == observed["new_vm_count"]
    # in the recorded system of the one name there was no wint
    assert sorted(int(e.attrs["qid"]) for e in there.values()) == list(range(len(there)))
    place = {"foo": f"{LIB}/foo", "default": LIB}[pool]
    made = set(os.listdir(machine.path(f"{place}/appvms"))) - {"work"}
    assert sorted(made) == observed["dirs"]
    failed = {error for error in errors if error}
    assert bool(failed) is bool(observed["errors"])
    assert all("VM p: " in error for error in failed)


@pytest.mark.parametrize("case", THEN)
def test_no_value_keeps_later_commands_from_working(base, call, case):
    given, (created, *then) = case["input"], case["observed"]["result"]
    assert set(created) == {"create_exit"}
    machine = base()
    code = call(machine, given, "create", "vm1", "-l", "red", *given["args"])[0]
    assert code == case["ours"]["create_exit"]
    for step in then:
        args = {"qvm-ls": ["ls"], "qvm-remove": ["remove", "work"]}[step["tool"]]
        assert call(machine, given, *args)[0] == step["exit"]


def with_vm_in_foo(base, call):
    """A machine with a VM in pool foo, and what the case has for input."""
    machine, given = base(), {"umask": "002", "user": "user"}
    assert call(machine, given, "create", "-Pfoo", "-l", "red", "infoo")[0] == 0
    return machine, given


def edit_conf(machine, old, new):
    """Change storage.conf by hand."""
    conf = machine.path("/etc/qubes/storage.conf")
    assert old in conf.read_text()
    conf.write_text(conf.read_text().replace(old, new))


def test_pool_removed_while_in_use(base, call):
    case = BY_ID["pool_removed_while_in_use"]
    machine, given = with_vm_in_foo(base, call)
    code, _, err = call(machine, given, "pool", "remove", "foo")
    assert code == 1
    assert "infoo" in err
    edit_conf(machine, "[foo]\ndriver=xen\ndir_path=/var/lib/qubes/foo\n", "")
    for step in case["observed"]["result"]:
        command = step["tool"].replace("qvm-", "", 1)
        if command == "prefs":
            continue  # no command of ours; what it shows is in ls
        code, _, err = call(machine, given, command, *step["args"])
        if step["args"] == ["infoo"]:  # the pool is unknown, so only its entry can go
            assert (code, step["exit"]) == (1, 1)
            assert "pool foo: unknown; " in err
            assert call(machine, given, command, "--just-db", "infoo")[0] == 0
            assert machine.path(f"{LIB}/foo/appvms/infoo/private.img").exists()
        else:
            assert (code, err) == (0, "")
    assert case["ours"]["reason"]


def test_pool_dir_changed_while_in_use(base, call):
    case = BY_ID["pool_dir_changed_while_in_use"]
    observed = case["observed"]["result"]
    machine, given = with_vm_in_foo(base, call)
    code, _, err = call(machine, given, "pool", "set", "foo", f"dir_path={LIB}/foo2")
    assert code == 1
    assert "infoo" in err
    edit_conf(machine, f"dir_path={LIB}/foo\n", f"dir_path={LIB}/foo2\n")
    before = machine.tree()
    code, out, _ = call(machine, given, "disks", "infoo")
    assert code == 0
    assert observed["private_img"] in out
    code, out, _ = call(machine, given, "report")
    assert code == 0
    assert f"{LIB}/foo2: No such file or directory" in out
    info = machine.connect().vm_info("infoo")
    assert info["dir_path"] == observed["new_vmdir"]
    assert machine.tree() == before
    assert case["ours"]["created"] == []
