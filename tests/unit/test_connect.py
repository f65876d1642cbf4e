"""Which machine it is, and whether the modules belong on it."""

import os

import pytest
import qubes_storage
from qubes_storage import registry, system
from qubes_storage.exc import InvalidInput
from qubes_storage.pool import CONF

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
