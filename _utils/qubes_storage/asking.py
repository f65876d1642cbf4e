"""
What is asked for: names that are texts, and flags that are true or false, told in one place.

A pillar, a program or a command line can hand over anything: ``purge: "no"`` is a text, and a text
is true. So whatever has a ``name`` is checked before anything is looked at.
"""

import functools
import inspect

from qubes_storage.exc import InvalidInput
from qubes_storage.values import to_flag

_TEXTS = ("name", "new_name", "klass", "template", "pool", "volume", "clone_from", "root_copy_from",
          "root_move_from")  # fmt: skip
_FLAGS = ("migrate", "create_only", "standalone", "purge", "keep")


def checked(klass):
    """Have each public method of a class whose first argument is ``name`` check what it gets."""
    for verb in (verb for verb in dir(klass) if not verb.startswith("_")):
        method = inspect.getattr_static(klass, verb)
        if not inspect.isfunction(method):
            continue
        if list(inspect.signature(method).parameters)[1:2] == ["name"]:
            setattr(klass, verb, _checked(method, "pool" if "pool" in verb else "VM"))
    return klass


def _checked(method, kind):
    signature = inspect.signature(method)

    @functools.wraps(method)
    def verb(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        for found in (given.arguments, given.arguments.get("declared", {})):
            _check(kind, given.arguments["name"], found)
        return method(*given.args, **given.kwargs)

    return verb


def _check(kind, name, found):
    for word in _TEXTS:
        value = found.get(word)
        who = f"{kind} {name!r}" if word == "name" else f"{kind} {name}"
        if value == "":
            raise InvalidInput(f"{who}: the {word} is empty; name one or leave it out")
        if value is not None or (word == "name" and word in found):
            _check_text(value, f"{who}: {word}")
    for word in _FLAGS:
        if word in found:
            found[word] = to_flag(found[word], f"{kind} {name}: {word}")


def _check_text(value, what):
    if not isinstance(value, str):
        raise InvalidInput(f"{what} {value!r} is not a text; put it in quotes")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as err:
        raise InvalidInput(f"{what} {value!r} cannot be written in UTF-8; take another") from err
    if "\0" in value:
        raise InvalidInput(f"{what} {value!r} has a NUL in it; take another")
