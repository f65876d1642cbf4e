"""Images: made, cloned and measured, on each filesystem that can be mounted here."""

import errno
import fcntl
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
from qubes_storage import files, image, mounts

MIB = 1024**2
SIZE = 64 * MIB
FILESYSTEMS = {
    "tmpfs": None,
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
}


def mount(kind, place, size=512 * MIB, options=()):
    """
    Mount a fresh filesystem of ``size`` bytes at a place, made with ``options``, or skip with the
    reason.
    """
    if os.geteuid():
        pytest.skip("only root can mount")
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "none", place]
    else:
        make = FILESYSTEMS[kind]
        if not shutil.which(make[0]):
            pytest.skip(f"{make[0]} is not installed")
        disk = f"{place}.disk"
        with open(disk, "wb") as file:
            file.truncate(size)
        subprocess.run([*make, *options, disk], check=True, capture_output=True)
        command = ["mount", "-o", "loop", disk, place]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"{kind} cannot be mounted here")


@pytest.fixture(scope="module", params=FILESYSTEMS)
def mounted(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param) / "mnt"
    place.mkdir()
    mount(request.param, place)
    yield request.param, place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def place(mounted):
    return pathlib.Path(tempfile.mkdtemp(dir=mounted[1]))


def write(path, parts, size=SIZE):
    """An image with data at some offsets and holes between."""
    with open(path, "wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        file.truncate(size)


def clone(source, target):
    with files.closing(image.open_image(source)) as fd:
        image.clone(fd, target)


PARTS = {
    "nothing": [],
    "start": [(0, b"head")],
    "middle": [(20 * MIB, b"x" * MIB), (40 * MIB + 17, b"y")],
    "end": [(0, b"a"), (SIZE - 5, b"tail!")],
}


@pytest.mark.parametrize("parts", PARTS)
def test_a_clone_has_the_content_and_the_holes_of_its_source(place, parts):
    source, target = place / "source", place / "target"
    write(source, PARTS[parts])
    clone(source, target)
    assert os.stat(target).st_size == SIZE
    with open(source, "rb") as one, open(target, "rb") as other:
        assert one.read() == other.read()
    assert os.stat(target).st_blocks * 512 < 8 * MIB
    assert os.stat(target).st_mode & 0o777 == 0o600


def test_a_clone_is_apart_from_its_source(place):
    source, target = place / "source", place / "target"
    write(source, [(0, b"old")])
    clone(source, target)
    with open(source, "r+b") as file:
        file.write(b"new")
    with open(target, "rb") as file:
        assert file.read(3) == b"old"


def test_blocks_are_shared_where_the_filesystem_can(mounted, place):
    kind = mounted[0]
    with files.closing(os.open(place, os.O_RDONLY)) as fd:
        assert mounts.filesystem(fd) == kind
        assert image.shares_blocks(fd) is (kind in ("btrfs", "xfs"))
        write(place / "source", [(0, os.urandom(32 * MIB))])
        os.sync()
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        clone(place / "source", place / "target")
        os.sync()
        taken = free - os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    assert (taken < 8 * MIB) is (kind in ("btrfs", "xfs"))


def test_xfs_that_was_made_to_share_no_blocks_is_known_without_a_try(tmp_path):
    (tmp_path / "xfs").mkdir()
    mount("xfs", tmp_path / "xfs", options=["-m", "reflink=0"])
    try:
        with files.closing(os.open(tmp_path / "xfs", os.O_RDONLY)) as fd:
            assert mounts.filesystem(fd) == "xfs"
            assert image.shares_blocks(fd) is image.can_share(fd) is False
    finally:
        subprocess.run(["umount", tmp_path / "xfs"], check=True)


def test_xfs_that_does_not_answer_counts_as_one_that_shares_no_blocks(mounted, place, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with files.closing(os.open(place, os.O_RDONLY)) as fd:
        assert image.shares_blocks(fd) is (mounted[0] == "btrfs")


def test_a_filesystem_is_known_whatever_its_mount_point_is_called(tmp_path):
    place = tmp_path / "my\n\\040\tdisk"
    place.mkdir()
    mount("btrfs", place)
    try:
        image_dir = place / "vm"
        with files.closing(os.open(place, os.O_RDONLY)) as fd:
            image.create_subvolume(fd, "vm")
        with files.closing(os.open(image_dir, os.O_RDONLY)) as fd:
            assert mounts.filesystem(fd) == "btrfs"
            assert image.shares_blocks(fd)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_clone_to_another_filesystem_keeps_holes(place, tmp_path):
    write(place / "source", PARTS["middle"])
    clone(place / "source", tmp_path / "target")
    with open(place / "source", "rb") as one, open(tmp_path / "target", "rb") as other:
        assert one.read() == other.read()
    assert os.stat(tmp_path / "target").st_blocks * 512 < 8 * MIB


def test_an_image_is_sparse_grows_with_a_hole_and_never_shrinks(place):
    path = place / "image"
    image.create(path, SIZE)
    assert (os.stat(path).st_size, os.stat(path).st_blocks) == (SIZE, 0)
    image.resize(path, 2 * SIZE)
    assert (os.stat(path).st_size, os.stat(path).st_blocks) == (2 * SIZE, 0)
    image.resize(path, 1)
    assert os.stat(path).st_size == 2 * SIZE


def test_what_is_there_is_never_written_over(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    for target in (path, tmp_path / "link"):
        with pytest.raises(FileExistsError):
            image.create(target, 1)
        with pytest.raises(FileExistsError):
            clone(path, target)
    assert path.read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_links_pipes_and_directories_are_no_images(tmp_path):
    (tmp_path / "image").write_bytes(b"x")
    (tmp_path / "link").symlink_to("image")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name in ("link", "pipe", "dir"):
        with pytest.raises(OSError, match=f"{name} is not a regular file"):
            image.open_image(tmp_path / name)
    with files.closing(os.open(tmp_path, os.O_RDONLY)) as fd:
        for name in ("link", "pipe", "dir", "none"):
            assert image.measure(fd, name) is None
        assert image.measure(fd, "image")[0] == 1
    for name in ("link", "pipe"):
        with pytest.raises(OSError):
            image.resize(tmp_path / name, 100)
    assert (tmp_path / "image").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set up a loop device")
@pytest.mark.parametrize("name", ["image", "caf\udce9", "new\nline\n"])
def test_an_image_that_a_loop_device_holds_is_in_use(tmp_path, name):
    path = tmp_path / name
    image.create(path, SIZE)
    with image.pinned(path) as (_, found):
        assert image.used_by_loop(found) is None
        made = subprocess.run(
            ["losetup", "--find", "--show", path], check=False, capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr}")
        try:
            assert image.used_by_loop(found) == made.stdout.strip()
        finally:
            subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
        assert image.used_by_loop(found) is None


def test_what_is_no_directory_has_a_number_alone(tmp_path):
    (tmp_path / "file").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    assert image.identity(fd, "file") == str((tmp_path / "file").stat().st_ino)
    os.close(fd)
