"""A driver that a user drops as one file into a file_root of his own."""

import shutil

from tests.conftest import TREE
from tests.integration.conftest import Machine, changed, results

PILLAR = """
qubes_storage:
  pools:
    default: {driver: xen}
    full: {driver: prealloc, dir_path: /opt/full, most: 4}
  vms:
    fedora-23: {klass: TemplateVM}
    work: {template: fedora-23, pool: full, volumes: {private: 3GiB}}
"""
LATER = "    torn: {driver: torn, dir_path: /opt/torn}\n"


def test_a_driver_in_a_second_file_root_works_after_one_highstate(
    salt_factories, tmp_path, installed
):
    drivers = tmp_path / "user_salt/_utils/qubes_storage/drivers"
    drivers.mkdir(parents=True)
    shutil.copy(TREE / "docs/example_driver.py", drivers / "prealloc.py")
    (drivers / "torn.py").write_text("import what_is_not_there\n")
    roots = {"base": [str(installed), str(tmp_path / "user_salt")]}
    machine = Machine(salt_factories, tmp_path, installed, file_roots=roots)
    pillar = tmp_path / "pillar.sls"
    pillar.write_text(PILLAR)
    machine.declare(pillar)

    assert set(results(machine.highstate()).values()) == {True}
    made = (machine.root / "opt/full/appvms/work/private.img").stat()
    assert made.st_size == 3 * 1024**3
    assert 4 * 1024**2 <= made.st_blocks * 512 < 8 * 1024**2
    assert changed(machine.highstate()) == set()

    listed = machine.call("qubes_pool.drivers")
    assert listed["prealloc"]["options"] == {
        "dir_path": {"type": "str"},
        "most": {"type": "int", "default": 1024},
    }
    assert listed["prealloc"]["from"].endswith("/qubes_storage/drivers/prealloc.py")
    assert "what_is_not_there" in listed["torn"]["problem"]
    assert {"xen", "reflink", "file-reflink", "btrfs"} < set(listed)

    pillar.write_text(PILLAR.replace("  vms:\n", LATER + "  vms:\n"))
    machine.declare(pillar)
    run = machine.highstate()
    assert run["pool torn"]["result"] is False
    assert "what_is_not_there" in run["pool torn"]["comment"]
    assert results(run)["pool full"] is results(run)["VM work"] is True
