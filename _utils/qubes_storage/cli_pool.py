"""``qubes-storage pool``: list, show, add, change and remove pools."""

import argparse

from qubes_storage import cli_output
from qubes_storage.exc import InvalidInput, StoragePoolException

_OPTIONS = """\
Options are written OPTION=VALUE, with the words of storage.conf: driver (xen where neither it nor
class is given) or class, dir_path and whatever else the driver takes; and the guards require_mount
(refuse while this is not a mount point) and min_free (refuse to fill the disk below this).

  qubes-storage pool add ssd dir_path=/mnt/ssd/qubes require_mount=/mnt/ssd min_free=20GiB
"""


def add(commands, reading, writing):
    """Add the command, which has commands of its own, to those there are."""
    text = "list, show, add, change or remove pools"
    pool = commands.add_parser(
        "pool", parents=[reading], help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    verbs = pool.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name, run, parents, text):
        parser = verbs.add_parser(
            name, parents=[parents], help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        parser.set_defaults(run=run)
        return parser

    verb("list", _list, reading, "list the pools: driver, directory and other options")
    for name, run, parents, text in (
        ("info", _info, reading, "show what is in force for a pool, its disk, VMs and problems"),
        ("add", _add, writing, "add a pool and make its directories"),
        ("set", _set, writing, "change options of a pool, and make what is missing"),
        ("remove", _remove, writing, "remove a pool that holds no VM; images are never deleted"),
    ):
        parser = verb(name, run, parents, text)
        parser.add_argument("name", metavar="NAME", help="name of the pool")
        if name in ("add", "set"):
            parser.add_argument("options", metavar="OPTION=VALUE", nargs="*")
            parser.epilog = _OPTIONS
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
        if name == "set":
            parser.add_argument(
                "-u", "--unset", metavar="OPTION", action="append", default=[], help="remove it"
            )
        if name == "remove":
            parser.add_argument(
                "--purge", action="store_true", help="also remove its directories that are empty"
            )


def _list(system, _):
    pools = system.list_pools()
    rows = []
    for name, config in pools.items():
        more = {k: v for k, v in config.items() if k not in ("driver", "class", "dir_path")}
        kind = config.get("class") or config.get("driver")
        rest = " ".join(f"{key}={value}" for key, value in more.items())
        rows.append([name, kind, config.get("dir_path"), rest])
    return pools, cli_output.table(["NAME", "DRIVER", "DIR_PATH", "OPTIONS"], rows), 0


def _info(system, args):
    found = system.pool_info(args.name)
    if found is None:
        raise StoragePoolException(f"pool {args.name}: is not there; see qubes-storage pool list")
    lines = []
    for key, value in found.items():
        if key in ("size", "used", "free", "provisioned"):
            lines.append([key, cli_output.size(value)])
        elif isinstance(value, list):
            lines += [[key if n == 0 else "", item] for n, item in enumerate(value)]
        else:
            lines.append([key, value])
    return found, cli_output.table(None, lines), 0


def _add(system, args):
    changes = system.add_pool(args.name, options=_options(args))
    return changes, [f"pool {args.name} was added"], 0


def _set(system, args):
    changes = system.set_pool(args.name, options=_options(args, args.unset))
    done = "was set" if changes else "is so already"
    return changes, [f"pool {args.name} {done}"], 0


def _remove(system, args):
    changes = system.remove_pool(args.name, purge=args.purge)
    if not changes:
        raise StoragePoolException(f"pool {args.name}: is not there; see qubes-storage pool list")
    return changes, [f"pool {args.name} was removed"], 0


def _options(args, unset=()):
    """One map for each option, so that one given twice is told of."""
    maps = [{key: None} for key in unset]
    for text in args.options:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"pool {args.name}: {text!r} is not OPTION=VALUE")
        maps.append({key: value})
    return maps
