"""Installed by pip, Salt finds modules and states by the entry point, with no sync."""

import os
import subprocess
import sys
import sysconfig

import pytest

from tests.conftest import TREE

OFFLINE = [
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--disable-pip-version-check",
]


@pytest.fixture
def venv(tmp_path):
    """A virtual environment of its own, which sees the Salt of ours."""
    path = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    purelib = subprocess.run(
        [path / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    ours = sysconfig.get_path("purelib")
    with open(os.path.join(purelib, "salt.pth"), "w", encoding="utf-8") as file:
        file.write(ours + "\n")
    return path


@pytest.fixture
def tree(tmp_path):
    """A copy of what git has here, for a build writes beside what it reads."""
    path = tmp_path / "tree"
    path.mkdir()
    names = [
        "_modules",
        "_states",
        "_utils",
        "packaging",
        "setup.py",
        "pyproject.toml",
        "README.md",
    ]
    subprocess.run(["cp", "-R", *names, str(path)], check=True, cwd=TREE)
    return path


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_states_and_functions_load_from_the_installed_package(venv, tree, tmp_path, editable):
    pip = [venv / "bin/python", "-m", "pip", "install", *OFFLINE]
    subprocess.run([*pip, *(["--editable"] if editable else []), str(tree)], check=True)
    root = tmp_path / "root"
    (root / "etc/qubes").mkdir(parents=True)
    (root / "var/lib/qubes").mkdir(parents=True)
    config = tmp_path / "etc"
    config.mkdir()
    (config / "minion").write_text(
        f"root_dir: {tmp_path}/minion\nid: dom0\nfile_client: local\nqubes_storage.root: {root}\n"
    )

    def call(*args):
        code = "import sys, salt.scripts; sys.exit(salt.scripts.salt_call())"
        run = subprocess.run(
            [
                *(venv / "bin/python", "-W", "ignore", "-c", code, "--local", "--out=json"),
                *(f"--config-dir={config}", "--retcode-passthrough", *args),
            ],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    assert "was added" in call("state.single", "qubes_pool.present", "default")
    assert '"driver": "xen"' in call("qubes_pool.list")
    assert "xen" in call("qubes_pool.drivers")
    assert (root / "var/lib/qubes/appvms").is_dir()
