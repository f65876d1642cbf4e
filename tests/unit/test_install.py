"""``make install`` touches nothing but the directory that it was told."""

import os
import subprocess

import pytest

from tests.conftest import TREE

NAMES = ["Makefile", "_modules", "_states", "_utils", "qubes_storage.sls"]


def install(cwd, dest, *args):
    """Run it in a directory that has what is copied."""
    subprocess.run(["cp", "-R", *NAMES, cwd], check=True, cwd=TREE)
    return subprocess.run(
        ["make", "install", f"DESTDIR={dest}", *args],
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd)},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["salt files", "", "~/salt", "salt\tfiles"])
def test_what_is_not_one_directory_is_refused_and_nothing_is_touched(tmp_path, name):
    work, salt = tmp_path / "work", tmp_path / "salt"
    work.mkdir()
    (salt / "_utils/qubes_storage").mkdir(parents=True)
    (salt / "_utils/qubes_storage/mine").touch()
    dest = f"{tmp_path}/{name}" if name.startswith("salt") else name
    done = install(work, dest, *([] if dest else ["--dry-run"]))  # it would be the root
    assert done.returncode != 0
    assert f"DESTDIR is '{dest}'; name one directory, without spaces and ~" in done.stderr
    assert (salt / "_utils/qubes_storage/mine").exists()
    assert len(list(work.iterdir())) == len(NAMES)
    assert [path.name for path in tmp_path.iterdir() if path not in (work, salt)] == []


@pytest.mark.parametrize("name", ["srv", "it's", 'a"b', "a;ls", "*"])
def test_a_name_that_a_shell_would_read_otherwise_is_taken_as_it_is(tmp_path, name):
    work = tmp_path / "work"
    work.mkdir()
    dest = tmp_path / name
    assert install(work, dest).returncode == 0
    for path in ("qubes_storage.sls", "_modules/qubes_vm.py", "_utils/qubes_storage/system.py"):
        assert (dest / path).is_file()
    assert set(tmp_path.iterdir()) == {work, dest}
