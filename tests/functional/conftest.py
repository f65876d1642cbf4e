"""Salt's own loader on this tree's modules and states, and on a real root."""

import re

import pytest
import salt.state
from saltfactories.utils.functional import Loaders

from tests.conftest import TREE


@pytest.fixture(scope="session")
def minion_config(tmp_path_factory):
    """Overrides for a masterless minion that loads the tree in place, with no sync."""
    tree = tmp_path_factory.mktemp("tree")  # the checkout itself would offer setup.py as a module
    for name in ("_modules", "_states", "_utils"):
        (tree / name).symlink_to(TREE / name)
    return {
        "file_client": "local",
        "module_dirs": [str(tree)],
        "file_roots": {"base": [str(tmp_path_factory.mktemp("file_root"))]},
        "pillar_roots": {"base": [str(tmp_path_factory.mktemp("pillar"))]},
    }


@pytest.fixture(scope="session")
def minion_opts(salt_factories, minion_config):
    """Options as a minion reads them."""
    return salt_factories.salt_minion_daemon("loaders", overrides=minion_config).config.copy()


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """A link to the root that the test at hand works on; making a loader costs seconds."""
    return tmp_path_factory.mktemp("machines") / "root"


@pytest.fixture(scope="session")
def session_loaders(minion_opts, machine):
    """One set of loaders for all tests."""
    machine.symlink_to("/nonexistent")
    return Loaders({**minion_opts, "qubes_storage.root": str(machine)})


@pytest.fixture
def loaders(session_loaders, machine, root):
    """Loaders whose machine is ``root``."""
    machine.unlink()
    machine.symlink_to(root)
    return session_loaders


@pytest.fixture
def modules(loaders):
    """Execution modules."""
    return loaders.modules


@pytest.fixture
def states(loaders):
    """State modules; ``test=True`` is a keyword of each call."""
    return loaders.states


@pytest.fixture(params=[False, True], ids=["apply", "test"])
def testmode(request):
    """Each idempotent state says the same in both modes."""
    return request.param


def snapshot(root):
    """Everything below root that a write would change: names, modes, sizes, times, links."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        stat = path.lstat()
        target = path.readlink() if path.is_symlink() else None
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ino, target)
    return found


class Run:
    """Runs of several states, as Salt calls those of a highstate."""

    def __init__(self, opts):
        self._state = salt.state.State(opts)

    def __call__(self, *declared, test=False):
        """``{name: return}`` of states, each given as function, name and arguments."""
        high = {}
        for order, (function, name, arguments) in enumerate(declared):
            state, fun = function.split(".")
            given = [fun, {"order": order}, *({key: arguments[key]} for key in arguments)]
            high[f"{order} {name}"] = {
                state: [{"name": name}, *given],
                "__sls__": "run",
                "__env__": "base",
            }
        self._state.states.opts["test"] = test
        return {ret["name"]: ret for ret in self._state.call_high(high).values()}


@pytest.fixture(scope="session")
def session_run(session_loaders):
    """What calls runs; making it costs seconds."""
    return Run(session_loaders.opts)


@pytest.fixture
def run(session_run, loaders):
    """Runs on the machine of ``loaders``."""
    return session_run


def check_foretold(run, declared, told):
    """
    Make a run of states, and once more: what test mode told of each is what the first does, and
    the second does nothing. Returns what was told, ``{name: comment}``.
    """
    done, again = run(*declared), run(*declared)
    for name in (name for name in done if not name.startswith("/")):
        said, ret = told[name], done[name]
        if said["result"] is None and re.search(" waits? for ", said["comment"]):
            assert (said["changes"], ret["result"]) == ({}, True), (said, ret)
        else:
            result = None if ret["changes"] else ret["result"]
            assert (said["result"], said["changes"]) == (result, ret["changes"]), (said, ret)
            assert result is not False or said["comment"] == ret["comment"]
        assert (again[name]["result"], again[name]["changes"]) == (ret["result"], {})
    return {name: ret["comment"] for name, ret in told.items()}
