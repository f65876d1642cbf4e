"""What the journals hold, so that one that is none is told before its use."""

from qubes_storage.admin.vm_words import OWN

STEPS = ("copy", "switch", "remove", "recreate", "restore", "clean", "finish")


def _is(*kinds):
    return lambda value: type(value) in kinds


def _one_of(values):
    return lambda value: type(value) is str and value in values


def _each(check):
    return lambda value: type(value) is list and all(map(check, value))


def _map(check):
    return lambda value: type(value) is dict and all(map(check, value.values()))


def _with(**checks):
    """Whether something is a map that has at least these keys, each with what it should hold."""
    return lambda value: type(value) is dict and not wrong(value, checks)


def wrong(found, checks):
    """The keys of a map that are missing, or hold what they should not."""
    return [key for key, check in checks.items() if key not in found or not check(found[key])]


_flag = _is(bool, type(None))
_text, _maybe, _texts = _is(str), _is(str, type(None)), _map(_is(str))
_volume = _with(size=_is(int), revisions_to_keep=_maybe, rw=_is(bool), ephemeral=_flag)


def _user(value):
    """A VM, None for the system, and its property that names another VM."""
    return type(value) is list and list(map(type, value)) in ([str, str], [type(None), str])


MOVE = {
    "vm": _text,
    "pool": _text,
    "step": _one_of(STEPS),
    "temporary": _text,
    "uuid": _text,
    "klass": _one_of(OWN),
    "template": _maybe,
    "label": _text,
    "asked": lambda value: bool(value) and _texts(value),
    "pools": _map(_maybe),
    "volumes": _map(_volume),
    "volatile": _volume,
    "snapshots": _map(_volume),
    "whole": _with(
        properties=_texts,
        tags=_each(_text),
        features=_texts,
        notes=_maybe,
        firewall=_text,
        devices=_map(_texts),
    ),
    "users": _each(_user),
    "lost": _each(_text),
    "made": _maybe,
}
COPY = {"source": _maybe, "uuid": _maybe, "features": _texts, "whole": _is(bool)}
# What a copy's journal is before anything was done.
BEGUN = {"source": None, "uuid": None, "features": {}, "whole": False}
CREATION = {
    "uuid": _maybe,
    "klass": _one_of(OWN),
    "template": _maybe,
    "label": _maybe,
    "pools": _texts,
    "declared": _with(template=_maybe, label=_maybe, volumes=_is(dict)),
}
REMOVAL = {"dir_path": _text}
