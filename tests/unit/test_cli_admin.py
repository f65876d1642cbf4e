"""The command line on R4: the same commands, and for what R4 has not, the way there."""

import json

import pytest
from qubes_storage import cli

from tests.r4.machine import machine, writes
from tests.r4.words import LABELS


@pytest.fixture
def daemon_and_call(tmp_path, capsys, qubesadmin):
    """The daemon, and ``call(*args)``: exit code, standard output and standard error."""
    root = tmp_path / "r4"
    (root / "mnt").mkdir(parents=True)
    with machine("4.3", root) as (daemon, system):

        def call(*args):
            given = ["--backend", "admin", "--socket", system.client.path, "--root", str(root)]
            system.refresh()
            code = cli.main([*given, *args])
            return code, *capsys.readouterr()

        yield daemon, call


def test_what_is_there_is_shown(daemon_and_call):
    _, call = daemon_and_call
    code, out, _ = call("ls")
    assert code == 0
    assert ["work", "AppVM", "ssd", "fedora", "red"] in [line.split() for line in out.splitlines()]
    code, out, _ = call("report")
    assert code == 0
    assert ["ssd", "work"] in [line.split()[:2] for line in out.splitlines()]
    assert "work" in json.loads(call("report", "--json")[1])["ssd"]["vms"]
    assert call("pool", "info", "ssd")[0] == 0
    assert call("verify")[0] in (0, 1)


def test_a_vm_is_made_grown_cloned_and_removed(daemon_and_call):
    daemon, call = daemon_and_call
    for args in (
        ["create", "-P", "btrfs", "-t", "fedora", "-l", "green", "new"],
        ["resize", "new", "private", "5GiB"],
        ["clone", "new", "other"],
        ["remove", "-f", "new"],
    ):
        code, _, err = call(*args)
        assert (code, err) == (0, ""), args
    assert "new" not in daemon.vms
    assert daemon.vms["other"].volumes["private"].size == 5 * 1024**3


def test_labels_are_those_that_the_daemon_has(daemon_and_call, monkeypatch):
    daemon, call = daemon_and_call
    code, out, err = call("create", "-t", "fedora", "-l", "pink", "new")
    assert (code, out) == (1, "")
    assert "unknown label 'pink'; it is one of red" in err
    for place in ("qubesd", "methods"):
        monkeypatch.setattr(f"tests.r4.{place}.LABELS", (*LABELS, "pink"))
    assert call("create", "-t", "fedora", "-l", "pink", "new")[0] == 0
    assert daemon.vms["new"].set["label"] == "pink"


@pytest.mark.parametrize(
    ("args", "way"),
    [
        (["rename", "work", "other"], "clone it"),
        (["disks", "work"], "virsh dumpxml"),
        (["orphans"], "dir_path"),
        (["commit", "fedora"], "revisions"),
        (["reset", "work"], "revert"),
        (["migrate", "--keep", "work", "btrfs"], "qubes_vm.clone"),
        (["remove", "--just-db", "work"], "leave out --just-db"),
        (["create", "-l", "red", "-m", "800", "new"], "qvm-prefs new"),
        (["create", "-l", "red", "-n", "new"], "NetVM"),
    ],
)
def test_what_r4_has_not_names_the_way(daemon_and_call, args, way):
    daemon, call = daemon_and_call
    code, out, err = call(*args)
    assert (code, out) == (1, "")
    assert way in err
    assert writes(daemon) == []


def test_an_interruption_while_the_daemon_works_is_told(daemon_and_call, interrupt):
    daemon, call = daemon_and_call
    daemon.before = lambda call: interrupt()
    code, out, err = call("ls")
    assert (code, out) == (cli.INTERRUPTED, "")
    assert (
        err == "qubes-storage: interrupted; what was begun is undone, or the next run finishes it\n"
    )
    daemon.before = None
    assert call("ls")[0] == 0
