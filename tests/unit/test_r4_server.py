"""The test server answers as the recorded daemons did, row by row."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

R4 = Path(__file__).parent.parent / "r4"
from qubes_storage import adminapi  # noqa: E402

from tests.r4.qubesd import Qubesd, serve  # noqa: E402

GROUPS = ("pools", "vms", "volumes", "framing", "extra")  # in the order in which they were recorded


def rows(folder):
    for group in GROUPS:
        for row in json.loads((R4 / folder / f"{group}.json").read_text())["rows"]:
            yield group, row


def rows_of(release):
    """``(group, row, what is expected)``; the later daemon was asked what 4.3 was asked."""
    folder = "r4.3" if release == "later" else f"r4.{release[-1]}"
    later = {}
    if release == "later":
        different = json.loads((R4 / "differences-by-release.json").read_text())
        later = {(row["group"], row["id"]): row["main"] for row in different}
    for group, row in rows(folder):
        expected = later.get((group, row["id"]))
        if expected is None and "kind" in row:
            expected = {
                "ok": ["ok", row.get("content")],
                "events": ["events", row["response"][2:]],
                "exception": [row.get("class"), row.get("message")],
            }.get(row["kind"], ["empty"])
        yield group, row, expected


def normal(text, release):
    """
    Without what a model cannot know: uuids, addresses in memory, bytes that the real file systems
    had or used. The later daemon's answers were recorded with each size as N, so there sizes that
    are the model's own count for nothing too.
    """
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "U", text or "")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"^((data_)?usage|data_size)=\d+$", r"\1=N", text, flags=re.M)
    if release == "later" or "vid=" not in text:
        text = re.sub(r"^size=\d+$", "size=N", text, flags=re.M)
    return text


def request_of(row, tokens):
    """The bytes of a request; two rows tell them in words, and tokens are the server's own."""
    match = re.fullmatch(r"<\d+ bytes: (.*) \+ 'a' \* (\d+)>", row["request"], re.S)
    if match:
        data = match[1].encode("latin-1") + b"a" * int(match[2])
        assert len(data) == int(re.match(r"<(\d+)", row["request"])[1])
        return data
    data = row["request"]
    for recorded, given in tokens.items():
        data = data.replace(recorded, given)
    return data.encode("latin-1")


def before(daemon, row):
    """What happened to the daemon's machine between two rows."""
    name = row["id"]
    if name in ("restart.xml", "restart2.ListSnapshots"):
        daemon.restart()
    elif name == "vol.Resize.running":
        daemon.qrexec = False
    elif name == "write sb:private":
        daemon.vms["sb"].volumes["private"].data = row["result"]
    daemon.debug = name.startswith("debug.")


@pytest.mark.parametrize("release", ["4.2", "4.3", "later"])
def test_every_recorded_row_is_answered_alike(release, tmp_path):
    daemon = Qubesd(release, tmp_path, fresh=True)
    for path in ("/mnt/btrfs", "/mnt/xfs"):
        os.makedirs(daemon.path(path))
    tokens, asked, wrong = {}, 0, []
    for group, row, expected in rows_of(release):
        before(daemon, row)
        if "kind" not in row:  # what lay on the disk, and the one row that never got an answer
            continue
        answer = adminapi.parse(daemon.handle(request_of(row, tokens)), row["id"])
        found = [answer.error, answer.message] if answer.error else [answer.kind]
        if answer.kind in ("ok", "events"):
            found = [answer.kind, answer.content]
        asked += 1
        if answer.ok and ".CloneFrom" in row["request"]:
            tokens[row["content"]] = answer.content
            assert len(answer.content) == len(row["content"])
            found[1] = row["content"]
        if [normal(t, release) for t in found] != [normal(t, release) for t in expected]:
            wrong.append((group, row["id"], found, expected))
    assert not wrong
    assert asked > 420


@pytest.mark.parametrize("folder", ["r4.2", "r4.3"])
def test_the_client_reads_every_recorded_response(folder):
    kinds = set()
    for _, row in rows(folder):
        if "kind" not in row:
            continue
        answer = adminapi.parse(row["response"].encode("latin-1"), row["id"])
        kinds.add(answer.kind)
        assert answer.kind == row["kind"]
        if answer.kind == "ok":
            assert answer.content == row["content"]
        elif answer.kind == "exception":
            assert (answer.error, answer.message) == (row["class"], row["message"])
    assert kinds == {"ok", "exception", "empty", "events"}


@pytest.mark.parametrize("folder", ["r4.2", "r4.3"])
def test_contents_of_recorded_responses_are_understood(folder):
    seen = {"Info": 0, "GetAll": 0}
    for _, row in rows(folder):
        method = row.get("request", "").partition("+")[0]
        if row.get("kind") != "ok":
            continue
        if method.endswith(".Info"):
            found = adminapi.pairs(row["content"], row["id"])
            assert found.keys() & {"driver", "pool"}
            seen["Info"] += 1
        elif method.endswith(".GetAll"):
            found = adminapi.properties(row["content"], row["id"])
            assert all(p.type in ("str", "int", "bool", "vm", "label") for p in found.values())
            seen["GetAll"] += 1
        elif method.endswith((".List", ".ListDrivers")):
            adminapi.lines(row["content"], row["id"])
    assert seen["Info"] > 40 and seen["GetAll"] == 2


def test_a_request_is_the_bytes_that_were_recorded():
    recorded = {row["request"] for _, row in rows("r4.3") if "request" in row}
    for method, dest, arg, payload in (
        ("admin.pool.List", "dom0", "", ""),
        ("admin.pool.Add", "dom0", "file", "name=pfile\ndir_path=/var/lib/pools/file\n"),
        ("admin.vm.volume.Resize", "sb", "private", "3221225472"),
        ("admin.vm.property.Set", "a1", "label", "green"),
    ):
        data = adminapi.request(method, dest, arg, payload)
        assert data.decode("latin-1") in recorded


def test_nothing_is_answered_before_the_half_close(tmp_path):
    (row,) = (row for _, row in rows("r4.3") if row["id"] == "frame.no-half-close")
    path = str(tmp_path / "sock")
    with serve(Qubesd("4.3", tmp_path), path) as daemon, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(row["request"].encode())
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert not daemon.log
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(5)
        assert sock.recv(100) == b"0\0varlibqubes\nlinux-kernel\n"


def test_it_serves_on_a_socket_and_keeps_a_log(tmp_path):
    with serve(Qubesd("4.3", tmp_path), tmp_path / "sock") as daemon:
        client = adminapi.Client(str(tmp_path / "sock"))
        assert client.read("admin.pool.List") == "varlibqubes\nlinux-kernel\n"
        assert [call.method for call in daemon.log] == ["admin.pool.List"]
    with pytest.raises(adminapi.StoragePoolException, match="does not listen"):
        client.call("admin.pool.Remove", arg="x")
