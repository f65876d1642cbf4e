"""Markers that no run has made: they are told while looking, and nothing is done."""

import os

import pytest
from qubes_storage import StoragePoolException

from tests.r32.machine import LIB

APPVMS = f"{LIB}/appvms"


@pytest.fixture
def machine(scratch):
    machine = scratch()
    system = machine.connect()
    system.add_pool("ssd", dir_path="/mnt/ssd")
    system.create_vm("work")
    return machine


def _file(machine, path):
    machine.write(path, b"")


def _directory(machine, path):
    machine.mkdir(path)


def _instead(machine, path):
    """A file where the VM's directory is to be, had a run died while it was removed."""
    machine.path(f"{APPVMS}/work").rename(machine.path("/mnt/away"))
    machine.write(path, b"")


@pytest.mark.parametrize(
    ("put", "path", "why", "asked"),
    [
        (_file, f"{APPVMS}/.new.creating", "Not a directory", {"name": "new"}),
        (_directory, f"{APPVMS}/.work.creating", "was not made by root", {"label": "blue"}),
        (_directory, f"{APPVMS}/.work.moving", "is a directory: move it away", {"label": "blue"}),
        (_instead, f"{APPVMS}/.work.removing", "Not a directory", {"label": "blue"}),
        (_file, "/mnt/ssd/appvms/.work.creating", "Not a", {"pool": "ssd", "migrate": True}),
    ],
)
def test_a_marker_that_no_run_made_is_told_while_looking(machine, put, path, why, asked):
    put(machine, path)
    before, system = machine.tree(), machine.connect()
    asked = {"name": "work", **asked}
    for verb in (system.vm_diff, system.create_vm if asked["name"] == "new" else system.set_vm):
        with pytest.raises(StoragePoolException, match=f"cannot be mended: .*{why}"):
            verb(**asked)
    for verb in (system.vm_remove_diff, system.remove_vm):
        with pytest.raises(StoragePoolException, match=f"cannot be mended: .*{why}"):
            verb(asked["name"], purge=True)
    assert machine.tree() == before


def test_a_vm_whose_images_are_not_in_what_a_dead_run_left_is_not_changed(machine):
    machine.path(f"{APPVMS}/work").rename(machine.path("/mnt/away"))
    machine.mkdir(f"{APPVMS}/.work.removing")
    with pytest.raises(StoragePoolException, match=r"work/private\.img is gone"):
        machine.connect().vm_diff("work", label="blue")


def test_a_vm_that_a_dead_run_was_removing_is_compared_whole(machine):
    machine.path(f"{APPVMS}/work").rename(machine.path(f"{APPVMS}/.work.removing"))
    system = machine.connect()
    changes = system.vm_diff("work", volumes={"private": "3GiB"})
    assert set(changes) == {"unfinished", "volumes"}
    assert system.set_vm("work", volumes={"private": "3GiB"}) == changes
    assert system.vm_diff("work", volumes={"private": "3GiB"}) == {}


OWN = ("private.img.new", "private.img.old", "root.img.new")


@pytest.mark.parametrize("verb", ["set", "rename", "remove, keep"])
def test_what_a_dead_run_was_making_in_a_vm_goes_with_the_next_change(machine, verb):
    vmdir = f"{APPVMS}/work"
    before = {path for path in machine.tree() if path.startswith(vmdir)}
    os.chmod(machine.mkdir(f"{vmdir}/.volatile.img.new"), 0o2700)
    machine.write(f"{vmdir}/.volatile.img.new/volatile.img", b"half")
    os.chmod(machine.mkdir(f"{vmdir}/.icon.png.new"), 0o700)
    machine.mkdir(f"{vmdir}/.new")  # the user's own
    machine.mkdir(f"{vmdir}/.private.img.new")
    machine.write(f"{vmdir}/.private.img.old", b"")
    machine.write(f"{vmdir}/.root.img.new", b"")
    own = {f"{vmdir}/.new", *(f"{vmdir}/.{n}" for n in OWN)}
    system = machine.connect()
    left = [f"{vmdir}/.icon.png.new", f"{vmdir}/.volatile.img.new"]
    unfinished = {"unfinished": {"old": left, "new": None}}
    assert system.vm_diff("work") == unfinished
    if verb == "set":
        assert system.set_vm("work") == unfinished
    elif verb == "rename":
        assert system.rename_vm("work", "job").items() >= unfinished.items()
    else:
        assert system.remove_vm("work", keep=True).items() >= unfinished.items()
    place = vmdir.replace("work", "job") if verb == "rename" else vmdir
    after = {path for path in machine.tree() if path.startswith(place)}
    assert after == {path.replace(vmdir, place) for path in before | own}


def test_what_others_are_making_in_a_vm_is_not_dead(machine):
    os.chmod(machine.mkdir(os.path.join(APPVMS, "work", ".volatile.img.new")), 0o700)
    os.chmod(machine.mkdir(os.path.join(APPVMS, ".work.creating")), 0o700)
    with machine.connect().locked():
        child = os.fork()
        if not child:
            left = machine.connect().vm_diff("work")
            os._exit(0 if left == {} else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert set(machine.connect().vm_diff("work")) == {"unfinished"}


@pytest.mark.parametrize("marker", [".new.creating", ".new.moving"])
def test_a_foreign_directory_beside_a_marker_is_refused_beforehand(machine, marker):
    if marker.endswith("creating"):
        machine.mkdir(f"{APPVMS}/{marker}", 0o2700)
    else:
        os.symlink("/mnt/ssd/appvms/new", machine.path(f"{APPVMS}/{marker}"))
    machine.mkdir(f"{APPVMS}/new")
    before, system = machine.tree(), machine.connect()
    for verb in (system.vm_diff, system.create_vm):
        with pytest.raises(StoragePoolException, match=f"VM new: {APPVMS}/new is there, and the r"):
            verb("new")
    assert machine.tree() == before


def test_a_marker_of_another_vms_file_is_told_while_looking(machine):
    place = machine.mkdir(f"{APPVMS}/.work.creating", 0o2700)
    os.symlink("1:2:2:/f/var/lib/qubes/appvms/other", place / ".taken")
    system = machine.connect()
    for verb in (system.vm_diff, system.set_vm):
        with pytest.raises(StoragePoolException, match="is that of .*/other: rename it back"):
            verb("work", label="blue")


def test_a_source_that_a_dead_run_was_removing_is_told_with_what_mends_it(machine):
    appvms = machine.path(APPVMS)
    (appvms / "work").rename(appvms / ".work.removing")
    with pytest.raises(StoragePoolException, match=".work.removing is left by .*qubes_vm.set work"):
        machine.connect().clone_vm("work", "new")
