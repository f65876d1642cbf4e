# ruff: noqa: F401, F811
"""R4: what is left of a move that was killed is in nobody's way, and nobody is in its way."""

import importlib
import os

import pytest
from qubes_storage import StoragePoolException, cli
from qubes_storage.admin.journal import Journal

from tests.functional.test_foretold_r4 import (
    daemon,
    foretold,
    r4,
    run,
    there,
)
from tests.r4.machine import forget
from tests.unit.conftest import qubesadmin

DATA = "the work of years"
ALIKE = ("customer-acme-corporation-web", "customer-acme-corporation-data")  # 25 characters


def cut(system, patch, vm="work", **declared):
    """A move that is killed where ``patch(system)`` says."""
    child = os.fork()
    if not child:
        try:
            patch(system)
            system.set_vm(vm, **(declared or {"pool": "btrfs"}), migrate=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    system.refresh()


def at(step):
    """Killed as a step begins: the journal names it."""
    return lambda system: setattr(system, f"_{step}", lambda *_: os._exit(9))


def before(step):
    """Killed before the journal names a step: the one before it is done."""

    def patch(_):
        write = Journal.write

        def dying(self, name, journal):
            if journal.get("step") == step:
                os._exit(9)
            write(self, name, journal)

        Journal.write = dying

    return patch


def hollow(vm):
    """Killed before a VM that is there again gets its data back."""

    def patch(system):
        copy = system._copy_volumes
        system._copy_volumes = lambda a, b, j: os._exit(9) if b == vm else copy(a, b, j)

    return patch


def holders(there, data):
    """The VMs that have some data."""
    vms = there[0].vms.items()
    return [n for n, vm in vms if vm.volumes and vm.volumes["private"].data == data]


@pytest.fixture
def command(there, capsys):
    """``command(*words)``: its exit code, and what it prints."""

    def call(*words):
        capsys.readouterr()
        system = there[1]
        code = cli.main(["--root", system.root, "--socket", system.client.path, *words])
        return code, capsys.readouterr().out

    return call


@pytest.mark.parametrize("first", [at("copy"), before("finish")], ids=["copy", "clean"])
def test_a_move_does_not_take_the_only_copy_of_another(there, first):
    daemon, system = there
    for name in ALIKE:
        daemon.add_vm(name, pool="ssd")
        daemon.vms[name].volumes["private"].data = name
    forget(*there)
    cut(system, first, ALIKE[0])
    cut(system, at("recreate"), ALIKE[1])
    for name in ALIKE:
        system.migrate_vm(name, "btrfs")
        assert [len(holders(there, each)) for each in ALIKE] == [1, 1]
    assert [holders(there, name) for name in ALIKE] == [[name] for name in ALIKE]


@pytest.mark.usefixtures("qubesadmin")
@pytest.mark.parametrize(
    ("vm", "pool", "call"),
    [
        ("work", "btrfs", lambda system: system.clone_vm("work", "backup")),
        ("fedora", "ssd", lambda system: system.create_vm("new", template="fedora")),
    ],
    ids=["clone", "template"],
)
def test_a_vm_that_is_half_moved_is_no_source(there, vm, pool, call):
    cut(there[1], hollow(vm), vm, pool=pool)
    with pytest.raises(StoragePoolException, match=f"{vm}: its move to pool {pool} was cut off"):
        call(there[1])


def test_the_only_copy_of_a_vm_that_moves_is_not_removed(there, command):
    cut(there[1], at("recreate"))
    assert holders(there, DATA) == ["work-mv1"]
    with pytest.raises(StoragePoolException, match="only whole copy of work, whose move was cut"):
        there[1].remove_vm("work-mv1", purge=True)
    assert holders(there, DATA) == ["work-mv1"]
    code, out = command("verify")
    assert code == 1
    assert "VM work-mv1: may be the only whole copy of work" in out


@pytest.mark.usefixtures("qubesadmin")
def test_a_vm_that_was_brought_back_by_hand_is_not_removed(there):
    daemon, system = there
    cut(system, at("recreate"))
    importlib.import_module("qubesadmin.config").QUBESD_SOCKET = system.client.path
    importlib.import_module("qubesadmin").Qubes().clone_vm("work-mv1", "work")  # as qvm-clone
    daemon.vms["work"].features.pop("prohibit-start", None)
    daemon.vms["work"].volumes["private"].data = "of today"
    forget(*there)
    with pytest.raises(StoragePoolException, match="work: is not of this move"):
        system.migrate_vm("work", "btrfs")
    assert holders(there, "of today") == ["work"]


PARTS = [
    ("sa", {"pool": "ssd", "volumes": {"root": {"pool": "btrfs"}}}),
    ("work", {"pool": "ssd", "volumes": {"volatile": {"pool": "btrfs"}}}),
]


@pytest.mark.parametrize(("vm", "declared"), PARTS, ids=["root", "volatile"])
@pytest.mark.parametrize("step", ["copy", "recreate"])
def test_a_move_of_one_volume_is_finished_by_the_same_state(run, there, vm, declared, step):
    there[0].add_vm("sa", "StandaloneVM", pool="ssd")
    cut(there[1], at(step), vm, **declared)
    ret = run(("qubes_vm.present", vm, {**declared, "migrate": True}))[vm]
    assert ret["result"] is True, ret["comment"]


@pytest.mark.parametrize(("vm", "declared"), PARTS, ids=["root", "volatile"])
def test_the_cure_that_is_told_moves_nothing_else(there, vm, declared):
    there[0].add_vm("sa", "StandaloneVM", pool="ssd")
    cut(there[1], at("recreate"), vm, **declared)
    there[1].migrate_vm(vm, "btrfs")
    pools = {name: volume.pool.name for name, volume in there[0].vms[vm].volumes.items()}
    assert pools["private"] == "ssd"
    assert pools[next(iter(declared["volumes"]))] == "btrfs"


def test_another_vm_of_that_name_is_not_touched(there):
    daemon, system = there
    cut(system, at("copy"))
    del daemon.vms["work"]
    daemon.add_vm("work", pool="ssd")
    forget(*there)
    with pytest.raises(StoragePoolException, match="someone else made another one"):
        system.migrate_vm("work", "btrfs")
    assert "prohibit-start" not in daemon.vms["work"].features
    assert "work-mv1" not in daemon.vms


@pytest.mark.parametrize(("step", "copies"), [("copy", []), ("switch", ["work-mv1"])])
def test_a_whole_copy_is_promised_only_where_there_is_one(there, step, copies):
    cut(there[1], at(step))
    del there[0].vms["work"]
    forget(*there)
    assert holders(there, DATA) == copies
    if copies:
        there[1].migrate_vm("work", "btrfs")
        assert holders(there, DATA) == ["work"]
    else:
        with pytest.raises(StoragePoolException, match="work: was removed before it was copied"):
            there[1].migrate_vm("work", "btrfs")


def test_a_vm_on_a_template_whose_move_is_finished_before_is_waited_for(foretold, there):
    cut(there[1], at("recreate"), "fedora")
    told = foretold(
        ("qubes_vm.present", "fedora", {"pool": "btrfs", "migrate": True}),
        ("qubes_vm.present", "new", {"template": "fedora"}),
    )
    assert told["new"] == "VM new waits for template fedora"


OTHERS = {"label": "blue"}, {"pool": "ssd"}, {"klass": "StandaloneVM"}


@pytest.mark.parametrize("differs", OTHERS, ids=lambda differs: next(iter(differs)))
@pytest.mark.parametrize(
    ("step", "name"), [("copy", "work-mv1"), ("recreate", "work")], ids=["temporary", "original"]
)
def test_a_new_vm_of_another_in_the_place_of_one_of_the_move_stays(there, run, step, name, differs):
    daemon, system = there
    cut(system, at(step))
    daemon.add_vm(name, **{"pool": "btrfs", "label": "red", **differs})
    theirs = daemon.vms[name]
    forget(*there)
    declared = ("qubes_vm.present", "work", {"pool": "btrfs", "migrate": True})
    for test in (True, False):
        ret = run(declared, test=test)["work"]
        assert (ret["result"], ret["changes"]) == (False, {})
        assert f"{name}: is not of this move; rename or remove it" in ret["comment"]
    assert daemon.vms[name] is theirs
    del daemon.vms[name]
    forget(*there)
    assert run(declared)["work"]["result"] is True
    assert holders(there, DATA) == ["work"]


@pytest.mark.parametrize("known", [True, False], ids=["refused", "killed"])
@pytest.mark.parametrize("step", ["copy", "recreate", "finish"])
def test_a_vm_that_was_made_in_part_is_finished_after_its_move_was_cut_off(there, step, known):
    daemon, system = there
    once = {"create_only": True, "pool": "ssd", "volumes": {"private": "20GiB"}}
    if known:
        full = b"2\0StoragePoolException\0\0full\0"
        daemon.before = lambda call: full if call.method == "admin.vm.volume.Resize" else None
        with pytest.raises(StoragePoolException, match="full"):
            system.create_vm("new", **once)
        daemon.before = None
    elif os.fork() == 0:
        system.vm_properties = lambda *_: os._exit(9)
        system.create_vm("new", **once)
    else:
        os.wait()
    forget(*there)
    cut(system, at(step), "new", pool="btrfs")
    told = system.vm_diff("new", pool="btrfs", migrate=True)
    assert told["volumes"]["new"] == {"private": 20 << 30}
    system.migrate_vm("new", "btrfs")
    assert system.set_vm("new", **once)["volumes"]["new"] == {"private": 20 << 30}
    assert daemon.vms["new"].volumes["private"].size == 20 << 30
    assert system.vm_diff("new", **once) == {}


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ({"label": "blue"}, {"label"}),
        ({"label": "pink"}, None),
        ({"klass": "StandaloneVM"}, None),
        ({"template": "debian"}, {"template"}),
        ({"volumes": {"private": "9GiB"}}, {"volumes"}),
        ({"volumes": {"private": {"revisions_to_keep": 4}}}, {"revisions_to_keep"}),
        ({"volumes": {"private": "1GiB"}}, set()),
        ({"volumes": {"root": "30GiB"}}, None),
        ({"volumes": {"private": {"revisions_to_keep": -5}}}, None),
        ({"volumes": {"volatile": {"pool": "varlibqubes"}}}, {"pool"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", ["copy", "recreate", "finish"])
def test_all_that_a_run_does_after_it_finished_a_move_is_foretold(run, there, step, more, changes):
    there[0].add_vm("debian", "TemplateVM")
    cut(there[1], at(step))
    declared = ("qubes_vm.present", "work", {"pool": "btrfs", "migrate": True, **more})
    told, done = run(declared, test=True)["work"], run(declared)["work"]
    assert told["changes"] == done["changes"]
    assert set(done["changes"]) == (set() if changes is None else {"unfinished", *changes})
    assert (told["result"], done["result"]) == ((False, False) if changes is None else (None, True))
    assert run(declared)["work"]["changes"] == {}


@pytest.mark.parametrize("step", ["copy", "recreate", "clean"])
def test_what_is_to_move_after_a_move_that_was_cut_off_is_foretold(run, there, step):
    there[0].add_vm("sa", "StandaloneVM", pool="ssd")
    cut(there[1], at(step), "sa", volumes={"private": {"pool": "btrfs"}})
    declared = ("qubes_vm.present", "sa", {"pool": "btrfs", "migrate": True})
    told, done = run(declared, test=True)["sa"], run(declared)["sa"]
    assert told["changes"] == done["changes"]
    assert done["changes"]["pool"] == {"old": "ssd", "new": "btrfs"}
    assert run(declared)["sa"]["changes"] == {}


@pytest.mark.parametrize("step", ["copy", "recreate"])
def test_growth_that_a_pool_has_no_room_for_is_told_before_a_move_is_finished(run, there, step):
    cut(there[1], at(step))
    there[1].set_pool("btrfs", min_free="900TiB")
    more = {"volumes": {"private": "30GiB"}}
    declared = ("qubes_vm.present", "work", {"pool": "btrfs", "migrate": True, **more})
    told, done = run(declared, test=True)["work"], run(declared)["work"]
    assert told["result"] is done["result"] is False
    assert "min_free keeps 900.0 TiB" in told["comment"]


def test_a_pool_that_goes_before_the_move_to_it_is_finished_is_missed(run, there):
    cut(there[1], at("copy"))
    declared = (
        ("qubes_pool.absent", "btrfs", {}),
        ("qubes_vm.present", "work", {"pool": "btrfs", "migrate": True}),
    )
    for test in (True, False):
        ret = run(*declared, test=test)["work"]
        assert (ret["result"], ret["changes"]) == (False, {})
        assert "migrate work btrfs undoes it if work is there): qubesd has no" in ret["comment"]
    with pytest.raises(StoragePoolException, match="qubesd has no pool btrfs"):
        there[1].migrate_vm("work", "btrfs")
    assert there[1].pending_move("work") is None
    assert "prohibit-start" not in there[0].vms["work"].features
