"""A driver that fails, or was written wrongly, is a problem of its own pool and names the cure."""

import importlib
import sys

import pytest
import qubes_storage
from qubes_storage import drivers
from qubes_storage.exc import NotSupported, StoragePoolException

FAILING = """
from qubes_storage.drivers import xen

class Pool(xen.Pool):
    fails = None

    def __init__(self, name, *, dir_path: str, fast: bool = False):
        super().__init__(name, dir_path=dir_path)

for name in ("usage", "verify", "missing", "create", "check_setup"):
    def method(self, *args, name=name):
        if name in (Pool.fails or ()):
            raise Pool.fails[name]
        return getattr(super(Pool, self), name)(*args)
    setattr(Pool, name, method)
"""
WRONG = {
    "none_of_ours": """
class Pool:
    def __init__(self, name, *, dir_path: str):
        raise SystemExit("called")
""",
    "without_super": """
import qubes_storage
class Pool(qubes_storage.Pool):
    def __init__(self, name, *, dir_path: str):
        self.name = name
""",
    "without_name": """
import qubes_storage
class Pool(qubes_storage.Pool):
    def __init__(self, name, *, dir_path: str):
        self.dir_path = dir_path
""",
}
TOLD = {
    "none_of_ours": "its driver is no qubes_storage.Pool, so it can hold no VM here; derive it",
    "without_super": "sets no name and dir_path; have its __init__ call super",
    "without_name": "sets no name and dir_path; have its __init__ call super",
}


@pytest.fixture
def machine(scratch, tmp_path_factory, monkeypatch):
    """A machine with a pool of a driver of somebody's own; ``machine.fail(method=error)``."""
    folder = tmp_path_factory.mktemp("drivers")
    for name, text in {"failing": FAILING, **WRONG}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(drivers, "__path__", [*drivers.__path__, str(folder)])
    before = set(sys.modules)
    importlib.invalidate_caches()
    made = scratch("[default]\ndriver=xen\n[bad]\ndriver=failing\ndir_path=/mnt/bad\n")
    made.add_pools()
    made.connect().create_vm("work", pool="bad")

    def fail(**errors):
        made.connect().get_pool("bad").__class__.fails = errors

    made.fail = fail
    yield made
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(machine, call, match):
    before = machine.tree()
    with pytest.raises(StoragePoolException, match=match):
        call()
    assert machine.tree() == before


@pytest.mark.parametrize("name", WRONG)
def test_a_driver_that_was_written_wrongly_is_told_and_harms_no_other_pool(machine, name):
    with open(machine.path("/etc/qubes/storage.conf"), "a") as conf:
        conf.write(f"[odd]\ndriver={name}\ndir_path=/mnt/odd\n")
    system = machine.connect()
    found = system.report()
    told = "is no qubes_storage.Pool" if name == "none_of_ours" else TOLD[name]
    assert told in " ".join(system.pool_info("odd")["problems"])
    assert found["odd"]["problems"] == system.pool_info("odd")["problems"]
    assert found["default"]["problems"] == []
    assert "odd" not in [row["pool"] for row in system.orphans()]
    refused(machine, lambda: system.create_vm("more", pool="odd"), f"pool odd: .*{TOLD[name]}")
    more = {"driver": name, "dir_path": "/mnt/more"}
    refused(machine, lambda: system.pool_diff("more", **more), f"pool more: .*{TOLD[name]}")
    refused(machine, lambda: system.add_pool("more", **more), f"pool more: .*{TOLD[name]}")


ERRORS = {
    OSError(5, "Input/output error"): "{pool}: Input/output error; mend it and try again",
    ValueError("no answer"): "{pool}: {method} of its driver fails: ValueError: no answer; mend",
    SystemExit(3): "{pool}: {method} of its driver fails: SystemExit: 3; mend the driver",
    StoragePoolException("pool bad: its own words"): "pool bad: its own words",
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_driver_raises_is_told_with_its_pool_and_path(machine, error):
    system = machine.connect()
    own = isinstance(error, StoragePoolException)

    def told(method, name="bad"):
        return ERRORS[error].format(pool=f"pool {name}: /mnt/{name}", method=method)

    machine.fail(usage=error)
    assert system.pool_info("bad")["problems"][-1].startswith(told("usage"))
    found = system.report()
    assert found["bad"]["problems"][-1].startswith(told("usage"))
    assert found["default"]["problems"] == []
    system.set_pool("bad", min_free="1MiB")
    for call in (
        lambda: system.create_vm("more", pool="bad"),
        lambda: system.vm_diff("more", pool="bad"),
        lambda: system.migrate_vm("fedora-23", "bad"),
    ):
        refused(machine, call, f"^{told('usage')}")
    machine.fail(verify=error)
    assert [p for p in system.verify_vm("work") if p.startswith(told("verify"))]
    more = {"driver": "failing", "dir_path": "/mnt/more"}
    for method in ("missing", "check_setup", "create"):
        machine.fail(**{method: error})
        name = "bad" if own else "more"
        refused(machine, lambda: system.add_pool("more", **more), f"^{told(method, name)}")
        if method != "create":
            assert system.pool_info("bad")["problems"][-1].startswith(told(method))
            refused(machine, lambda: system.set_pool("bad", fast=True), f"^{told(method)}")
    machine.fail()
    assert set(system.add_pool("more", **more)) == {"created", "driver", "dir_path"}


def test_no_driver_that_is_no_pool_is_made_by_r32_s_call(machine):
    with open(machine.path("/etc/qubes/storage.conf"), "a") as conf:
        conf.write("[odd]\ndriver=none_of_ours\ndir_path=/mnt/odd\n")
    with pytest.raises(NotSupported, match="pool odd: its driver is no qubes_storage.Pool"):
        qubes_storage.get_pool("odd", root=machine.root)
