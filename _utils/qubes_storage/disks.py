"""The disks of a VM as libvirt knows them: ``<disk>`` elements, as R3.2 puts them in a domain."""

import os
from xml.sax.saxutils import escape

from qubes_storage import build, files, image
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.looking import looking
from qubes_storage.vm import IMAGES, KERNELS, template_qid

_DRIVES = {"hd": "disk", "disk": "disk", "cdrom": "cdrom"}


class Disks:
    """The part of :py:class:`~qubes_storage.system.System` that tells libvirt of the images."""

    @looking
    def disks(self, name):
        """
        ``{rootdev, privatedev, volatiledev, otherdevs}`` of a VM: the text of its ``<disk>``
        elements, ``""`` for a disk that it does not have.
        """
        vm = self.get_vm(name)
        vmdir = self._vmdir(vm)
        with_volatile = not vm.klass.is_hvm  # an HVM has no initramfs that would ask for it
        for each in (vm, self.get_vm(vm.template)) if vm.template else (vm,):
            self._check_no_links(each)
        private = "" if vm.klass.name == "DispVM" else _disk(f"{vmdir}/private.img", "xvdb")
        return {
            "rootdev": self._rootdev(vm, vmdir),
            "privatedev": private,
            "volatiledev": _disk(f"{vmdir}/volatile.img", "xvdc") if with_volatile else "",
            "otherdevs": self._drive(vm) if vm.klass.is_hvm else self._modules(vm, vmdir),
        }

    def _check_no_links(self, vm):
        """Refuse to name what is no file: who attaches it would follow it."""
        if vm.klass.name == "AdminVM":
            return
        path, pool = self._vmdir(vm), self.pool_of(vm)
        try:
            fd = files.open_inside(pool.root, pool.dir_path, vm.klass.subdir, vm.dirname)
        except FileNotFoundError:  # nor is anything in it that could be followed
            return
        except OSError as err:
            raise StoragePoolException(
                f"VM {vm.name}: {path}: cannot be opened: {err.strerror}; put its directory there,"
                " not a link, and run as root"
            ) from err
        with files.closing(fd):
            for name in vm.images.values():
                if files.exists(fd, name) and not image.measure(fd, name):
                    raise StoragePoolException(
                        f"VM {vm.name}: {path}/{name} is no file; put the image in its place"
                    )

    def _vmdir(self, vm):
        """Where the machine sees a VM; R3.2 has dom0 in the default pool, whatever it says."""
        if vm.klass.name == "AdminVM":
            return self.get_pool("default").vmdir(vm)
        return self.pool_of(vm).vmdir(vm)

    def _rootdev(self, vm, vmdir):
        """
        The root image: alone, as what root-cow.img saves the old blocks of (a template), or as a
        snapshot below which the template may change.
        """
        qid = template_qid(vm.entry)
        if vm.template is None and qid is not None:
            raise StoragePoolException(
                f"VM {vm.name}: its template (qid {qid}) is not in qubes.xml; give it another with"
                f" qubes_vm.set {vm.name} template=NAME"
            )
        if vm.template is None:
            cow = self.images_on_disk(vm).get("root-cow") if vm.klass.is_template else None
            if cow is None:
                return _disk(f"{vmdir}/root.img", "xvda")
            return _disk(f"{vmdir}/root.img:{vmdir}/root-cow.img", "xvda", script="block-origin")
        template = self._vmdir(self.get_vm(vm.template))
        if vm.klass.is_hvm:  # which puts no second layer over it, so that this one is written to
            path = f"{template}/root.img:{vmdir}/{IMAGES['volatile']}"
            return _disk(path, "xvda", script="block-snapshot")
        path = f"{template}/root.img:{template}/root-cow.img"
        return _disk(path, "xvda", read_only=True, script="block-snapshot")

    def _modules(self, vm, vmdir):
        """The kernel's modules; a VM with kernels of its own may write to its own."""
        if vm.klass.name == "AdminVM" or vm.klass.is_hvm:
            return ""
        kernel = self._kernel_of(vm)
        if kernel and ("/" in kernel or kernel in (".", "..")):
            raise InvalidInput(
                f"VM {vm.name}: kernel {kernel!r} leads out of {KERNELS}; mend it in qubes.xml"
            )
        path = os.path.join(KERNELS, kernel) if kernel else os.path.join(vmdir, "kernels")
        try:
            with files.closing(self._kernels_of(vm, kernel)) as fd:
                there = image.measure(fd, "modules.img")
        except OSError:
            there = None
        return _disk(f"{path}/modules.img", "xvdd", read_only=kernel is not None) if there else ""

    def _kernel_of(self, vm):
        """The version of the kernel of a VM, None for one in its own directory."""
        if vm.entry.flag("uses_default_kernel", True):
            return self.registry().get("default_kernel")
        version = vm.entry.attrs.get("kernel", "")
        return None if version.lower() in ("none", "") else version

    def _kernels_of(self, vm, kernel):
        if kernel:
            return build.open_kernels(self.root, kernel)
        pool = self.pool_of(vm)
        return files.open_inside(pool.root, pool.dir_path, vm.klass.subdir, vm.dirname, "kernels")

    def _drive(self, vm):
        """The drive of an HVM, such as the CD that it is installed from."""
        drive = vm.entry.attrs.get("drive", "None")
        if drive.lower() == "none":
            return ""
        kind, domain, path = parse_drive(drive, vm.name)
        domain = None if domain.lower() == "dom0" else domain
        return _disk(path, "xvdd", kind=kind, read_only=kind == "cdrom", domain=domain)


def parse_drive(text, vm):
    """
    ``(disk or cdrom, VM, path)`` of a drive, written ``TYPE:VM:/PATH`` with ``hd`` or ``cdrom`` as
    the type. As R3.2 takes it, the type may lack (then it is a cdrom), and the VM (then it is
    dom0). The path may have colons.
    """
    first, colon, rest = text.partition(":")
    kind, rest = (first, rest) if colon and first in _DRIVES else ("cdrom", text)
    domain, path = ("dom0", rest) if rest.startswith("/") else rest.partition(":")[::2]
    if not path.startswith("/"):
        raise InvalidInput(
            f"VM {vm}: drive {text!r} is not TYPE:VM:/PATH, such as cdrom:dom0:/iso/a.iso; mend it"
            " in qubes.xml"
        )
    return _DRIVES[kind], domain or "dom0", path


def _disk(path, target, kind="disk", read_only=False, domain=None, script=None):
    lines = [
        f"    <disk type='block' device='{kind}'>",
        "      <driver name='phy'/>",
        f"      <source dev='{_quoted(path)}'/>",
        f"      <target dev='{target}' bus='xen'/>",
        "      <readonly/>" if read_only else None,
        f"      <backenddomain name='{_quoted(domain)}'/>" if domain else None,
        f"      <script path='{script}'/>" if script else None,
        "    </disk>\n",
    ]
    return "\n".join(line for line in lines if line is not None)


def _quoted(text):
    return escape(text, {"'": "&apos;"})
