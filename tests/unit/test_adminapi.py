"""The client: what it sends, what it makes of answers, what it says when there are none."""

import os
import socket
import threading
import time

import pytest
from qubes_storage import InvalidInput, StoragePoolException, adminapi, connect

from tests.r4.machine import RELEASES, forget, machine, writes


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    with machine(request.param, tmp_path) as found:
        yield found


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (("admin.pool.Info", "dom0", "a b"), "has a space"),
        (("admin.pool.Info", "dom0", "a\0b"), "has a space"),
        (("admin.pool.Info", "dom0", "é"), "not printable ASCII"),
        (("admin.vm.Remove", "a b"), "not a name"),
        (("admin.vm.Remove", "default"), "not a name"),
        (("admin.pool Info", "dom0"), "no method"),
        (("admin.property.Set", "dom0", "default_pool", "a" * 65536), "65536"),
    ],
)
def test_what_the_header_cannot_hold_is_not_sent(there, call, why):
    daemon, system = there
    with pytest.raises(InvalidInput, match=why):
        system.client.call(*call)
    assert not daemon.log


def test_a_request_of_exactly_65536_bytes_is_sent():
    header = len(adminapi.request("admin.property.Set", arg="default_pool"))
    data = adminapi.request(
        "admin.property.Set", arg="default_pool", payload="a" * (65536 - header)
    )
    assert len(data) == 65536


@pytest.mark.parametrize(
    "data", [b"0", b"2\0Some", b"2\0Some\0\0half a mess", b"x", b"0\0\xff\xfe", b"HTTP/1.1 200 OK"]
)
def test_an_answer_that_was_cut_off_is_an_error(data):
    with pytest.raises(StoragePoolException, match="cut off"):
        adminapi.parse(data)


def test_lines_that_were_cut_off_are_an_error():
    with pytest.raises(StoragePoolException, match="cut off"):
        adminapi.lines("varlibqubes\nlinux-ker", "admin.pool.List")


def test_a_line_that_is_no_property_is_an_error():
    with pytest.raises(StoragePoolException, match="no property"):
        adminapi.properties("label default=True\n", "VM work")


def test_an_empty_answer_is_neither_ok_nor_an_exception():
    answer = adminapi.parse(b"")
    assert answer is adminapi.EMPTY
    assert not answer.ok and not answer.error
    assert "journalctl" in str(answer)


def test_properties_keep_new_lines_and_backslashes():
    content = "kernelopts default=False type=str a\\\\b\\nc d\nnetvm default=True type=vm \n"
    found = adminapi.properties(content, "")
    assert found["kernelopts"] == ("a\\b\nc d", "str", False)
    assert found["netvm"] == ("", "vm", True)


def test_reading_again_asks_once_and_writing_forgets(there):
    daemon, system = there
    client = adminapi.Client(system.client.path)
    for _ in range(3):
        assert "varlibqubes" in system.client.read("admin.pool.List")
        assert "varlibqubes" in client.read("admin.pool.List")
    assert len(daemon.log) == 1
    client.call("admin.pool.Set.revisions_to_keep", arg="ssd", payload="2")
    system.client.read("admin.pool.List")
    assert len(daemon.log) == 3
    system.refresh()
    client.read("admin.pool.List")
    assert len(daemon.log) == 4


def test_nothing_is_refused_on_kept_answers(there):
    daemon, system = there
    assert "new" not in system.list_pools()
    assert "debian" not in system.list_vms()
    # As a command of the same run might do.
    daemon.add_pool("new", "file", dir_path="/mnt/new")
    daemon.add_vm("debian", "TemplateVM")
    assert system.default_pools_diff(default_pool="new")["default_pool"]["new"] == "new"
    assert "created" in system.vm_diff("box", template="debian", pool="new")
    assert system.pool_remove_diff("new")
    daemon.add_vm("box", pool="new")
    system.refresh()
    with pytest.raises(StoragePoolException, match="VMs lie in it"):
        system.pool_remove_diff("new")
    del daemon.vms["box"]
    assert system.pool_remove_diff("new")
    daemon.vms["work"].running = True
    system.refresh()
    with pytest.raises(StoragePoolException, match="Running"):
        system.vm_remove_diff("work", purge=True)
    daemon.vms["work"].running = False
    assert system.vm_remove_diff("work", purge=True)
    daemon.pools["ssd"].options["dir_path"] = "/mnt/elsewhere"
    system.list_pools()
    assert system.pool_diff("ssd", dir_path="/mnt/elsewhere") == {}
    assert not writes(daemon)


def test_a_kept_answer_gets_old(there, monkeypatch):
    daemon, system = there
    system.client.read("admin.pool.List")
    now = time.monotonic()
    monkeypatch.setattr(adminapi.time, "monotonic", lambda: now + adminapi.KEEP + 1)
    system.client.read("admin.pool.List")
    assert len(daemon.log) == 2


def test_a_daemon_that_is_not_there_is_said(tmp_path):
    system = connect(tmp_path, "admin", str(tmp_path / "none.sock"))
    with pytest.raises(StoragePoolException, match=r"none.sock: qubesd does not listen there"):
        system.list_pools()
    with socket.socket(socket.AF_UNIX) as left:  # a socket file that nobody listens on
        left.bind(str(tmp_path / "left.sock"))
    with pytest.raises(StoragePoolException, match="systemctl start qubesd"):
        connect(tmp_path, "admin", str(tmp_path / "left.sock")).list_pools()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_who_may_not_speak_to_the_daemon_is_told_what_to_be(there):
    _, system = there
    os.seteuid(65534)
    try:
        with pytest.raises(StoragePoolException, match=r"qubesd.sock: Permission denied; run as r"):
            system.list_pools()
    finally:
        os.seteuid(0)
    assert system.list_pools()


def test_a_connection_that_breaks_is_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        client = adminapi.Client(str(tmp_path / "sock"))

        def hang_up():
            sock, _ = listener.accept()
            sock.recv(1)  # what is left unread makes the kernel reset the connection
            sock.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(
            StoragePoolException, match=r"the connection to qubesd broke.*run again"
        ):
            client.call("admin.pool.List")
        thread.join()


def test_auto_is_admin_where_a_socket_is_given(there, tmp_path):
    _, system = there
    assert connect(tmp_path, "auto", system.client.path).backend == "admin"
    assert connect(tmp_path, "auto", str(tmp_path / "none.sock")).backend == "local"


def half(call, answer):
    return answer[: len(answer) // 2]


def nothing(call, answer):
    return b""


@pytest.mark.parametrize("after", [half, nothing])
def test_half_answers_and_none_write_nothing_and_are_errors(there, after):
    daemon, system = there
    daemon.after = after
    for verb in (
        lambda: system.add_pool("new", "file", dir_path="/mnt/ssd/new"),
        lambda: system.set_pool("ssd", revisions_to_keep=3),
        lambda: system.create_vm("new", pool="ssd"),
        lambda: system.set_vm("work", label="green"),
        lambda: system.remove_vm("work", purge=True),
        lambda: system.migrate_vm("work", "btrfs"),
    ):
        with pytest.raises(StoragePoolException, match=r"cut off|answered nothing"):
            verb()
    assert not writes(daemon)


def test_a_slow_daemon_is_waited_for(there):
    daemon, system = there
    daemon.before = lambda call: 0.3 if call.method == "admin.pool.List" else None
    started = time.monotonic()
    assert "ssd" in system.list_pools()
    assert time.monotonic() - started >= 0.3


def test_a_daemon_that_stops_in_the_middle_is_said_and_the_next_run_goes_on(there):
    daemon, system = there

    def stop(call, answer):
        if call.method == "admin.vm.volume.Resize":
            raise ConnectionAbortedError
        return answer

    hook = threading.excepthook
    daemon.after = stop
    try:
        answered = system.create_vm("new", volumes={"private": "5GiB"})
    except StoragePoolException as err:
        answered = str(err)
    finally:
        threading.excepthook = hook
        daemon.after = None
    # It was carried out before the daemon stopped, and what counts is what is read afterwards.
    assert answered["created"]["new"] == "new"
    assert daemon.vms["new"].volumes["private"].size == 5 * 1024**3


def test_fifty_vms_cost_calls_that_grow_with_neither_pools_nor_repetition(there):
    daemon, system = there
    names = [f"vm{n}" for n in range(50)]
    for name in names:
        daemon.add_vm(name, pool="ssd")

    def run():
        forget(daemon, system)
        for name in names:
            declared = {"template": "fedora", "label": "red", "pool": "ssd"}
            for _ in range(2):
                again = connect(system.root, "admin", system.client.path)
                assert again.pool_diff("ssd", driver="file-reflink") == {}
                assert again.vm_diff(name, volumes={"private": "1GiB"}, **declared) == {}
        assert not writes(daemon)
        return len(daemon.log)

    few = run()
    for n in range(20):
        daemon.add_pool(f"pool{n}", "file", dir_path=f"/var/lib/pools/{n}")
    assert run() == few
    assert few <= 2 * len(names) + 10
