"""Runs of several states on R4: what test mode tells is what the run does, and once is enough."""

import sys

import pytest
from saltfactories.utils.functional import Loaders

from tests.conftest import TREE
from tests.functional.conftest import Run
from tests.r4.machine import RELEASES, forget, machine, writes

CALL = """\
import sys
sys.path.insert(0, {core!r})
from qubes_storage.adminapi import Client
print(Client({socket!r}).call(*{words!r}))
"""


@pytest.fixture(scope="module")
def r4(minion_opts, tmp_path_factory):
    """``(link, run)``: runs on the machine that the link leads to; making it costs seconds."""
    link = tmp_path_factory.mktemp("r4") / "root"
    settings = {
        "qubes_storage.root": str(link),
        "qubes_storage.backend": "admin",
        "qubes_storage.socket": str(link / "qubesd.sock"),
    }
    link.symlink_to("/nonexistent")
    return link, Run(Loaders({**minion_opts, **settings}).opts)


@pytest.fixture(params=RELEASES)
def there(request, r4, tmp_path):
    """``(daemon, system)`` of R4, of each release."""
    r4[0].unlink()
    r4[0].symlink_to(tmp_path)
    with machine(request.param, tmp_path) as found:
        forget(*found)
        yield found


@pytest.fixture
def daemon(there):
    """The daemon that the runs speak to."""
    return there[0]


@pytest.fixture
def run(r4, there):
    """Runs on that machine."""
    return r4[1]


@pytest.fixture
def foretold(run, there):
    """``foretold(*states)``: call them in all ways; what test mode said, ``{name: comment}``."""

    def call(*declared):
        forget(*there)
        told = run(*declared, test=True)
        assert writes(there[0]) == []
        done, again = run(*declared), run(*declared)
        for name in (name for name in done if not name.startswith("/")):
            said, ret = told[name], done[name]
            if said["result"] is None and " for " in said["comment"]:
                assert (said["changes"], ret["result"]) == ({}, True), (said, ret)
            else:
                result = None if ret["changes"] else ret["result"]
                assert (said["result"], said["changes"]) == (result, ret["changes"]), (said, ret)
                assert result is not False or said["comment"] == ret["comment"]
            assert (again[name]["result"], again[name]["changes"]) == (ret["result"], {})
        return {name: ret["comment"] for name, ret in told.items()}

    return call


@pytest.fixture
def call(tmp_path):
    """``call(*words)``: a state that has another process make a call."""

    def state(*words):
        script = tmp_path / "call.py"
        core, socket = str(TREE / "_utils"), str(tmp_path / "qubesd.sock")
        script.write_text(CALL.format(core=core, socket=socket, words=words))
        return ("cmd.run", f"{sys.executable} {script}", {})

    return state


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("admin.vm.property.Set", "work", "label", b"blue"), {"label"}),
        (("admin.vm.Remove", "work"), {"created", "klass", "template", "label"}),
    ],
)
def test_what_another_state_of_the_run_changed_is_seen(run, call, words, changes):
    declared = ("qubes_vm.present", "work", {"label": "red"})
    assert run(declared)["work"]["changes"] == {}
    assert set(run(declared, call(*words), declared)["work"]["changes"]) == changes
    assert run(declared)["work"]["changes"] == {}


def test_what_nobody_changed_is_read_once(run, daemon):
    vms = [f"vm{number}" for number in range(9)]
    for vm in vms:
        daemon.add_vm(vm)
    daemon.log.clear()
    run(*(("qubes_vm.present", vm, {"pool": "varlibqubes"}) for vm in vms))
    methods = [call.method for call in daemon.log]
    assert methods.count("admin.vm.List") == 1
    assert len(methods) < 4 * len(vms)
