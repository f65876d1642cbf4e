"""
``qubes-storage``: the pools and VMs of a machine, from a command line.

Exit codes are those of R3.2's tools: 0 for done, 1 for what could not be done, 2 for a command line
that is none; and 130 for Ctrl-C, after which all is as it was, or the next run finishes it.
"""

import argparse
import io
import json
import os
import sys

import qubes_storage
from qubes_storage import cli_create, cli_output, cli_pool, image
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.system import BACKENDS, SOCKET

INTERRUPTED = 130


def main(argv=None):
    """Run a command line; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file would get its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a name that is not UTF-8 is shown all the same
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parse(argv)
    image.watch = None if getattr(args, "quiet", False) else cli_output.progress()
    try:
        result, lines, code = args.run(_connect(args), args)
        if not _shown(args, result, lines):
            return 1
    except KeyboardInterrupt:
        _tell("interrupted; what was begun is undone, or the next run finishes it")
        return INTERRUPTED
    except (OSError, StoragePoolException) as err:
        _tell(err)
        return 1
    finally:
        image.watch = None
    return code


def _connect(args):
    for option in ("root", "socket"):
        if getattr(args, option) == "":
            raise InvalidInput(f"--{option}: is empty; name one or leave it out")
    # Who names a socket means it, whatever lies there.
    backend = "admin" if args.socket and args.backend == "auto" else args.backend
    return qubes_storage.connect(os.path.abspath(args.root), backend, args.socket)


def _shown(args, result, lines):
    """Show what came of it; False, and why, if that could not be written."""
    changing = hasattr(args, "quiet")
    try:
        if args.json:
            print(json.dumps(result, indent=2))
        elif not (changing and args.quiet):
            for line in lines:
                print(line if args.exact else cli_output.printable(line))
        sys.stdout.flush()
    except OSError as err:
        _silence(sys.stdout)
        if changing:
            _tell(
                f"it is done, but could not be shown: {err.strerror}; see it with a command such"
                " as qubes-storage report"
            )
        elif not isinstance(err, BrokenPipeError):  # whoever reads had enough, as head does
            _tell(f"standard output: {err.strerror}; have it written elsewhere")
        return False
    return True


def _tell(message):
    try:
        print(f"qubes-storage: {cli_output.printable(message)}", file=sys.stderr)
    except OSError:
        _silence(sys.stderr)


def _silence(stream):
    """What is left of it goes nowhere, or Python would fail on it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(argv):
    """What is asked for; options of a pool may stand behind what begins with a dash too."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(args, "options")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.options = [*args.options, *rest]
    return args


def _parser():
    parser = argparse.ArgumentParser(
        prog="qubes-storage", description="Storage pools of Qubes OS, and the VMs in them."
    )
    parser.add_argument("--root", metavar="DIR", default="/", help="the machine lies below it")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="local: R3.2's files; admin: R4's Admin API; auto: admin where its socket is, or where"
        " --socket is given",
    )
    parser.add_argument("--socket", metavar="PATH", help=f"where qubesd listens ({SOCKET})")
    parser.add_argument("--json", action="store_true", help="print what is returned, as JSON")
    parser.add_argument("--version", action="version", version=qubes_storage.VERSION)
    parser.set_defaults(exact=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    writing = argparse.ArgumentParser(add_help=False, parents=[shared])
    writing.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    for option in ("--force-root", "--offline-mode"):
        text = "accepted, as R3.2's tools do; means nothing"
        writing.add_argument(option, action="store_true", help=text)

    def add(name, run, *arguments, parents=writing, **kwargs):
        text = kwargs["help"]
        command = commands.add_parser(
            name, parents=[parents], description=f"{text[0].upper()}{text[1:]}.", **kwargs
        )
        for argument in arguments:
            command.add_argument(argument, metavar=argument.upper())
        command.set_defaults(run=run)
        return command

    cli_create.add(add)
    cli_pool.add(commands, shared, writing)
    add("ls", _ls, parents=shared, help="list the VMs: class, pool, template, label")
    clone = add("clone", _clone, "name", "new_name", help="copy a VM with its images")
    clone.add_argument("-P", "--pool", help="pool of the copy; default: that of the VM")
    clone.add_argument("-p", "--path", help="accepted and ignored, as by qvm-clone; -P says where")
    add("rename", _rename, "name", "new_name", help="give a VM another name")
    resize = add("resize", _resize, "name", "volume", "size", help="grow private or root of a VM")
    resize.epilog = "SIZE is in bytes, or with a unit, such as 20GiB. An image never shrinks."
    for volume in ("private", "root"):
        grow = add(
            f"grow-{volume}",
            _resize,
            "name",
            "size",
            help=f"grow {volume} of a VM, as qvm-grow-{volume} does",
        )
        grow.set_defaults(volume=volume)
        grow.add_argument("--allow-start", action="store_true", help=argparse.SUPPRESS)
    migrate = add("migrate", _migrate, "name", "pool", help="move a VM into another pool")
    migrate.add_argument("--keep", action="store_true", help="leave the old images where they are")
    remove = add("remove", _remove, "name", help="remove a VM and delete its images, for good")
    remove.add_argument("--just-db", action="store_true", help="leave its images where they are")
    remove.add_argument("-f", "--force", action="store_true", help="do not ask on a terminal")
    add("commit", _commit, "name", help="make a template's changes last")
    add("reset", _reset, "name", help="make volatile.img of a VM anew")
    verify = add("verify", _verify, parents=shared, help="say what is wrong with VMs' images")
    verify.add_argument("names", metavar="NAME", nargs="*", help="default: every VM")
    add("orphans", _orphans, parents=shared, help="list directories that no VM owns")
    disks = add("disks", _disks, "name", parents=shared, help="print a VM's disks as libvirt XML")
    disks.set_defaults(exact=True)  # a program reads it
    add("report", _report, parents=shared, help="show every pool, and the VMs in it with sizes")
    return parser


def _ls(system, _):
    vms = system.list_vms()
    keys = ("klass", "pool", "template", "label")
    rows = [[name, *(vm.get(key) for key in keys)] for name, vm in sorted(vms.items())]
    return vms, cli_output.table(["NAME", *map(str.upper, keys)], rows), 0


def _clone(system, args):
    if args.path is not None:
        _tell(f"{args.path} is ignored; -P says where")
    changes = system.clone_vm(args.name, args.new_name, pool=args.pool)
    return changes, [f"VM {args.name} was cloned to {args.new_name}"], 0


def _rename(system, args):
    changes = system.rename_vm(args.name, args.new_name)
    return changes, [f"VM {args.name} was renamed to {args.new_name}"], 0


def _resize(system, args):
    changes = system.resize_vm(args.name, args.volume, args.size)
    done = "has grown to" if changes else "has"
    return changes, [f"VM {args.name}: {args.volume} {done} {args.size}"], 0


def _migrate(system, args):
    changes = system.migrate_vm(args.name, args.pool, keep=args.keep)
    done = "was moved to" if changes else "is in"
    return changes, [f"VM {args.name} {done} pool {args.pool}"], 0


def _remove(system, args):
    if args.just_db and system.backend != "local":
        raise NotSupported(
            f"VM {args.name}: backend {system.backend} removes a VM with its images only; leave out"
            " --just-db"
        )
    how = {"keep": True} if args.just_db else {"purge": True}
    planned = system.vm_remove_diff(args.name, **how)
    if not planned:
        raise _not_there(args.name)
    deleted = planned.get("deleted", {"old": []})["old"]
    if deleted and sys.stdin.isatty() and not args.force:
        _ask(args.name, deleted)
    changes = system.remove_vm(args.name, **how)
    if not changes:  # another was first
        raise _not_there(args.name)
    return changes, [f"VM {args.name} was removed"], 0


def _ask(name, deleted):
    """On standard error, so that what is returned stands alone on standard output."""
    lines = [
        f"VM {name} and its images go for good:",
        *map(cli_output.printable, deleted),
        "Delete them? [y/N] ",
    ]
    print("\n".join(lines), end="", file=sys.stderr, flush=True)
    answer = sys.stdin.buffer.readline()
    if not answer.endswith(b"\n"):  # Ctrl-D leaves the cursor there
        print(file=sys.stderr)
    if answer.strip().lower() not in (b"y", b"yes"):
        raise InvalidInput(f"VM {name}: was left as it is")


def _not_there(name):
    return StoragePoolException(f"VM {name}: is not there; see qubes-storage ls")


def _commit(system, args):
    changes = system.commit_vm(args.name)
    return changes, [f"VM {args.name} was committed"], 0


def _reset(system, args):
    changes = system.reset_vm(args.name)
    done = "was reset" if changes else "keeps its volatile.img"
    return changes, [f"VM {args.name} {done}"], 0


def _verify(system, args):
    vms = {} if args.names else system.list_vms()
    problems = {}
    for name in args.names or [name for name in vms if vms[name]["klass"] != "AdminVM"]:
        try:
            problems[name] = system.verify_vm(name)
        except StoragePoolException as err:  # the others are told all the same
            problems[name] = [str(err)]
    lines = [_of_vm(name, line) for name, found in problems.items() for line in found]
    return problems, lines, 1 if lines else 0


def _of_vm(name, problem):
    who = f"VM {name}: "
    return problem if problem.startswith(who) else f"{who}{problem}"


def _orphans(system, _):
    found = system.orphans()
    rows = [[row["pool"], cli_output.size(row["size"]), row["path"]] for row in found]
    return found, cli_output.table(["POOL", "SIZE", "PATH"], rows, right=[1]), 0


def _disks(system, args):
    found = system.disks(args.name)
    return found, ["".join(found.values()).rstrip("\n")], 0


def _report(system, _):
    found = system.report()
    return found, cli_output.report(found), 0
