"""A machine of R4 to test on: a root, a qubesd that serves on a socket, and a system on it."""

import contextlib
import os

from qubes_storage import connect
from qubes_storage.adminapi import Client

from tests.r4.qubesd import RELEASES, Call, Qubesd, serve


@contextlib.contextmanager
def machine(release, root):
    """``(daemon, system)``: pools varlibqubes, linux-kernel, ssd and btrfs, a template, two VMs."""
    for path in ("/mnt/ssd", "/mnt/btrfs"):
        os.makedirs(f"{root}{path}")
    socket = str(root / "qubesd.sock")
    daemon = Qubesd(release, root)
    daemon.add_pool("ssd", "file-reflink", dir_path="/mnt/ssd/qubes")
    daemon.add_pool("btrfs", "file-reflink", dir_path="/mnt/btrfs/qubes", revisions_to_keep="2")
    daemon.add_vm("fedora", "TemplateVM", label="black")
    daemon.globals.set["default_template"] = "fedora"
    daemon.add_vm("work", pool="ssd")
    daemon.add_vm("vault")
    daemon.vms["work"].volumes["private"].data = "the work of years"
    with serve(daemon, socket):
        system = connect(root, "admin", socket)
        system.refresh()
        yield daemon, system


def writes(daemon):
    """The calls since :py:func:`forget` that change something."""
    return [call.method for call in daemon.log if call.writes]


def forget(daemon, system):
    """Start anew: an empty log, nothing read."""
    daemon.log.clear()
    system.refresh()


__all__ = ["RELEASES", "forget", "machine", "writes"]


def killed_at(number, verb, after=False, files=False):
    """
    Run a verb in a process that dies at its step of that number, before or after it; False if it
    made fewer. Steps are the daemon's writing calls; with ``files`` renames and deletions too.
    """
    pid = os.fork()
    if not pid:
        made = 0

        def dying(step, counts=lambda *args: True):
            def die(*args, **kwargs):
                nonlocal made
                if not counts(*args):
                    return step(*args, **kwargs)
                made += 1
                if made == number and not after:
                    os._exit(9)
                try:
                    return step(*args, **kwargs)
                finally:
                    if made == number:
                        os._exit(9)

            return die

        try:
            if files:
                os.rename, os.unlink = dying(os.rename), dying(os.unlink)
            Client._send = dying(Client._send, lambda _, __, m: Call(m, "", "", "", b"").writes)
            verb()
            os._exit(0)
        except BaseException as err:  # what pytest would do in the child helps nobody
            os.write(2, f"in the child: {err!r}\n".encode())
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9
