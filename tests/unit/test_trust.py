"""Who may write storage.conf is not who may write any file that root then imports."""

import os
import sys

import pytest
import qubes_storage
from qubes_storage import trust

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
    with pytest.raises(qubes_storage.StoragePoolException, match="chown root: .*mine.py"):
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
