"""What cloning images costs, beside ``cp --reflink=auto``, on fresh filesystems."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

TREE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "_utils"))

from qubes_storage import image  # noqa: E402

MIB = 1024**2
ROUNDS = 5
SMALL = 200
MKFS = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
}


@contextlib.contextmanager
def mounted(kind, base):
    """A fresh filesystem on a loop device, or a tmpfs."""
    place = base / kind
    place.mkdir()
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=3G", "bench", str(place)]
    else:
        disk = base / f"{kind}.img"
        with open(disk, "wb") as file:
            file.truncate(4 * 1024 * MIB)
        subprocess.run([*MKFS[kind], str(disk)], check=True, stdout=subprocess.DEVNULL)
        mount = ["mount", "-o", "loop", str(disk), str(place)]
    subprocess.run(mount, check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def best(make, prepare=lambda: None):
    """The best time of some rounds, in seconds."""
    taken = []
    for _ in range(ROUNDS):
        prepare()
        start = time.perf_counter()
        make()
        taken.append(time.perf_counter() - start)
    return min(taken)


def clone(source, target):
    """Clone an image in this process, as the core does."""
    fd = os.open(source, os.O_RDONLY)
    try:
        image.clone(fd, str(target))
    finally:
        os.close(fd)


def copy(*paths):
    """Copy an image in another process, as R3.2 does."""
    subprocess.run(["cp", "--reflink=auto", "--sparse=auto", *map(str, paths)], check=True)


def used(place):
    """Bytes in use on a filesystem."""
    subprocess.run(["sync", "-f", str(place)], check=True)
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def large(place):
    """Times of cloning 10 GiB that hold 400 MiB: ``(ours, cp, the bytes that a clone takes)``."""
    source, target = place / "source.img", place / "target.img"
    with open(source, "wb") as file:
        file.truncate(10 * 1024 * MIB)
        for part in range(4):
            file.seek(part * 2048 * MIB)
            file.write(os.urandom(100 * MIB))
        os.fsync(file.fileno())
    before = used(place)
    clone(source, target)
    taken = used(place) - before
    ours = best(lambda: clone(source, target), target.unlink)
    theirs = best(lambda: copy(source, target), target.unlink)
    target.unlink()
    source.unlink()
    return ours, theirs, taken


def small(place):
    """Times of cloning many small images: ``(ours, cp, one process each)``."""
    sources = [place / f"{n}.img" for n in range(SMALL)]
    for source in sources:
        with open(source, "wb") as file:
            file.write(b"x" * 4096)
            file.truncate(2048 * MIB)
    used(place)  # on the disk, so that no clone has to bring it there

    def clean():
        for source in sources:
            source.with_suffix(".new").unlink(missing_ok=True)

    def each(how):
        return lambda: [how(source, source.with_suffix(".new")) for source in sources]

    found = best(each(clone), clean), best(each(copy), clean)
    clean()
    return found


def main():
    """Print the ratios; filesystems need root, and are left out without."""
    if os.geteuid():
        print("cloning: only root can mount the filesystems it is measured on")
        return
    print("cloning an image of 10 GiB that holds 400 MiB, and many small ones, beside cp")
    with tempfile.TemporaryDirectory() as base:
        for kind in ("btrfs", "xfs", "ext4", "tmpfs"):
            with mounted(kind, pathlib.Path(base)) as place:
                ours, theirs, taken = large(place)
                many, many_cp = small(place)
            print(
                f"  {kind:6} {ours / theirs:5.2f} x the time of cp, and {taken / MIB:4.0f} MiB more"
                f" in use; {SMALL} small ones {many_cp / many:3.0f} times as fast"
            )


if __name__ == "__main__":
    main()
