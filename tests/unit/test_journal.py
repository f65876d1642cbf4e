"""The journals of R4: no link is followed to them, and one that is none is told as that."""

import os
import stat

import pytest
from qubes_storage import StoragePoolException
from qubes_storage.admin.journal import COPIES, MOVES, Journal

ELSEWHERE = "/etc/vulkan"


@pytest.fixture(params=[(MOVES, "move"), (COPIES, "copy")])
def journal(request, root):
    """A journal, and below its root a directory with files that are none of its business."""
    place = root / ELSEWHERE[1:]
    place.mkdir(mode=0o755)
    (place / "work.json").write_text("{}")
    (place / "work.json").chmod(0o600)
    return Journal(str(root), *request.param)


def outside(journal):
    place = journal.root + ELSEWHERE
    found = [place, *(os.path.join(place, name) for name in sorted(os.listdir(place)))]
    return [(path, os.lstat(path).st_mode, os.lstat(path).st_mtime_ns) for path in found]


def each_refused(journal, match):
    before = outside(journal)
    for verb in (
        lambda: journal.read("work"),
        lambda: journal.write("work", {}),
        lambda: journal.remove("work"),
        lambda: journal.locked("work").__enter__(),
    ):
        with pytest.raises(StoragePoolException, match=match):
            verb()
    assert outside(journal) == before


@pytest.mark.parametrize("target", [ELSEWHERE, "../../../etc/vulkan", "/nowhere"])
def test_a_link_in_place_of_the_journals_is_refused(journal, target):
    os.symlink(target, journal.root + journal.path)
    each_refused(journal, f"VM work: {journal.path}: Not a directory; no link is followed there")
    assert os.readlink(journal.root + journal.path) == target


def test_a_file_in_place_of_the_journals_is_refused(journal, root):
    (root / journal.path[1:]).write_text("precious")
    each_refused(journal, f"VM work: {journal.path}: Not a directory")
    assert (root / journal.path[1:]).read_text() == "precious"


def test_a_link_in_place_of_a_journal_is_not_read_and_gives_way_to_one(journal, root):
    place = root / journal.path[1:]
    place.mkdir()
    (place / "work.json").symlink_to(root / "etc/vulkan/work.json")
    before = outside(journal)
    with pytest.raises(StoragePoolException, match=f"{journal.path}/work.json: Too many levels"):
        journal.read("work")
    journal.write("work", {})
    assert not (place / "work.json").is_symlink()
    (place / "work.json").unlink()
    (place / "work.json").symlink_to(root / "etc/vulkan/work.json")
    journal.remove("work")
    assert not os.listdir(place)
    assert outside(journal) == before


def test_who_only_reads_makes_nothing(journal, root):
    assert journal.read("work") is None
    journal.remove("work")
    assert os.listdir(root / "var/lib/qubes") == []


def test_what_is_made_is_open_to_the_group_alone(journal, root):
    before = os.umask(0)
    try:
        with journal.locked("work"):
            journal.write("work", {})
            path = root / journal.path[1:]
            (path / "work.json").chmod(0o666)  # somebody has opened it up
            journal.write("work", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o2770
    assert stat.S_IMODE((path / "work.json").stat().st_mode) == 0o660
