"""qubes_storage.sls: in which order what a pillar declares is made and goes, and what stays."""

import os
import re
import shutil

import pytest
import yaml
from salt.exceptions import SaltInvocationError

from tests.conftest import TREE
from tests.functional.conftest import snapshot
from tests.r4.model import DRIVERS

VMS = "var/lib/qubes/appvms"


@pytest.fixture
def apply(modules, minion_config):
    """``apply(pillar, test)``: ``{ID: what the state returns}``."""
    shutil.copy(TREE / "qubes_storage.sls", minion_config["file_roots"]["base"][0])

    def run(pillar, test=False):
        ret = modules.state.sls("qubes_storage", pillar={"qubes_storage": pillar}, test=test)
        assert not ret.errors, ret.errors
        return {state.id: state for state in ret}

    return run


@pytest.fixture
def old(states, root):
    """A pool that takes nothing, a template, and the VM ``old``; the path of its image."""
    states.qubes_pool.present("default")
    states.qubes_pool.present("full", dir_path="/opt/full", min_free="900TiB")
    states.qubes_pool.present("spare", dir_path="/opt/spare")
    states.qubes_vm.present("fedora-23", klass="TemplateVM")
    states.qubes_vm.present("old", klass="StandaloneVM", template="fedora-23")
    return root / VMS / "old/private.img"


@pytest.mark.parametrize(
    "new",
    [
        {"clone_from": "old"},
        {"klass": "StandaloneVM", "template": "old"},
        {"klass": "StandaloneVM", "root_copy_from": f"{VMS}/old/root.img"},
        {"clone_from": "old", "lable": "red"},
    ],
    ids=lambda new: next(iter(set(new) & {"root_copy_from", "lable"}), None),
)
def test_a_vm_stays_while_what_is_made_of_it_is_not_there(apply, root, old, new):
    new = {key: f"{root}/{value}" if "/" in value else value for key, value in new.items()}
    pillar = {"vms": {"new": {**new, "pool": "full"}, "old": {"absent": True, "purge": True}}}
    run = apply(pillar)
    assert run["VM new"].result is run["VM old"].result is False
    assert "requisite" in run["VM old"].comment
    assert old.exists()
    new.pop("lable", None)
    pillar["vms"]["new"] = {**new, "pool": "spare"}
    before = snapshot(root)
    assert {state.result for state in apply(pillar, test=True).values()} == {None}
    assert snapshot(root) == before
    assert {state.result for state in apply(pillar).values()} == {True}
    assert (root / "opt/spare/appvms/new/root.img").exists()
    assert not old.parent.exists()
    again = apply(pillar)
    assert [(state.result, state.changes) for state in again.values()] == [(True, {})] * 2


def test_nothing_is_removed_while_the_pillar_is_wrong(apply, root, old):
    before = snapshot(root)
    run = apply({"vms": {"new": "clone_from: old", "old": {"absent": True, "purge": True}}})
    assert {state.result for state in run.values()} == {False}
    assert run["VM old"].comment == "VM old stays while the pillar is wrong"
    assert snapshot(root) == before


def test_a_vm_on_a_template_that_is_to_be_absent_is_a_clear_failure(apply, root, old):
    pillar = {
        "vms": {
            "app": {"template": "fedora-23"},
            "fedora-23": {"absent": True, "purge": True},
        }
    }
    run = apply(pillar)
    assert run["VM app"].result is True
    assert run["VM fedora-23"].result is False
    assert "app" in run["VM fedora-23"].comment
    assert (root / "var/lib/qubes/vm-templates/fedora-23/root.img").exists()


def test_a_template_goes_after_its_vms_have_another(apply, states, old):
    states.qubes_vm.present("debian", klass="TemplateVM")
    states.qubes_vm.present("app", template="debian")
    pillar = {
        "vms": {"debian": {"absent": True, "purge": True}, "app": {"template": "fedora-23"}},
    }
    assert [(i, state.result) for i, state in apply(pillar).items()] == [
        ("VM app", True), ("VM debian", True)
    ]  # fmt: skip


def test_a_pool_goes_after_its_vms_have_gone_or_left(apply, root, states, old):
    states.qubes_vm.present("app", pool="spare")
    states.qubes_vm.present("away", pool="spare")
    pillar = {
        "pools": {"spare": {"absent": True, "purge": True}},
        "vms": {
            "app": {"pool": "full", "migrate": True},
            "away": {"absent": True, "purge": True},
        },
    }
    run = apply(pillar)
    assert {i: state.result for i, state in run.items()} == {
        "VM app": False, "VM away": True, "pool spare": False
    }  # fmt: skip
    pillar["vms"]["app"]["pool"] = "default"
    run = apply(pillar)
    assert {state.result for state in run.values()} == {True}
    assert list(run)[-1] == "pool spare"
    assert not (root / "opt/spare").exists()


def test_a_vm_in_a_pool_that_is_to_be_absent_is_a_clear_failure(apply, root, old):
    pillar = {"pools": {"spare": {"absent": True}}, "vms": {"app": {"pool": "spare"}}}
    run = apply(pillar)
    assert run["VM app"].result is True
    assert run["pool spare"].result is False
    assert "VMs lie in it (app)" in run["pool spare"].comment


@pytest.mark.parametrize("absent", [False, None])
def test_absent_can_be_switched_off(apply, root, old, absent):
    off = {"absent": absent, "purge": True}
    pillar = {
        "pools": {"ssd": {"dir_path": "/opt/ssd", **off}},
        "vms": {"app": {"pool": "ssd", **off}},
    }
    assert {state.result for state in apply(pillar, test=True).values()} == {None}
    assert {state.result for state in apply(pillar).values()} == {True}
    assert os.listdir(root / "opt/ssd/appvms") == ["app"]
    assert not any(state.changes for state in apply(pillar).values())


def test_what_is_misspelt_beside_absent_is_told_and_nothing_goes(apply, root, old):
    before = snapshot(root)
    run = apply({"vms": {"old": {"absent": True, "puge": True}}})
    assert run["VM old"].result is False
    assert "takes no puge" in run["VM old"].comment
    assert snapshot(root) == before
    run = apply({"pools": {"spare": {"absent": True, "driver": "xen", "prge": True}}})
    assert run["pool spare"].result is False
    assert run["pool spare"].comment == "pool spare that is absent takes no prge"
    assert snapshot(root) == before


def test_what_is_declared_of_a_pool_may_stay_beside_absent(apply, root, old):
    gone = {"absent": True, "purge": True}
    pools = {
        "spare": {"dir_path": "/opt/spare", "Driver": "xen", "min_free": None, **gone},
        "never": {"driver": "mine", "stripes": 4, **gone},
        "nowhere": {"class": "some.where.Pool", "stripes": 4, **gone},
    }
    assert {state.result for state in apply({"pools": pools}).values()} == {True}
    assert not (root / "opt/spare").exists()


def test_the_options_of_each_driver_may_stay_beside_absent(modules):
    sls = (TREE / "qubes_storage.sls").read_text()
    ours = modules.qubes_pool.drivers()
    for driver, options in [*DRIVERS.items(), *((name, ours[name]["options"]) for name in ours)]:
        assert not [word for word in (driver, *options) if f'"{word}"' not in sls]


def test_a_registry_that_cannot_be_read_is_an_error_of_each_vm_alone(apply, root, old):
    (root / "var/lib/qubes/qubes.xml").write_text("<torn")
    run = apply({"pools": {"new": {"dir_path": "/opt/new"}}, "vms": {"old": {"absent": True}}})
    assert run["VM old"].result is False
    assert "qubes.xml" in run["VM old"].comment
    assert old.exists()


def test_a_vm_requires_the_pools_of_its_volumes(apply):
    pillar = {
        "vms": {"work": {"volumes": {"private": {"pool": "fast"}, "root": "12GiB"}}},
        "pools": {"fast": {"dir_path": "/opt/fast", "min_free": "no size"}},
    }
    run = apply(pillar)
    assert run["pool fast"].result is False
    assert "requisite" in run["VM work"].comment


def test_pools_that_lie_in_others_are_made_after_them(apply, root):
    pools = {
        "innermost": {"dir_path": "/opt/a/inner/most"},
        "inner": {"dir_path": "/opt/a/inner"},
        "default": {},
        "a": {"dir_path": "/opt/a/"},
        "ab": {"dir_path": "/opt/ab"},
    }
    assert {state.result for state in apply({"pools": pools}, test=True).values()} == {None}
    assert {state.result for state in apply({"pools": pools}).values()} == {True}
    assert (root / "opt/a/inner/most/appvms").is_dir()
    assert not any(state.changes for state in apply({"pools": pools}).values())


@pytest.mark.parametrize("path", ["/", 7, None])
def test_pools_of_a_strange_place_require_nothing(apply, root, path):
    run = apply({"pools": {"a": {"dir_path": path}, "b": {"dir_path": path}}})
    assert [state.result for state in run.values()] == [False, False]
    assert "requisite" not in run["pool b"].comment


def test_a_netvm_goes_after_its_vms_and_before_its_template(apply, root, states, old):
    states.qubes_vm.present("net", klass="NetVM", template="fedora-23")
    states.qubes_vm.present("app", template="fedora-23")
    registry = root / "var/lib/qubes/qubes.xml"
    text = registry.read_text().replace('uses_default_netvm="True"', 'uses_default_netvm="False"')
    number = re.search(r'name="net".*? qid="(\d+)"', text)[1]
    text = text.replace('name="app" netvm_qid="none"', f'name="app" netvm_qid="{number}"')
    registry.write_text(text)
    gone = {vm: {"absent": True, "purge": True} for vm in ("fedora-23", "net", "app")}
    told = apply({"vms": gone}, test=True)
    assert [(i, state.result) for i, state in told.items()] == [
        ("VM app", None), ("VM net", None), ("VM fedora-23", None)
    ]  # fmt: skip
    assert {state.result for state in apply({"vms": gone}).values()} == {True}


@pytest.mark.parametrize("names", [("front", "back", "fedora-23"), ("fedora-23", "back", "front")])
def test_of_two_proxies_the_one_behind_goes_first(apply, root, states, old, names):
    for vm in ("front", "back"):
        states.qubes_vm.present(vm, klass="ProxyVM", template="fedora-23")
    registry = root / "var/lib/qubes/qubes.xml"
    text = registry.read_text().replace('uses_default_netvm="True"', 'uses_default_netvm="False"')
    number = re.search(r'name="front".*? qid="(\d+)"', text)[1]
    text = text.replace('name="back" netvm_qid="none"', f'name="back" netvm_qid="{number}"')
    assert f'netvm_qid="{number}"' in text
    registry.write_text(text)
    pillar = {"vms": {vm: {"absent": True, "purge": True} for vm in names}}
    for test in (True, False):
        assert {state.result for state in apply(pillar, test=test).values()} == {
            None if test else True
        }


@pytest.mark.parametrize("names", ["work", ["work", 5], None, {"work": 1}])
def test_what_is_no_list_of_names_has_no_order(modules, names):
    with pytest.raises(SaltInvocationError, match="is no list of names of VMs"):
        modules.qubes_vm.removal_order(names)


def test_what_cannot_be_read_leaves_names_as_they_are_given(modules, root):
    (root / "var/lib/qubes/qubes.xml").write_text("<broken")
    assert modules.qubes_vm.removal_order(["b", "a"]) == ["b", "a"]


@pytest.mark.parametrize("pillar", [{}, None, {"pools": None, "vms": {}}])
def test_a_minion_of_which_nothing_is_declared_does_not_fail(apply, root, pillar):
    run = apply(pillar)
    assert list(run) == ["nothing is declared in pillar qubes_storage"]
    assert [(state.result, state.changes) for state in run.values()] == [(True, {})]


def test_what_is_misspelt_is_told_in_test_mode_too(apply, root):
    run = apply({"vms": {"work": {"tempalte": "x"}, "old": {"absent": True, "puge": 1}}}, test=True)
    assert {state.result for state in run.values()} == {False}
    assert "takes no tempalte" in run["VM work"].name
    assert "takes no puge" in run["VM old"].name


@pytest.mark.parametrize(
    ("text", "ident", "comment"),
    [
        ("[a]", "", "not a map of pools and vms"),
        ("{pool: {}}", "", "it takes pools, vms and default_pools"),
        ("{pools: foo}", "", "not a map by name"),
        ("{vms: {work: red}}", "", "not a map of options"),
        ("{vms: {work: {lable: red}}}", "VM work", "takes no lable"),
        ("{vms: {1: {}}}", "VM 1", "not a name for a VM"),
        ("[{a: {b: c}}]", "", "is [{a: {b: c}}], not a map of pools and vms; leave out the dashes"),
        ("{vms: {work: [{label: red}]}}", "", "is [{label: red}], not a map of options; leave"),
        ("{vms: [{work: {}}]}", "", "is [{work: {}}], not a map by name; leave out the dashes"),
        ("{vms: {work: {volumes: 10GiB}}}", "VM work", "are no map"),
        ("{vms: {work: {volumes: [{private: 3GiB}]}}}", "VM work", "[{private: 3GiB}], no list; "),
        ("{vms: {work: {volumes: {private: [size: 3GiB]}}}}", "VM work", "private is [{size: 3G"),
        ("{pools: {ssd: {options: {a: b}}}}", "pool ssd", "options is {a: b}, no text or number; "),
        ("{pools: {ssd: {dir_path: [/a]}}}", "pool ssd", "a line of the pool; leave out the dash"),
        ("{vms: {work: {template: 5}}}", "VM work", "put it in quotes"),
        ("{vms: {work: {absent: 'true'}}}", "", ":absent is 'true', neither true nor false; write"),
        ("{vms: {work: {create_only: 'yes'}}}", "", "create_only is 'yes', neither true nor"),
        ("{pools: {ssd: {absent: true, purge: 'no'}}}", "", "without quotes"),
        ("{vms: {work: {migrate: [1]}}}", "", "migrate is [1], neither true nor false"),
    ],
)
def test_a_pillar_of_the_wrong_shape_is_a_state_that_says_so(apply, root, text, ident, comment):
    before = snapshot(root)
    for test in (False, True):
        run = apply(yaml.safe_load(text), test=test)
        (wrong,) = [state for name, state in run.items() if name.startswith(ident)]
        assert wrong.result is False
        assert comment in f"{wrong.name}: {wrong.comment}"
        assert "Traceback" not in wrong.comment
    assert snapshot(root) == before
