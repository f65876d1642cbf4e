"""Files and directories below a root, where something is in the way of them."""

import contextlib
import ctypes
import errno
import os

import pytest
from qubes_storage import files, owning, replacing, trees
from qubes_storage.exc import StoragePoolException

from tests.r32.machine import XML

OTHER = 12345
GID = 98
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@contextlib.contextmanager
def as_user(uid, *groups):
    """The rest is done as another user, of these groups."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(groups[0])
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def place(tmp_path):
    """A handle of an empty directory, with its path."""
    path = tmp_path / "place"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    yield fd, path
    os.close(fd)


def test_a_root_that_is_away_is_told_with_the_cure(tmp_path):
    with pytest.raises(
        StoragePoolException, match="away: No such .*; make or mount it, or correct"
    ):
        files.open_dir(str(tmp_path / "away"), "/etc")


def test_links_that_lead_round_are_no_directory(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("/a")
    with pytest.raises(OSError, match="Too many levels of symbolic links: '/a/x'"):
        files.open_dir(str(tmp_path), "/a/x")


def test_what_goes_while_a_directory_is_looked_at_is_not_in_it(place):
    fd, path = place
    for name in ("a", "b", "c"):
        (path / name).touch()
    seen = []
    for name, _ in files.entries(fd):
        seen.append(name)
        (path / "b").unlink(missing_ok=True)
    assert seen == ["a", "c"]


def test_attributes_that_let_nobody_in_are_kept(tmp_path):
    path = tmp_path / "file"
    path.touch()
    try:
        os.setxattr(path, "user.colour", b"red")
    except OSError as err:
        pytest.skip(f"no attributes here: {err}")
    with files.closing(os.open(path, os.O_RDWR)) as fd:
        owning.own(fd, 0o640)
    assert os.getxattr(path, "user.colour") == b"red"
    assert path.stat().st_mode & 0o7777 == 0o640


@root_only
def test_a_directory_is_made_whatever_the_umask_shuts_out(place):
    fd, path = place
    os.chown(path, OTHER, OTHER)
    with as_user(OTHER, OTHER), umask(0o777):
        os.close(owning.make_dir(fd, "new"))
    assert (path / "new").stat().st_mode & 0o7777 == 0o2770
    assert (path / "new").stat().st_uid == OTHER


def test_a_directory_that_was_put_in_place_of_the_new_one_is_not_taken_for_it(place, monkeypatch):
    fd, path = place
    make = os.mkdir

    def swap(name, *args, **kwargs):
        make(name, *args, **kwargs)
        (path / name / "of another").touch()

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", swap)
        with pytest.raises(OSError, match="new was taken away while it was made"):
            owning.make_dir(fd, "new")
    assert os.listdir(path / "new") == ["of another"]


def test_what_is_half_made_goes_with_its_workshop(place):
    fd, path = place

    def half():
        with owning.workshop(fd, ".work") as made:
            os.mkdir("dir", dir_fd=made)
            (path / ".work/dir/file").touch()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        half()
    assert os.listdir(path) == []


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "etc").symlink_to("/none/such")
    with pytest.raises(FileNotFoundError, match="leads nowhere: take the link away: '/etc'"):
        files.make_dirs(str(tmp_path), "/etc")
    assert os.listdir(tmp_path) == ["etc"]


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name in ("pipe", "dir"):
        with pytest.raises(StoragePoolException, match=f"/{name}: is not a file; put a file in"):
            files.read(str(tmp_path), f"/{name}")


def test_what_is_too_large_to_be_one_of_qubes_is_not_read(scratch):
    machine = scratch()
    for path in ("/etc/qubes/storage.conf", XML, "/etc/qubes/storage-guards.conf"):
        there = machine.path(path).read_bytes() if machine.path(path).exists() else None
        with open(machine.path(path), "ab") as file:
            file.truncate(1 << 42)
        with pytest.raises(StoragePoolException, match=f"{path}: has more than 64 MiB"):
            machine.connect().add_pool("foo", dir_path="/mnt/foo")
        machine.path(path).unlink()
        if there is not None:
            machine.path(path).write_bytes(there)
    (machine.root / "large").write_bytes(b"x" * (64 << 20))
    assert len(files.read(str(machine.root), "/large")) == 64 << 20


def test_the_stamp_of_a_file_is_the_same_by_whichever_root(tmp_path):
    (tmp_path / "file").write_text("x")
    seen = files.stamp("/", str(tmp_path / "file"))
    assert seen == files.stamp(str(tmp_path), "/file")
    assert seen == files.stamp_of((tmp_path / "file").stat())
    assert files.stamp("/", str(tmp_path / "none")) is None


class Old:
    """A C library from before renameat2."""


class Refusing:
    """A C library on a filesystem that cannot refuse to replace."""

    @staticmethod
    def renameat2(*_):
        ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("library", [None, Old, Refusing])
def test_nothing_is_replaced_whatever_the_c_library_knows(place, monkeypatch, library):
    fd, path = place
    if library:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    for name in ("one", "two"):
        (path / name).mkdir()
    with pytest.raises(FileExistsError, match="two"):
        trees.rename_new(fd, fd, "one", "two")
    trees.rename_new(fd, fd, "one", "three")
    assert sorted(os.listdir(path)) == ["three", "two"]


@root_only
@pytest.mark.parametrize("gid", [OTHER, GID])
def test_a_file_that_a_member_of_its_group_replaces_keeps_group_and_mode(place, gid):
    fd, path = place
    os.chown(path, OTHER, OTHER)
    (path / "file").write_text("old")
    os.chown(path / "file", 0, gid)
    (path / "file").chmod(0o660)
    with as_user(OTHER, OTHER, GID):
        replacing.replace(fd, "file", b"new")
    found = (path / "file").stat()
    assert (path / "file").read_text() == "new"
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (OTHER, gid, 0o660)


def test_directories_in_directories_for_ever_are_refused(place):
    fd, path = place
    deep = path
    for _ in range(131):
        deep /= "d"
        deep.mkdir()
    with pytest.raises(OSError, match="d lies more than 128 directories deep"):
        trees.remove(fd, "d")
    assert deep.exists()
    assert trees.tree_size(fd, "d") > 0


@root_only
def test_what_may_not_be_read_is_told_with_the_cure(scratch):
    machine = scratch()
    path = machine.path("/etc/qubes/storage.conf")
    path.chmod(0o600)
    for above in (path.parent, path.parent.parent):
        above.chmod(0o755)
    with as_user(OTHER, OTHER):
        with pytest.raises(StoragePoolException, match="denied; run as root or as a member of"):
            files.read(str(machine.root), "/etc/qubes/storage.conf")
        assert files.read(str(machine.root), "/etc/none") is None


def test_a_file_instead_of_a_directory_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "file").touch()
    with open(tmp_path / "file") as file, pytest.raises(NotADirectoryError):
        files.exists(file.fileno(), "name")
