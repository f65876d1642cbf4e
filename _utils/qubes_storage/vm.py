"""The classes of VMs as R3.2 knows them: where one lies, what it starts with, what it needs."""

import uuid
from dataclasses import dataclass

from qubes_storage.exc import InvalidInput
from qubes_storage.registry import Entry
from qubes_storage.values import to_bool, to_int

GIB = 1024**3
MIB = 1024**2
LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
ICONS = "/usr/share/icons/hicolor/128x128/devices/appvm-{}.png"
KERNELS = "/var/lib/qubes/vm-kernels"
KERNEL_FILES = ("vmlinuz", "initramfs", "modules.img")
IMAGES = {
    "root": "root.img",
    "private": "private.img",
    "volatile": "volatile.img",
    "root-cow": "root-cow.img",
}
PRIVATE_SIZE = 2 * GIB
# volatile.img holds the copy-on-write space of root, 1 GiB of swap and R3.2's 512 MiB of slack.
_VOLATILE_EXTRA = 1536 * MIB


@dataclass(frozen=True)
class Klass:
    """What R3.2 means by a class of VMs."""

    name: str
    tag: str  # the element in qubes.xml
    subdir: str  # the directory in a pool
    label: str = "red"
    memory: int = 400
    root_size: int = 10 * GIB
    based_on: str = None  # the class of template that it runs on
    is_template: bool = False
    is_netvm: bool = False
    is_hvm: bool = False

    def root_filename(self):
        """Images of its own, besides private and volatile."""
        return ("root", "root-cow") if self.is_template else ("root",)

    def volatile_size(self, root):
        """
        R3.2's size of volatile.img, in bytes: that of its class's root in whole MiB and more; an
        HVM's grows with its root, of ``root`` bytes.
        """
        size = max(root, self.root_size) if self.is_hvm else self.root_size
        return min(size // MIB * MIB + _VOLATILE_EXTRA, 2**63 - 512)  # no file is larger


KLASSES = {
    k.name: k
    for k in (
        Klass("AppVM", "QubesAppVm", "appvms", based_on="TemplateVM"),
        Klass("StandaloneVM", "QubesAppVm", "appvms"),
        Klass("TemplateVM", "QubesTemplateVm", "vm-templates", "black", is_template=True),
        Klass(
            "NetVM", "QubesNetVm", "servicevms", memory=300, based_on="TemplateVM", is_netvm=True
        ),
        Klass(
            "ProxyVM",
            "QubesProxyVm",
            "servicevms",
            memory=300,
            based_on="TemplateVM",
            is_netvm=True,
        ),
        Klass(
            "HVM",
            "QubesHVm",
            "appvms",
            memory=512,
            root_size=20 * GIB,
            based_on="TemplateHVM",
            is_hvm=True,
        ),
        Klass(
            "TemplateHVM",
            "QubesTemplateHVm",
            "vm-templates",
            "black",
            memory=512,
            root_size=20 * GIB,
            is_template=True,
            is_hvm=True,
        ),
        Klass("DispVM", "QubesDisposableVm", "appvms", based_on="TemplateVM"),
        Klass("AdminVM", "QubesAdminVm", "servicevms", "black", memory=300),
    )
}
_BY_TAG = {k.tag: k for k in reversed(KLASSES.values())}
SUBDIRS = ("appvms", "servicevms", "vm-templates")
# What present and create can make; R3.2 makes a DispVM when it starts one, and dom0 is there.
CREATABLE = tuple(k for k in KLASSES if k not in ("DispVM", "AdminVM"))


def get_klass(name, vm):
    """The :py:class:`Klass` of a word, or :py:class:`InvalidInput` that names the words."""
    if name in CREATABLE:
        return KLASSES[name]
    if name == "DispVM":
        raise InvalidInput(
            f"VM {vm}: R3.2 makes a DispVM when it starts one (qvm-run --dispvm); declare its"
            " template instead"
        )
    raise InvalidInput(f"VM {vm}: unknown klass {name!r}; it is one of {', '.join(CREATABLE)}")


def check_label(label, vm):
    """One of R3.2's eight labels."""
    if label not in LABELS:
        raise InvalidInput(f"VM {vm}: unknown label {label!r}; it is one of {', '.join(LABELS)}")
    return label


def start_attrs(name, memory=None, vcpus=None, internal=None):
    """
    Attributes that a VM starts with other than its class does: memory in MiB, vcpus, and whether it
    is internal. R3.2 takes any text for them, and then cannot read its registry.
    """
    attrs = {}
    for word, value, least in (("memory", memory, 0), ("vcpus", vcpus, 0)):
        if value is None:
            continue
        if to_int(value, f"VM {name}: {word}") < least:
            raise InvalidInput(f"VM {name}: {word} {value} is less than {least}; take more")
        attrs[word] = str(int(value))
    if internal is not None:
        attrs["internal"] = str(to_bool(internal, f"VM {name}: internal"))
    return attrs


def template_qid(entry):
    """The qid of the template that an element names, there or not; None for none."""
    qid = entry.attrs.get("template_qid", "")
    return None if qid.lower() in ("", "none") else qid


class VM:
    """A VM as the registry has it, or as it would be; R3.2's attributes, none of its state."""

    def __init__(
        self, name, klass, *, pool="default", label=None, template=None, based=None, entry=None
    ):
        self.name = name
        self.klass = klass
        self.pool = pool
        self.label = label or klass.label
        self.template = template  # the VM it runs on, by name; None also for one that is gone
        self.based = based or template is not None  # whether it runs on one
        self.entry = entry

    @classmethod
    def of(cls, entry, registry):
        """The VM of an element, or None for an element that is no VM."""
        klass = _BY_TAG.get(entry.tag)
        name = entry.attrs.get("name")
        if klass is None or not name:
            return None
        qid = template_qid(entry)
        template = registry.by_qid(qid)
        if klass is KLASSES["AppVM"] and qid is None:
            klass = KLASSES["StandaloneVM"]
        return cls(
            name,
            klass,
            pool=entry.attrs.get("pool_name", "default"),
            label=entry.attrs.get("label", klass.label),
            template=template.attrs.get("name") if template else None,
            based=klass.based_on is not None and qid is not None,
            entry=entry,
        )

    @classmethod
    def stranger(cls, entry):
        """The VM of an element of a class that is not known here, as R3.2's plug-ins have them."""
        name = entry.attrs.get("name")
        if entry.tag in _BY_TAG or not entry.tag.startswith("Qubes") or not name:
            return None
        subdir = entry.attrs.get("dir_path", "").split("/")[-2:-1]
        klass = Klass(entry.tag, entry.tag, subdir[0] if {*subdir} & {*SUBDIRS} else "appvms")
        return cls(name, klass, pool=entry.attrs.get("pool_name", "default"), entry=entry)

    @property
    def dirname(self):
        """
        The name of its directory. A DispVM shares that of its template's saved DispVM.

        A name with a slash cannot come from us, and would lead out of the pool.
        """
        saved = self.klass.name == "DispVM" and self.template
        name = f"{self.template}-dvm" if saved else self.name
        if "/" in name or "\0" in name or name in (".", ".."):
            raise InvalidInput(f"VM {name!r}: the name leads out of its pool; mend it in qubes.xml")
        return name

    @property
    def images(self):
        """``{volume: file name}`` of the images that lie in its directory."""
        if self.klass.name == "AdminVM":
            return {}
        names = [] if self.based else self.klass.root_filename()
        return {volume: IMAGES[volume] for volume in (*names, "private", "volatile")}

    def new_entry(self, registry, vmdir):
        """The element for qubes.xml that R3.2's ``add_new_vm`` would write."""
        template = registry.by_name.get(self.template)
        attrs = {
            "autostart": "False", "backup_content": "False", "backup_path": "",
            "backup_size": "0", "conf_file": f"{self.name}.conf", "debug": "False",
            "default_user": "user", "dir_path": vmdir, "dispvm_netvm": "none",
            "firewall_conf": "firewall.xml", "include_in_backups": "True",
            "installed_by_rpm": "False", "internal": "False", "label": self.label,
            "memory": str(self.klass.memory), "name": self.name, "pci_e820_host": "True",
            "pci_strictreset": "True", "pcidevs": "[]", "pool_name": self.pool,
            "qid": registry.unused("qid"), "qrexec_timeout": "60",
            "services": str({"meminfo-writer": not self.klass.is_hvm}),
            "template_qid": template.attrs["qid"] if template else "none",
            "uses_default_dispvm_netvm": "True", "uuid": str(uuid.uuid4()), "vcpus": "2",
        }  # fmt: skip
        if self.klass.is_hvm:
            attrs.update(
                drive="None", guiagent_installed="False", qrexec_installed="False",
                seamless_gui_mode="False", timezone="localtime",
            )  # fmt: skip
        else:
            attrs.update(
                kernel=registry.get("default_kernel") or "None", kernelopts="nopat",
                uses_default_kernel="True", uses_default_kernelopts="True",
            )  # fmt: skip
        if self.klass.is_netvm:
            attrs["netid"] = registry.unused("netid")
        if self.klass.name == "ProxyVM":
            attrs["netvm_qid"] = registry.get("default_fw_netvm") or "none"
            attrs["dispvm_netvm"] = attrs["netvm_qid"]
        elif self.klass.name != "NetVM":
            attrs.update(netvm_qid="none", uses_default_netvm="True")
        return Entry(self.klass.tag, attrs)

    def defaults(self, registry, qid):
        """The collection's attributes once this VM is in it: R3.2 takes the first of each kind."""
        attrs = dict(registry.attrs)
        if "clockvm" not in attrs and registry.clockvm():
            attrs["clockvm"] = registry.clockvm()
        firsts = {
            "default_fw_netvm": self.klass.is_netvm,
            "default_netvm": self.klass.name == "ProxyVM",
            "default_template": self.klass.is_template,
            "updatevm": self.klass.name == "ProxyVM",
            "clockvm": self.klass.is_netvm,
        }
        for key, fits in firsts.items():
            if fits and registry.lacks(key):
                attrs[key] = qid
        return attrs
