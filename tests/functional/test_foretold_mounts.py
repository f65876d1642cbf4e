# ruff: noqa: F401, F811
"""Test mode tells what is wrong besides what a state waits for: mounts, and pools to be made."""

import os
import subprocess

import pytest
from qubes_storage import guards

from tests.functional.test_foretold_r4 import daemon, r4, there
from tests.r4.machine import forget

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
PURGE = {"purge": True}
NEW = ("qubes_pool.present", "new", {"driver": "file-reflink", "dir_path": "/mnt/ssd/new"})


@pytest.fixture
def run_r4(r4, there):
    """``run_r4(*states, test=False)`` on a machine of R4."""
    forget(*there)
    return r4[1]


def refused(run, *declared, about):
    """Why a state after others is refused, in test mode as in the run."""
    told, done = run(*declared, test=True)[about], run(*declared)[about]
    assert (told["result"], told["changes"]) == (False, {}), told["comment"]
    assert (done["result"], done["changes"]) == (False, {}), done["comment"]
    return told["comment"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"default_pool_volatile": "typo"}, "no pool typo"),
        ({"default_pool_kernel": "new"}, "kernels go into a pool of driver linux-kernel"),
    ],
)
def test_a_default_pool_that_waits_hides_no_other_that_is_wrong(run_r4, more, why):
    default = ("qubes_pool.default", "all", {"default_pool": "new", **more})
    assert why in refused(run_r4, NEW, default, about="all")


def test_default_pools_wait_for_the_pools_that_are_made(run_r4):
    default = ("qubes_pool.default", "all", {"default_pool": "new"})
    told, done = run_r4(NEW, default, test=True)["all"], run_r4(NEW, default)["all"]
    assert (told["result"], told["comment"]) == (None, "Default pools wait for pool new")
    assert done["result"] is True


def test_a_disk_that_is_away_is_told_before_the_vms_that_leave(run_r4, there):
    guards.save(there[1].root, "ssd", {"require_mount": "/mnt/ssd"})
    forget(*there)
    leaves, gone = ("qubes_vm.absent", "work", PURGE), ("qubes_pool.absent", "ssd", PURGE)
    assert "/mnt/ssd is not mounted" in refused(run_r4, leaves, gone, about="ssd")


def test_a_disk_that_is_away_is_told_before_the_vms_that_leave_on_r32(run, root):
    os.makedirs(f"{root}/opt/a")
    run(
        ("qubes_pool.present", "foo", {"dir_path": "/opt/a/foo"}),
        ("qubes_vm.present", "t", {"klass": "TemplateVM"}),
        ("qubes_vm.present", "w", {"template": "t", "pool": "foo"}),
    )
    guards.save(str(root), "foo", {"require_mount": "/opt/a"})
    leaves = ("qubes_vm.present", "w", {"pool": "default", "migrate": True})
    told = run(leaves, ("qubes_pool.absent", "foo", PURGE), test=True)["foo"]
    assert (told["result"], "/opt/a is not mounted" in told["comment"]) == (False, True)


@root_only
@pytest.mark.parametrize(
    ("volumes", "why"),
    [
        ({"root": "20GiB"}, "snapshot of its template's"),
        ({"private": {"revisions_to_keep": -5}}, "revisions_to_keep"),
        ({"kernel": {"pool": "nosuch"}}, "no pool nosuch"),
    ],
)
@pytest.mark.parametrize("name", ["new", "work"])
def test_a_mount_that_is_waited_for_hides_nothing_else(run_r4, there, name, volumes, why):
    daemon, system = there
    guards.save(system.root, "ssd", {"require_mount": "/mnt/ssd"})
    daemon.globals.set["default_pool"] = "ssd"
    forget(*there)
    place = f"{system.root}/mnt/ssd"
    mount = ("mount.mounted", place, {"device": "tmpfs", "fstype": "tmpfs", "persist": False})
    vm = ("qubes_vm.present", name, {"volumes": {"private": "30GiB", **volumes}})
    try:
        assert why in refused(run_r4, mount, vm, about=name)
    finally:
        subprocess.run(["umount", place], check=False)


def test_a_label_that_is_none_is_told_before_a_template_that_is_waited_for(run_r4):
    template = ("qubes_vm.present", "debian", {"klass": "TemplateVM"})
    vm = ("qubes_vm.present", "new", {"template": "debian", "label": "pink"})
    assert "unknown label 'pink'" in refused(run_r4, template, vm, about="new")


def test_the_revisions_of_a_volatile_volume_move_along(there):
    system = there[1]
    declared = {"volumes": {"volatile": {"revisions_to_keep": 3}}}
    system.set_vm("work", **declared)
    system.set_vm("work", **declared, pool="btrfs", migrate=True)
    system.refresh()
    assert system.vm_diff("work", **declared, pool="btrfs") == {}
