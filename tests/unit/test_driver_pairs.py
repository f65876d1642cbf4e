"""Pools of different drivers side by side: a VM goes from each to each as it is."""

import hashlib
import itertools
import os
import subprocess

import pytest

from tests.unit.test_image import mount

MIB = 1024**2
GIB = 1024**3
POOLS = {
    "xen-ext4": ("xen", "ext4"),
    "xen-btrfs": ("xen", "btrfs"),
    "reflink-xfs": ("reflink", "xfs"),
    "reflink-btrfs": ("file-reflink", "btrfs"),
    "btrfs": ("btrfs", "btrfs"),
    "other-btrfs": ("btrfs", "btrfs"),
}
PARTS = {"private": (0, GIB // 2 + 5, 3 * GIB - MIB), "root": (MIB, 5 * GIB, 7 * GIB)}


@pytest.fixture
def machine(scratch, tmp_path):
    made = scratch()
    mounted = []
    try:
        for kind in sorted({kind for _, kind in POOLS.values()}):
            place = tmp_path / kind
            place.mkdir()
            mount(kind, place)
            mounted.append(place)
            inside = made.mkdir(f"/mnt/{kind}")
            subprocess.run(["mount", "--bind", place, inside], check=True)
            mounted.append(inside)
        yield made
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", place], check=True)


def fill(machine, system, name):
    """Data in parts of a VM's images, with holes before, between and behind."""
    for volume, offsets in PARTS.items():
        path = machine.path(system.vm_info(name)["volumes"][volume]["path"])
        with open(path, "r+b") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(os.urandom(MIB))


def used(machine, kind):
    """The MiB in use on a filesystem, once all is on it."""
    place = machine.path(f"/mnt/{kind}")
    subprocess.run(["sync", "-f", place], check=True)
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // MIB


def state(machine, system, name):
    """``{volume: (size, digest of its data)}``, and the MiB that its images take."""
    found, taken = {}, 0
    for volume, offsets in PARTS.items():
        info = system.vm_info(name)["volumes"][volume]
        digest = hashlib.sha256()
        with open(machine.path(info["path"]), "rb") as file:
            os.fsync(file.fileno())
            for offset in offsets:  # and some of the hole on either side
                file.seek(max(0, offset - MIB))
                digest.update(file.read(3 * MIB))
            taken += os.fstat(file.fileno()).st_blocks * 512
        found[volume] = info["size"], digest.hexdigest()
    return found, taken // MIB


def test_clone_and_migrate_between_every_pair_keep_content_holes_and_sizes(machine):
    system = machine.connect()
    for pool, (driver, kind) in POOLS.items():
        system.add_pool(pool, driver=driver, dir_path=f"/mnt/{kind}/{pool}")
    for source, target in itertools.product(POOLS, POOLS):
        system.create_vm(
            "work",
            klass="StandaloneVM",
            template="fedora-23",
            pool=source,
            volumes={"private": "3GiB", "root": "10GiB"},
        )
        fill(machine, system, "work")
        before, taken = state(machine, system, "work")
        assert taken >= 6
        kind = POOLS[source][1]
        shares = kind == POOLS[target][1] != "ext4"
        in_use = used(machine, kind)
        system.clone_vm("work", "play", target)
        assert system.vm_info("play")["pool"] == target
        if source != target:
            system.migrate_vm("work", target)
        assert system.vm_info("work")["pool"] == target
        if shares:
            assert used(machine, kind) <= in_use + 2, (source, target)
        for name in ("play", "work"):
            found, now = state(machine, system, name)
            assert found == before, (source, target, name)
            assert now <= taken + 1, (source, target, name)
            assert system.verify_vm(name) == []
            system.remove_vm(name, purge=True)
        for pool in {source, target}:
            assert os.listdir(machine.path(f"/mnt/{POOLS[pool][1]}/{pool}/appvms")) == []
