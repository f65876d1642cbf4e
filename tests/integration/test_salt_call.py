"""Masterless salt-call, from an empty cache: the highstate syncs the modules and runs them."""

import os
import subprocess

import pytest

from tests.conftest import TREE
from tests.functional.conftest import snapshot
from tests.integration.conftest import changed, results

EXAMPLES = TREE / "pillar-examples"
SHIPPED = """\
[default] ; a pool
driver=xen ; images as files
; class = qubes.storage.xen.XenStorage ; class beats driver
;
; a driver of your own: module path and class
; (see the manual)
; [pool-b]
; class = my.own.Pool
;
; [pool-c]
; driver=dummy

"""


@pytest.mark.parametrize("example", ["default", "manual", "workstation"])
def test_example_is_applied_and_then_changes_nothing(machine, example):
    machine.declare(EXAMPLES / f"{example}.sls")
    before = snapshot(machine.root)
    planned = machine.highstate(test=True)
    assert set(results(planned).values()) == {None}
    assert snapshot(machine.root) == before
    first = machine.highstate()
    assert set(results(first).values()) == {True}
    made = machine.call("qubes_pool.list")
    assert made["default"] == {"driver": "xen"}
    second = machine.highstate()
    assert set(results(second).values()) == {True}
    assert changed(second) == set()


def test_manual_pools_are_where_the_manual_has_them(machine):
    machine.declare(EXAMPLES / "manual.sls")
    machine.highstate()
    for pool in ("opt/qubes-vm", "var/lib/qubes"):
        for name in ("appvms", "servicevms", "vm-templates"):
            assert (machine.root / pool / name).is_dir()


def test_workstation_has_its_vms_where_and_as_large_as_declared(machine):
    machine.declare(EXAMPLES / "workstation.sls")
    machine.highstate()
    vms = machine.call("qubes_vm.list")
    assert {name: vm["klass"] for name, vm in vms.items()} == {
        "dom0": "AdminVM",
        "fedora-23": "TemplateVM",
        "sys-net": "NetVM",
        "sys-firewall": "ProxyVM",
        "personal": "AppVM",
        "work": "AppVM",
        "build": "StandaloneVM",
        "windows": "HVM",
    }
    work = machine.call("qubes_vm.info", "work")
    assert work["dir_path"] == "/opt/ssd/appvms/work"
    assert work["volumes"]["private"]["size"] == 20 * 1024**3
    private = machine.root / "opt/ssd/appvms/work/private.img"
    assert private.stat().st_size == 20 * 1024**3
    assert private.stat().st_blocks == 0


def test_external_disk_is_refused_while_it_is_not_mounted(machine):
    machine.declare(EXAMPLES / "external-disk.sls")
    for options in ({"test": True}, {}):
        run = machine.highstate(**options)
        assert run["pool backup"]["result"] is False
        assert "/mnt/backup is not mounted" in run["pool backup"]["comment"]
        assert run["VM archive"]["result"] is False
        assert not (machine.root / "mnt/backup").exists()
    assert results(run)["pool default"] is True
    assert results(run)["pool old"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a filesystem")
def test_external_disk_is_used_once_it_is_mounted(machine):
    machine.declare(EXAMPLES / "external-disk.sls")
    disk = machine.root / "mnt/backup"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40G", "disk", str(disk)], check=True)
    try:
        assert set(results(machine.highstate()).values()) == {True}
        image = disk / "qubes/appvms/archive/private.img"
        assert image.stat().st_size == 100 * 1024**3
        assert changed(machine.highstate()) == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    run = machine.highstate()
    assert run["pool backup"]["result"] is False
    assert list(disk.iterdir()) == []


def test_yaml_of_issue_8102_works_as_it_stands(machine, installed):
    (installed / "issue-8102.sls").write_bytes((EXAMPLES / "issue-8102.sls").read_bytes())
    machine.call("saltutil.sync_all")
    first = machine.highstate("state.apply", "issue-8102")
    assert results(first) == {"pool-name": True, "other-pool-name": True}
    assert changed(first) == {"pool-name"}
    assert machine.call("qvm-pool.list")["pool-name"]["dir_path"] == "/opt/pool"
    assert changed(machine.highstate("state.apply", "issue-8102")) == set()


def test_a_pool_is_added_to_the_shipped_file_and_no_other_byte_changes(machine):
    conf = machine.root / "etc/qubes/storage.conf"
    conf.write_text(SHIPPED)
    machine.call("saltutil.sync_all")
    machine.call("qubes_pool.add", "foo", driver="xen", dir_path="/opt/foo")
    text = conf.read_text()
    assert text.startswith(SHIPPED)
    assert text[len(SHIPPED) :].strip() == "[foo]\ndriver = xen\ndir_path = /opt/foo"
    machine.call("qubes_pool.remove", "foo")
    assert conf.read_text() == SHIPPED


def test_pillar_order_does_not_matter_and_absent_goes_last(machine, tmp_path):
    pillar = tmp_path / "pillar.sls"
    pillar.write_text(
        """
        qubes_storage:
          vms:
            work: {pool: ssd}
            fedora-23: {klass: TemplateVM, pool: ssd}
          pools:
            ssd: {dir_path: /opt/ssd}
        """
    )
    machine.declare(pillar)
    assert set(results(machine.highstate(test=True)).values()) == {None}
    assert set(results(machine.highstate()).values()) == {True}
    assert machine.call("qubes_vm.list")["work"]["template"] == "fedora-23"
    pillar.write_text(
        """
        qubes_storage:
          pools:
            ssd: {absent: true, purge: true}
          vms:
            fedora-23: {absent: true, purge: true}
            work: {absent: true, purge: true}
        """
    )
    machine.declare(pillar)
    planned = machine.highstate(test=True)
    assert set(results(planned).values()) == {None}
    assert planned["VM work"]["comment"] == "VM work would be removed"
    assert planned["VM fedora-23"]["comment"] == "VM fedora-23 waits for work to leave it"
    waits = "Pool ssd waits for fedora-23, work to leave it"
    assert planned["pool ssd"]["comment"] == waits
    run = machine.highstate()
    assert set(results(run).values()) == {True}
    assert changed(run) == {"pool ssd", "VM fedora-23", "VM work"}
    assert not (machine.root / "opt/ssd").exists()
    assert changed(machine.highstate()) == set()


@pytest.mark.parametrize(
    ("text", "ident", "comment"),
    [
        ("qubes_storage: {pools: {true: {}}}", "pool True", "R3.2 reads such a name"),
        ("qubes_storage: {pools: {ssd: {dir_path: [/x]}}}", "pool ssd", "no text or number"),
    ],
)
def test_a_pillar_of_the_wrong_shape_is_a_state_that_says_so(
    machine, tmp_path, text, ident, comment
):
    pillar = tmp_path / "pillar.sls"
    pillar.write_text(text)
    machine.declare(pillar)
    before = snapshot(machine.root)
    run = machine.highstate()
    wrong = [state for name, state in run.items() if name.startswith(ident)]
    assert [state["result"] for state in wrong] == [False]
    assert comment in wrong[0]["comment"]
    assert "Traceback" not in wrong[0]["comment"]
    assert snapshot(machine.root) == before


def test_what_no_state_will_make_fails_in_test_mode_as_it_will_in_the_run(machine, tmp_path):
    pillar = tmp_path / "pillar.sls"
    pillar.write_text(
        """
        qubes_storage:
          pools: {default: {}, ssd: {dir_path: /opt/ssd}}
          vms:
            fedora-23: {klass: TemplateVM}
            misplaced: {template: fedora-23, pool: sdd}
            unbased: {template: fedora-32, pool: ssd}
            work: {template: fedora-23}
        """
    )
    machine.declare(pillar)
    planned = machine.highstate(test=True)
    assert planned["VM work"]["result"] is None
    assert planned["VM work"]["comment"] == "VM work waits for pool default and template fedora-23"
    assert planned["VM misplaced"]["result"] is False
    assert "pool sdd: unknown" in planned["VM misplaced"]["comment"]
    assert planned["VM unbased"]["result"] is False
    assert "fedora-32 is not in qubes.xml" in planned["VM unbased"]["comment"]
    real = machine.highstate()
    assert {i for i, r in results(real).items() if r is False} == {"VM misplaced", "VM unbased"}
    planned = machine.highstate(test=True)
    assert planned["VM misplaced"]["comment"] == real["VM misplaced"]["comment"]


def test_a_pool_waits_for_a_directory_that_the_run_makes_first(machine, installed):
    (installed / "parent.sls").write_text(
        f"""
        {machine.root}/srv/pools:
          file.directory: []
        ssd:
          qubes_pool.present:
            - dir_path: /srv/pools/ssd
            - require: ['{machine.root}/srv/pools']
        """
    )
    machine.call("saltutil.sync_all")
    planned = machine.highstate("state.apply", "parent", test=True)
    assert planned["ssd"]["result"] is None
    assert planned["ssd"]["comment"] == "Pool ssd waits for /srv/pools"
    assert set(results(machine.highstate("state.apply", "parent")).values()) == {True}
    assert (machine.root / "srv/pools/ssd/appvms").is_dir()
