# ruff: noqa: F401, F811
"""R4: what states, functions and commands tell is what there is."""

import fcntl
import os
import shutil

import pytest
from qubes_storage import StoragePoolException, guards

from tests.conftest import TREE
from tests.functional.test_foretold_r4 import call, daemon, r4, run, there
from tests.functional.test_r4_cut_off import command
from tests.r4.machine import forget
from tests.unit.conftest import qubesadmin

GIB = 1024**3


@pytest.fixture
def apply(r4, there, minion_config):
    """``apply(pillar, test)``: ``{ID: what the state returns}``."""
    shutil.copy(TREE / "qubes_storage.sls", minion_config["file_roots"]["base"][0])

    def sls(pillar, test=False):
        ret = r4[2].state.sls("qubes_storage", pillar={"qubes_storage": pillar}, test=test)
        assert not ret.errors, ret.errors
        return {state.id: state for state in ret}

    return sls


def refuse(daemon, method, arg):
    """Have the daemon refuse a call."""
    answer = b"2\0StoragePoolException\0\0full\0"
    daemon.before = lambda call: answer if (call.method, call.arg) == (method, arg) else None


def test_a_vm_that_was_made_in_part_is_told_as_that(daemon, run):
    refuse(daemon, "admin.vm.volume.Resize", "root")
    sizes = {"private": "20GiB", "root": "30GiB"}
    ret = run(("qubes_vm.present", "new", {"klass": "StandaloneVM", "volumes": sizes}))["new"]
    assert "Traceback" not in ret["comment"]
    assert ret["changes"]["volumes"] == {"old": None, "new": {"private": 20 * GIB}}


ONCE = {"create_only": True, "volumes": {"private": "20GiB"}}


def test_changes_of_create_only_are_those_that_were_made(daemon, run):
    refuse(daemon, "admin.vm.volume.Resize", "private")
    ret = run(("qubes_vm.present", "new", ONCE))["new"]
    assert ret["result"] is False
    assert "created" in ret["changes"] and "volumes" not in ret["changes"]


def test_a_vm_that_create_only_made_in_part_is_finished_by_the_next_run(there, run, command):
    daemon, system = there
    refuse(daemon, "admin.vm.volume.Resize", "private")
    assert run(("qubes_vm.present", "new", ONCE))["new"]["result"] is False
    assert "VM new: is not all that it was declared" in command("verify")[1]
    daemon.before = None
    forget(*there)
    told = run(("qubes_vm.present", "new", ONCE), test=True)["new"]
    assert told["result"] is None and "volumes" in told["changes"]
    done = run(("qubes_vm.present", "new", ONCE))["new"]
    assert (done["result"], done["changes"]) == (True, told["changes"])
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    system.set_vm("new", label="green")  # from now on it is left alone
    assert run(("qubes_vm.present", "new", {**ONCE, "label": "red"}))["new"]["changes"] == {}


@pytest.mark.parametrize("answered", [False, True])
def test_a_vm_that_a_killed_create_only_made_is_finished(there, run, answered):
    daemon, system = there
    if os.fork() == 0:
        name = "set_vm" if answered else "vm_properties"  # the first that is asked afterwards
        setattr(system, name, lambda *_, **__: os._exit(9))
        system.create_vm("new", **ONCE, klass="StandaloneVM")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    assert daemon.vms["new"].volumes["private"].size == 2 * GIB
    forget(*there)
    assert run(("qubes_vm.present", "new", ONCE))["new"]["result"] is True
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    assert run(("qubes_vm.present", "new", {**ONCE, "label": "green"}))["new"]["changes"] == {}


@pytest.mark.parametrize("lost", ["admin.vm.Create.AppVM", "admin.vm.List"])
def test_a_vm_whose_creation_was_not_answered_is_finished(there, run, lost):
    daemon, system = there

    def torn(call, answer):
        return b"0" if "new" in daemon.vms and call.method == lost else answer

    daemon.after = torn
    assert run(("qubes_vm.present", "new", ONCE))["new"]["result"] is False
    daemon.after = None
    forget(*there)
    assert run(("qubes_vm.present", "new", ONCE))["new"]["result"] is True
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    assert system.verify_vm("new") == []


@pytest.mark.parametrize("verb", ["resize", "migrate", "set"])
def test_whatever_else_changes_such_a_vm_finishes_it(there, run, command, verb):
    daemon, system = there
    refuse(daemon, "admin.vm.volume.Resize", "private")
    run(("qubes_vm.present", "new", ONCE))
    daemon.before = None
    forget(*there)
    if verb == "set":
        changes = system.set_vm("new", label="green")
        assert changes["volumes"]["new"] == {"private": 20 * GIB}
    else:
        words = {"resize": ["volatile", "11GiB"], "migrate": ["varlibqubes"]}[verb]
        assert command(verb, "new", *words)[0] == 0
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    assert system.vm_diff("new", **ONCE) == {}


@pytest.mark.parametrize(
    "verb",
    [
        ("set_vm", {"create_only": True, "volumes": {"private": "20GiB"}}),
        ("set_vm", {"volumes": {"private": "20GiB"}, "label": "green"}),
        ("resize_vm", {"volume": "private", "size": "20GiB"}),
    ],
    ids=["create_only", "set", "resize"],
)
def test_a_size_that_could_not_be_given_is_corrected_by_what_is_declared_now(there, run, verb):
    daemon, system = there
    once = {"create_only": True, "volumes": {"private": "2TiB"}}
    journal = "/var/lib/qubes/storage-creations/new.json"
    full = b"2\0StoragePoolException\0\0full\0"
    daemon.before = lambda call: full if call.payload == b"%d" % (2048 * GIB) else None
    for declared in (once, once, {"label": "red"}):
        ret = run(("qubes_vm.present", "new", declared))["new"]
        assert (ret["result"], journal in ret["comment"]) == (False, True), ret["comment"]
        assert "or remove that file to leave it as it is" in ret["comment"]
    forget(*there)
    if verb[0] == "set_vm":
        told = system.vm_diff("new", **verb[1])
        assert told["volumes"]["new"] == {"private": 20 * GIB}
        assert system.set_vm("new", **verb[1]) == told
    else:
        system.resize_vm("new", **verb[1])
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    assert system.vm_diff("new", **once) == {}


def test_a_disk_that_is_too_full_for_the_rest_of_a_creation_names_the_journal(there, run):
    daemon, system = there
    refuse(daemon, "admin.vm.volume.Resize", "private")
    run(("qubes_vm.present", "new", {**ONCE, "pool": "ssd"}))
    system.set_pool("ssd", min_free="900TiB")
    forget(*there)
    with pytest.raises(StoragePoolException, match="min_free .*storage-creations/new.json has"):
        system.vm_diff("new", **ONCE)


def test_what_such_a_vm_got_at_once_and_somebody_changed_since_stays(there, run):
    daemon = there[0]
    daemon.add_vm("debian", "TemplateVM")
    refuse(daemon, "admin.vm.volume.Resize", "private")
    once = {**ONCE, "label": "red", "template": "fedora"}
    run(("qubes_vm.present", "new", once))
    daemon.before = None
    daemon.vms["new"].set.update(label="blue", template="debian")
    forget(*there)
    assert set(run(("qubes_vm.present", "new", once))["new"]["changes"]) == {
        "unfinished",
        "volumes",
    }
    assert daemon.vms["new"].set["label"] == "blue"
    assert daemon.vms["new"].set["template"] == "debian"


def test_revisions_that_a_creation_was_to_give_are_given_with_what_else_is_asked_for(there, run):
    daemon, system = there
    refuse(daemon, "admin.vm.volume.Set.revisions_to_keep", "private")
    once = {"create_only": True, "pool": "ssd", "volumes": {"private": {"revisions_to_keep": 3}}}
    run(("qubes_vm.present", "new", once))
    daemon.before = None
    forget(*there)
    system.set_vm("new", volumes={"private": "5GiB"})
    private = system.volume("new", "private")
    assert (private.size, private.revisions_to_keep) == (5 * GIB, "3")


@pytest.mark.usefixtures("qubesadmin")
@pytest.mark.parametrize("step", ["release", "finish_copy", "set_vm"])
def test_a_clone_that_a_killed_create_only_made_is_finished(there, step):
    daemon, system = there
    declared = {**ONCE, "clone_from": "work", "label": "green"}
    if os.fork() == 0:
        setattr(system, step, lambda *_, **__: os._exit(9))
        system.create_vm("new", **declared)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    forget(*there)
    told = system.vm_diff("new", **declared)
    assert {"label", "volumes"} <= {*told}
    assert system.set_vm("new", **declared) == told
    assert daemon.vms["new"].set["label"] == "green"
    assert daemon.vms["new"].volumes["private"].size == 20 * GIB
    assert system.vm_diff("new", **declared) == {}


USED = {"label": "blue"}, {"template": "debian"}, {"pool": "btrfs"}, {"data": "mine"}, {"on": True}


@pytest.mark.parametrize("differs", USED, ids=lambda differs: next(iter(differs)))
def test_a_vm_that_was_made_by_hand_after_a_kill_is_left_alone(there, run, differs):
    daemon, system = there
    daemon.add_vm("debian", "TemplateVM")
    declared = {**ONCE, "template": "fedora", "label": "red", "pool": "ssd"}
    if os.fork() == 0:
        system.make_vm = lambda *_: os._exit(9)
        system.create_vm("new", **declared)
    os.wait()
    like = {"template": "fedora", "label": "red", "pool": "ssd", **differs}
    data, on = like.pop("data", b""), like.pop("on", False)
    daemon.add_vm("new", **like)
    daemon.vms["new"].volumes["private"].data = data
    daemon.vms["new"].running = on
    forget(*there)
    assert system.vm_diff("new", **declared) == {}
    assert run(("qubes_vm.present", "new", declared))["new"]["changes"] == {}
    assert system.verify_vm("new") == []


def test_a_kill_while_a_journal_is_written_leaves_no_file(there):
    system = there[1]
    if os.fork() == 0:
        rename, made = os.rename, []

        def dying(*args, **kwargs):
            made.append(args)
            if len(made) == 2:
                os._exit(9)
            return rename(*args, **kwargs)

        os.rename = dying
        system.create_vm("new", **ONCE)
    os.wait()
    forget(*there)
    system.set_vm("new", **ONCE)
    assert system.vm_info("new")["volumes"]["private"]["size"] == 20 * GIB
    assert os.listdir(system.path("/var/lib/qubes/storage-creations")) == []


def test_a_vm_of_that_name_that_somebody_else_made_is_left_alone(there, run):
    daemon, system = there
    refuse(daemon, "admin.vm.volume.Resize", "private")
    run(("qubes_vm.present", "new", ONCE))
    del daemon.vms["new"]
    daemon.add_vm("new")
    daemon.before = None
    forget(*there)
    assert run(("qubes_vm.present", "new", ONCE))["new"]["changes"] == {}
    assert system.verify_vm("new") == []
    assert run(("qubes_vm.absent", "new", {"purge": True}))["new"]["result"] is True
    assert run(("qubes_vm.absent", "new", {"purge": True}))["new"]["changes"] == {}


def test_the_journal_of_a_vm_that_was_never_made_changes_no_other_one(there):
    daemon, system = there
    if os.fork() == 0:
        system.make_vm = lambda *_: os._exit(9)
        system.create_vm("new", **ONCE)
    os.wait()
    assert os.listdir(system.path("/var/lib/qubes/storage-creations")) == ["new.json"]
    forget(*there)
    changes = system.create_vm("new", volumes={"private": "5GiB"})
    assert changes["volumes"]["new"] == {"private": 5 * GIB}
    assert daemon.vms["new"].volumes["private"].size == 5 * GIB
    assert os.listdir(system.path("/var/lib/qubes/storage-creations")) == []


def test_a_creation_that_failed_leaves_nothing(there, run):
    refuse(there[0], "admin.vm.Create.AppVM", "fedora")
    assert run(("qubes_vm.present", "new", ONCE))["new"]["result"] is False
    there[0].before = None
    forget(*there)
    assert there[1].vm_remove_diff("new") == {}


def test_revisions_that_were_set_are_told(daemon, run):
    daemon.add_vm("sa", "StandaloneVM", pool="ssd")
    refuse(daemon, "admin.vm.volume.Set.revisions_to_keep", "root")
    keep = {volume: {"revisions_to_keep": 5} for volume in ("private", "root")}
    ret = run(("qubes_vm.present", "sa", {"volumes": keep}))["sa"]
    assert daemon.vms["sa"].volumes["private"].revisions_to_keep == "5"
    assert ret["changes"]["revisions_to_keep"]["new"] == {"private": "5"}


def test_a_default_template_that_nobody_sets_is_not_waited_for(apply, there):
    del there[0].globals.set["default_template"]
    forget(*there)
    pillar = {"vms": {"app": {}, "new": {"klass": "TemplateVM"}}}
    told, done = apply(pillar, test=True)["VM app"], apply(pillar)["VM app"]
    assert (told.result, done.result) == (False, False)
    assert told.comment == done.comment


def test_a_pool_that_is_null_is_that_of_the_default_pools(apply, daemon):
    away = {"driver": "file-reflink", "dir_path": "/mnt/away/fast"}
    defaults = {"default_pool": "fast"}
    apply({"pools": {"fast": away}, "default_pools": defaults, "vms": {"app": {"pool": None}}})
    assert "app" not in daemon.vms


def test_what_was_read_before_another_state_is_not_told_by_a_function(there, run, call):
    where = {"__sls__": "run", "__env__": "base"}
    unless = {"unless": [{"fun": "qubes_vm.info", "args": ["work"]}]}
    removes = call("admin.vm.Remove", "work")[1]
    high = {
        "one": {"qubes_vm": ["present", {"order": 1}, {"name": "work"}], **where},
        "two": {"cmd": ["run", {"order": 2}, {"name": removes}], **where},
        "three": {
            "test": ["succeed_with_changes", {"order": 3}, {"name": "gone"}, unless],
            **where,
        },
    }
    ret = {ret["name"]: ret for ret in run._state.call_high(high).values()}
    assert "work" not in there[0].vms
    assert ret["gone"]["changes"], ret["gone"]["comment"]


def test_a_disposable_is_in_no_pool_that_it_is_not_in(there, run, command):
    there[0].vms["work"].set["template_for_dispvms"] = "True"
    there[0].add_vm("disp", "DispVM", template="work")
    forget(*there)
    ret = run(("qubes_vm.present", "disp", {"pool": "nosuch"}))["disp"]
    assert (ret["result"], ret["changes"]) == (False, {})
    assert command("migrate", "disp", "btrfs") == (1, "")


def test_the_report_tells_of_a_pool_that_does_not_answer(there, command):
    away = ("admin.pool.UsageDetails", "ssd")
    there[0].after = lambda call, answer: b"" if (call.method, call.arg) == away else answer
    forget(*there)
    code, out = command("report")
    assert code == 0
    assert "btrfs" in out and "pool ssd: " in out


def test_sizes_are_whole_sectors(there):
    there[1].set_vm("work", volumes={"private": 3 * GIB + 1})
    assert there[0].vms["work"].volumes["private"].size == 3 * GIB + 512
    there[1].resize_vm("work", "private", 4 * GIB + 1)
    assert there[0].vms["work"].volumes["private"].size == 4 * GIB + 512


def test_no_pool_is_told_of_where_none_is_named(there, command):
    told = command("create", "-t", "fedora", "-l", "red", "new")
    assert told == (0, "VM new was created\n")


def test_vms_go_in_the_order_of_their_use(apply, daemon):
    daemon.add_vm("net")
    daemon.add_vm("app")
    daemon.vms["net"].set["provides_network"] = "True"
    daemon.vms["app"].set["netvm"] = "net"
    pillar = {"vms": {vm: {"absent": True, "purge": True} for vm in ("net", "app")}}
    for test in (True, False):
        assert {state.result for state in apply(pillar, test=test).values()} == {
            None if test else True
        }


@pytest.mark.parametrize("purge", [True, False])
def test_a_removal_that_fails_tells_what_it_did_and_the_next_one_the_rest(
    there, run, monkeypatch, purge
):
    daemon, system = there
    monkeypatch.setattr(guards, "PATIENCE", 0)
    system.add_pool("old", "file-reflink", dir_path="/mnt/btrfs/old", min_free="1MiB")
    state = ("qubes_pool.absent", "old", {"purge": purge})
    fd = os.open(system.path("/var/lib/qubes"), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    ret = run(state)["old"]
    os.close(fd)
    assert ret["result"] is False
    assert set(ret["changes"]) == ({"removed", "directories"} if purge else {"removed"})
    assert "old" not in daemon.pools
    told, done = run(state, test=True)["old"], run(state)["old"]
    assert (told["result"], done["result"]) == (None, True)
    assert told["changes"] == done["changes"] == {"min_free": {"old": "1MiB", "new": None}}
    assert run(state)["old"]["changes"] == {}
    assert system.guards("old") == {}
