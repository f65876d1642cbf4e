"""What unit tests share."""

import signal
import sys
import threading

import pytest
from qubes_storage import cli

from tests.r4.machine import RELEASES, forget
from tests.r4.machine import machine as r4_machine

GIB = 1024**3
THIN = {
    "data_size": 100 * GIB,
    "data_usage": 40 * GIB,
    "metadata_size": GIB,
    "metadata_usage": GIB // 10,
}

QUBESADMIN = """
from qubesadmin import config
from qubes_storage.adminapi import Client

class Qubes:
    def clone_vm(self, source, name, new_cls=None, *, pools=None, ignore_volumes=()):
        # The calls that qubesadmin makes, without properties and the like.
        call = Client(config.QUBESD_SOCKET).call
        told = call("admin.vm.List", source).content
        klass = new_cls or told.split("class=")[1].split(" ")[0]
        template = call("admin.vm.property.Get", source, "template").content.split(" ")[-1]
        words = "".join(f" pool:{v}={p}" for v, p in (pools or {}).items())
        verb = "CreateInPool" if pools else "Create"
        arg = template if klass == "AppVM" else ""
        payload = f"name={name} label=red{words}"
        answer = call(f"admin.vm.{verb}.{klass}", arg=arg, payload=payload)
        if not answer.ok:
            raise RuntimeError(str(answer))
        for feature in call("admin.vm.feature.List", source).content.split():
            value = call("admin.vm.feature.Get", source, feature).content
            call("admin.vm.feature.Set", name, feature, value)
        own = ("private",) if klass == "AppVM" else ("private", "root")
        for volume in set(own) - set(ignore_volumes):
            token = call("admin.vm.volume.CloneFrom", source, volume).content
            call("admin.vm.volume.CloneTo", name, volume, token)
"""


@pytest.fixture
def call(machine, capsys):
    """``call(*args)``: exit code, standard output and standard error of the command line."""

    def run(*args):
        try:
            code = cli.main(["--root", str(machine.root), *args])
        except SystemExit as err:
            code = err.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=RELEASES)
def there(request, tmp_path):
    """``(daemon, system)`` of R4, of each release, with a thin pool of LVM."""
    with r4_machine(request.param, tmp_path) as found:
        found[0].thin_pools["qubes_dom0/vm-pool"] = dict(THIN)
        forget(*found)
        yield found


@pytest.fixture
def interrupt():
    """
    ``interrupt()``: Ctrl-C for the main thread, from another; also where the tests run in the
    background, which ignores it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    yield lambda: signal.pthread_kill(main, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def qubesadmin(tmp_path, monkeypatch):
    """A package of that name that makes the calls of its clone_vm, for it is on no index."""
    package = tmp_path / "python" / "qubesadmin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(QUBESADMIN)
    (package / "config.py").write_text("QUBESD_SOCKET = '/var/run/qubesd.sock'\n")
    monkeypatch.syspath_prepend(str(package.parent))
    yield
    for name in ("qubesadmin", "qubesadmin.config"):
        sys.modules.pop(name, None)
