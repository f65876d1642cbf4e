"""What the recorded cases share: ``fakemod`` can be imported, as a class of someone else's can."""

import contextlib
import importlib
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
# Loaded here, so that it counts as running already, whoever may write the checkout.
importlib.import_module("fakemod")

USER, QUBES = 1000, 98  # the ids that the recorded cases have for their user and group


@contextlib.contextmanager
def as_user(case):
    """Run as the case's user, who is a member of group qubes, and with its umask."""
    ids = os.geteuid(), os.getegid(), os.getgroups()
    user = case["input"]["user"] == "user"
    if user and ids[0]:
        pytest.skip("only root can become the user of the case")
    umask = os.umask(int(case["input"]["umask"], 8))
    try:
        if user:
            os.setgroups([QUBES])
            os.setegid(USER)
            os.seteuid(USER)
        yield
    finally:
        if user:
            os.seteuid(ids[0])
            os.setegid(ids[1])
            os.setgroups(ids[2])
        os.umask(umask)


def give(path, mode, gid=QUBES):
    """Give a file the group of the case, where we may, and its mode."""
    if os.geteuid() == 0:
        os.chown(path, 0, gid)
    path.chmod(mode)


def tree(root):
    """Everything below a root: what it is, whose, its bytes and when it changed."""
    found = {}
    for place in [root, *sorted(root.rglob("*"))]:
        stat = place.lstat()
        content = None
        if place.is_symlink():
            content = os.readlink(place)
        elif place.is_file():
            content = place.read_bytes()
        key = os.path.relpath(place, root)
        found[key] = (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_mtime_ns, content)
    return found


@pytest.fixture
def machine():
    """A root that another user may enter, with the directories of the recorded system."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="qubes-r32-"))
    for name in ("etc/qubes", "var/lib/qubes", "mnt"):
        (root / name).mkdir(parents=True)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)
    for name in ("", "appvms", "servicevms", "vm-templates", "vm-kernels"):
        path = root / "var/lib/qubes" / name
        path.mkdir(exist_ok=True)
        give(path, 0o2770)
    (root / "mnt").chmod(0o777)
    yield root
    shutil.rmtree(root)
