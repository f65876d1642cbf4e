"""Where an installed package keeps what a file_root keeps in ``_modules`` and ``_states``."""

import importlib.util


def _dir(package):
    return next(iter(importlib.util.find_spec(package).submodule_search_locations))


def loader_dirs():
    """The directories for Salt's loader, by the kind of module; an editable install has its own."""
    return {
        "modules": [_dir("qubes_storage_salt.modules")],
        "states": [_dir("qubes_storage_salt.states")],
    }
