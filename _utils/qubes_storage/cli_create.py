"""``qubes-storage create``: the options of R3.2's qvm-create, and its checks."""

import argparse
import os
import re

from qubes_storage.exc import InvalidInput, NotSupported
from qubes_storage.vm import LABELS

_DESCRIPTION = """\
Create a VM: its directory and images, and its entry in the registry. Options and checks are those
of R3.2's qvm-create.
"""
_EPILOG = """\
A VM's images lie in one pool, and -P says in which: a section of storage.conf, as
'qubes-storage pool list' shows them. Without -P that is the pool 'default' (/var/lib/qubes). The
pool must be there: 'qubes-storage pool add ssd dir_path=/mnt/ssd/qubes' makes one. A VM stays in
its pool until 'qubes-storage migrate' moves it. The pool of its template does not matter.

  qubes-storage create -P ssd -t fedora-23 -l green work
"""
_KLASSES = {
    "netvm": "NetVM",
    "proxyvm": "ProxyVM",
    "hvm": "HVM",
    "hvm_template": "TemplateHVM",
}
_FLAGS = (
    ("-p", "--proxy", "proxyvm", "create a ProxyVM"),
    ("-H", "--hvm", "hvm", "create an HVM (standalone unless -t is given)"),
    (None, "--hvm-template", "hvm_template", "create a template for HVMs"),
    ("-n", "--net", "netvm", "create a NetVM"),
    ("-s", "--standalone", "standalone", "give it a root of its own, copied from the template"),
)


def add(add_command):
    """Add the command to those there are."""
    command = add_command("create", None, help="create a VM, as qvm-create does")
    command.description, command.epilog = _DESCRIPTION, _EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("name", metavar="NAME", help="name of the VM")
    command.add_argument("-t", "--template", help="the template it runs on, or is copied from")
    command.add_argument("-l", "--label", help=f"needed: {', '.join(LABELS)}")
    command.add_argument("-P", "--pool", help="storage pool of its images; default: default")
    for short, long, dest, text in _FLAGS:
        names = [name for name in (short, long) if name]
        command.add_argument(*names, dest=dest, action="store_true", help=text)
    for short, long, dest, text in (
        ("-R", "--root-move-from", "root_move_from", "its root image: the file is moved"),
        ("-r", "--root-copy-from", "root_copy_from", "its root image: the file is copied"),
    ):
        command.add_argument(short, long, dest=dest, metavar="FILE", help=text)
    command.add_argument("-m", "--mem", metavar="MIB", help="memory that it starts with")
    command.add_argument("-c", "--vcpus", metavar="N", help="number of virtual processors")
    command.add_argument("-i", "--internal", action="store_true", help="hide it from the menus")

    def run(system, args):
        klass = _klass(command, args)
        declared = _declared(system, args, klass)
        changes = system.create_vm(args.name, **declared)
        pool = changes.get("pool", {}).get("new", args.pool)
        where = f" in pool {pool}" if pool else ""
        return changes, [f"VM {args.name} was created{where}"], 0

    command.set_defaults(run=run)


def _klass(command, args):
    """The class asked for; more than one is a command line that is none."""
    klasses = [klass for dest, klass in _KLASSES.items() if getattr(args, dest)]
    if len(klasses) > 1:
        command.error(
            f"a VM is one of {', '.join(klasses)}: give one of -p, -H, -n, --hvm-template"
        )
    if klasses:
        return klasses[0]
    return "StandaloneVM" if args.standalone else "AppVM"


def _check(args, standalone, local):
    """What qvm-create checks before it looks at the system, in its order."""
    name = args.name
    if args.label is None:
        raise InvalidInput(f"VM {name}: choose its label with -l: {', '.join(LABELS)}")
    if local and args.label not in LABELS:  # R4 has labels of its own, and looks itself
        raise InvalidInput(
            f"VM {name}: unknown label {args.label!r}; it is one of {', '.join(LABELS)}"
        )
    if re.fullmatch(r"disp\d+", name):
        raise InvalidInput(f"VM {name}: such a name is for the DispVMs that are made at start")
    root = args.root_move_from if args.root_copy_from is None else args.root_copy_from
    if root == "":
        raise InvalidInput(f"VM {name}: the file of its root image is empty; name one")
    if root is not None and not standalone:
        raise InvalidInput(f"VM {name}: only a VM with a root of its own takes {root}; add -s")
    if args.hvm_template and args.template is not None:
        raise InvalidInput(f"VM {name}: a template cannot be based on another; leave out -t")
    if args.root_move_from is not None and args.root_copy_from is not None:
        raise InvalidInput(f"VM {name}: a root is either moved or copied: give one of -R and -r")
    if root is not None and not os.path.exists(root):
        raise InvalidInput(f"VM {name}: {root} is not there; name the file of its root image")


def _declared(system, args, klass):
    """The arguments of ``create_vm``."""
    standalone = args.standalone or args.hvm_template or (args.hvm and args.template is None)
    local = system.backend == "local"
    _check(args, standalone, local)
    found = {"klass": klass, "label": args.label, "template": args.template, "pool": args.pool}
    if args.template is not None:
        _check_template(system, args)
    elif local and standalone and not args.hvm and not args.hvm_template:
        found["template"] = system.default_template(args.name)
    if local and standalone and klass in ("NetVM", "ProxyVM", "HVM"):
        found["standalone"] = True
    for option in ("root_move_from", "root_copy_from"):
        path = getattr(args, option)
        if path is not None:
            found[option] = os.path.abspath(path)
    start = {"memory": args.mem, "vcpus": args.vcpus, "internal": args.internal or None}
    start = {key: value for key, value in start.items() if value is not None}
    if start and not local:
        raise NotSupported(
            f"VM {args.name}: backend {system.backend} sets {', '.join(start)} of a VM that is"
            f" there; create it without and use qvm-prefs {args.name}"
        )
    return {**found, **start}


def _check_template(system, args):
    vms = system.list_vms()
    klass = vms.get(args.template, {}).get("klass")
    if args.name not in vms and klass and not klass.startswith("Template"):
        raise InvalidInput(
            f"VM {args.name}: {args.template} is no template but {klass}; name a template, or"
            " use qubes-storage clone"
        )
