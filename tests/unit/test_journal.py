"""The journals of R4: no link is followed to them, and one that is none is told as that."""

import json
import os
import stat

import pytest
from qubes_storage import StoragePoolException
from qubes_storage.admin.journal import MOVES, Journal
from qubes_storage.admin.shapes import BEGUN, MOVE

from tests.r4.machine import forget, writes

ELSEWHERE = "/etc/vulkan"


@pytest.fixture(params=["move", "copy"])
def journal(request, root):
    """A journal, and below its root a directory with files that are none of its business."""
    place = root / ELSEWHERE[1:]
    place.mkdir(mode=0o755)
    (place / "work.json").write_text("{}")
    (place / "work.json").chmod(0o600)
    return Journal(str(root), request.param)


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


def test_a_directory_in_place_of_a_journal_is_told(journal, root):
    (root / journal.path[1:] / "work.json").mkdir(parents=True)
    with pytest.raises(StoragePoolException, match=f"{journal.path}/work.json: is not a file; put"):
        journal.read("work")
    for verb in (lambda: journal.write("work", {}), lambda: journal.remove("work")):
        with pytest.raises(StoragePoolException, match=f"{journal.path}/work.json: Is a director"):
            verb()


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_who_may_not_read_them_is_told_as_whom_to_run(scratch):
    journal = Journal(str(scratch().root), "move")
    journal.write("work", {})
    match = f"VM work: {journal.path}/work.json: Permission denied; run as root or as a member of"
    os.seteuid(65534)
    try:
        with pytest.raises(StoragePoolException, match=match):
            journal.read("work")
    finally:
        os.seteuid(0)


WRONG_OF_MOVE = [
    *([key] for key in MOVE if key not in ("made", "snapshots")),  # one of before has none
    *([key, 5] for key in MOVE),
    ["step", "next"],
    ["step", []],
    ["klass", "HVM"],
    ["asked", {}],
    ["asked", {"private": None}],
    ["pools", [["private", "ssd"]]],
    ["volumes", {"private": 1}],
    ["volatile", {"size": True, "revisions_to_keep": None, "rw": True, "ephemeral": True}],
    ["users", [["vault"]]],
    ["users", [[5, "netvm"]]],
    ["whole", {"properties": {}}],
    ["label", "\ud800"],
]


@pytest.mark.parametrize("change", WRONG_OF_MOVE, ids=str)
def test_a_journal_of_a_move_of_another_shape_names_the_file_and_the_cure(there, change):
    """On a daemon, where a right one is what a move leaves that stops after its first step."""
    daemon, system = there
    path = f"{system.root}{MOVES}/work.json"
    kept = []

    def keep(call):
        if call.method == "admin.vm.volume.CloneTo" and not kept:
            with open(path, encoding="ascii") as file:
                kept.append(json.load(file))

    daemon.before = keep
    system.migrate_vm("work", "btrfs")
    with open(path, "w", encoding="ascii") as file:
        others = {key: value for key, value in kept[0].items() if key != change[0]}
        json.dump({**others, **dict([change] if change[1:] else [])}, file)
    forget(daemon, system)
    for verb in (
        lambda: system.vm_diff("work", label="red"),
        lambda: system.verify_vm("work"),
        lambda: system.migrate_vm("work", "ssd"),
        lambda: system.remove_vm("work", purge=True),
    ):
        with pytest.raises(StoragePoolException) as err:
            verb()
        told = str(err.value)
        assert told.startswith(f"VM work: {MOVES}/work.json, the journal of its move, cannot be")
        assert change[0] in told or "surrogates" in told
        assert told.endswith("; no VM is touched until it is mended or removed by hand")
    assert not writes(daemon)


@pytest.mark.parametrize(
    "text", ["", "x", "5", "null", '"x"', "[]", '[["a", "b"]]', "[" * 200_000, '{"a": ' * 100_000]
)
def test_what_is_no_map_is_no_journal(journal, root, text):
    (root / journal.path[1:]).mkdir()
    (root / journal.file("work")[1:]).write_text(text)
    with pytest.raises(StoragePoolException, match=f"journal of its {journal.what}, cannot be re"):
        journal.read("work")


@pytest.mark.parametrize(
    "found", [{"source": 5}, {"uuid": []}, {"features": None}, {"features": {"a": 1}}, {"whole": 1}]
)
def test_a_journal_of_a_copy_of_another_shape(root, found):
    journal = Journal(str(root), "copy")
    journal.write("work", found)
    with pytest.raises(StoragePoolException, match=f"cannot be read: {next(iter(found))}: not the"):
        journal.read("work")
    journal.write("work", {"source": "vault"})
    assert journal.read("work") == {**BEGUN, "source": "vault", "path": journal.file("work")}
