"""What the states before one in a run will make, on R4; R3.2's runs are in tests/functional."""

import pytest
from qubes_storage import foretelling
from qubes_storage.exc import StoragePoolException, Waits

from tests.r4.machine import RELEASES, machine

POOL = {"driver": "file-reflink", "dir_path": "/mnt/ssd/new"}


@pytest.fixture(params=RELEASES)
def after(request, tmp_path):
    """``after(*states)``: a machine as they leave it; each is its name, arguments and changes."""
    with machine(request.param, tmp_path) as (daemon, _):
        settings = {
            "qubes_storage.root": daemon.root,
            "qubes_storage.backend": "admin",
            "qubes_storage.socket": f"{daemon.root}/qubesd.sock",
        }

        def connect(*states):
            lows, returns = [], {}
            for state, arguments, changes in states:
                function, name = state.split(" ")
                module, fun = function.split(".")
                low = {"state": module, "fun": fun, "name": name, "__id__": name}
                lows.append({**low, **arguments})
                tag = f"{module}_|-{name}_|-{name}_|-{fun}"
                returns[tag] = {"result": None, "changes": changes}
            return foretelling.connect_as(settings.get, (lows, returns))

        connect.daemon = daemon
        yield connect


def made(**options):
    return {key: {"old": None, "new": value} for key, value in options.items()}


def test_a_place_that_a_pool_of_the_run_takes_is_taken(after):
    there = after(("qubes_pool.present new", POOL, made(created="new", **POOL)))
    with pytest.raises(StoragePoolException, match="is the directory of pool new too") as caught:
        there.pool_diff("other", **POOL)
    assert not isinstance(caught.value, Waits)
    lvm = {"volume_group": "dom0", "thin_pool": "fast"}
    there = after(("qubes_pool.present new", {"options": {"driver": "lvm_thin", **lvm}}, {}))
    with pytest.raises(StoragePoolException, match="dom0/fast is that of pool new too"):
        there.pool_diff("other", driver="lvm_thin", **lvm)


def test_what_needs_a_pool_of_the_run_waits_for_it(after):
    there = after(("qvm-pool.present new", POOL, made(created="new", **POOL)))
    for verb, comment in (
        (lambda: there.vm_diff("app", pool="new"), "VM app waits for pool new"),
        (lambda: there.default_pools_diff(default_pool="new"), "Default pools wait for pool new"),
        (
            lambda: there.pool_diff("inner", driver="file", dir_path="/mnt/ssd/new/inner"),
            "Pool inner waits for /mnt/ssd/new",
        ),
    ):
        with pytest.raises(Waits, match=f"^{comment}$"):
            verb()


def test_a_pool_does_not_wait_for_the_default_pools(after):
    there = after(("qubes_pool.default new", {"default_pool": "ssd"}, made(default_pool="ssd")))
    assert "created" in there.pool_diff("new", **POOL)


def test_guards_that_the_run_sets_are_kept(after):
    there = after(("qubes_pool.present ssd", {"min_free": "900TiB"}, made(min_free="900TiB")))
    with pytest.raises(StoragePoolException, match="min_free keeps 900.0 TiB"):
        there.vm_diff("app", pool="ssd")


@pytest.mark.usefixtures("qubesadmin")
def test_a_clone_waits_for_what_the_run_changes_and_for_the_templates_of_the_run(after):
    there = after(
        ("qubes_vm.present work", {"label": "blue"}, made(label="blue")),
        ("qubes_vm.present t", {"klass": "TemplateVM"}, {}),
    )
    for declared, needed in (
        ({"clone_from": "work"}, "VM work"),
        ({"template": "t"}, "template t"),
        ({"clone_from": "t"}, "VM t"),
    ):
        with pytest.raises(Waits, match=f"^VM app waits for {needed}$"):
            there.vm_diff("app", **declared)


def test_what_is_made_of_a_template_that_the_run_changes_waits_and_is_refused_if_it_goes(after):
    grown = ("qubes_vm.present fedora", {}, made(volumes={"root": "30GiB"}))
    with pytest.raises(Waits, match="^VM app waits for template fedora$"):
        after(grown).vm_diff("app", template="fedora")
    labelled = ("qubes_vm.present fedora", {}, made(label="blue"))
    assert "created" in after(labelled).vm_diff("app", template="fedora")
    gone = ("qubes_vm.absent fedora", {"purge": True}, {"removed": {"old": "fedora", "new": None}})
    with pytest.raises(StoragePoolException, match="its template fedora is not there") as err:
        after(gone).vm_diff("app", template="fedora")
    assert not isinstance(err.value, Waits)


def test_a_state_on_its_own_may_wait_for_any_pool_or_vm_but_for_no_directory(after):
    there = after()
    for verb in (
        lambda: there.vm_diff("app", template="nope"),
        lambda: there.vm_diff("app", pool="nope"),
    ):
        with pytest.raises(Waits, match="VM app waits for (pool|template) nope"):
            verb()
    with pytest.raises(StoragePoolException) as caught:
        there.pool_diff("inner", driver="file", dir_path="/mnt/nope/inner")
    assert caught.value.waits_for and not isinstance(caught.value, Waits)


def test_what_goes_waits_for_those_that_leave_it(after):
    after.daemon.add_vm("debian", "TemplateVM")
    after.daemon.add_vm("app", "AppVM", template="debian")
    gone = ("qubes_vm.absent app", {"purge": True}, {"removed": {"old": "app", "new": None}})
    moved = ("qubes_vm.present app", {"template": "fedora"}, made(template="fedora"))
    left = ("qubes_vm.present work", {"pool": "btrfs", "migrate": True}, made(pool="btrfs"))
    with pytest.raises(StoragePoolException, match="is named by app's template") as caught:
        after(left).vm_remove_diff("debian", purge=True)
    assert not isinstance(caught.value, Waits)
    for state in (gone, moved):
        with pytest.raises(Waits, match="VM debian waits for app to leave it"):
            after(state).vm_remove_diff("debian", purge=True)
    with pytest.raises(StoragePoolException, match=r"VMs lie in it \(work\)") as caught:
        after(gone).pool_remove_diff("ssd")
    assert not isinstance(caught.value, Waits)
    with pytest.raises(Waits, match="Pool ssd waits for work to leave it"):
        after(left).pool_remove_diff("ssd")
