"""salt-call and R4: the same states over the Admin API, on each release of a real server."""

import pytest

from tests.conftest import TREE
from tests.integration.conftest import Machine, changed, results
from tests.r4.machine import RELEASES, machine

GIB = 1024**3
# Word for word what qubes-issues #8102 asks for.
ISSUE_8102 = """\
pool-name:
  qvm-pool.present:
    - driver: lvm_thin
    - options:
        - volume_group: pool-vg
        - thin_pool: pool-thin
        - revisions_to_keep: 17

other-pool-name:
  qvm-pool.absent: []
"""


@pytest.fixture(params=RELEASES)
def there(request, salt_factories, tmp_path, installed):
    """``(the daemon, a minion that reaches it)``."""
    root = tmp_path / "r4"
    root.mkdir()
    with machine(request.param, root) as (daemon, _):
        minion = Machine(
            salt_factories,
            tmp_path,
            installed,
            **{
                "qubes_storage.root": str(root),
                "qubes_storage.backend": "admin",
                "qubes_storage.socket": str(root / "qubesd.sock"),
            },
        )
        yield daemon, minion


def writes(daemon):
    """The writing calls since the last time this was asked."""
    found = [call.method for call in daemon.log if call.writes]
    daemon.log.clear()
    return found


def test_yaml_of_issue_8102_and_a_vm_of_20_gib_in_it_twice(there, installed):
    daemon, minion = there
    daemon.thin_pools["pool-vg/pool-thin"] = {
        "data_size": 256 * GIB,
        "data_usage": 25 * GIB,
        "metadata_size": GIB,
        "metadata_usage": GIB // 10,
    }
    (installed / "r4.sls").write_text(
        ISSUE_8102
        + """
work-20:
  qubes_vm.present:
    - template: fedora
    - label: green
    - pool: pool-name
    - volumes: {private: 20GiB}
    - require: [pool-name]
"""
    )
    minion.call("saltutil.sync_all")
    writes(daemon)
    planned = minion.highstate("state.apply", "r4", test=True)
    assert results(planned) == {"pool-name": None, "other-pool-name": True, "work-20": None}
    assert writes(daemon) == []
    first = minion.highstate("state.apply", "r4")
    assert results(first) == {"pool-name": True, "other-pool-name": True, "work-20": True}
    assert changed(first) == {"pool-name", "work-20"}
    assert first["pool-name"]["changes"] == planned["pool-name"]["changes"]
    assert writes(daemon)
    assert daemon.vms["work-20"].volumes["private"].size == 20 * GIB
    second = minion.highstate("state.apply", "r4")
    assert set(results(second).values()) == {True}
    assert changed(second) == set()
    assert writes(daemon) == []


def test_one_pillar_layout_serves_r4_too(there, tmp_path):
    daemon, minion = there
    minion.declare(TREE / "pillar-examples/r4.sls")
    writes(daemon)
    planned = minion.highstate(test=True)
    assert set(results(planned).values()) == {None}
    assert writes(daemon) == []
    first = minion.highstate()
    assert {i: s["comment"] for i, s in first.items() if s["result"] is not True} == {}
    assert minion.call("qubes_pool.default_pools")["default_pool"] == "fast"
    assert minion.call("qubes_vm.info", "personal")["volumes"]["private"]["size"] == 20 * GIB
    assert changed(minion.highstate()) == set()


def test_words_of_r32_are_refused_with_those_of_r4(there, tmp_path):
    daemon, minion = there
    minion.declare(TREE / "pillar-examples/workstation.sls")
    writes(daemon)
    run = minion.highstate()
    assert "file-reflink" in run["pool ssd"]["comment"]
    assert run["pool ssd"]["result"] is False
    assert writes(daemon) == []


def test_what_is_there_is_left_alone_where_only_creation_is_asked_for(there, tmp_path):
    daemon, minion = there
    pillar = tmp_path / "pillar.sls"
    pillar.write_text("qubes_storage: {vms: {work: {label: blue, pool: btrfs, create_only: true}}}")
    minion.declare(pillar)
    writes(daemon)
    run = minion.highstate()
    assert results(run) == {"VM work": True}
    assert changed(run) == set()
    assert writes(daemon) == []
