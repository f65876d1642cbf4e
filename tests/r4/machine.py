"""A machine of R4 to test on: a root, a qubesd that serves on a socket, and a system on it."""

import contextlib
import os

from qubes_storage import connect

from tests.r4.qubesd import RELEASES, Qubesd, serve


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
