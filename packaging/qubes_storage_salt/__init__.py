"""Where an installed package keeps what a file_root keeps in ``_modules`` and ``_states``."""

import pathlib

_HERE = pathlib.Path(__file__).resolve().parent
_TREE = _HERE.parent.parent


def loader_dirs():
    """
    The directories for Salt's loader, by the kind of module.

    In a wheel they lie beside this file; an editable install finds this file in its tree.
    """
    kinds = ("modules", "states")
    if (_HERE / "modules").is_dir():
        return {kind: [str(_HERE / kind)] for kind in kinds}
    return {kind: [str(_TREE / f"_{kind}")] for kind in kinds}
