"""Command lines that ask for nonsense: each word of each command replaced by each odd text."""

import os
import subprocess
import sys

import pytest
from qubes_storage import cli

from tests.conftest import TREE
from tests.torture.test_inputs_salt import root, watched  # noqa: F401

ODD = ["", " ", "a\nb", "é", "\udcff", "../x", "/", "-", "--", "-f", "=", "a=b=c", "x" * 300]
MORE = [
    "-1",
    "1.5",
    "%s",
    "{}",
    "[a]",
    "none",
    "True",
    "*",
    "a b",
    "\t",
    "\x1b[2J",
    "1e9",
    "--json",
    "--root=/nonexistent",
    "-Pnope",
    "10 Gib",
    "9" * 30,
    "dom0",
    "driver=",
    "class=x",
    "dir_path=relative",
    "dir_path=/mnt/../etc",
    "min_free=lots",
    "require_mount=x",
    "\\",
]
COMMANDS = [
    "pool info nope", "pool add ssd dir_path=/mnt/ssd", "pool set nope dir_path=/mnt/x",
    "pool set ssd -u nope", "pool remove ssd", "create -l red -P ssd work",
    "create -t work x -l red",
    "create -l red -R /nonexistent -s x", "create -l red -m lots x", "create -l red -c none x",
    "clone work alone", "rename work alone", "resize work private 1", "resize work nope 10GiB",
    "grow-private work 1", "grow-root work 10GiB", "migrate work nope", "remove nope",
    "commit work",
    "reset nope", "verify nope", "disks nope", "nope", "pool nope", "--backend nope ls",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_of_nonsense_is_told_in_a_line(command, root, capsys, everything, figures):  # noqa: F811
    before = watched(root)
    words = command.split()
    lines = [words]
    for at in range(len(words)):
        for odd in ODD + MORE if everything else ODD[::2]:
            lines.append([*words[:at], odd, *words[at + 1 :]])
    figures["command lines of nonsense"] += len(lines)
    for line in lines:
        try:
            code = cli.main(["--root", str(root), *line])
        except SystemExit as err:
            code = err.code
        out, err = capsys.readouterr()
        assert code in (0, 1, 2), line
        assert code == 0 or err or "verify" in line, (line, code, out)
        assert "Traceback" not in err, (line, err)
        assert watched(root) == before, line


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("command", ["pool list", "pool info foo", "report", "ls", "orphans"])
def test_what_is_not_utf_8_is_shown_all_the_same(command, encoding, root):  # noqa: F811
    with open(root / "etc/qubes/storage.conf", "ab") as conf:
        conf.write(b"[foo]\ndriver = xen\ndir_path = /mnt/caf\xe9\n")
    run = subprocess.run(
        [sys.executable, "-m", "qubes_storage", "--root", str(root), *command.split()],
        env={**os.environ, "PYTHONPATH": str(TREE / "_utils"), "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert b"caf" in run.stdout or command in ("ls", "orphans")
