"""Who lives where, and what it takes: as data, and as a table."""

import json
import os
import subprocess

import pytest
from qubes_storage import cli, cli_output

from tests.r32.machine import GIB, LIB, element

CONF = "[default]\ndriver=xen\n[foo]\ndriver=xen\ndir_path=/var/lib/qubes/foo\nbad=option\n"


@pytest.fixture
def machine(scratch):
    """A VM in the default pool, in one that cannot be loaded, and in one that is not there."""
    machine = scratch(CONF)
    machine.elements.append(element("QubesAppVm", "lost", 7, template_qid="1", pool_name="gone"))
    machine.elements.append(element("QubesAppVm", "there", 8, template_qid="1", pool_name="foo"))
    machine.write_registry()
    machine.connect().create_vm("work", volumes={"private": 3 * GIB})
    return machine


def test_every_pool_and_vm_is_told_of(machine):
    found = machine.connect().report()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"default", "foo", "gone"}
    default = found["default"]
    usage = os.statvfs(machine.path(LIB))
    assert default["size"] == usage.f_blocks * usage.f_frsize
    assert default["driver"] == "xen"
    assert default["dir_path"] == LIB
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", machine.path(LIB)], capture_output=True, text=True, check=True
    )
    assert kind.stdout.strip().startswith(default["filesystem"][:3])
    assert set(default["vms"]) == {"fedora-23", "work"}  # dom0 has no images
    private = default["vms"]["work"]["private"]
    assert private["size"] == 3 * GIB
    assert (
        private["allocated"]
        == os.stat(machine.path(f"{LIB}/appvms/work/private.img")).st_blocks * 512
    )
    sizes = [v["size"] for volumes in default["vms"].values() for v in volumes.values()]
    assert default["provisioned"] == sum(sizes)


def test_what_is_wrong_is_told_and_hides_nothing(machine):
    found = machine.connect().report()
    assert found["foo"]["size"] is None
    assert any("takes no option bad" in problem for problem in found["foo"]["problems"])
    assert found["foo"]["vms"] == {"there": {}}
    assert found["gone"]["vms"] == {"lost": {}}
    assert "storage.conf lacks it" in found["gone"]["problems"][0]


def test_images_that_are_gone_have_no_size(machine):
    machine.path(f"{LIB}/appvms/work/private.img").unlink()
    found = machine.connect().report()["default"]["vms"]["work"]
    assert found["private"] == {"size": None, "allocated": None}


def test_orphans_are_told_although_a_pool_cannot_be_loaded(machine):
    machine.mkdir(f"{LIB}/appvms/old")
    found = machine.connect().orphans()
    paths = [(row["pool"], row["path"]) for row in found]
    assert ("default", f"{LIB}/appvms/old") in paths
    assert ("gone", None) in paths


def test_looking_writes_nothing(machine):
    before = machine.tree()
    machine.connect().report()
    assert machine.tree() == before


def test_the_table_shows_it(machine, capsys):
    assert cli.main(["--root", str(machine.root), "report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["POOL", "DRIVER", "FILESYSTEM", "SIZE"]
    work = next(line for line in lines if " work " in line)
    assert work.split()[:2] == ["default", "work"]
    assert work.endswith("14.5 GiB")  # 3 of private, 11.5 of volatile
    assert any(line.startswith("pool gone: VMs lie in it") for line in lines)
    assert any(line.startswith("pool foo: driver xen takes no option bad") for line in lines)


def test_the_table_says_where_blocks_are_shared(machine):
    found = machine.connect().report()
    found["default"]["shared"] = False
    assert not any("may be shared" in line for line in cli_output.report(found))
    found["default"]["shared"] = True
    assert any("may be shared with other images in default" in x for x in cli_output.report(found))


def test_json_is_what_the_core_returns(machine, capsys):
    expected = machine.connect().report()
    for args in (["--json", "report"], ["report", "--json"]):
        assert cli.main(["--root", str(machine.root), *args]) == 0
        found = json.loads(capsys.readouterr().out)
        for pools in (found, expected):
            for pool in pools.values():  # others write to this filesystem meanwhile
                pool.update(used=None, free=None)
        assert found == expected
