"""What is looked at before a module is imported: what has no source, no file or another owner."""

import errno
import importlib.machinery
import os
import sys

import pytest
from qubes_storage import trust
from qubes_storage.exc import StoragePoolException

OTHER = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


def test_a_package_of_directories_alone_is_looked_at_too(tmp_path, monkeypatch):
    """Without an __init__.py a package is found in no file."""
    package = tmp_path / "package_of_directories"
    package.mkdir()
    (package / "mine.py").touch()
    (package / "mine.py").chmod(0o644)
    package.chmod(0o777)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StoragePoolException, match="chmod go-w .*/package_of_directories$"):
        trust.check_module("package_of_directories.mine")
    package.chmod(0o755)
    trust.check_module("package_of_directories.mine")
    (package / "mine.py").chmod(0o666)
    with pytest.raises(StoragePoolException, match=r"chmod go-w .*/mine\.py$"):
        trust.check_module("package_of_directories.mine")


def test_a_module_in_machine_code_is_looked_at_too(tmp_path, monkeypatch):
    """It has a file, and nothing compiled beside it."""
    path = tmp_path / f"native_of_tests{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.touch(0o644)
    path.chmod(0o644)
    monkeypatch.syspath_prepend(str(tmp_path))
    trust.check_module("native_of_tests")
    path.chmod(0o666)
    with pytest.raises(StoragePoolException, match=f"chmod go-w {path}$"):
        trust.check_module("native_of_tests")
    assert "native_of_tests" not in sys.modules


def test_what_is_not_there_is_not_imported(tmp_path):
    with pytest.raises(StoragePoolException, match="none: No such file or directory; mend it"):
        trust.check_path(tmp_path / "none/file")


def test_a_filesystem_without_access_lists_has_none(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o664)

    def refuse(_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "listxattr", refuse)
    trust.check_path(path)


@pytest.fixture
def core(tmp_path, monkeypatch):
    """A directory in place of the core's own."""
    path = tmp_path / "core"
    (path / "drivers").mkdir(parents=True)
    (path / "drivers/mine.py").touch()
    for made in (path, path / "drivers", path / "drivers/mine.py"):
        made.chmod(0o755)
    monkeypatch.setattr(trust, "_CORE", str(path))
    return path


def test_a_link_beside_the_core_counts_as_what_it_leads_to(core, tmp_path):
    driver = core / "drivers/mine.py"
    driver.rename(tmp_path / "real.py")
    driver.symlink_to(tmp_path / "real.py")
    trust.check_driver(str(driver))
    (tmp_path / "real.py").chmod(0o666)
    with pytest.raises(StoragePoolException, match=r"chmod go-w .*/real\.py$"):
        trust.check_driver(str(driver))


@root_only
def test_a_group_that_may_write_the_core_may_write_a_driver(core):
    driver = core / "drivers/mine.py"
    os.chown(driver, 0, OTHER)
    driver.chmod(0o664)
    with pytest.raises(StoragePoolException, match="chmod go-w"):
        trust.check_driver(str(driver))
    os.chown(core, 0, OTHER)
    core.chmod(0o775)
    trust.check_driver(str(driver))
    driver.chmod(0o666)
    with pytest.raises(StoragePoolException, match="chmod go-w"):
        trust.check_driver(str(driver))


def named(lib, monkeypatch, *names):
    """Files of root's on Python's path, which can be looked for by their names."""
    lib.mkdir(parents=True)
    lib.chmod(0o755)
    for name in names:
        (lib / name).parent.mkdir(exist_ok=True)
        (lib / name).touch()
        (lib / name).chmod(0o644)
    monkeypatch.syspath_prepend(str(lib))


@root_only
def test_a_sticky_directory_may_not_hold_the_file_itself(tmp_path, monkeypatch):
    """Others can add what Python takes in its place: compiled, in machine code, a package."""
    lib = tmp_path / "lib"
    named(
        lib, monkeypatch, "module_of_tests.py", "whole_of_tests/__init__.py", "bare_of_tests/m.py"
    )
    lib.chmod(0o1777)
    trust.check_module("whole_of_tests")  # of a package, its own directory holds the file
    for module in ("module_of_tests", "bare_of_tests.mine"):
        with pytest.raises(StoragePoolException, match=f"chmod go-w {lib}$"):
            trust.check_module(module)
    with pytest.raises(StoragePoolException, match=f"chmod go-w {lib}$"):
        trust.check_driver(str(lib / "module_of_tests.py"))
    lib.chmod(0o755)
    (lib / "__pycache__").mkdir()
    (lib / "__pycache__").chmod(0o1777)
    with pytest.raises(StoragePoolException, match=f"chmod go-w {lib}/__pycache__$"):
        trust.check_module("module_of_tests")
    (lib / "__pycache__").chmod(0o755)
    for module in ("module_of_tests", "bare_of_tests.mine"):
        trust.check_module(module)
    trust.check_driver(str(lib / "module_of_tests.py"))


def test_dots_behind_a_link_lead_to_what_is_looked_at(tmp_path, monkeypatch):
    for name in ("safe", "open"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "lib").mkdir()
        (tmp_path / name / "lib/module_of_tests.py").touch(0o644)
    (tmp_path / "safe/link").symlink_to(tmp_path / "open/x")
    (tmp_path / "open/lib").chmod(0o777)
    monkeypatch.syspath_prepend(str(tmp_path / "safe/link/../lib"))
    with pytest.raises(StoragePoolException, match=f"chmod go-w {tmp_path}/open/lib$"):
        trust.check_module("module_of_tests")


def test_a_path_that_is_relative_is_looked_at_from_here(tmp_path, monkeypatch):
    (tmp_path / "file").touch(0o644)
    (tmp_path / "file").chmod(0o666)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoragePoolException, match=f"chmod go-w {tmp_path}/file$"):
        trust.check_path("file")
