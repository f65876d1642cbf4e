"""
add_pool and remove_pool: what a reader finds after each call, and the bytes of the file.

R3.2 writes the file anew, in its own form and in place. We edit the text: every line that was there
stays, in its order, the file is replaced whole, and owner, group and mode stay. A call that is
refused, or has nothing to do, leaves the very same file. So ``file_after`` and ``same_inode`` are
not compared with what was observed; ``ours`` says of each call in order whether it is ``refused``
and what ``reparsed`` finds, where that is not what R3.2 does.
"""

import os

import pytest
import qubes_storage

from tests.r32.cases import cases, raw, text
from tests.r32.conftest import as_user, give, tree

CONF = "etc/qubes/storage.conf"


def call(root, op):
    """Make the call of a case; what it returns."""
    verb, name, *more = op
    if verb == "add":
        return qubes_storage.add_pool(name, root=root, **dict(more[0]))
    if verb == "add_positional":
        return qubes_storage.add_pool(name, *more[0])
    if verb == "remove":
        return qubes_storage.remove_pool(name, root=root)
    assert verb == "exists"
    return qubes_storage.pool_exists(name, root=root)


def wanted_of(case):
    """``(op, refused, what it returns, what a reader finds)`` of each call."""
    ours = case.get("ours", {}).get("ops", [])
    assert len(ours) in (0, len(case["observed"]["result"]))
    for number, seen in enumerate(case["observed"]["result"]):
        mine = ours[number] if ours else {}
        refused = mine.get("refused", "exception" in seen["ret"])
        reparsed = mine.get("reparsed", seen["reparsed"].get("ok"))
        result = mine.get("ret", seen["ret"].get("ok"))
        found = {text(n): {k: text(v) for k, v in o} for n, o in reparsed.items()}
        yield seen["op"], refused, result, found


def setup(root, case):
    path = root / CONF
    if case["input"]["text"] is not None:
        path.write_bytes(raw(case["input"]["text"]))
        give(path, 0o664)
    return path


def is_subsequence(lines, within):
    rest = iter(within)
    return all(line in rest for line in lines)


def stat_of(path):
    found = path.stat()
    return found.st_mode, found.st_uid, found.st_gid


@pytest.mark.parametrize("case", cases("B_add_remove_pool"))
def test_each_call_does_what_r32_does_and_keeps_the_text(case, machine):
    path = setup(machine, case)
    for op, refused, result, reparsed in wanted_of(case):
        before = tree(machine)
        old = path.read_bytes() if path.exists() else None
        owner = stat_of(path) if path.exists() else None
        with as_user(case):
            umask = os.umask(0o022)
            os.umask(umask)
            if refused:
                with pytest.raises(qubes_storage.StoragePoolException) as caught:
                    call(machine, op)
                check_message(str(caught.value), op)
            else:
                returned = call(machine, op)
                if op[0] == "exists":
                    assert returned is result
            assert os.umask(umask) == umask, "the umask leaked"
        if refused or op[0] == "exists":
            check_untouched(case, before, tree(machine))
        new = path.read_bytes() if path.exists() else None
        assert qubes_storage.loads(new or b"") == reparsed
        check_text(op, old or b"", new or b"")
        if owner:
            assert stat_of(path) == owner
        elif new is not None:
            assert path.stat().st_mode & 0o7777 == 0o660
        assert set(os.listdir(path.parent)) <= {"storage.conf"}


def check_message(message, op):
    """An error names the pool, or the file that cannot be used, or what was no root."""
    name = op[1]
    assert (isinstance(name, str) and name in message) or repr(name) in message or "root" in message


def check_untouched(case, before, after):
    """Nothing came, went or changed, but for the lock's own file where the write itself failed."""
    if case["input"]["user"] == "user":
        registry = "var/lib/qubes/qubes.xml"
        assert set(after) - {registry} == set(before)
        before = {path: at for path, at in before.items() if path.startswith("etc")}
        after = {path: at for path, at in after.items() if path.startswith("etc")}
    assert after == before


def check_text(op, old, new):
    """Lines only come with ``add`` and only go with ``remove``; all others stay in their order."""
    if op[0] == "remove":
        assert is_subsequence(new.splitlines(), old.splitlines())
    elif op[0] == "add":
        assert is_subsequence(old.splitlines(True), new.splitlines(True))
        if b"\r\n" in old:
            assert new.count(b"\n") == new.count(b"\r\n")
    else:
        assert new == old


@pytest.mark.parametrize("case", cases("B_add_remove_pool"))
def test_what_add_made_remove_takes_away_to_the_byte(case, machine):
    path = setup(machine, case)
    for op, refused, _, _ in wanted_of(case):
        if op[0] == "add" and not refused and case["input"]["text"] is not None:
            before = path.read_bytes()
            with as_user(case):
                call(machine, op)
                qubes_storage.remove_pool(op[1], root=machine)
            assert path.read_bytes() == before
