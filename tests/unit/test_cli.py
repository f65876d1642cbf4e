"""The command line: what it prints, what it asks, and what an interruption leaves."""

import fcntl
import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from qubes_storage import cli, cli_output

from tests.conftest import TREE
from tests.r32.machine import GIB, LIB, XML, element

ENV = {**os.environ, "PYTHONPATH": str(TREE / "_utils")}


@pytest.fixture
def machine(scratch):
    machine = scratch("[default]\ndriver=xen\n")
    machine.connect().create_vm("work", label="green")
    return machine


def command(machine, *args):
    """The arguments of a process of its own."""
    return [sys.executable, "-m", "qubes_storage", "--root", str(machine.root), *args]


def test_ls_shows_every_vm_in_columns(call):
    code, out, err = call("ls")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "NAME       KLASS       POOL     TEMPLATE   LABEL",
        "dom0       AdminVM     default  -          black",
        "fedora-23  TemplateVM  default  -          black",
        "work       AppVM       default  fedora-23  green",
    ]
    assert set(json.loads(call("ls", "--json")[1])) == {"dom0", "fedora-23", "work"}


def test_pools_are_added_changed_shown_and_removed(call, machine):
    assert call("pool", "add", "ssd", "dir_path=/mnt/ssd", "min_free=1MiB") == (
        0,
        "pool ssd was added\n",
        "",
    )
    assert machine.path("/mnt/ssd/appvms").is_dir()
    assert "ssd      xen     /mnt/ssd  -" in call("pool", "list")[1].splitlines()
    assert call("pool", "add", "ssd", "dir_path=/mnt/ssd")[0] == 1
    code, out, _ = call("pool", "info", "ssd")
    assert code == 0
    assert ["min_free", "1MiB"] in [line.split() for line in out.splitlines()]
    assert json.loads(call("pool", "info", "ssd", "--json")[1])["dir_path"] == "/mnt/ssd"
    assert call("pool", "set", "ssd", "min_free=1MiB")[1] == "pool ssd is so already\n"
    assert call("pool", "set", "ssd", "--unset", "min_free")[1] == "pool ssd was set\n"
    assert "min_free" not in machine.connect().pool_info("ssd")
    assert call("pool", "remove", "--purge", "ssd")[0] == 0
    assert not machine.path("/mnt/ssd").exists()


def test_options_of_a_pool_may_stand_behind_what_begins_with_a_dash(call, machine):
    assert call("pool", "add", "ssd", "-q", "dir_path=/mnt/ssd", "min_free=1MiB") == (0, "", "")
    assert call("pool", "set", "ssd", "min_free=2MiB", "-q", "dir_path=/mnt/ssd") == (0, "", "")
    assert machine.connect().pool_info("ssd")["min_free"] == "2MiB"
    done = (0, "pool ssd was set\n", "")
    assert call("pool", "set", "ssd", "-u", "min_free", "dir_path=/mnt/ssd") == done
    assert "min_free" not in machine.connect().pool_info("ssd")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["pool", "info", "nope"], 1, "pool nope: is not there; see qubes-storage pool list"),
        (["pool", "remove", "nope"], 1, "pool nope: is not there"),
        (["pool", "add", "x", "dir_path"], 1, "pool x: 'dir_path' is not OPTION=VALUE"),
        (["pool", "add", "x", "a=1", "a=2"], 1, "pool x: a is given twice"),
        (["pool", "add", "x", "-q", "a"], 1, "pool x: 'a' is not OPTION=VALUE"),
        (["pool", "add", "x", "-q", "a=1", "--purge"], 2, "unrecognized arguments: a=1 --purge"),
        (["remove", "work", "other"], 2, "unrecognized arguments: other"),
        (["pool"], 2, "COMMAND"),
        ([], 2, "COMMAND"),
        (["nonsense"], 2, "invalid choice"),
        (["remove", "nope"], 1, "VM nope: is not there; see qubes-storage ls"),
        (["create", "x", "-l", "red", "-t", "work", "-s"], 1, "work is no template but AppVM"),
        (["create", "x", "-l", "red", "-s", "-r", "/a", "-R", "/b"], 1, "one of -R and -r"),
        (["create", "x", "-l", "red", "-c-1"], 1, "VM x: vcpus -1 is less than 0"),
        (["create", "x", "-l", "red", "-P", ""], 1, "VM x: the pool is empty; name one or lea"),
        (["create", "x", "-l", "red", "-t", ""], 1, "VM x: the template is empty"),
        (["create", "x", "-l", "red", "-s", "-r", ""], 1, "the file of its root image is empty"),
        (["create", "", "-l", "red"], 1, "VM '': the name is empty"),
        (["clone", "work", ""], 1, "VM work: the new_name is empty"),
        (["migrate", "work", ""], 1, "VM work: the pool is empty"),
        (["pool", "set", "", "min_free=1MiB"], 1, "pool '': the name is empty"),
        (["disks", "nope"], 1, "VM nope: is not in qubes.xml"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(call, machine, args, code, message):
    before = machine.tree()
    found, out, err = call(*args)
    assert (found, out) == (code, "")
    assert message in err
    assert machine.tree() == before


def test_help_explains_pools(call):
    code, out, _ = call("create", "--help")
    assert code == 0
    for words in ("-P says in which", "qubes-storage pool add ssd", "qubes-storage migrate"):
        assert words in out


def test_every_command_has_help(call):
    listed = call("--help")[1].split("COMMAND\n")[1].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("    ") and line[4] != " "]
    assert {"create", "pool", "ls", "clone", "rename", "resize", "migrate", "remove"} <= set(names)
    for name in names:
        code, out, _ = call(name, "--help")
        assert code == 0
        assert f"qubes-storage {name}" in out


def test_orphans_are_listed_with_their_sizes(call, machine):
    machine.mkdir(f"{LIB}/servicevms/dom0")  # it has no images, and is no orphan
    machine.mkdir(f"{LIB}/appvms/old")
    machine.image(f"{LIB}/appvms/old/private.img", GIB, "data")
    code, out, _ = call("orphans")
    assert code == 0
    assert f"{LIB}/appvms/old" in out
    assert [row["path"] for row in json.loads(call("orphans", "--json")[1])] == [
        f"{LIB}/appvms/old"
    ]


def test_names_that_others_gave_say_nothing_to_the_terminal(call, machine):
    machine.mkdir(f"{LIB}/appvms/a\ndefault  9.9 GiB  work")
    machine.mkdir(f"{LIB}/appvms/b\x1b]0;title\x07\u202e\udcff")
    machine.write(f"{LIB}/appvms/work/\x1b[31mred\nVM dom0: is gone", b"")
    with open(machine.path("/etc/qubes/storage.conf"), "a", encoding="ascii") as file:
        file.write("[x]\ndriver=xen\ndir_path=/mnt/\x1b[2J\n")
    for args in (["orphans"], ["verify"], ["pool", "list"], ["report"], ["pool", "info", "x"]):
        out = call(*args)[1]
        assert all(line.isprintable() for line in out.split("\n")), args
    assert f"{LIB}/appvms/a\\ndefault  9.9 GiB  work" in call("orphans")[1]
    assert f"{LIB}/appvms/b\\x1b]0;title\\x07\\u202e\\udcff" in call("orphans")[1]
    assert f"{LIB}/appvms/work/\\x1b[31mred\\nVM dom0: is gone: has no" in call("verify")[1]
    assert "\\x1b[2J" in call("pool", "add", "y", "dir_path=/mnt/\x1b[2J")[2]
    assert json.loads(call("pool", "list", "--json")[1])["x"]["dir_path"] == "/mnt/\x1b[2J"


def test_disks_are_printed(call, machine):
    disks = machine.connect().disks("work")
    assert call("disks", "work")[1] == "".join(disks.values())


def test_only_the_registry_forgets_with_just_db(call, machine):
    assert call("remove", "--just-db", "work")[0] == 0
    assert "work" not in machine.entries()
    assert machine.path(f"{LIB}/appvms/work/private.img").exists()
    assert [row["path"] for row in machine.connect().orphans()] == [f"{LIB}/appvms/work"]


def test_what_is_quiet_says_nothing(call):
    assert call("create", "-q", "-l", "red", "new") == (0, "", "")
    assert call("remove", "-q", "new") == (0, "", "")


def test_json_of_a_command_that_changes_is_the_changes(call):
    code, out, _ = call("--json", "create", "-l", "red", "new")
    assert code == 0
    assert json.loads(out)["created"] == {"old": None, "new": "new"}


def on_terminal(args, answer=""):
    """``(exit code, what the terminal showed)`` of a process on a terminal."""
    pid, fd = pty.fork()
    if not pid:
        os.execve(args[0], args, ENV)
    shown = b""
    os.write(fd, answer.encode())
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_terminal_is_asked_before_images_go(machine):
    code, shown = on_terminal(command(machine, "remove", "work"), "n\n")
    assert code == 1
    assert f"{LIB}/appvms/work/private.img" in shown
    assert "was left as it is" in shown
    assert "work" in machine.entries()
    assert on_terminal(command(machine, "remove", "work"), "y\n")[0] == 0
    assert "work" not in machine.entries()
    assert not machine.path(f"{LIB}/appvms/work").exists()
    machine.connect().create_vm("work")
    assert on_terminal(command(machine, "remove", "-f", "work"))[0] == 0
    assert "work" not in machine.entries()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_as_one_that_leads_nowhere(machine, closed):
    for args, code in (["ls"], 0), (["ls", "--json"], 0), (["remove", "nope"], 1):
        line = f"{shlex.join(command(machine, *args))} {closed}"
        done = subprocess.run(
            line, shell=True, env=ENV, check=False, capture_output=True, text=True
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
    line = f"{shlex.join(command(machine, 'remove', 'work'))} {closed}"
    assert subprocess.run(line, shell=True, env=ENV, check=False).returncode == 0
    assert list(machine.entries()) == ["dom0", "fedora-23"]


def test_the_descriptor_of_a_closed_stream_goes_to_no_file(machine, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["--root", str(machine.root), "remove", "work"]) == 0
    assert [sys.stdin.name, sys.stdout.name, sys.stderr.name] == [os.devnull] * 3
    assert "work" not in machine.entries()


def test_an_interruption_leaves_nothing_half_done(machine):
    """A copy of 256 MiB is interrupted; should it be done by then, the next one is."""
    with open(machine.path(f"{LIB}/vm-templates/fedora-23/root.img"), "r+b") as image:
        for _ in range(256):
            image.write(os.urandom(4096) * 256)
    appvms = machine.path(f"{LIB}/appvms")
    codes = []
    for n in range(10):
        name = f"new{n}"
        before, xml = set(os.listdir(appvms)), machine.xml
        process = subprocess.Popen(
            command(machine, "create", "-s", "-l", "red", name),
            env=ENV,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while (
            process.poll() is None and not (appvms / f".{name}.creating/{name}/root.img").exists()
        ):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
        codes.append(process.returncode)
        if process.returncode == cli.INTERRUPTED:
            assert "interrupted; what was begun is undone, or the next run" in err
            assert set(os.listdir(appvms)) == before
            assert machine.xml == xml
            break
        assert process.returncode == 0, err
        machine.connect().remove_vm(name, purge=True)
    assert codes[-1] == cli.INTERRUPTED, codes


def test_an_interruption_while_it_waits_for_another_writer(machine):
    system = machine.connect()
    with system.locked():
        process = subprocess.Popen(
            command(machine, "create", "-l", "red", "new"),
            env=ENV,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(500):
            with open("/proc/locks", encoding="ascii") as locks:
                if any(f" {process.pid} " in line for line in locks if "->" in line):
                    break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == cli.INTERRUPTED
    assert "new" not in machine.entries()


def test_a_reader_that_has_enough_is_no_error(machine):
    for n in range(100):
        machine.elements.append(element("QubesAppVm", f"vm{n}", n + 10, template_qid="1"))
    machine.write_registry()
    process = subprocess.Popen(
        command(machine, "ls"), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


@pytest.mark.parametrize("place", ["qubes_storage", "qubes_storage/__main__.py"])
def test_as_the_manual_runs_a_copy_nothing_of_the_current_directory_is_imported(
    machine, tmp_path, place
):
    line = "python3 -I /srv/salt/_utils/qubes_storage"
    assert line in (TREE / "docs/command-line.md").read_text()
    for name in ("argparse", "json", "qubes_storage", "conf", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current directory')\n")
    words = [sys.executable, "-I", TREE / "_utils" / place, "--root", machine.root, "ls"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "work" in done.stdout


@pytest.mark.parametrize("where", [">/dev/full", "| true"])
def test_what_could_not_be_shown_is_told_to_be_done(machine, where):
    def run(*args):
        line = f"{{ sleep .2; {shlex.join(command(machine, *args))}; echo =$? >&2; }} {where}"
        return subprocess.run(line, shell=True, env=ENV, check=False, capture_output=True).stderr

    told = run("pool", "add", "foo", "dir_path=/mnt/foo").decode()
    why = "No space left on device" if "full" in where else "Broken pipe"
    assert told == (
        f"qubes-storage: it is done, but could not be shown: {why}; see it with a command such as"
        " qubes-storage report\n=1\n"
    )
    assert "foo" in machine.connect().list_pools()
    told = run("ls").decode()
    if "full" in where:
        full = "qubes-storage: standard output: No space left on device; have it written elsewhere"
        assert told == f"{full}\n=1\n"
    else:
        assert told == "=1\n"


def test_an_error_that_cannot_be_shown_is_an_error_still(machine):
    for args, code in (["remove", "nope"], 1), (["clone", "work", "new", "-p", "/x"], 0):
        line = f"{shlex.join(command(machine, *args))} 2>/dev/full"
        done = subprocess.run(line, shell=True, env=ENV, check=False, capture_output=True)
        assert done.returncode == code


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--root", ""], "--root: is empty; name one or leave it out"),
        (["--socket", ""], "--socket: is empty; name one or leave it out"),
        (["--socket", "/etc/passwd"], "/etc/passwd: qubesd does not listen there"),
        (["--socket", "/nowhere/sock"], "/nowhere/sock: qubesd does not listen there"),
        (["--socket", f"/{'x' * 200}"], "has more than 107 bytes, the most that a socket's path"),
    ],
)
def test_a_machine_that_is_none_is_told_as_that(call, args, message):
    code, out, err = call(*args, "ls")
    assert (code, out) == (1, "")
    assert message in err


def test_json_stands_before_or_behind_each_word(call):
    found = call("pool", "list", "--json")
    assert "default" in json.loads(found[1])
    for words in (["--json", "pool", "list"], ["pool", "--json", "list"]):
        assert call(*words) == found


def test_a_machine_below_a_relative_root(machine, monkeypatch, capsys):
    monkeypatch.chdir(machine.root.parent)
    assert cli.main(["--root", "root", "ls"]) == 0
    assert "work" in capsys.readouterr().out
    assert machine.path(XML).exists()


def test_no_bar_where_nobody_sees_it():
    assert cli_output.progress() is None  # pytest's stderr is no terminal


def test_a_bar_for_copies_that_take_long(monkeypatch):
    pytest.importorskip("tqdm")
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        bar = cli_output.progress()
        bar("/proc/self/fd/7/quick.img", GIB, GIB)
        bar("/proc/self/fd/7/root.img", 1, GIB)
        time.sleep(1.1)
        bar("/proc/self/fd/7/root.img", GIB // 2, GIB)
        bar("/proc/self/fd/7/root.img", GIB, GIB)
        stderr.flush()
        assert select.select([reading], [], [], 10)[0]
        shown = os.read(reading, 65536).decode()
    os.close(reading)
    assert "root.img:  50%" in shown
    assert "512M/1.00G" in shown
    assert "quick.img" not in shown


def test_a_copy_tells_how_far_it_is(machine, monkeypatch):
    seen = []
    with open(machine.path(f"{LIB}/vm-templates/fedora-23/root.img"), "r+b") as image:
        image.seek(GIB)
        image.write(b"x" * 4096)
    monkeypatch.setattr("qubes_storage.image.watch", lambda *args: seen.append(args))
    machine.connect().create_vm("alone", klass="StandaloneVM", template="fedora-23")
    root = [(done, total) for path, done, total in seen if path.endswith("/root.img")]
    assert root == [(4096, 8192), (8192, 8192)]
