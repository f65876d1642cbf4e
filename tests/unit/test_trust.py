"""Who may write storage.conf is not who may write any file that root then imports."""

import importlib.machinery
import importlib.util
import json
import os
import py_compile
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import qubes_storage
from qubes_storage import finding, trust

SOURCE = """\
import pathlib
import qubes_storage

pathlib.Path({mark!r}).write_text("imported")


class Pool(qubes_storage.Pool):
    pass
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory on Python's path, with a package that leaves a mark when it is imported."""
    path = tmp_path / "lib"
    (path / "pack_of_tests").mkdir(parents=True)
    source = SOURCE.format(mark=str(tmp_path / "mark"))
    (path / "pack_of_tests/__init__.py").write_text("")
    (path / "pack_of_tests/mine.py").write_text(source)
    for made in [path, *path.rglob("*")]:
        made.chmod(0o755)
    monkeypatch.syspath_prepend(str(path))
    yield path
    for name in [name for name in sys.modules if name.startswith("pack_of_tests")]:
        del sys.modules[name]


@pytest.fixture
def system(root):
    conf = root / "etc/qubes/storage.conf"
    conf.write_text(
        "[default]\ndriver = xen\n[mine]\nclass = pack_of_tests.mine.Pool\ndir_path = /opt/mine\n"
    )
    return qubes_storage.connect(root, "local")


def imported(place):
    return (place.parent / "mark").exists()


def test_a_class_that_root_alone_may_write_is_imported(place, system):
    pool = system.get_pool("mine")
    assert type(pool).__module__ == "pack_of_tests.mine"
    assert pool.dir_path == "/opt/mine"
    assert imported(place)


@pytest.mark.parametrize("mode", [0o002, 0o020, 0o022], ids=oct)
@pytest.mark.parametrize(
    "which", ["pack_of_tests/mine.py", "pack_of_tests/__init__.py", "pack_of_tests", "."]
)
def test_what_others_may_write_is_not_imported_and_the_error_names_it(place, system, which, mode):
    path = place / which
    if mode & 0o020 and os.geteuid() == 0:
        for made in [place, *place.rglob("*")]:
            os.chown(made, 0, 12345)
    elif mode == 0o020:
        pytest.skip("only root can give a file a group that is not its own")
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(qubes_storage.StoragePoolException) as caught:
        system.get_pool("mine")
    message = str(caught.value)
    assert message.startswith("pool mine: ")
    assert f"chmod go-w {path.resolve()}" in message
    assert not imported(place)


def test_a_class_that_is_not_trusted_hides_no_other_pool(place, system):
    place.chmod(0o777)
    assert "others than root may write" in " ".join(system.pool_info("mine")["problems"])
    assert system.pool_info("default")["dir_path"] == "/var/lib/qubes"
    assert not qubes_storage.pool_exists("mine", root=system.root)
    assert not imported(place)


def test_a_file_of_someone_elses_is_not_imported(place, system):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(place / "pack_of_tests/mine.py", 12345, -1)
    with pytest.raises(qubes_storage.StoragePoolException, match="chown -h root: .*mine.py"):
        system.get_pool("mine")
    assert not imported(place)


def test_a_sticky_directory_of_roots_is_safe_to_lie_below(place, system):
    if os.geteuid():
        pytest.skip("only root has directories of root's")
    place.chmod(0o1777)
    assert system.get_pool("mine").dir_path == "/opt/mine"


def test_a_sticky_directory_of_someone_elses_is_not(place, system):
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    place.chmod(0o1777)
    os.chown(place, 12345, -1)
    with pytest.raises(qubes_storage.StoragePoolException, match="others than root may write"):
        system.get_pool("mine")
    assert not imported(place)


def test_a_link_is_followed_to_what_it_means(place, system, tmp_path):
    real = tmp_path / "real.py"
    (place / "pack_of_tests/mine.py").rename(real)
    (place / "pack_of_tests/mine.py").symlink_to(real)
    real.chmod(0o666)
    with pytest.raises(qubes_storage.StoragePoolException, match=r"chmod go-w .*real\.py"):
        system.get_pool("mine")
    assert not imported(place)


def test_a_directory_that_others_write_is_refused_with_the_path_of_it(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open/file").touch()
    with pytest.raises(qubes_storage.StoragePoolException, match="chmod go-w .*/open$"):
        trust.check_path(tmp_path / "open/file")


@pytest.mark.parametrize("module", ["sys", "os", "qubes_storage", "no_such_module.at.all"])
def test_what_is_running_or_not_there_is_for_the_import_to_tell(module):
    trust.check_module(module)


def test_a_link_on_the_way_counts_as_well_as_what_it_leads_to(place, system, tmp_path):
    safe = tmp_path / "safe"
    (place / "pack_of_tests").rename(safe)
    middle = tmp_path / "middle"
    middle.mkdir()
    (middle / "link").symlink_to("../safe")
    (place / "pack_of_tests").symlink_to("../middle/link")
    middle.chmod(0o777)
    with pytest.raises(qubes_storage.StoragePoolException, match="chmod go-w .*/middle$"):
        system.get_pool("mine")
    assert not imported(place)
    middle.chmod(0o755)
    assert system.get_pool("mine").dir_path == "/opt/mine"


def test_links_without_end_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(qubes_storage.StoragePoolException, match="too many links"):
        trust.check_path(tmp_path / "a/file")


@pytest.mark.parametrize("which", ["__pycache__", "__pycache__/mine.{tag}.pyc"])
def test_what_is_compiled_is_as_good_as_its_source(place, system, which):
    py_compile.compile(place / "pack_of_tests/mine.py")
    path = place / "pack_of_tests" / which.format(tag=sys.implementation.cache_tag)
    path.chmod(0o777)
    with pytest.raises(qubes_storage.StoragePoolException, match=f"chmod go-w {path}$"):
        system.get_pool("mine")
    assert not imported(place)


def access_list(path, perm):
    """Let uid 12345 do something with a file, as ``setfacl --modify u:12345:rw`` does."""
    nobody = 0xFFFFFFFF
    entries = [
        (1, 7, nobody),
        (2, perm, 12345),
        (4, 5, nobody),
        (0x10, 7, nobody),
        (0x20, 5, nobody),
    ]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", data)
    except OSError as err:
        pytest.skip(f"no access lists here: {err}")


def test_a_list_of_users_who_may_write_counts(place, system):
    path = place / "pack_of_tests/mine.py"
    access_list(path, 6)
    with pytest.raises(qubes_storage.StoragePoolException, match=f"and setfacl -b {path}$"):
        system.get_pool("mine")
    assert not imported(place)


def test_whichever_finder_of_python_knows_it(place, system, tmp_path, monkeypatch):
    """As an editable install has them: on no path, and known to a finder of its own."""
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "pack_of_tests":
                return None
            init = elsewhere / "pack_of_tests/__init__.py"
            return importlib.util.spec_from_file_location(
                name, init, submodule_search_locations=[str(init.parent)]
            )

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    elsewhere.chmod(0o777)
    with pytest.raises(qubes_storage.StoragePoolException, match=f"chmod go-w {elsewhere}$"):
        system.get_pool("mine")
    assert not imported(place)
    elsewhere.chmod(0o755)
    assert system.get_pool("mine").dir_path == "/opt/mine"


def test_a_package_in_a_zip_file_is_as_good_as_that(place, system, tmp_path, monkeypatch):
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("__init__.py", "mine.py"):
            file.write(place / "pack_of_tests" / name, f"pack_of_tests/{name}")
    shutil.rmtree(place / "pack_of_tests")
    monkeypatch.syspath_prepend(str(packed))
    packed.chmod(0o666)
    with pytest.raises(qubes_storage.StoragePoolException, match=f"chmod go-w {packed}$"):
        system.get_pool("mine")
    assert not imported(place)
    packed.chmod(0o644)
    assert system.get_pool("mine").dir_path == "/opt/mine"


def test_an_entry_point_is_not_imported_from_what_others_may_write(place):
    info = place / "pack_of_tests-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: pack-of-tests\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[qubes_storage.drivers]\npacked = pack_of_tests.mine:Pool\n"
    )
    importlib.invalidate_caches()
    path = place / "pack_of_tests/mine.py"
    path.chmod(0o666)
    found = finding.describe_drivers()["packed"]
    assert "driver packed: module pack_of_tests.mine is not imported" in found["problem"]
    assert f"chmod go-w {path}" in found["problem"]
    assert not imported(place)
    path.chmod(0o644)
    assert "problem" not in finding.describe_drivers()["packed"]


@pytest.fixture
def copied(tmp_path):
    """``copied()``: what the drivers of a copy of the core are, as Salt's cache has one."""
    core = tmp_path / "extmods/qubes_storage"
    shutil.copytree(os.path.dirname(qubes_storage.__file__), core)
    for made in [core.parent, core, *core.rglob("*")]:
        made.chmod(0o755 if made.is_dir() else 0o644)
    (core / "drivers/mine.py").write_text(
        "from qubes_storage.drivers import xen\n\n\nclass Pool(xen.Pool):\n    pass\n"
    )
    (core / "drivers/mine.py").chmod(0o644)

    def look():
        code = "import json, qubes_storage.finding as f; print(json.dumps(f.describe_drivers()))"
        found = subprocess.run(
            [sys.executable, "-B", "-c", code], cwd="/", env={"PYTHONPATH": str(core.parent)},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return {name: told.get("problem") for name, told in json.loads(found.stdout).items()}

    look.core = core
    return look


def test_a_driver_in_a_file_has_to_be_no_more_open_than_the_core(copied):
    assert not any(copied().values())
    path = copied.core / "drivers/mine.py"
    path.chmod(0o666)
    found = copied()
    assert f"driver mine: is not imported: others than root may write {path}" in found.pop("mine")
    assert not any(found.values())
    path.chmod(0o644)
    path.parent.chmod(0o777)
    assert all(f"chmod go-w {path.parent}" in problem for problem in copied().values())
    copied.core.chmod(0o777)  # who may write that has the core itself
    assert not any(copied().values())


def test_a_driver_is_not_imported_by_a_link_into_what_others_may_write(copied, tmp_path):
    path = copied.core / "drivers/mine.py"
    real = tmp_path / "shared/mine.py"
    real.parent.mkdir()
    path.rename(real)
    path.symlink_to(real)
    real.parent.chmod(0o777)
    assert f"chmod go-w {real.parent}" in copied()["mine"]
    real.parent.chmod(0o755)
    assert not copied()["mine"]


def test_a_checkout_of_a_user_s_runs_as_root(copied):
    if os.geteuid():
        pytest.skip("only root can give files away")
    for made in [copied.core.parent, copied.core, *copied.core.rglob("*")]:
        os.chown(made, 12345, 12345)
        made.chmod(0o775)
    assert not any(copied().values())
    (copied.core / "drivers/mine.py").chmod(0o777)
    assert "chmod go-w" in copied()["mine"]


def test_only_a_plain_file_is_a_driver(copied):
    """What Python would import instead, or in no other form, is looked at by nobody."""
    drivers = copied.core / "drivers"
    source = (drivers / "mine.py").read_text()
    (drivers / "pack").mkdir()
    (drivers / "pack/__init__.py").write_text(source)
    (drivers / "pack/__init__.py").chmod(0o666)
    py_compile.compile(drivers / "mine.py", drivers / "byte.pyc")
    (drivers / "byte.pyc").chmod(0o666)
    for name in ("native", "xen"):  # one alone, one that Python takes before the file
        (drivers / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    (drivers / "mine").mkdir()
    assert set(copied()) == {"btrfs", "file-reflink", "mine", "reflink"}
    (drivers / "mine/__init__.py").touch()
    assert set(copied()) == {"btrfs", "file-reflink", "reflink"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has directories of root's")
def test_a_sticky_directory_of_drivers_is_as_open_as_any(copied):
    drivers = copied.core / "drivers"
    drivers.chmod(0o1777)
    assert f"chmod go-w {drivers}" in copied()["mine"]
    drivers.chmod(0o755)
    elsewhere = copied.core.parent / "compiled"
    elsewhere.mkdir()
    elsewhere.chmod(0o1777)
    shutil.rmtree(drivers / "__pycache__", ignore_errors=True)  # as the core here had it
    (drivers / "__pycache__").symlink_to(elsewhere)
    assert f"chmod go-w {elsewhere}" in copied()["mine"]
    elsewhere.chmod(0o755)
    assert not copied()["mine"]
