"""Runs of several states on R4: what test mode tells is what the run does, and once is enough."""

import shutil
import sys
from pathlib import Path

import pytest
from qubes_storage.adminapi import Client
from saltfactories.utils.functional import Loaders

from tests.conftest import TREE
from tests.functional.conftest import Run, check_foretold
from tests.r4.machine import RELEASES, forget, machine, writes
from tests.unit.conftest import qubesadmin  # noqa: F401

CALL = """\
import sys
sys.path.insert(0, {core!r})
from qubes_storage.adminapi import Client
print(Client({socket!r}).call(*{words!r}))
"""


@pytest.fixture(scope="module")
def r4(minion_opts, tmp_path_factory):
    """``(link, run, modules)`` of the machine that the link leads to; making them costs seconds."""
    link = tmp_path_factory.mktemp("r4") / "root"
    settings = {
        "qubes_storage.root": str(link),
        "qubes_storage.backend": "admin",
        "qubes_storage.socket": str(link / "qubesd.sock"),
    }
    link.symlink_to("/nonexistent")
    loaders = Loaders({**minion_opts, **settings})
    return link, Run(loaders.opts), loaders.modules


@pytest.fixture(params=RELEASES)
def there(request, r4, tmp_path):
    """``(daemon, system)`` of R4, of each release."""
    r4[0].unlink()
    r4[0].symlink_to(tmp_path)
    Client(str(r4[0] / "qubesd.sock")).refresh()  # what was read of the machine before
    with machine(request.param, tmp_path) as found:
        forget(*found)
        yield found


@pytest.fixture
def daemon(there):
    """The daemon that the runs speak to."""
    return there[0]


@pytest.fixture
def run(r4, there):
    """Runs on that machine."""
    return r4[1]


@pytest.fixture
def foretold(run, there):
    """``foretold(*states)``: call them in all ways; what test mode said, ``{name: comment}``."""

    def call(*declared):
        forget(*there)
        told = run(*declared, test=True)
        assert writes(there[0]) == []
        return check_foretold(run, declared, told)

    return call


@pytest.fixture
def call(tmp_path):
    """``call(*words)``: a state that has another process make a call."""

    def state(*words):
        script = tmp_path / "call.py"
        core, socket = str(TREE / "_utils"), str(tmp_path / "qubesd.sock")
        script.write_text(CALL.format(core=core, socket=socket, words=words))
        return ("cmd.run", f"{sys.executable} {script}", {})

    return state


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("admin.vm.property.Set", "work", "label", b"blue"), {"label"}),
        (("admin.vm.Remove", "work"), {"created", "klass", "template", "label"}),
    ],
)
def test_what_another_state_of_the_run_changed_is_seen(run, call, words, changes):
    declared = ("qubes_vm.present", "work", {"label": "red"})
    assert run(declared)["work"]["changes"] == {}
    assert set(run(declared, call(*words), declared)["work"]["changes"]) == changes
    assert run(declared)["work"]["changes"] == {}


def test_what_nobody_changed_is_read_once(run, daemon):
    vms = [f"vm{number}" for number in range(9)]
    for vm in vms:
        daemon.add_vm(vm)
    daemon.log.clear()
    run(*(("qubes_vm.present", vm, {"pool": "varlibqubes"}) for vm in vms))
    methods = [call.method for call in daemon.log]
    assert methods.count("admin.vm.List") == 1
    assert len(methods) < 4 * len(vms)


OLD = ("qubes_pool.absent", "old", {})
PURGE = {"purge": True}


@pytest.fixture
def old(daemon):
    """A pool that is the default one, and takes nothing."""
    daemon.add_pool("old", "file-reflink", dir_path="/mnt/btrfs/old")
    daemon.globals.set["default_pool"] = "old"
    daemon.usage["old"] = {"data_size": 1 << 30, "data_usage": 1 << 30}


def test_the_default_pools_that_the_run_sets_count(foretold, old):
    told = foretold(
        ("qubes_pool.present", "new", {"driver": "file-reflink", "dir_path": "/mnt/ssd/new"}),
        ("qubes_pool.default", "all", {"default_pool": "new"}),
        ("qubes_pool.default", "root", {"default_pool_root": "new"}),
        ("qubes_vm.present", "app", {}),
        ("qubes_pool.default", "private", {"default_pool_private": "btrfs"}),
        OLD,
        ("qubes_pool.absent", "btrfs", {}),
    )
    assert told["all"] == "Default pools wait for pool new"
    assert told["app"] == "VM app waits for pool new"
    assert told["old"] == "Pool old would be removed"
    assert "is the default_pool_private;" in told["btrfs"]


@pytest.mark.parametrize(("pool", "made"), [("ssd", True), ("old", False)])
def test_a_vm_without_a_pool_goes_where_the_run_has_new_ones_go(foretold, there, old, pool, made):
    there[1].set_pool("old", min_free="900TiB")
    there[0].globals.set["default_pool"] = "old" if made else "ssd"
    told = foretold(
        ("qubes_pool.default", "all", {"default_pool": pool}), ("qubes_vm.present", "app", {})
    )
    assert (told["app"] == "VM app would be created") is made


@pytest.mark.parametrize(
    ("vm", "comment"),
    [
        (("new", {"pool": "ssd"}), "VMs lie in it (new)"),
        (("new", {"volumes": {"volatile": {"pool": "ssd"}}}), "VMs lie in it (new)"),
        (("vault", {"pool": "ssd", "migrate": True}), "VMs lie in it (vault)"),
        (("alone", {"pool": "btrfs", "migrate": True}), "waits for alone, work to leave it"),
        (
            ("alone", {"pool": "btrfs", "volumes": {"root": {"pool": "ssd"}}, "migrate": True}),
            "VMs lie in it (alone)",
        ),
    ],
)
def test_a_pool_goes_if_all_vms_of_the_run_leave_it(foretold, daemon, vm, comment):
    if vm[0] == "alone":
        daemon.add_vm("alone", "StandaloneVM", pool="ssd")
    left = {"volumes": {"private": {"pool": "btrfs"}}, "migrate": True}
    told = foretold(
        ("qubes_vm.present", "work", left),
        ("qubes_vm.present", *vm),
        ("qubes_pool.absent", "ssd", {}),
    )
    assert comment in told["ssd"]


@pytest.mark.parametrize("way", ["moves", "is left", "both", "stays", "disposable"])
def test_a_pool_goes_with_what_is_made_of_a_template_in_it(foretold, there, way):
    daemon = there[0]
    daemon.add_pool("old", "file-reflink", dir_path="/mnt/ssd/old")
    daemon.add_vm("debian", "TemplateVM", pool="old")
    daemon.add_vm("app", template="debian", pool="ssd")
    if way == "disposable":  # its volumes stay where they are
        daemon.vms["app"].set["template_for_dispvms"] = "True"
        daemon.add_vm("disp", "DispVM", template="app")
    forget(*there)
    states = {
        "moves": [("qubes_vm.present", "debian", {"pool": "btrfs", "migrate": True})],
        "is left": [
            ("qubes_vm.present", "app", {"template": "fedora"}),
            ("qubes_vm.absent", "debian", PURGE),
        ],
        "stays": [("qubes_vm.present", "app", {"template": "fedora"})],
    }
    states["both"] = states["stays"] + states["moves"]
    states["disposable"] = states["moves"]
    told = foretold(*states[way], ("qubes_pool.absent", "old", PURGE))
    stays = {"stays": "VMs lie in it (debian)", "disposable": "VMs lie in it (disp)"}
    assert stays.get(way, "waits for app, debian to leave it") in told["old"]
    assert ("old" in daemon.pools) is (way in stays)


@pytest.mark.parametrize("size", [None, "20GiB"])
def test_the_volatile_volume_of_a_vm_that_does_not_move_stays(foretold, there, size):
    there[0].add_pool("old", "file-reflink", dir_path="/mnt/ssd/old")
    there[1].create_vm("app", pool="ssd", volumes={"volatile": {"pool": "old"}})
    volumes = {"private": {"pool": "ssd", "size": size}}
    told = foretold(
        ("qubes_vm.present", "app", {"label": "green", "volumes": volumes}),
        ("qubes_pool.absent", "old", {}),
    )
    assert "VMs lie in it (app)" in told["old"]


def test_a_pool_goes_with_the_vms_that_the_run_removes(foretold, daemon):
    gone = [("qubes_vm.absent", vm, PURGE) for vm in ("work", "vault", "fedora")]
    del daemon.globals.set["default_template"]
    told = foretold(*gone, ("qubes_pool.absent", "ssd", {}))
    assert "waits for work to leave it" in told["ssd"]


@pytest.mark.usefixtures("qubesadmin")
@pytest.mark.parametrize(
    "made",
    [
        [("new", {"template": "fedora"})],
        [("new", {"clone_from": "work"})],
        [("other", {"template": "fedora"}), ("new", {"clone_from": "other"})],
        [("new", {"clone_from": "work", "pool": "later"})],
    ],
    ids=str,
)
def test_a_template_stays_for_the_vms_that_the_run_makes_on_it(foretold, daemon, made):
    del daemon.globals.set["default_template"]
    gone = [("qubes_vm.absent", vm, PURGE) for vm in ("work", "vault")]
    later = ("qubes_pool.present", "later", {"driver": "file", "dir_path": "/mnt/later"})
    new = [("qubes_vm.present", *vm) for vm in made]
    told = foretold(later, *new, *gone, ("qubes_vm.absent", "fedora", PURGE))
    names = sorted(f"{vm}'s template" for vm, _ in made)
    assert f"is named by {', '.join(names)};" in told["fedora"]


@pytest.mark.parametrize("new", [{}, {"pool": "later"}], ids=["planned", "waiting"])
def test_the_default_template_stays_for_what_is_made_on_it_for_want_of_another(foretold, new):
    later = ("qubes_pool.present", "later", {"driver": "file", "dir_path": "/mnt/later"})
    gone = [("qubes_vm.absent", vm, PURGE) for vm in ("work", "vault")]
    new = ("qubes_vm.present", "new", new)
    told = foretold(later, new, *gone, ("qubes_vm.absent", "fedora", PURGE))
    assert "is named by new's template, the system's default_template;" in told["fedora"]


@pytest.mark.parametrize(
    ("absent", "later"),
    [
        (("qubes_pool.absent", "btrfs", {}), ("qubes_vm.present", "new", {"pool": "btrfs"})),
        (
            ("qubes_pool.absent", "btrfs", {}),
            ("qubes_pool.default", "d", {"default_pool": "btrfs"}),
        ),
        (("qubes_vm.absent", "debian", PURGE), ("qubes_vm.present", "n", {"template": "debian"})),
        (("qubes_vm.absent", "debian", PURGE), ("qubes_vm.present", "n", {"clone_from": "debian"})),
    ],
)
def test_what_went_before_is_not_there(foretold, daemon, absent, later):
    daemon.add_vm("debian", "TemplateVM")
    told = foretold(absent, later)
    assert "no pool btrfs;" in told[later[1]] or "debian is not there;" in told[later[1]]


NEW = {"driver": "file", "dir_path": "/mnt/new"}


@pytest.mark.parametrize(
    ("declared", "comment"),
    [
        (("work", {"pool": "new"}), "its private volume lies in pool ssd, not in new;"),
        (("x", {"pool": "new", "label": "pink"}), "unknown label 'pink'"),
        (("x", {"template": "t", "pool": "nowhere"}), "qubesd has no pool nowhere"),
        (("x", {"template": "t", "volumes": {"root": "20GiB"}}), "snapshot of its template's"),
        (("x", {"template": "a"}), "a is of class AppVM; AppVM runs on TemplateVM"),
        (("x", {"clone_from": "a", "klass": "StandaloneVM"}), "is of class AppVM, not Standalone"),
        (("x", {"klass": "DispVM", "template": "a"}), "a is no disposable template"),
        (
            ("x", {"pool": "new", "volumes": {"private": {"revisions_to_keep": 3}}}),
            "3 is not what driver file can keep",
        ),
        (("x", {"pool": "new"}), "VM x waits for pool new"),
        (("x", {"template": "t", "pool": "new"}), "VM x waits for template t and pool new"),
        (("work", {"pool": "new", "migrate": True}), "VM work waits for pool new"),
    ],
)
def test_what_waits_is_wrong_in_nothing_else(foretold, declared, comment):
    told = foretold(
        ("qubes_pool.present", "new", NEW),
        ("qubes_vm.present", "t", {"klass": "TemplateVM"}),
        ("qubes_vm.present", "a", {"template": "fedora"}),
        ("qubes_vm.present", *declared),
    )
    assert comment in told[declared[0]]


@pytest.mark.parametrize("given", [{"driver": "file"}, {"options": {"driver": "file"}}], ids=str)
def test_a_pool_that_waits_itself_has_its_driver(foretold, there, given):
    private = {"volumes": {"private": {"revisions_to_keep": 3}}}
    told = foretold(
        ("file.directory", f"{there[1].root}/mnt/later", {"makedirs": True}),
        ("qubes_pool.present", "new", {"dir_path": "/mnt/later/new", **given}),
        ("qubes_vm.present", "x", {"pool": "new"}),
        ("qubes_vm.present", "y", {"pool": "new", **private}),
    )
    assert told["new"] == "Pool new waits for /mnt/later"
    assert told["x"] == "VM x waits for pool new"
    assert "3 is not what driver file can keep" in told["y"]


def test_a_disposable_waits_for_a_template_that_another_state_may_put_right(run, call):
    declared = (
        ("qubes_vm.present", "a", {"template": "fedora"}),
        call("admin.vm.property.Set", "a", "template_for_dispvms", b"True"),
        ("qubes_vm.present", "x", {"klass": "DispVM", "template": "a"}),
    )
    assert run(*declared, test=True)["x"]["comment"] == "VM x waits for template a"
    assert run(*declared)["x"]["result"] is True


@pytest.mark.parametrize("number", [-1, 0])
@pytest.mark.parametrize("runs", [False, True])
def test_revisions_that_cannot_be_set_are_told(foretold, daemon, number, runs):
    daemon.vms["work"].running = runs
    keep = {"volumes": {"private": {"revisions_to_keep": number}}}
    told = foretold(
        ("qubes_pool.present", "ssd", {"revisions_to_keep": number}),
        ("qubes_vm.present", "work", keep),
        ("qubes_vm.present", "new", {"pool": "btrfs", **keep}),
    )
    old = number < 0 and daemon.release == "4.2"
    refused = [name for name, comment in told.items() if "can be set" in comment]
    assert refused == (list(told) if old else ["work"] if number < 0 and runs else [])


@pytest.mark.parametrize("path", ["mnt/new", "mnt/new/appvms"])
def test_a_file_where_a_pool_would_have_a_directory_is_told(foretold, there, path):
    place = Path(there[1].root) / path
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    told = foretold(("qubes_pool.present", "new", NEW))
    assert f"/{path} is no directory;" in told["new"]


def test_no_vm_is_called_domain_0(foretold):
    assert "Xen's name of dom0" in foretold(("qubes_vm.present", "Domain-0", {}))["Domain-0"]


def test_a_disposable_goes_before_the_vm_that_it_runs_on(r4, daemon, minion_config):
    daemon.add_vm("dvm")
    daemon.vms["dvm"].set["template_for_dispvms"] = "True"
    daemon.add_vm("disp", "DispVM", template="dvm")
    shutil.copy(TREE / "qubes_storage.sls", minion_config["file_roots"]["base"][0])
    gone = {vm: {"absent": True, "purge": True} for vm in ("fedora", "dvm", "disp", "work")}
    gone["vault"] = gone["work"]
    del daemon.globals.set["default_template"]
    for test in (True, False):
        ret = r4[2].state.sls("qubes_storage", pillar={"qubes_storage": {"vms": gone}}, test=test)
        assert {state.result for state in ret} == {None if test else True}
    assert list(daemon.vms) == ["dom0"]
