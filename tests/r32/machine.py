"""
The scratch system of every recorded case, made below a root with plain file operations.

Where the tests run as root, a case of ``user`` runs as uid 1000 in group 98, as it was recorded.
"""

import contextlib
import os
import pickle
import re
import stat
import sys
import traceback

import qubes_storage
from qubes_storage import registry

GID = 98
USER = 1000
GIB = 1024**3
LIB = "/var/lib/qubes"
XML = f"{LIB}/qubes.xml"
SUBDIRS = ("appvms", "servicevms", "vm-templates")
ICON = "/usr/share/icons/hicolor/128x128/devices/appvm-black.png"
KERNEL = "4.4.14-11"
# R3.2's classes, with a template and without, in our words.
KLASSES = {
    "QubesAppVm": ("AppVM", "StandaloneVM"),
    "QubesNetVm": ("NetVM", "NetVM"),
    "QubesProxyVm": ("ProxyVM", "ProxyVM"),
    "QubesTemplateVm": ("TemplateVM", "TemplateVM"),
    "QubesHVm": ("HVM", "HVM"),
    "QubesTemplateHVm": ("TemplateHVM", "TemplateHVM"),
    "QubesDisposableVm": ("DispVM", "DispVM"),
    "QubesAdminVm": ("AdminVM", "AdminVM"),
}
_COMMON = {
    "autostart": "False", "backup_content": "False", "backup_path": "", "backup_size": "0",
    "debug": "False", "default_user": "user", "dispvm_netvm": "none",
    "firewall_conf": "firewall.xml", "include_in_backups": "True", "installed_by_rpm": "False",
    "internal": "False", "kernel": KERNEL, "kernelopts": "nopat", "label": "red", "memory": "400",
    "netvm_qid": "none", "pci_e820_host": "True", "pci_strictreset": "True", "pcidevs": "[]",
    "pool_name": "default", "qrexec_timeout": "60", "services": "{'meminfo-writer': True}",
    "template_qid": "none", "uses_default_dispvm_netvm": "True", "uses_default_kernel": "True",
    "uses_default_kernelopts": "True", "uses_default_netvm": "True", "vcpus": "2",
}  # fmt: skip


def element(tag, name, qid, **attrs):
    """``(tag, attributes)`` of a VM, for :py:meth:`Machine.write_registry`."""
    return tag, {
        **_COMMON,
        "conf_file": f"{name}.conf",
        "dir_path": f"{LIB}/appvms/{name}",
        "name": name,
        "qid": str(qid),
        **attrs,
    }


DOM0 = ("QubesAdminVm", {**_COMMON, "name": "dom0", "qid": "0", "netid": "0", "label": "black"})
TEMPLATE = element("QubesTemplateVm", "fedora-23", 1, label="black")


class Machine:
    """A root with R3.2's directories, a kernel and the template ``fedora-23``."""

    def __init__(self, root, conf="[default]\ndriver=xen\n", template=True):
        self.root = root
        self.attrs = dict.fromkeys(
            ("clockvm", "default_fw_netvm", "default_netvm", "updatevm"), "None"
        )
        self.attrs.update(default_kernel=KERNEL, default_template="1" if template else "None")
        self.elements = [(DOM0[0], dict(DOM0[1]))]
        for name in ("/etc/qubes", LIB, "/mnt", "/usr"):
            self.mkdir(name)
        os.chmod(self.path("/mnt"), 0o777)
        for name in (*SUBDIRS, "vm-kernels", "backup", "dvmdata"):
            self.mkdir(f"{LIB}/{name}")
        kernels = self.mkdir(f"{LIB}/vm-kernels/{KERNEL}", 0o2775)
        for name in ("vmlinuz", "initramfs", "modules.img"):
            (kernels / name).write_text(f"{name}\n")
        if conf is not None:
            self.write("/etc/qubes/storage.conf", conf.encode("utf-8", "surrogateescape"))
        if template:
            self.add_template(TEMPLATE, LIB)
        self.write_registry()

    def path(self, path):
        """Where a path of the machine lies."""
        return self.root / path.lstrip("/")

    def _own(self, path):
        if os.geteuid() == 0:
            os.chown(path, 0, GID)

    def mkdir(self, path, mode=0o2770):
        """A directory, with its parents."""
        there = self.path(path)
        there.mkdir(parents=True, exist_ok=True)
        self._own(there)
        os.chmod(there, mode)
        return there

    def write(self, path, data, mode=0o664):
        """A file of the system's own."""
        self.path(path).write_bytes(data)
        self._own(self.path(path))
        os.chmod(self.path(path), mode)

    def image(self, path, size, head=""):
        """A sparse image whose first line is a marker."""
        with open(self.path(path), "wb") as file:
            file.write(f"{head}\n".encode() if head else b"")
            file.truncate(size)
        self._own(self.path(path))
        os.chmod(self.path(path), 0o660)

    def add_template(self, entry, pool, root_size=10 * GIB, marked=True):
        """A template with its images."""
        name = entry[1]["name"]
        vmdir = f"{pool}/vm-templates/{name}"
        self.mkdir(vmdir)
        self.image(f"{vmdir}/root.img", root_size, f"ROOT:{name}" if marked else "")
        self.image(f"{vmdir}/private.img", 2 * GIB, f"PRIV:{name}" if marked else "")
        self.image(f"{vmdir}/root-cow.img", root_size)
        self.image(f"{vmdir}/volatile.img", root_size + 3 * GIB // 2)
        os.symlink(ICON, self.path(f"{vmdir}/icon.png"))
        self.elements.append((entry[0], dict(entry[1])))

    def add_pools(self):
        """The directories of every pool that storage.conf names."""
        text = self.path("/etc/qubes/storage.conf").read_text()
        for dir_path in re.findall(r"(?m)^dir_path *= *(\S+)", text):
            for name in ("", *SUBDIRS):
                self.mkdir(os.path.join(dir_path, name))

    def write_registry(self):
        """qubes.xml, of ``attrs`` and ``elements``."""
        self.write(XML, self.registry_text(), 0o660)

    def registry_text(self):
        """The text of it, written as lxml writes it."""
        lines = [f"<QubesVmCollection {_attributes(self.attrs)}>"]
        lines += [f"  <{tag} {_attributes(attrs)}/>" for tag, attrs in self.elements]
        return "\n".join([*lines, "</QubesVmCollection>", ""]).encode("ascii", "xmlcharrefreplace")

    @property
    def xml(self):
        """The bytes of qubes.xml."""
        return self.path(XML).read_bytes()

    def connect(self):
        """The core on this machine."""
        return qubes_storage.connect(str(self.root))

    def entries(self):
        """``{name: element}`` of what the core reads from qubes.xml."""
        return registry.load(os.path.realpath(self.root)).by_name

    def tree(self, but=()):
        """``{path: what lies there}`` of the whole machine."""
        found = {}
        for here, dirs, names in os.walk(self.root):
            for name in dirs + names:
                path = os.path.join(here, name)
                shown = "/" + os.path.relpath(path, self.root)
                if shown not in but:
                    found[shown] = _look(path)
        return found


def _attributes(attrs):
    return " ".join(
        f'{key}="{value.replace("&", "&amp;").replace("<", "&lt;")}"'
        for key, value in sorted(attrs.items())
    )


def _look(path):
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return {"type": "link", "target": os.readlink(path)}
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    if stat.S_ISDIR(found.st_mode):
        return {"type": "dir", "mode": mode}
    with open(path, "rb") as file:
        head = file.read(40).split(b"\n")[0].rstrip(b"\0").decode("ascii", "replace")
    return {
        "type": "file",
        "mode": mode,
        "size": found.st_size,
        "blocks_zero": found.st_blocks == 0,
        "head": head,
        "inode": found.st_ino,
        "mtime": found.st_mtime_ns,
    }


def run(function, user="root", umask="022"):
    """
    ``(what a function returns, its exception, its umask afterwards)``, run in a process of its own
    with the umask and, where we are root, as the user of a case.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(reading)
            os.umask(int(umask, 8))
            if user != "root" and os.geteuid() == 0:
                os.setgroups([GID])
                os.setgid(USER)
                os.setuid(USER)
            result = error = None
            try:
                result = function()
            except Exception as err:
                error = err
                if not isinstance(err, qubes_storage.StoragePoolException):
                    traceback.print_exc(file=sys.stderr)
            data = pickle.dumps((result, error, f"{os.umask(0):03o}"))
            with open(writing, "wb") as file:
                file.write(data)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    return pickle.loads(data)
