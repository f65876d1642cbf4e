"""Real minions: salt-call in a process of its own, on files installed as a user installs them."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import TREE


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A file_root as ``make install`` fills it, and a top file that applies the SLS."""
    path = tmp_path_factory.mktemp("srv") / "salt"
    install = ["make", "--no-print-directory", "-C", str(TREE), "install", f"DESTDIR={path}"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    (path / "top.sls").write_text("base:\n  '*':\n    - qubes_storage\n")
    return path


class Machine:
    """A masterless minion and the root that it manages."""

    def __init__(self, factories, tmp_path, file_root, **config):
        self.root = tmp_path / "root"
        for name in ("etc/qubes", "var/lib/qubes", "opt", "mnt", "srv"):
            (self.root / name).mkdir(parents=True)
        self.pillar = tmp_path / "pillar"
        self.pillar.mkdir()
        overrides = {
            "file_client": "local",
            "file_roots": {"base": [str(file_root)]},
            "pillar_roots": {"base": [str(self.pillar)]},
            "clean_dynamic_modules": True,
            "fileserver_list_cache_time": 0,
            "qubes_storage.root": str(self.root),
            **config,
        }
        name = config.get("id") or tmp_path.name.replace("_", "-")
        minion = factories.salt_minion_daemon(name, overrides=overrides)
        self.cli = minion.salt_call_cli(timeout=120)

    def declare(self, source):
        """Take a pillar file, or a directory with a top file, as this machine's pillar."""
        if source.is_dir():
            shutil.copytree(source, self.pillar, dirs_exist_ok=True)
        else:
            (self.pillar / "top.sls").write_text("base:\n  '*':\n    - machine\n")
            shutil.copy(source, self.pillar / "machine.sls")

    def call(self, *args, **kwargs):
        """What a function returns."""
        return self.cli.run("--local", *args, **kwargs).data

    def highstate(self, function="state.highstate", *args, **kwargs):
        """``{state ID: its return}``; each state's result is there to be looked at."""
        data = self.call(function, *args, **kwargs)
        assert isinstance(data, dict), data
        return {key.split("_|-")[1]: value for key, value in data.items()}


@pytest.fixture
def machine(salt_factories, tmp_path, installed):
    """A machine that has never seen our modules: its cache is empty."""
    return Machine(salt_factories, tmp_path, installed)


def results(run):
    """``{state ID: result}`` of a run."""
    return {ident: state["result"] for ident, state in run.items()}


def changed(run):
    """The IDs of the states that report changes."""
    return {ident for ident, state in run.items() if state["changes"]}


def as_json(value):
    """A value as an argument of salt-call."""
    return json.dumps(value)
