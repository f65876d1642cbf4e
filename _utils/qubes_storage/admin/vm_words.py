"""R4: the words in which a VM is declared, and the plan that they become."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from qubes_storage.exc import InvalidInput, NotSupported
from qubes_storage.values import parse_size, to_int, whole_sectors

# The volumes of a class that hold what must not be lost; the others are made at each start.
OWN = {
    "AppVM": ("private",),
    "TemplateVM": ("root", "private"),
    "StandaloneVM": ("root", "private"),
    "DispVM": (),
}
_GIB = 1024**3
# What qubesd gives the volumes of a new VM.
SIZES = {"root": 10 * _GIB, "private": 2 * _GIB, "volatile": 10 * _GIB}
_OLD = {
    "NetVM": "an AppVM with provides_network: declare AppVM, and set it with qvm-prefs",
    "ProxyVM": "an AppVM with provides_network: declare AppVM, and set it with qvm-prefs",
    "HVM": "a StandaloneVM or AppVM with virt_mode hvm: declare that, and set it with qvm-prefs",
    "TemplateHVM": "a TemplateVM with virt_mode hvm: declare that, and set it with qvm-prefs",
}


class Seen(NamedTuple):
    """A VM that is compared: as it is, or as it will be once its move is finished."""

    klass: str
    state: str
    properties: dict  # {property: Property}
    volume: Callable  # a Volume by its name
    moves: bool  # whether a move of it was cut off


@dataclass
class Plan:
    """What to make of a new VM, or to change of one that is there."""

    changes: dict = field(default_factory=dict)
    klass: str = None
    template: str = None  # what it runs on
    label: str = None
    pools: dict = field(default_factory=dict)  # {volume: pool} that are declared
    sizes: dict = field(default_factory=dict)  # {volume: bytes} to grow to, or of a new VM
    revisions: dict = field(default_factory=dict)  # {volume: revisions_to_keep} to set
    copied: str = None  # the VM that it is a copy of


def check_klass(klass, name):
    """A class of VM as R4 has it."""
    if klass in _OLD:
        raise NotSupported(
            f"VM {name}: klass {klass} is R3.2's; backend admin (R4) has it as {_OLD[klass]}"
        )
    if klass not in OWN:
        raise InvalidInput(f"VM {name}: unknown klass {klass!r}; it is one of {', '.join(OWN)}")


def check_volumes(name, volumes):
    """
    ``{volume: {size: bytes, pool: name, revisions_to_keep: number}}`` of what is declared; a bare
    size is short for ``{size: ...}``.
    """
    if not isinstance(volumes or {}, dict):
        raise InvalidInput(f"VM {name}: volumes {volumes!r} are no map; write private: 10GiB")
    found = {}
    for volume, value in (volumes or {}).items():
        takes = ("size", "pool", "revisions_to_keep")
        if volume == "kernel":
            takes = ("pool",)
        elif volume not in ("root", "private", "volatile"):
            raise InvalidInput(
                f"VM {name}: there is no volume {volume!r}; declare root, private, volatile or"
                " kernel"
            )
        options = dict(value) if isinstance(value, dict) else {"size": value}
        what = f"VM {name}: volume {volume}"
        for option in options:
            if option not in takes:
                raise InvalidInput(f"{what} has no option {option!r}; it takes {', '.join(takes)}")
        options = {k: v for k, v in options.items() if v is not None}
        if "size" in options:
            options["size"] = whole_sectors(parse_size(options["size"], what))
        if "revisions_to_keep" in options:
            number = to_int(options["revisions_to_keep"], f"{what}: revisions_to_keep")
            options["revisions_to_keep"] = number
        found[volume] = options
    return found
