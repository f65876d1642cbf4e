"""R4: what a declared VM needs, compared with what the daemon has."""

from dataclasses import dataclass, field

from qubes_storage.admin_pool_plan import check_revisions
from qubes_storage.adminapi import check_label, lines
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.values import check_vm_name, parse_size, to_int

# The volumes of a class that hold what must not be lost; the others are made at each start.
OWN = {
    "AppVM": ("private",),
    "TemplateVM": ("root", "private"),
    "StandaloneVM": ("root", "private"),
    "DispVM": (),
}
_OLD = {
    "NetVM": "an AppVM with provides_network: declare AppVM, and set it with qvm-prefs",
    "ProxyVM": "an AppVM with provides_network: declare AppVM, and set it with qvm-prefs",
    "HVM": "a StandaloneVM or AppVM with virt_mode hvm: declare that, and set it with qvm-prefs",
    "TemplateHVM": "a TemplateVM with virt_mode hvm: declare that, and set it with qvm-prefs",
}


@dataclass
class Plan:
    """What to make of a new VM, or to change of one that is there."""

    changes: dict = field(default_factory=dict)
    klass: str = None
    template: str = None  # what it runs on
    label: str = None
    pools: dict = field(default_factory=dict)  # {volume: pool} that are declared
    sizes: dict = field(default_factory=dict)  # {volume: bytes} to grow to
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
            options["size"] = parse_size(options["size"], what)
        if "revisions_to_keep" in options:
            number = to_int(options["revisions_to_keep"], f"{what}: revisions_to_keep")
            options["revisions_to_keep"] = number
        found[volume] = options
    return found


class AdminVMPlan:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that plans VMs."""

    def vm_diff(self, name, **declared):
        """
        What :py:meth:`create_vm` or :py:meth:`set_vm` would change, ``{}`` for nothing; entries are
        ``{"old": ..., "new": ...}``, ``created`` for a new VM. Raises what they would raise.

        Keywords: klass, template, label, pool, volumes, clone_from, root_copy_from, migrate,
        create_only.
        """
        return self.vm_plan(name, **declared).changes

    def vm_plan(
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
        create_only=False,
    ):
        """The :py:class:`Plan` of a declared VM."""
        if root_copy_from is not None:
            raise NotSupported(
                f"VM {name}: backend admin cannot take a root image from a file; create the VM and"
                " run qvm-volume import NAME:root FILE"
            )
        texts = {"klass": klass, "template": template, "pool": pool, "clone_from": clone_from}
        for word, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise InvalidInput(f"VM {name}: {word} {value!r} is not a text; put it in quotes")
        if klass is not None:
            check_klass(klass, name)
        if label is not None:
            check_label(label, f"VM {name}")
        wanted = check_volumes(name, volumes)
        moving = self.pending_move(check_vm_name(name))
        if moving and create_only:
            return Plan()
        if moving:
            return Plan(changes=self._unfinished(name, moving, pool, migrate))
        there = self.listed().get(name)
        if there is None:
            return self._plan_new(name, klass, template, label, pool, wanted, clone_from)
        if create_only:
            return Plan()
        return self._compare_vm(name, there, klass, template, label, pool, wanted, migrate)

    @staticmethod
    def _unfinished(name, moving, pool, migrate):
        to = moving["pool"]
        if not migrate or pool not in (None, to):
            raise StoragePoolException(
                f"VM {name}: its move to pool {to} was cut off and {moving['path']} tells where;"
                f" finish it with qubes_vm.migrate {name} {to}, or declare pool: {to} and"
                " migrate: true"
            )
        return {"unfinished": {"old": moving["path"], "new": None}}

    def _compare_vm(self, name, there, klass, template, label, pool, wanted, migrate):
        if there.klass not in OWN:
            raise InvalidInput(f"VM {name}: a {there.klass} has no volumes; declare other VMs")
        if klass not in (None, there.klass):
            raise StoragePoolException(
                f"VM {name}: is a {there.klass}, not a {klass}; a class never changes: declare"
                f" {there.klass}, or remove the VM first"
            )
        plan = Plan(klass=there.klass)
        properties = self.vm_properties(name)
        if label is not None and label != properties["label"].value:
            self._check_label_exists(name, label)
            plan.label = label
            plan.changes["label"] = {"old": properties["label"].value, "new": label}
        if template is not None and "template" in properties:
            self._compare_template(name, there, properties["template"].value, template, plan)
        self._compare_volumes(name, plan, wanted, pool, migrate)
        return plan

    def _compare_template(self, name, there, old, template, plan):
        if template == old:
            return
        self._check_template(name, there.klass, template)
        if there.state != "Halted":
            raise StoragePoolException(
                f"VM {name}: runs on {old}, not on {template}, and is {there.state}; a template"
                " changes only while the VM is halted: shut it down"
            )
        plan.template = template
        plan.changes["template"] = {"old": old, "new": template}

    def _compare_volumes(self, name, plan, wanted, pool, migrate):
        wanted_pools = {volume: pool for volume in OWN[plan.klass] if pool is not None}
        wanted_pools.update((v, o["pool"]) for v, o in wanted.items() if "pool" in o)
        moved, old_sizes, old_revisions = {}, {}, {}
        for volume in sorted({*wanted_pools, *wanted}):
            found = self.volume(name, volume)
            if found is None:
                raise StoragePoolException(f"VM {name}: was removed meanwhile; run again")
            options = wanted.get(volume, {})
            to = wanted_pools.get(volume, found.pool)
            if to != found.pool:
                self._check_target(name, volume, to, plan.klass)
                moved[volume] = (found.pool, to)
            if "size" in options and found.snap:
                raise self._is_snapshot(name, volume)
            if options.get("size", 0) > found.size:
                self.check_growth(found.pool)
                plan.sizes[volume] = options["size"]
                old_sizes[volume] = found.size
            keep = options.get("revisions_to_keep")
            if keep is not None and str(keep) != found.revisions_to_keep:
                driver = self.check_pool(to, f"VM {name}: volume {volume}")
                check_revisions(keep, driver, f"VM {name}: volume {volume}: revisions_to_keep")
                plan.revisions[volume] = keep
                old_revisions[volume] = found.revisions_to_keep
        if moved:
            self._compare_pools(name, plan, moved, migrate)
        if plan.sizes:
            plan.changes["volumes"] = {"old": old_sizes, "new": dict(plan.sizes)}
        if plan.revisions:
            new = {v: str(keep) for v, keep in plan.revisions.items()}
            plan.changes["revisions_to_keep"] = {"old": old_revisions, "new": new}

    def _compare_pools(self, name, plan, moved, migrate):
        if not migrate:
            volume, (old, new) = next(iter(moved.items()))
            raise StoragePoolException(
                f"VM {name}: its {volume} volume lies in pool {old}, not in {new}; declare"
                f" migrate: true to move it (the VM has to be halted), or pool: {old}"
            )
        plan.pools = {volume: new for volume, (_, new) in moved.items()}
        self.check_move(name, plan.pools)
        olds, news = ({v: pools[n] for v, pools in moved.items()} for n in (0, 1))
        plain = len(set(olds.values())) == 1 and len(set(news.values())) == 1
        plan.changes["pool"] = (
            {"old": next(iter(olds.values())), "new": next(iter(news.values()))}
            if plain
            else {"old": olds, "new": news}
        )

    @staticmethod
    def _is_snapshot(name, volume):
        return InvalidInput(
            f"VM {name}: its {volume} volume is a snapshot of its template's; declare its size"
            " there"
        )

    def _check_label_exists(self, name, label):
        labels = lines(self.client.read("admin.label.List"), "admin.label.List")
        if label not in labels:
            raise InvalidInput(
                f"VM {name}: unknown label {label!r}; it is one of {', '.join(labels)}"
            )

    def _source(self, name, source, word):
        found = self.listed().get(check_vm_name(source))
        if found is None:
            raise StoragePoolException(
                f"VM {name}: its {word} {source} is not there; declare or create it first",
                waits_for=("VM", source),
            )
        return found

    def _check_template(self, name, klass, template):
        """The VM that one of a class can run on."""
        found = self._source(name, template, "template")
        base = {"AppVM": "TemplateVM", "DispVM": "AppVM"}.get(klass)
        if found.klass != base:
            raise InvalidInput(
                f"VM {name}: {template} is a {found.klass}; a {klass} runs on a {base}"
            )
        if klass == "DispVM":
            allowed = self.vm_properties(template).get("template_for_dispvms")
            if not allowed or allowed.value != "True":
                raise InvalidInput(
                    f"VM {name}: {template} is no disposable template; set its"
                    " template_for_dispvms with qvm-prefs, or take another"
                )

    def _check_target(self, name, volume, pool, klass):
        driver = self.check_pool(pool, f"VM {name}: volume {volume}")
        if (driver == "linux-kernel") != (volume == "kernel"):
            raise InvalidInput(
                f"VM {name}: volume {volume} cannot lie in pool {pool} of driver {driver}; declare"
                " another pool"
            )
        if volume not in (*OWN[klass], "volatile", "kernel"):
            raise InvalidInput(
                f"VM {name}: the {volume} volume of a {klass} is a snapshot and lies with its"
                " template's; declare the pool there"
            )

    def _plan_new(self, name, klass, template, label, pool, wanted, clone_from):
        plan = Plan(klass=klass or "AppVM", label=label)
        if clone_from is not None:
            found = self._source(name, clone_from, "clone_from")
            if klass not in (None, found.klass):
                raise InvalidInput(
                    f"VM {name}: clone_from {clone_from} is a {found.klass}, not a {klass}; declare"
                    f" {found.klass}"
                )
            plan.klass, plan.copied = found.klass, clone_from
            check_klass(plan.klass, name)
        if plan.klass in ("AppVM", "DispVM"):
            plan.template = self._plan_template(name, plan, template)
        elif template is not None:
            self._source(name, template, "template")
            plan.copied = plan.copied or template
        if label is None and plan.copied is None:
            plan.label = "black" if plan.klass == "TemplateVM" else "red"
        if plan.label is not None:
            self._check_label_exists(name, plan.label)
        self._plan_volumes(name, plan, pool, wanted)
        if plan.copied:
            self.check_copying(name)
        new = {
            "created": name,
            "klass": plan.klass,
            "template": template if plan.copied else plan.template,
            "clone_from": clone_from,
            "label": plan.label,
            "pool": pool,
            "volumes": dict(plan.sizes) or None,
            "volume_pools": {v: o["pool"] for v, o in wanted.items() if "pool" in o} or None,
            "revisions_to_keep": {v: str(k) for v, k in plan.revisions.items()} or None,
        }
        plan.changes = {k: {"old": None, "new": v} for k, v in new.items() if v is not None}
        return plan

    def _plan_template(self, name, plan, template):
        if template is None and plan.copied:
            return None
        if template is None:
            if plan.klass == "DispVM":
                raise InvalidInput(f"VM {name}: a DispVM needs template, a disposable template")
            found = self.system_properties().get("default_template")
            template = found and found.value
        if not template:
            raise StoragePoolException(
                f"VM {name}: no template is declared and the system has no default one; declare"
                " template, or klass: StandaloneVM",
                waits_for=("VM", None),
            )
        self._check_template(name, plan.klass, template)
        return template

    def _plan_volumes(self, name, plan, pool, wanted):
        """Where the volumes will lie, that they may, and what is to be set on them."""
        defaults = self.default_pools()
        for volume in (*OWN[plan.klass], "volatile"):
            to = wanted.get(volume, {}).get("pool", pool)
            if to is not None:
                plan.pools[volume] = to
            elif not plan.copied and defaults.get(f"default_pool_{volume}"):
                self.check_growth(defaults[f"default_pool_{volume}"])
        for volume, options in wanted.items():
            if "pool" in options:
                plan.pools[volume] = options["pool"]
            if "size" in options:
                if volume not in (*OWN[plan.klass], "volatile"):
                    raise self._is_snapshot(name, volume)
                plan.sizes[volume] = options["size"]
            if "revisions_to_keep" in options:
                to = plan.pools.get(volume, defaults.get(f"default_pool_{volume}"))
                driver = self.check_pool(to, f"VM {name}: volume {volume}") if to else None
                keep = options["revisions_to_keep"]
                check_revisions(keep, driver, f"VM {name}: volume {volume}: revisions_to_keep")
                plan.revisions[volume] = keep
        needed = {}
        for volume, to in plan.pools.items():
            self._check_target(name, volume, to, plan.klass)
            needed.setdefault(to, 0)
            source = plan.copied and volume in OWN[plan.klass] and self.volume(plan.copied, volume)
            if source and source.pool != to:
                needed[to] += source.usage
        for to, size in needed.items():
            self.check_growth(to, size)
