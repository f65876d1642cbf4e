"""What a declared VM needs: validated, compared with what there is, and planned."""

import os

from qubes_storage import build, files, image, mounts, owning
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.plan import Image, Outside, Plan, Source, class_dir
from qubes_storage.values import check_vm_name, parse_size, whole_sectors
from qubes_storage.vm import (
    IMAGES,
    KERNEL_FILES,
    KERNELS,
    KLASSES,
    PRIVATE_SIZE,
    VM,
    check_label,
    get_klass,
)


def check_volumes(name, volumes):
    """
    ``{volume: bytes}`` of what is declared, in whole sectors, for a disk has no other size; a bare
    size is short for ``{size: ...}``, and None declares nothing.
    """
    if volumes is None:
        return {}
    if not isinstance(volumes, dict):
        raise InvalidInput(f"VM {name}: volumes {volumes!r} are no map; write private: 10GiB")
    sizes = {}
    for volume, value in volumes.items():
        if volume not in ("private", "root"):
            raise InvalidInput(
                f"VM {name}: volume {volume!r} has no size of its own; declare private or root"
                " (R3.2 makes volatile.img anew at each start)"
            )
        options = value if isinstance(value, dict) else {"size": value}
        for option, given in options.items():
            if option not in ("size", "pool", "revisions_to_keep"):
                raise InvalidInput(
                    f"VM {name}: volume {volume} has no option {option!r}; it takes size"
                )
            if option != "size" and given is not None:
                raise NotSupported(
                    f"VM {name}: {option} of volume {volume}: backend local keeps all images of a"
                    " VM in one pool, as that says; declare the VM's pool, and its options"
                )
        if options.get("size") is not None:
            size = parse_size(options["size"], f"VM {name}: volume {volume}")
            sizes[volume] = whole_sectors(size)
    return sizes


class Planning:
    """The part of :py:class:`~qubes_storage.system.System` that plans."""

    @staticmethod
    def places():
        """One class of VMs for each directory of a pool."""
        return [KLASSES["AppVM"], KLASSES["NetVM"], KLASSES["TemplateVM"]]

    def plan(
        self,
        name,
        klass=None,
        template=None,
        label=None,
        pool=None,
        volumes=None,
        clone_from=None,
        root_copy_from=None,
        migrate=False,
        root_move_from=None,
        create_only=False,
        standalone=False,
        keep=False,
    ):
        """
        ``(changes, plan)``: what differs from what is declared, and for a new VM what to make.

        ``create_only`` leaves a VM that is there as it is, whatever it is.

        ``standalone`` makes a NetVM or ProxyVM with a root of its own, copied from ``template``.

        ``keep`` is that of a move, which then copies what it could have linked.
        """
        brought = [v for v in (clone_from, root_copy_from, root_move_from) if v is not None]
        if len(brought) > 1:
            raise InvalidInput(
                f"VM {name}: clone_from, root_copy_from and root_move_from each say where its root"
                " comes from; declare one of them"
            )
        sizes = check_volumes(name, volumes)
        if label is not None:
            check_label(label, name)
        vm = self.find_vm(name)
        if klass is not None and not (vm and vm.klass.name == "AdminVM"):  # which is refused anyway
            get_klass(klass, name)
        if vm is not None and create_only:
            left = self._left(vm)  # by the run that made it, which this finishes
            return ({"unfinished": {"old": left, "new": None}} if left else {}), None
        if vm is None and clone_from is not None:
            return self._plan_clone(name, clone_from, klass, template, label, pool, sizes)
        if vm is None:
            moved = root_move_from is not None
            outside = (root_move_from if moved else root_copy_from, moved)
            return self._plan_new(name, klass, template, label, pool, sizes, standalone, outside)
        if standalone:
            template = None  # what its root was copied from matters at creation only
        return self._compare_vm(vm, klass, template, label, pool, sizes, migrate, keep), None

    def _template(self, name, klass, template):
        """The template VM that a class can run on."""
        found = self._source(name, template)
        self._check_runs_on(name, klass, found)
        return found

    @staticmethod
    def _check_runs_on(name, klass, template):
        if template.klass.name != klass.based_on:
            raise InvalidInput(
                f"VM {name}: {template.name} is of class {template.klass.name}; {klass.name} runs"
                f" on {klass.based_on}"
            )

    def _source(self, name, template):
        found = self.find_vm(template)
        if found is None:
            raise StoragePoolException(
                f"VM {name}: its template {template} is not in qubes.xml; declare or create it"
                " first",
                waits_for=[("VM", template)],
            )
        if "qid" not in found.entry.attrs:
            raise StoragePoolException(
                f"VM {name}: its template {template} has no qid in qubes.xml; mend it there"
            )
        return found

    def _plan_new(self, name, klass, template, label, pool, sizes, standalone, outside):
        check_vm_name(name)
        kind = KLASSES[klass or "AppVM"]
        registry = self.registry()
        runs_on = None
        default = template is None and kind.based_on and not kind.is_hvm and not standalone
        pool = "default" if pool is None else pool
        self._check_needs(name, pool, template, default)
        if kind.based_on and not standalone:
            if default:
                template = self.default_template(name)
            if template is not None:
                runs_on = self._template(name, kind, template).name
        vm = VM(name, kind, pool=pool, label=label, template=runs_on)
        place = self.pool_of(vm)
        source = self._source(name, template) if template is not None else None
        if source and source.klass.is_hvm and not kind.is_hvm:
            raise InvalidInput(
                f"VM {name}: {template} is of class {source.klass.name}, whose root has a system"
                f" that {kind.name} cannot start; take a TemplateVM, or klass: HVM"
            )
        if runs_on and "root" in sizes:
            raise self._root_is_templates(name, runs_on)
        plan = Plan(vm, place)
        left = self._all_left(name)
        self._plan_images(plan, source, sizes)
        self._check_copied(plan)
        if outside[0] is not None:
            self._plan_import(plan, *outside, sizes.get("root", 0))
        plan.has_kernel, kernels = self._kernels(vm, registry)
        if "root" in vm.images and not kind.is_hvm:
            plan.kernels = kernels
        self.check_growth(place, kind.subdir, self._needed(plan))
        self._check_new_vm(vm)
        build.check_vacant(place, vm)
        registry.unused("qid")
        changes = self._created(plan, template, sizes, left)
        if outside[0] is not None:
            word = "root_move_from" if outside[1] else "root_copy_from"
            changes[word] = {"old": None, "new": outside[0]}
        return changes, plan

    def _check_needs(self, name, pool, template, default):
        """Tell of all that is missing at once: who waits for one of it waits for all of it."""
        lacking = []
        for kind, needed in (("pool", pool), ("VM", template)):
            try:
                if kind == "pool":
                    self.get_pool(needed)
                elif default:
                    self.default_template(name)
                elif needed is not None:
                    self._source(name, needed)
            except StoragePoolException as err:
                if not err.waits_for:
                    raise
                lacking.append(err)
        if lacking:
            waits_for = [pair for err in lacking for pair in err.waits_for]
            raise StoragePoolException("; ".join(map(str, lacking)), waits_for)

    @staticmethod
    def _created(plan, template, sizes, left):
        vm = plan.vm
        made = {wanted.filename: wanted.size for wanted in plan.images}
        new = {
            "created": vm.name,
            "klass": vm.klass.name,
            "template": template,
            "label": vm.label,
            "pool": vm.pool,
            "volumes": {v: made[IMAGES[v]] for v in sizes} or None,
        }
        changes = {k: {"old": None, "new": v} for k, v in new.items() if v is not None}
        if left:
            changes["unfinished"] = {"old": left, "new": None}
        return changes

    def default_template(self, name):
        """The name of the template that VM ``name`` gets where it says none."""
        registry = self.registry()
        entry = registry.by_qid(registry.get("default_template"))
        if entry is None:
            raise StoragePoolException(
                f"VM {name}: no template is declared and the system has no default one; declare"
                " template, or klass: StandaloneVM",
                waits_for=[("VM", None)],
            )
        return entry.attrs.get("name")

    def _plan_images(self, plan, source, sizes):
        vm = plan.vm
        root = sizes.get("root", 0)
        for volume, filename in vm.images.items():
            if volume == "volatile":
                size = vm.klass.volatile_size(root)
                plan.images.append(Image(filename, size))
            elif volume == "root-cow":
                plan.images.append(Image(filename, root))
            elif source is None:
                size = {"private": PRIVATE_SIZE, "root": vm.klass.root_size}[volume]
                size = max(size, sizes.get(volume, 0))
                plan.images.append(Image(filename, size))
                root = size if volume == "root" else root
            else:
                size, copied = self._find_image(vm, source, volume)
                size = max(size, sizes.get(volume, 0))
                plan.images.append(Image(filename, size, copied))
                root = size if volume == "root" else root

    def _find_image(self, vm, source, volume):
        """``(size, source)`` of an image to copy."""
        source = Source(self.pool_of(source), source, IMAGES[volume])
        there = self.images_on_disk(source.vm).get(volume)
        if there is None:
            raise StoragePoolException(
                f"VM {vm.name}: {source.path} in pool {source.pool.name}, of which it gets a copy,"
                " is not there; bring it back, or take another template",
                waits_for=[("mount", source.path)],
            )
        return there[0], source

    def _check_copied(self, plan):
        """
        Refuse images to copy that are in use; those who run on a template only read its root. Who
        is to run on it gets its private image as it is just now, as from R3.2.
        """
        copied = [wanted.source for wanted in plan.images if isinstance(wanted.source, Source)]
        for vm in {source.vm.name: source.vm for source in copied}.values():
            if not vm.klass.is_template:
                self._check_all_halted(vm)
            elif any(source.filename == IMAGES["root"] for source in copied):
                self._check_all_halted(vm, ("private",))

    def _kernels(self, vm, registry):
        """``(whether there is a kernel, the version to copy)``."""
        version = registry.get("default_kernel")
        try:
            os.close(build.open_kernels(self.root))
        except OSError:
            return False, None
        if version is None or "/" in version or version in ("", ".", ".."):
            return False, None
        if "root" in vm.images and not vm.klass.is_hvm:
            self._check_kernels(vm, version)
        return True, version

    def _check_kernels(self, vm, version):
        wrong = []
        for name in KERNEL_FILES:
            try:
                with files.closing(build.open_kernels(self.root, version)) as fd:
                    os.close(image.open_image(files.at(fd, name)))
            except OSError as err:
                wrong.append(f"{os.path.join(KERNELS, version, name)}: {err.strerror}")
        if wrong:
            raise StoragePoolException(
                f"VM {vm.name}: {', '.join(wrong)}; install that kernel or set another"
                " default_kernel"
            )

    def _needed(self, plan):
        """How many bytes the copies of a plan take, 0 for what shares blocks or is linked."""
        needed = 0
        with files.closing(class_dir(plan.pool, plan.vm.klass.subdir)) as fd:
            here = image.device(fd) if image.shares_blocks(fd) else None
        for wanted in plan.images:
            if wanted.source:
                with wanted.source.opened() as source:
                    if image.device(source) != here and not _is_linked(plan, wanted, source):
                        needed += os.fstat(source).st_blocks * 512
        return needed


def _is_linked(plan, wanted, source):
    """Whether an image becomes a link of a file of the caller's, which then goes."""
    if not isinstance(wanted.source, Outside) or not wanted.source.moved:
        return False
    found = os.fstat(source)
    with files.closing(plan.pool.open_subdir(plan.vm.klass.subdir)) as fd:
        near = mounts.mount_of(source) == mounts.mount_of(fd)
    whole = found.st_nlink == 1 and found.st_size >= wanted.size
    return near and whole and owning.is_roots(source)
