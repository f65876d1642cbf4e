"""Which machine it is, and whether the modules belong on it."""

import os
import subprocess
import sys

import pytest
import qubes_storage
from qubes_storage import registry, system
from qubes_storage.exc import InvalidInput
from qubes_storage.pool import CONF

from tests.conftest import TREE

QUBES = any(map(os.path.exists, (CONF, registry.PATH, system.SOCKET)))


def test_a_backend_that_there_is_not_is_refused(root):
    with pytest.raises(InvalidInput, match="backend: 'r4' is none of auto, local, admin; set one"):
        qubes_storage.connect(root, "r4")


def test_modules_of_another_version_name_the_core_that_was_found():
    why = system.why_not({"qubes_storage.root": "/mnt"}.get, "0.0")
    assert (
        f"is of version 0.0, but the core that this Python found is of {qubes_storage.VERSION}"
        in why
    )
    assert qubes_storage.__file__ in why


@pytest.mark.skipif(QUBES, reason="this machine is a dom0")
def test_modules_belong_in_a_dom0_or_where_a_root_is_set(tmp_path):
    settings = {}
    why = system.why_not(settings.get, qubes_storage.VERSION)
    assert why.startswith("this machine is no Qubes dom0")
    assert system.SOCKET in why
    socket = tmp_path / "qubesd.sock"
    settings["qubes_storage.socket"] = str(socket)
    assert str(socket) in system.why_not(settings.get, qubes_storage.VERSION)
    socket.touch()
    assert system.why_not(settings.get, qubes_storage.VERSION) is None
    for key, value in (("root", "/mnt"), ("backend", "local")):
        assert system.why_not({f"qubes_storage.{key}": value}.get, qubes_storage.VERSION) is None


@pytest.mark.parametrize(
    ("socket", "message"),
    [
        ("/etc/passwd", "/etc/passwd is no socket; name qubesd's"),
        (f"/{'x' * 107}", "has more than 107 bytes"),
        ("/run/\0", "is no path of a socket"),
        (5, "5 is no path of a socket"),
    ],
)
def test_a_socket_that_is_none_is_refused(root, socket, message):
    with pytest.raises(InvalidInput, match=message):
        qubes_storage.connect(root, socket=socket)


def test_a_socket_that_is_not_there_leaves_the_files(root):
    assert qubes_storage.connect(root, socket="/nowhere/qubesd.sock").backend == "local"


CONNECT = "import qubes_storage, sys; qubes_storage.connect(sys.argv[1]).list_pools()"


def connected(root, *wrapper, **env):
    """What a process says that connects, in its own locale."""
    env.update({name: told for name, told in os.environ.items() if name.startswith("COVERAGE")})
    return subprocess.run(
        [*wrapper, sys.executable, "-c", CONNECT, root],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TREE / "_utils"), **env},
        cwd="/",
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_locale_that_is_not_utf_8_is_refused_with_the_cure(root):
    """It found and wrote other paths than the same command in another locale."""
    utf8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = connected(root, LC_ALL="C", **utf8)
    assert "names of files for ascii" in done.stderr.replace("ANSI_X3.4-1968", "ascii")
    assert "; run it with LC_ALL=C.UTF-8 or PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX"},
        {"LANG": "C", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "nn_NO.nowhere"},
        {"LC_ALL": "C.UTF-8"},
        {"PYTHONUTF8": "1"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
    ],
    ids=str,
)
def test_the_locales_in_which_daemons_start_are_utf_8(root, env):
    done = connected(root, **env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can unmount /proc")
def test_without_proc_one_error_says_so(root):
    script = 'umount -l /proc && exec "$@"'
    done = connected(root, "unshare", "--mount", "sh", "-c", script, "sh")
    if "umount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert "StoragePoolException: /proc/self/fd: is not there" in done.stderr
    assert "; mount /proc with mount -t proc proc /proc" in done.stderr
