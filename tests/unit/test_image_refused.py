"""What the disk or the kernel refuses while an image is made, copied, grown or told of."""

import errno
import fcntl
import os
import subprocess

import pytest
from qubes_storage import files, image, trees
from qubes_storage.exc import StoragePoolException

from tests.unit.test_image import mount


def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def source():
    """An open file of 8 KiB in memory, so that no other filesystem shares its blocks."""
    fd = os.memfd_create("source")
    os.pwrite(fd, b"x" * 8192, 0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("module", "name"), [(fcntl, "ioctl"), (os, "copy_file_range"), (os, "lseek")]
)
def test_an_error_of_the_disk_is_told_and_no_other_way_is_tried(
    source, tmp_path, monkeypatch, module, name
):
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail)
        with pytest.raises(OSError, match="Input/output error"):
            image.clone(source, tmp_path / "target")
    assert not (tmp_path / "target").read_bytes().strip(b"\0")


def test_an_image_that_gets_shorter_while_it_is_copied_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "_WATCHED_CHUNK", 4096)
    monkeypatch.setattr(image, "watch", lambda *_: os.ftruncate(source, 4096))
    with pytest.raises(OSError, match="the image got shorter while it was copied"):
        image.clone(source, tmp_path / "target")


def test_what_is_added_to_an_image_while_it_is_copied_is_left_out(source, tmp_path, monkeypatch):
    os.truncate(source, 16384)
    monkeypatch.setattr(image, "watch", lambda *_: os.pwrite(source, b"new", 16384))
    image.clone(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"x" * 8192 + bytes(8192)


def test_an_image_that_cannot_be_synced_does_not_stay_grown(tmp_path, monkeypatch):
    path = tmp_path / "image"
    image.create(path, 4096)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            image.resize(path, 8192)
    assert path.stat().st_size == 4096


def test_sharing_is_tried_out_where_no_file_can_be_without_a_name(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(refuse.errno, os.strerror(refuse.errno))
        return real(path, flags, *args, **kwargs)

    with files.closing(os.open(tmp_path, os.O_RDONLY)) as fd:
        shares = image.can_share(fd)
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            refuse.errno = errno.EOPNOTSUPP
            assert image.can_share(fd) is shares
            refuse.errno = errno.EIO
            with pytest.raises(OSError, match="Input/output error"):
                image.can_share(fd)
        monkeypatch.setattr(fcntl, "ioctl", fail)
        with pytest.raises(OSError, match="Input/output error"):
            image.can_share(fd)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def looped(tmp_path):
    """``(image, the loop device over it)``"""
    path = tmp_path / "image"
    image.create(path, 1 << 20)
    command = ["losetup", "--find", "--show", path]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr}")
    device = made.stdout.strip()
    yield path, device
    subprocess.run(["losetup", "--detach", device], check=True)


def sectors(device):
    with open(f"/sys/block/{os.path.basename(device)}/size", encoding="utf-8") as file:
        return int(file.read())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set up a loop device")
def test_a_loop_device_that_was_not_told_is_named_with_the_cure(looped, monkeypatch):
    path, device = looped
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "ioctl", fail)
        image.tell_loops(path)  # there is nothing to tell, so nothing is called
        image.resize(path, 2 << 20)
        with pytest.raises(StoragePoolException, match=f"error; tell it with losetup -c {device}"):
            image.tell_loops(path)
    assert sectors(device) == 2048
    image.tell_loops(path)
    assert sectors(device) == 4096


def test_a_directory_with_the_inode_number_of_a_subvolume_is_not_taken_for_one(tmp_path):
    """A new tmpfs counts its inodes from 1, so one of its first directories has number 256."""
    mount("tmpfs", tmp_path)
    try:
        for count in range(300):
            (tmp_path / str(count)).mkdir()
        numbers = {made.stat().st_ino: made.name for made in tmp_path.iterdir()}
        if 256 not in numbers:
            pytest.skip("this kernel counts the inodes of tmpfs otherwise")
        name = numbers[256]
        (tmp_path / name / "file").touch()
        with files.closing(os.open(tmp_path, os.O_RDONLY)) as fd:
            assert image.identity(fd, name) == "256"
            assert not image.destroy_subvolume(fd, name)
            with files.closing(files.open_subdir(fd, name)) as there:
                assert not image.is_subvolume(there)
            trees.remove_tree(fd, name)
        assert not (tmp_path / name).exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
