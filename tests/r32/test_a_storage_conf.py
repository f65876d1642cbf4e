"""
What R3.2 makes of a storage.conf, and we: sections, options, classes, pools, errors.

R3.2's exceptions are :py:class:`StoragePoolException` here, with a message that names the pool, or
for text that cannot be parsed, each line. Where a case has ``ours``, it holds instead of what was
observed.
"""

import os
import re

import pytest
import qubes_storage
from qubes_storage import conf
from qubes_storage.drivers import xen
from qubes_storage.pool import in_force, pool_class
from qubes_storage.vm import KLASSES, VM

from tests.r32.cases import cases, raw, text
from tests.r32.conftest import as_user, give, tree

CASES = cases("A_storage_conf")
TEXTS = [param for param in CASES if param.values[0]["input"].get("text") is not None]
CLASSES = {
    "qubes.storage.xen.XenPool": xen.Pool,
    "qubes.storage.xen.XenStorage": xen.Pool,
    "fakemod.Rec": "fakemod.Rec",
}


def expected(case):
    """What was observed, with what is ours in its place."""
    found = case["observed"]["result"]
    for pool, values in case.get("ours", {}).get("pools", {}).items():
        found = {**found, "pools": {**found["pools"], pool: {**found["pools"][pool], **values}}}
    if "parse" in case.get("ours", {}):
        found = {**found, "parse": case["ours"]["parse"]}
    return found


def pairs(options):
    return [(text(key), text(value)) for key, value in options]


def write(root, case):
    """Put the storage.conf of a case in place."""
    path = root / "etc/qubes/storage.conf"
    given = case["input"].get("text")
    if given is not None:
        path.write_bytes(raw(given))
        give(path, 0o664)
        return
    kind = case["input"].get("conf")
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling symlink":
        path.symlink_to("nowhere.conf")
    elif kind == "mode 0600 root":
        path.write_bytes(b"[default]\ndriver=xen\n")
        path.chmod(0o600)
    else:
        assert kind is None


def outcome(name, function, *args, **kwargs):
    """What a call returns, or that it raised, which is always ours and names pool or file."""
    try:
        return {"ok": function(*args, **kwargs)}
    except qubes_storage.StoragePoolException as err:
        assert name in str(err) or "storage.conf" in str(err)
        return {"exception": type(err)}


def agrees(found, wanted):
    """Whether both raised, or both came to the same."""
    if "exception" in wanted:
        return "exception" in found
    return found == {"ok": wanted["ok"]}


def classname(klass):
    return f"{klass.__module__}.{klass.__name__}"


@pytest.mark.parametrize("case", TEXTS)
def test_text_is_read_as_r32_reads_it(case):
    wanted = expected(case)
    data = raw(case["input"]["text"])
    if wanted["parse"] != "ok":
        message = wanted["parse"]["exception"]["message"]
        lines = re.findall(r"line:? +(\d+)", message)
        assert lines
        with pytest.raises(conf.ConfError) as caught:
            qubes_storage.loads(data)
        assert re.findall(r"line (\d+)", str(caught.value)) == lines
        return
    found = qubes_storage.loads(data)
    assert list(found) == [text(name) for name in wanted["sections"]]
    for name, options in wanted["section_values"].items():
        assert list(found[name].items()) == pairs(options)
    assert sorted(conf.Conf(data).own("DEFAULT").items()) == sorted(pairs(wanted["DEFAULT_items"]))
    assert qubes_storage.loads(data.decode("utf-8", "surrogateescape")) == found


@pytest.mark.parametrize("case", CASES)
def test_each_pool_is_what_r32_makes_of_it(case, machine):
    write(machine, case)
    before = tree(machine)
    with as_user(case):
        for name, values in expected(case)["pools"].items():
            check_pool(machine, name, values)
    assert tree(machine) == before, "looking made or changed something"


def check_pool(root, name, wanted):
    system = qubes_storage.connect(root, "local")
    vm = VM("vm1", KLASSES["AppVM"], pool=name)

    found = outcome(name, qubes_storage.pool_exists, name, root=root)
    assert agrees(found, wanted["pool_exists"])

    found = outcome(name, lambda: pool_class(name, section(system, name)))
    if "ok" in wanted["class"]:
        klass = CLASSES[wanted["class"]["ok"]]
        assert found["ok"] is klass or classname(found["ok"]) == klass
    else:
        assert "exception" in found

    if "ok" in wanted["kwargs"]:
        options = {key: text(value) for key, value in wanted["kwargs"]["ok"].items()}
        assert slashless(in_force(name, section(system, name))) == slashless(options)

    found = outcome(name, qubes_storage.get_pool, name, root=root)
    if "exception" in wanted["instance"]:
        assert "exception" in found
        return
    pool, values = found["ok"], wanted["instance"]["ok"]
    if values["type"] == "Rec":
        assert classname(type(pool)) == "fakemod.Rec"
        assert pool.kw == {key: text(value) for key, value in values["kw"].items()}
        return
    assert type(pool) is CLASSES[f"qubes.storage.xen.{values['type']}"]
    assert pool.dir_path.rstrip("/") == text(values["dir_path"]).rstrip("/")
    assert pool.vmdir(vm) == text(values["vmdir"])
    assert os.fspath(pool) == pool.dir_path
    assert wanted["dirs_created"] == []


def section(system, name):
    """The section of a pool, or R3.2's error for none."""
    if name not in system.sections():
        raise qubes_storage.StoragePoolException(f"{name} is not in storage.conf")
    return system.sections()[name]


def slashless(options):
    """R3.2 writes its default dir_path with a slash at the end, we without."""
    if "dir_path" in options:
        return {**options, "dir_path": options["dir_path"].rstrip("/")}
    return options
