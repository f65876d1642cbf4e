"""The command line, verb by verb: what each prints and makes, and what qvm-create's checks say."""

import io
import json
import os
import runpy
import sys

import pytest
import qubes_storage
from qubes_storage import cli, cli_output

from tests.r32.machine import GIB, LIB, XML

FOO = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/mnt/foo\n"


@pytest.fixture
def machine(scratch):
    machine = scratch(FOO)
    machine.add_pools()
    machine.connect().create_vm("work", label="green")
    return machine


def test_a_vm_is_cloned_renamed_grown_and_moved(call, machine):
    assert call("clone", "work", "copy") == (0, "VM work was cloned to copy\n", "")
    assert call("clone", "-p", "/mnt/x", "-P", "foo", "work", "far") == (
        0,
        "VM work was cloned to far\n",
        "qubes-storage: /mnt/x is ignored; -P says where\n",
    )
    assert machine.path("/mnt/foo/appvms/far/private.img").exists()
    assert call("rename", "copy", "other") == (0, "VM copy was renamed to other\n", "")
    assert not machine.path(f"{LIB}/appvms/copy").exists()
    assert call("grow-private", "other", "3GiB") == (
        0,
        "VM other: private has grown to 3GiB\n",
        "",
    )
    assert call("resize", "other", "private", "3GiB")[1] == "VM other: private has 3GiB\n"
    assert call("migrate", "other", "foo") == (0, "VM other was moved to pool foo\n", "")
    assert call("migrate", "other", "foo") == (0, "VM other is in pool foo\n", "")
    assert os.stat(machine.path("/mnt/foo/appvms/other/private.img")).st_size == 3 * GIB


def test_a_template_is_committed_and_a_vm_reset(call):
    assert call("commit", "fedora-23") == (0, "VM fedora-23 was committed\n", "")
    assert call("reset", "work") == (0, "VM work was reset\n", "")
    assert call("reset", "fedora-23") == (0, "VM fedora-23 keeps its volatile.img\n", "")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["-n", "-p", "-l", "red"], 2, "a VM is one of NetVM, ProxyVM: give one of -p, -H, -n"),
        ([], 1, "VM new: choose its label with -l: red, orange"),
        (["-l", "pink"], 1, "VM new: unknown label 'pink'; it is one of red"),
        (["-l", "red", "-r", "/root.img"], 1, "a root of its own takes /root.img; add -s"),
        (["-l", "red", "--hvm-template", "-t", "fedora-23"], 1, "cannot be based on another; leav"),
        (["-l", "red", "-s", "-R", "/no/root.img"], 1, "/no/root.img is not there; name the file"),
    ],
)
def test_what_create_cannot_be_asked_for(call, machine, args, code, message):
    before = machine.tree()
    found, out, err = call("create", *args, "new")
    assert (found, out) == (code, "")
    assert message in err
    assert machine.tree() == before


def test_the_names_of_vms_that_are_made_at_start_are_not_taken(call, machine):
    assert "for the DispVMs that are made at start" in call("create", "-l", "red", "disp12")[2]
    assert call("create", "-l", "red", "disp12a") == (
        0,
        "VM disp12a was created in pool default\n",
        "",
    )


def test_a_standalone_is_copied_from_the_default_template(call, machine):
    assert call("create", "-l", "red", "-s", "alone")[0] == 0
    with machine.path(f"{LIB}/appvms/alone/root.img").open("rb") as root:
        assert root.read(14) == b"ROOT:fedora-23"
    assert call("create", "-l", "red", "-s", "-n", "net")[0] == 0
    assert machine.path(f"{LIB}/servicevms/net/root.img").exists()
    assert machine.entries()["net"].attrs["template_qid"] == "none"


def test_a_root_image_is_copied_from_a_file_wherever_it_is_named_from(call, machine, monkeypatch):
    (machine.root.parent / "given.img").write_bytes(b"a system")
    monkeypatch.chdir(machine.root.parent)
    assert call("create", "-l", "red", "-H", "-r", "given.img", "windows")[0] == 0
    root = machine.path(f"{LIB}/appvms/windows/root.img")
    assert root.read_bytes()[:8] == b"a system"
    assert (machine.root.parent / "given.img").exists()


def test_a_terminal_without_tqdm_shows_no_bar(monkeypatch):
    reading, writing = os.openpty()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with os.fdopen(reading), os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli_output.progress() is None


def test_the_package_is_a_command_when_it_is_run_and_none_when_it_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qubes-storage", "--version"])
    with pytest.raises(SystemExit) as err:
        runpy.run_module("qubes_storage", run_name="__main__")
    assert err.value.code == 0
    assert capsys.readouterr().out == f"{qubes_storage.VERSION}\n"
    runpy.run_module("qubes_storage.__main__", run_name="imported")
    assert capsys.readouterr().out == ""


@pytest.fixture
def keys(monkeypatch):
    """What is typed at a terminal, which is standard input."""
    ours, theirs = os.openpty()
    with os.fdopen(ours, "wb", buffering=0) as typed, os.fdopen(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield typed


@pytest.mark.parametrize("answer", [b"\n", b"n\n", b"\xff\n", b"\x04"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_is_asked_and_all_but_yes_leaves_the_vm(call, machine, keys, options, answer):
    keys.write(answer)
    code, out, err = call(*options, "remove", "work")
    assert (code, out) == (1, "")
    assert f"\n{LIB}/appvms/work/private.img\n" in err
    assert err.endswith("qubes-storage: VM work: was left as it is\n")
    assert "work" in machine.entries()


def test_a_terminal_is_asked_and_yes_removes(call, machine, keys):
    keys.write(b"Yes\n")
    code, out, err = call("--json", "remove", "work")
    assert (code, list(json.loads(out))) == (0, ["removed", "deleted"])
    assert err.endswith("Delete them? [y/N] ")
    assert "work" not in machine.entries()


def test_a_reader_that_has_enough_ends_it_quietly(machine, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert cli.main(["--root", str(machine.root), "ls"]) == 1
    assert capsys.readouterr().err == ""


def test_a_vm_that_another_removed_while_the_question_stood_is_not_there(
    call, machine, monkeypatch
):
    class Terminal:
        isatty = staticmethod(lambda: True)

        @staticmethod
        def readline():
            machine.connect().remove_vm("work", purge=True)
            return b"y\n"

    Terminal.buffer = Terminal
    monkeypatch.setattr(sys, "stdin", Terminal)
    code, _, err = call("remove", "work")
    assert code == 1
    assert err.endswith("[y/N] qubes-storage: VM work: is not there; see qubes-storage ls\n")


def test_what_it_says_goes_to_any_stream_and_a_name_that_is_not_utf8_is_shown(
    call, machine, monkeypatch
):
    stream = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert cli.main(["--root", str(machine.root), "ls"]) == 0
    assert "work" in stream.getvalue()
    code, out, err = call("verify", "\udcff")
    assert (code, err) == (1, "")
    assert out.startswith("VM \\udcff: is not in qubes.xml")


def test_a_vm_that_cannot_be_looked_at_hides_no_other(call, machine):
    machine.path(f"{LIB}/appvms/work/private.img").unlink()
    odd = b'<QubesAppVm name="a/b" qid="99"/>\n</QubesVmCollection>'
    machine.write(XML, machine.xml.replace(b"</QubesVmCollection>", odd), 0o660)
    code, out, err = call("verify")
    assert (code, err) == (1, "")
    assert "private.img: is gone" in out
    assert "VM 'a/b': the name leads out of its pool" in out
    assert call("verify", "a/b")[0] == 1
    code, out, err = call("verify", "nope", "work")
    assert (code, err) == (1, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == ["VM nope", "VM work"]


def test_a_vm_whose_pool_cannot_be_loaded_is_named(call, machine):
    machine.connect().migrate_vm("work", "foo")
    machine.write(
        "/etc/qubes/storage.conf", FOO.replace("[foo]\ndriver=xen", "[foo]\ndriver=no").encode()
    )
    assert call("verify")[1].startswith("VM work: pool foo: unknown driver 'no'")
