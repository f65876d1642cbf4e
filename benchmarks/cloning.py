"""
What cloning images costs, beside ``cp --reflink=auto`` and the bare call that shares the blocks
(FICLONE, a snapshot), on fresh filesystems.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

TREE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "_utils"))

from qubes_storage import files, image, trees  # noqa: E402
from qubes_storage.drivers import btrfs  # noqa: E402

MIB = 1024**2
FICLONE = 0x40049409
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


def best(*ways, clean=lambda: None):
    """The best time of each way in some rounds, in turns, in seconds; each begins cleaned."""
    taken = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, times in zip(ways, taken):
            clean()
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    clean()
    return [min(times) for times in taken]


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


def share(source, target):
    """The bare call of the kernel, on a new file."""
    with open(source, "rb") as old, open(target, "xb") as new:
        fcntl.ioctl(new, FICLONE, old.fileno())


def fill(path):
    """Write an image of 10 GiB that holds 400 MiB."""
    with open(path, "wb") as file:
        file.truncate(10 * 1024 * MIB)
        for part in range(4):
            file.seek(part * 2048 * MIB)
            file.write(os.urandom(100 * MIB))
        os.fsync(file.fileno())


def large(place, shares):
    """``(the bytes a clone takes, times of ours, cp, FICLONE where blocks are shared)``."""
    source, target = place / "source.img", place / "target.img"
    fill(source)
    before = used(place)
    clone(source, target)
    taken = used(place) - before

    def clean():
        target.unlink(missing_ok=True)
        used(place)

    ways = [clone, copy, share] if shares else [clone, copy]
    times = best(*(functools.partial(way, source, target) for way in ways), clean=clean)
    source.unlink()
    return taken, *times


def subvolume(place):
    """Times of cloning a VM of driver btrfs, with an image like that: ``(ours, the snapshot)``."""
    pool = btrfs.Pool("bench", dir_path=str(place / "pool"))
    pool.create()
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(files.closing(pool.open_subdir("appvms")))
        work = stack.enter_context(files.closing(pool.make_vmdir(fd, "work")))
        fill(files.at(work, "private.img"))
        pool.create_image(files.at(work, "volatile.img"), 10 * 1024 * MIB)

        def clean():
            if files.exists(fd, "play"):
                trees.remove_tree(fd, "play")
            used(place)

        return best(
            lambda: os.close(pool.make_vmdir(fd, "play", work, ["private.img"])),
            lambda: image.snapshot_subvolume(work, fd, "play"),
            clean=clean,
        )


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

    return best(each(clone), each(copy), clean=clean)


def main():
    """Print the ratios; filesystems need root, and are left out without."""
    if os.geteuid():
        print("cloning: only root can mount the filesystems it is measured on")
        return
    print("cloning an image of 10 GiB that holds 400 MiB, and many small ones, beside cp")
    with tempfile.TemporaryDirectory() as base:
        for kind in ("btrfs", "xfs", "ext4", "tmpfs"):
            with mounted(kind, pathlib.Path(base)) as place:
                taken, ours, theirs, *bare = large(place, kind in ("btrfs", "xfs"))
                many, many_cp = small(place)
                shot = subvolume(place) if kind == "btrfs" else None
            print(
                f"  {kind:6} {ours / theirs:5.2f} x the time of cp, and {taken / MIB:4.0f} MiB more"
                f" in use; {SMALL} small ones {many_cp / many:3.0f} times as fast"
            )
            for time_ in bare:
                print(f"         {ours / time_:5.2f} x the time of FICLONE itself")
            if shot:
                print(f"         {shot[0] / shot[1]:5.2f} x that of the snapshot, for a whole VM")


if __name__ == "__main__":
    main()
