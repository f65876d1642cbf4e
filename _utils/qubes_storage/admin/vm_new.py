"""R4: what a new VM needs, validated and planned."""

from qubes_storage.admin.pool_plan import check_revisions
from qubes_storage.admin.vm_words import OWN, SIZES, Plan, check_klass
from qubes_storage.adminapi import lines
from qubes_storage.exc import InvalidInput, StoragePoolException
from qubes_storage.values import check_admin_vm_name


class AdminVMNew:
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that plans new VMs."""

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

    def _there(self, name):
        """What admin.vm.List says of a VM that another needs, or None."""
        return self.listed().get(name)

    def _source(self, name, source, word):
        moving = self.pending_move(check_admin_vm_name(source))
        if moving:
            raise StoragePoolException(
                f"VM {name}: {source}: its move to pool {moving['pool']} was cut off"
                f" ({moving['path']}); finish it with qubes_vm.migrate {source} {moving['pool']}",
                waits_for=[("VM", source)],
            )
        found = self._there(source)
        if found is None:
            raise StoragePoolException(
                f"VM {name}: its {word} {source} is not there; declare or create it first",
                waits_for=[("VM", source)],
            )
        copying = self.pending_copy(source)
        if copying and not copying["whole"]:
            raise StoragePoolException(
                f"VM {name}: {source}: {self.said_of_copy(copying)}; have it copied again first",
                waits_for=[("VM", source)],
            )
        return found

    def _check_template(self, name, klass, template):
        """The VM that one of a class can run on."""
        found = self._source(name, template, "template")
        base = {"AppVM": "TemplateVM", "DispVM": "AppVM"}.get(klass)
        if found.klass != base:
            raise InvalidInput(
                f"VM {name}: {template} is of class {found.klass}; {klass} runs on {base}"
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

    def _copied_volumes(self, name, plan):
        """``{volume: Volume}`` of the VM that a new one is a copy of; raises where it cannot be."""
        source = plan.copied
        found = self.volumes(source)
        runs = self.get_listed(source).state != "Halted"
        for volume in OWN[plan.klass]:
            if volume not in found or found[volume].snap:
                raise InvalidInput(
                    f"VM {name}: {source} has no {volume} volume of its own to copy, as a"
                    f" {plan.klass} needs; take its template, or another VM"
                )
            pool = found[volume].pool
            if runs and self.check_pool(pool, f"VM {source}: volume {volume}") == "file":
                raise StoragePoolException(
                    f"VM {name}: {source} is running, and its {volume} volume lies in pool {pool},"
                    " whose driver file copies only VMs that are halted; shut it down"
                )
        return found

    def plan_new(self, name, klass, template, label, pool, wanted, clone_from):
        if name == "Domain-0":
            raise InvalidInput(f"VM {name}: is Xen's name of dom0; take another")
        if "." in name and not self.is_43():
            raise InvalidInput(
                f"VM {name}: R4.2 takes no dot in the name of a VM; take another, with _ or -"
            )
        if label is not None:
            self._check_label_exists(name, label)
        plan = Plan(klass=klass or "AppVM", label=label)
        if clone_from is not None:
            found = self._source(name, clone_from, "clone_from")
            if klass not in (None, found.klass):
                raise InvalidInput(
                    f"VM {name}: clone_from {clone_from} is of class {found.klass}, not {klass};"
                    f" declare {found.klass}"
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
                waits_for=[("VM", None)],
            )
        self._check_template(name, plan.klass, template)
        return template

    def _plan_volumes(self, name, plan, pool, wanted):
        """Where the volumes will lie, that they may, and what is to be set on them."""
        defaults = self.default_pools()
        sources = self._copied_volumes(name, plan) if plan.copied else {}
        needed = {}
        for volume in (*OWN[plan.klass], "volatile"):
            to = wanted.get(volume, {}).get("pool", pool)
            if to is None and volume in sources:
                to = sources[volume].pool
            if to is not None:
                plan.pools[volume] = to
            elif defaults.get(f"default_pool_{volume}") and not plan.copied:
                self.check_pool(defaults[f"default_pool_{volume}"], f"VM {name}: volume {volume}")
                needed[defaults[f"default_pool_{volume}"]] = 0
        for volume, options in wanted.items():
            if "pool" in options:
                plan.pools[volume] = options["pool"]
            if "size" in options:
                if volume not in (*OWN[plan.klass], "volatile"):
                    raise self._is_snapshot(name, volume)
                copied = volume in sources and volume in OWN[plan.klass]
                made = sources[volume].size if copied else SIZES[volume]
                plan.sizes[volume] = max(options["size"], made)
            if "revisions_to_keep" in options:
                to = plan.pools.get(volume, defaults.get(f"default_pool_{volume}"))
                driver = self.check_pool(to, f"VM {name}: volume {volume}") if to else None
                keep = options["revisions_to_keep"]
                what = f"VM {name}: volume {volume}: revisions_to_keep"
                check_revisions(keep, driver, what)
                self.check_settable(keep, what)
                plan.revisions[volume] = keep
        for volume, to in plan.pools.items():
            self._check_target(name, volume, to, plan.klass)
            needed.setdefault(to, 0)
            source = sources.get(volume)
            if source and source.save and source.pool != to:
                needed[to] += source.usage
        for to, size in needed.items():  # last: who waits for a mount waits for nothing else
            self.check_growth(to, size)
