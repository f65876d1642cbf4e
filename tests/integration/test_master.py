"""One master, one pillar tree, minions that get different pools and VMs from it."""

import pytest

from tests.conftest import TREE
from tests.integration.conftest import changed

MINIONS = {"laptop-1": {}, "server-1": {"grains": {"qubes_disk": "raid"}}}


@pytest.fixture(scope="module")
def fleet(salt_factories, installed, tmp_path_factory):
    """A master with two minions: ``{minion id: (root, salt-call)}``."""
    master = salt_factories.salt_master_daemon(
        "fleet-master",
        overrides={
            "file_roots": {"base": [str(installed)]},
            "pillar_roots": {"base": [str(TREE / "pillar-examples/fleet")]},
            "fileserver_list_cache_time": 0,
        },
    )
    machines = {}
    with master.started():
        for name, config in MINIONS.items():
            root = tmp_path_factory.mktemp(name)
            for path in ("etc/qubes", "var/lib/qubes", "opt", "srv"):
                (root / path).mkdir(parents=True)
            overrides = {"qubes_storage.root": str(root), **config}
            minion = master.salt_minion_daemon(name, overrides=overrides)
            machines[name] = (root, minion)
        with machines["laptop-1"][1].started(), machines["server-1"][1].started():
            yield {
                name: (root, m.salt_call_cli(timeout=180)) for name, (root, m) in machines.items()
            }


def run(cli):
    """A highstate: ``{state ID: its return}``, none of which failed."""
    data = cli.run("state.highstate").data
    states = {key.split("_|-")[1]: value for key, value in data.items()}
    assert {ident: s["comment"] for ident, s in states.items() if s["result"] is not True} == {}
    return states


def test_each_minion_gets_its_own_pools_and_vms_from_one_pillar_tree(fleet):
    pools, vms = {}, {}
    for name, (_, cli) in fleet.items():
        assert changed(run(cli))
        assert changed(run(cli)) == set()
        pools[name] = cli.run("qubes_pool.list").data
        vms[name] = set(cli.run("qubes_vm.list").data) - {"dom0"}
    assert set(pools["laptop-1"]) == {"default", "travel"}
    assert vms["laptop-1"] == {"fedora-23", "work", "travel"}
    assert pools["server-1"]["raid"]["dir_path"] == "/srv/raid-server-1"
    assert vms["server-1"] == {"fedora-23", "work", "build-1", "build-2", "build-3"}
    assert (fleet["server-1"][0] / "srv/raid-server-1/appvms/build-3/private.img").exists()
    assert not (fleet["laptop-1"][0] / "srv/raid-laptop-1").exists()
