"""What ``make highstate`` and ``make install`` leave as a user has it."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import TREE

NAMES = ["Makefile", "packaging", "pillar-examples", "_modules", "_states", "_utils"]
# What ``make test SALT=...`` hands down, as flags and as variables.
OURS = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS", "SALT", "TESTS", "JOBS")
MINE = "# mine\nqubes_storage: {pools: {default: {}}}\n"


@pytest.fixture
def make(tmp_path):
    """``make(*args)`` in a copy of the tree, whose virtual environment runs the Salt of ours."""
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    (tree / "tests/requirements.txt").touch()
    subprocess.run(["cp", "-R", *NAMES, "qubes_storage.sls", tree], check=True, cwd=TREE)
    salt_call = tree / ".venv/bin/salt-call"
    salt_call.parent.mkdir(parents=True)
    code = "import salt.scripts; salt.scripts.salt_call()"
    words = [sys.executable, "-W", "ignore", "-c", code]
    salt_call.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    salt_call.chmod(0o755)
    (tree / ".venv/ready").touch()

    def run(*args):
        words = ["make", "--no-print-directory", *args]
        env = {name: told for name, told in os.environ.items() if name not in OURS}
        return subprocess.run(words, cwd=tree, env=env, check=False, capture_output=True, text=True)

    run.tree = tree
    return run


def test_the_pillar_that_one_has_edited_stays_until_another_example_is_named(make):
    pillar = make.tree / "demo/srv/pillar/machine.sls"
    examples = make.tree / "pillar-examples"
    planned = make("highstate", "ARGS=test=True")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "The machine is" not in planned.stdout
    assert pillar.read_text() == (examples / "workstation.sls").read_text()
    pillar.write_text(MINE)
    for args in ([], ["EXAMPLE=workstation"]):
        done = make("highstate", *args)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The machine is demo/root" in done.stdout
        assert pillar.read_text() == MINE
    assert "[default]" in (make.tree / "demo/root/etc/qubes/storage.conf").read_text()
    assert make("highstate", "EXAMPLE=manual").returncode == 0
    assert pillar.read_text() == (examples / "manual.sls").read_text()
    planned = make("highstate", "EXAMPLE=workstation", "ARGS=test=True")  # beside what manual made
    assert planned.returncode == 0, planned.stdout + planned.stderr


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ("issue-8102", "is a state file, no pillar"),
        ("nope", "is not there"),
        ("external-disk", "needs a disk at /mnt/backup, which ./demo has not"),
        ("r4", "needs the daemon of R4, which ./demo has not"),
    ],
)
def test_an_example_that_cannot_be_applied_is_told_with_those_that_can(make, example, why):
    done = make("highstate", f"EXAMPLE={example}")
    assert done.returncode != 0
    pillars = "default, manual, workstation"
    assert f"pillar-examples/{example}.sls {why}; EXAMPLE is one of {pillars}\n" in done.stderr
    assert not (make.tree / "demo/srv/pillar").exists()


def test_install_leaves_a_users_driver_and_nothing_of_an_older_version(make, tmp_path):
    core = tmp_path / "srv/_utils/qubes_storage"
    for name in ("drivers/mine.py", "drivers/xen.py", "older.py", "older/__init__.py"):
        (core / name).parent.mkdir(parents=True, exist_ok=True)
        (core / name).write_text("of before\n")
    assert make("install", f"DESTDIR={tmp_path}/srv").returncode == 0
    assert (core / "drivers/mine.py").read_text() == "of before\n"
    assert (core / "drivers/xen.py").read_text() != "of before\n"
    assert not [path for path in core.iterdir() if path.name.startswith("older")]
