"""
A qubesd that answers what it never should: each answer that a verb reads, broken in each way.

Whatever it says, a verb returns or raises our own error; and as long as it only looks, it asks for
nothing that changes anything.
"""

import contextlib
import re
import shutil

import pytest
from qubes_storage import StoragePoolException

from tests.r4.machine import RELEASES, forget, machine, writes

VERBS = {
    "list_pools": lambda s: s.list_pools(),
    "list_drivers": lambda s: s.list_drivers(),
    "pool_info": lambda s: s.pool_info("ssd"),
    "pool_diff": lambda s: s.pool_diff("ssd", revisions_to_keep=3),
    "pool_diff new": lambda s: s.pool_diff("new", driver="file-reflink", dir_path="/mnt/btrfs/x"),
    "pool_remove_diff": lambda s: s.pool_remove_diff("btrfs"),
    "default_pools": lambda s: s.default_pools_diff(default_pool="ssd"),
    "list_vms": lambda s: s.list_vms(),
    "vm_info": lambda s: s.vm_info("work"),
    "vm_diff": lambda s: s.vm_diff("work", volumes={"private": "9GiB"}, pool="btrfs", migrate=True),
    "vm_diff new": lambda s: s.vm_diff("new", pool="ssd", label="green"),
    "vm_diff clone": lambda s: s.vm_diff("new", clone_from="work"),
    "vm_remove_diff": lambda s: s.vm_remove_diff("work", purge=True),
    "verify_vm": lambda s: s.verify_vm("work"),
    "revisions": lambda s: s.revisions("work", "private"),
    "report": lambda s: s.report(),
    # Those that write may have written; what they say afterwards is what counts.
    "add_pool": lambda s: s.add_pool("new", driver="file-reflink", dir_path="/mnt/btrfs/x"),
    "set_pool": lambda s: s.set_pool("ssd", revisions_to_keep=3),
    "create_vm": lambda s: s.create_vm("new", pool="ssd"),
    "resize_vm": lambda s: s.resize_vm("work", "private", "9GiB"),
    "revert": lambda s: s.revert("work", "private"),
    "migrate_vm": lambda s: s.migrate_vm("work", "btrfs"),
    "remove_vm": lambda s: s.remove_vm("work", purge=True),
}
LOOKING, WRITING = list(VERBS)[:16], list(VERBS)[16:]


def broken(answer):
    """What an answer may be instead."""
    content = answer[2:]
    yield "nothing", b""
    yield "cut off", answer[: len(answer) // 2]
    yield "cut off in the last line", answer[:-1]
    yield "empty", b"0\0"
    yield "no text", b"0\0\xff\xfe\n"
    yield "NULs", b"0\0" + content.replace(b" ", b"\0")
    yield "blank lines", b"0\0\n\n" + content.replace(b"\n", b"\n\n")
    yield "no numbers", b"0\0" + bytes(b"x"[0] if 48 <= c < 58 else c for c in content)
    yield "negative", b"0\0" + content.replace(b"=", b"=-")
    yield "long numbers", b"0\0" + content.replace(b"=", b"=" + b"9" * 5000)
    yield "no keys", b"0\0" + content.replace(b"=", b"")
    yield "no values", b"0\0" + re.sub(rb"=.*", b"=", content)
    yield "twice", b"0\0" + content * 2
    yield "another", b"0\0a b=c d\n=\n \n../x class=? state=\n"
    yield "huge", b"0\0" + (content or b"a=b\n") * (10**6 // max(1, len(content)))
    yield "events", b"1\0" + content + b"\0\0"
    yield "half an exception", b"2\0QubesException\0\0"
    yield "an exception", b"2\0QubesException\0\0No such thing\0"
    yield "an odd exception", b"2\0\xff\0trace\nback\0%s {} \xff\n\0\0\0"
    yield "HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n"


SOME = ("nothing", "cut off", "no numbers", "another")


def calls_of(verb, release, root):
    """The calls that a verb makes, each once."""
    root.mkdir()
    with machine(release, root) as (daemon, system):
        forget(daemon, system)
        with contextlib.suppress(StoragePoolException):  # it has no revision, and no qubesadmin
            VERBS[verb](system)
        return list(dict.fromkeys((call.method, call.dest, call.arg) for call in daemon.log))


def run(verb, there, at, name):
    """Have a verb read a broken answer to one of its calls; whether it told of it."""
    daemon, system = there
    forget(daemon, system)
    daemon.after = lambda call, answer: (
        dict(broken(answer))[name] if (call.method, call.dest, call.arg) == at else answer
    )
    try:
        VERBS[verb](system)
    except StoragePoolException as err:
        assert len(str(err)) > 10, (verb, at, name)
        return True
    finally:
        daemon.after = None
    return False


@pytest.mark.parametrize("verb", LOOKING)
def test_who_looks_tells_of_a_broken_answer_or_takes_no_harm(verb, tmp_path, everything, figures):
    for release in RELEASES if everything else ["4.3"]:
        calls, told = calls_of(verb, release, tmp_path / f"first {release}"), 0
        (tmp_path / release).mkdir()
        with machine(release, tmp_path / release) as there:
            for at in calls:
                for name in [n for n, _ in broken(b"0\0") if everything or n in SOME]:
                    figures["broken answers of qubesd"] += 1
                    told += run(verb, there, at, name)
                    assert not writes(there[0]), (at, name)
        assert told


@pytest.mark.parametrize("verb", WRITING)
def test_who_writes_tells_of_a_broken_answer_or_takes_no_harm(verb, tmp_path, everything, figures):
    told = 0
    names = [name for name, _ in broken(b"0\0") if everything or name == "another"]
    calls = calls_of(verb, "4.3", tmp_path / "first")
    if not everything:
        calls = calls[:: 1 + len(calls) // 12]  # a move makes a hundred
    for number, at in enumerate(calls):
        for name in names:
            root = tmp_path / f"{number} {name}"
            root.mkdir()
            with machine("4.3", root) as there:
                figures["broken answers of qubesd"] += 1
                told += run(verb, there, at, name)
            shutil.rmtree(root)
    assert told
