"""The model of a disk finds what a forgotten sync may cost, and is laid out as real files."""

import os

import pytest

from tests.torture import disk_calls, disk_states, disk_tree, strace

OLD, NEW = b"old\n", b"new and longer\n"


def replace(folder, *synced):
    """Replace ``conf`` by a file written beside, with syncs of ``file`` and ``folder`` or not."""
    with open(folder / ".conf.new", "xb") as file:
        file.write(NEW)
        file.flush()
        if "file" in synced:
            os.fsync(file.fileno())
    os.rename(folder / ".conf.new", folder / "conf")
    sync(folder, "folder" in synced)


def sync(folder, wanted=True):
    fd = os.open(folder, os.O_RDONLY)
    if wanted:
        os.fsync(fd)
    os.close(fd)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "live"
    made.mkdir()
    (made / "conf").write_bytes(OLD)
    return made


def run(function, folder):
    """``(disk, states)`` of a function that changes what lies in a folder."""
    tree = disk_tree.Tree(folder, folder)
    disk = disk_calls.replay(tree, strace.record(lambda: function(folder), folder))
    real = disk_tree.Tree(folder, folder).disk
    assert disk_tree.listing(disk, disk.now) == disk_tree.listing(real, real.before)
    return disk, disk_states.states(disk)[1]


def laid_out(disk, states, place, name):
    """What a file holds in each state, as real files; None where it is not there."""
    place.mkdir(exist_ok=True)
    found = set()
    for state in states:
        disk_tree.lay_out(disk, state.facts, place)
        real = disk_tree.Tree(place, place).disk
        assert disk_tree.listing(real, real.before) == disk_tree.listing(disk, state.facts)
        found.add((place / name).read_bytes() if (place / name).exists() else None)
    return found


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize(
    ("synced", "torn", "kept"),
    [((), True, False), (("file",), False, False), (("folder",), True, True),
     (("file", "folder"), False, True)],
)  # fmt: skip
def test_a_file_is_replaced_whole_only_if_it_is_synced_first(folder, tmp_path, synced, torn, kept):
    disk, states = run(lambda place: replace(place, *synced), folder)
    found = laid_out(disk, states, tmp_path / "again", "conf")
    assert {OLD, NEW} <= found
    assert (found > {OLD, NEW}) is torn
    assert (b"" in found) is torn
    assert (bytes(len(NEW)) in found) is torn
    assert (NEW[: (len(NEW) + 1) // 2].ljust(len(NEW), b"\0") in found) is torn
    ended = laid_out(disk, [s for s in states if s.ended], tmp_path / "again", "conf")
    assert (OLD in ended) is not kept
    assert None not in found


@pytest.mark.usefixtures("tracing")
def test_a_sync_of_a_new_directory_does_not_keep_its_name(folder, tmp_path):
    def make(place):
        (place / "dir").mkdir()
        (place / "dir/file").write_bytes(NEW)
        with open(place / "dir/file", "rb") as file:
            os.fsync(file.fileno())
        sync(place / "dir")

    disk, states = run(make, folder)
    ended = [state for state in states if state.ended]
    assert laid_out(disk, ended, tmp_path / "again", "dir/file") == {None, NEW}


@pytest.mark.usefixtures("tracing")
def test_links_modes_times_and_holes_are_laid_out(folder, tmp_path):
    def make(place):
        os.symlink("conf", place / "link")
        os.link(place / "conf", place / "other")
        os.chmod(place / "conf", 0o640)
        with open(place / "image", "xb") as file:
            os.truncate(file.fileno(), 1 << 40)
            os.pwrite(file.fileno(), b"x" * 9000, 1 << 30)
            os.utime(file.fileno(), ns=(5, 5))
        os.unlink(place / "conf")
        os.rename(place / "other", place / "last")

    disk, states = run(make, folder)
    again = tmp_path / "again"
    assert None in laid_out(disk, states, again, "last")
    disk_tree.lay_out(disk, disk.now, again)
    assert sorted(os.listdir(again)) == ["image", "last", "link"]
    found = os.stat(again / "image")
    assert (found.st_size, found.st_blocks * 512, found.st_mtime_ns) == (1 << 40, 12288, 5)
    assert os.readlink(again / "link") == "conf"


@pytest.mark.usefixtures("tracing")
def test_every_choice_of_what_is_not_synced_is_taken(folder):
    def make(place):
        for name in "abc":
            (place / name).mkdir()

    disk, states = run(make, folder)
    found = {frozenset(n for n in "abc" if f"/{n}" in disk_tree.listing(disk, s.facts))
             for s in states}  # fmt: skip
    assert len(found) == 8
