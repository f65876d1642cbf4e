"""R4: what a declared VM needs, compared with what the daemon has."""

import contextlib
import functools

from qubes_storage.admin.pool_plan import check_revisions
from qubes_storage.admin.vm_new import AdminVMNew
from qubes_storage.admin.vm_words import OWN, Plan, Seen, check_klass, check_volumes
from qubes_storage.adminapi import check_label, fresh_if_refused
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.values import check_admin_vm_name


class AdminVMPlan(AdminVMNew):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that plans VMs."""

    @fresh_if_refused
    def vm_diff(self, name, **declared):
        """
        What :py:meth:`create_vm` or :py:meth:`set_vm` would change, ``{}`` for nothing; entries are
        ``{"old": ..., "new": ...}``, ``created`` for a new VM. Raises what they would raise.

        Keywords: klass, template, label, pool, volumes, clone_from, root_copy_from, root_move_from,
        migrate, create_only.
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
        root_move_from=None,
        migrate=False,
        create_only=False,
    ):
        """The :py:class:`Plan` of a declared VM."""
        if root_copy_from is not None or root_move_from is not None:
            raise NotSupported(
                f"VM {name}: backend admin cannot take a root image from a file; create the VM and"
                " run qvm-volume import NAME:root FILE"
            )
        if klass is not None:
            check_klass(klass, name)
        if label is not None:
            check_label(label, f"VM {name}")
        wanted = check_volumes(name, volumes)
        moving = self.pending_move(check_admin_vm_name(name))
        if moving and create_only:
            return Plan()
        if moving:
            return self._plan_moving(name, moving, klass, template, label, pool, wanted, migrate)
        there = self.listed().get(name)
        copying = self.pending_copy(name)
        if there is None or (copying and not copying["whole"]):
            if there is not None:
                self._check_declared_again(name, copying, klass, template, clone_from)
            plan = self.plan_new(name, klass, template, label, pool, wanted, clone_from)
            left = copying
        else:
            begun = self.pending_creation(name)
            left = copying or begun
            if begun and not copying:
                if create_only:  # the rest of it, and nothing else
                    klass = template = label = pool = None
                    wanted = {v: {k: o[k] for k in o if k != "pool"} for v, o in wanted.items()}
                    migrate = False
                template, label, wanted = _with_rest(name, begun, template, label, wanted)
            plan = Plan()
            if left or not create_only:
                with unfinished_told(begun):
                    seen = self._seen(name, there)
                    plan = self._compare_vm(
                        name, seen, klass, template, label, pool, wanted, migrate
                    )
        if left:
            plan.changes["unfinished"] = {"old": left["path"], "new": None}
        return plan

    def _check_declared_again(self, name, copying, klass, template, clone_from):
        self.check_hollow(name, copying)
        is_copy = klass in ("TemplateVM", "StandaloneVM") and template is not None
        if clone_from is None and not is_copy:
            raise StoragePoolException(
                f"VM {name}: {self.said_of_copy(copying)}; declare clone_from (or the template of a"
                " StandaloneVM or TemplateVM) to have it copied again, or remove it with"
                f" qubes_vm.remove {name} purge=true"
            )

    @staticmethod
    def _unfinished(name, moving, pool, migrate, wanted=()):
        to, own = moving["pool"], OWN[moving["klass"]]
        declared = {volume: pool if volume in own else None for volume in moving["asked"]}
        declared.update({v: wanted[v]["pool"] for v in wanted if wanted[v].get("pool")})
        differs = [v for v, asked in moving["asked"].items() if declared[v] not in (None, asked)]
        if not migrate or differs:
            raise StoragePoolException(
                f"VM {name}: its move to pool {to} was cut off and {moving['path']} tells where;"
                f" finish it with qubes_vm.migrate {name} {to}, or declare pool: {to} and"
                " migrate: true"
            )
        return {"unfinished": {"old": moving["path"], "new": None}}

    def _plan_moving(self, name, moving, klass, template, label, pool, wanted, migrate):
        """What the rest of a move that was cut off changes, and what differs once it is done."""
        changes = self._unfinished(name, moving, pool, migrate, wanted)
        self.check_goes_on(name, moving)
        begun = self.creations.read(name)
        if begun and begun["uuid"] in (moving["uuid"], moving["made"] or moving["uuid"]):
            template, label, wanted = _with_rest(name, begun, template, label, wanted)
        seen = self.as_moved(name, moving)
        plan = self._compare_vm(name, seen, klass, template, label, pool, wanted, migrate)
        return Plan(changes={**changes, **plan.changes})

    @staticmethod
    def _other_class(name, old, new):
        return StoragePoolException(
            f"VM {name}: is of class {old}, not {new}; a class never changes: declare {old}, or"
            " remove the VM first"
        )

    def _seen(self, name, there):
        """A VM as it is."""
        volume = functools.partial(self.get_volume, name)
        return Seen(there.klass, there.state, self.get_properties(name), volume, False)

    def _compare_vm(self, name, seen, klass, template, label, pool, wanted, migrate):
        if seen.klass not in OWN:
            raise InvalidInput(f"VM {name}: a {seen.klass} has no volumes; declare other VMs")
        if klass not in (None, seen.klass):
            raise self._other_class(name, seen.klass, klass)
        plan = Plan(klass=seen.klass)
        properties = seen.properties
        if label is not None and label != properties["label"].value:
            self._check_label_exists(name, label)
            plan.label = label
            plan.changes["label"] = {"old": properties["label"].value, "new": label}
        if template is not None and "template" in properties:
            self._compare_template(name, seen, properties["template"].value, template, plan)
        self._compare_volumes(name, seen, plan, wanted, pool, migrate)
        return plan

    def _compare_template(self, name, seen, old, template, plan):
        if template == old:
            return
        self._check_template(name, seen.klass, template)
        if seen.state != "Halted":
            raise StoragePoolException(
                f"VM {name}: runs on {old}, not on {template}, and is {seen.state}; a template"
                " changes only while the VM is halted: shut it down"
            )
        plan.template = template
        plan.changes["template"] = {"old": old, "new": template}

    def _compare_volumes(self, name, seen, plan, wanted, pool, migrate):
        own = OWN[plan.klass] or ("volatile",)  # all that a DispVM has in a pool of its own
        wanted_pools = {volume: pool for volume in own if pool is not None}
        wanted_pools.update((v, o["pool"]) for v, o in wanted.items() if "pool" in o)
        moved, old_sizes, old_revisions, grown = {}, {}, {}, set()
        for volume in sorted({*wanted_pools, *wanted}):
            found = seen.volume(volume)
            options = wanted.get(volume, {})
            to = wanted_pools.get(volume, found.pool)
            if to != found.pool:
                self._check_target(name, volume, to, plan.klass)
                moved[volume] = (found.pool, to)
            if "size" in options and found.snap:
                raise self._is_snapshot(name, volume)
            if options.get("size", 0) > found.size and not found.rw:
                raise StoragePoolException(
                    f"VM {name}: volume {volume} is read-only and cannot grow; run qvm-volume"
                    f" config {name}:{volume} rw True, or leave its size out"
                )
            if options.get("size", 0) > found.size:
                grown.add(to)
                plan.sizes[volume] = options["size"]
                old_sizes[volume] = found.size
            keep = options.get("revisions_to_keep")
            if keep is not None and str(keep) != found.revisions_to_keep:
                driver = self.check_pool(to, f"VM {name}: volume {volume}")
                what = f"VM {name}: volume {volume}: revisions_to_keep"
                check_revisions(keep, driver, what)
                self.check_settable(keep, what)
                if keep < 0 and seen.state != "Halted":
                    raise StoragePoolException(
                        f"{what}: {keep} can be set only while the VM is halted; shut it down"
                    )
                plan.revisions[volume] = keep
                old_revisions[volume] = found.revisions_to_keep
        if moved:
            self._compare_pools(name, seen, plan, moved, migrate)
        for to in sorted(grown):
            self.check_growth(to)
        if plan.sizes:
            plan.changes["volumes"] = {"old": old_sizes, "new": dict(plan.sizes)}
        if plan.revisions:
            new = {v: str(keep) for v, keep in plan.revisions.items()}
            plan.changes["revisions_to_keep"] = {"old": old_revisions, "new": new}

    def _compare_pools(self, name, seen, plan, moved, migrate):
        volume, (old, new) = next(iter(moved.items()))
        if not OWN[plan.klass]:
            raise NotSupported(
                f"VM {name}: its {volume} volume lies in pool {old}, not in {new}, and a"
                f" {plan.klass} has no volumes of its own to move; declare pool: {old}, or move its"
                " template"
            )
        if not migrate:
            raise StoragePoolException(
                f"VM {name}: its {volume} volume lies in pool {old}, not in {new}; declare"
                f" migrate: true to move it (the VM has to be halted), or pool: {old}"
            )
        plan.pools = {volume: new for volume, (_, new) in moved.items()}
        if not seen.moves:
            self.check_move(name, plan.pools)
        olds, news = ({v: pools[n] for v, pools in moved.items()} for n in (0, 1))
        plain = len(set(olds.values())) == 1 and len(set(news.values())) == 1
        plan.changes["pool"] = (
            {"old": next(iter(olds.values())), "new": next(iter(news.values()))}
            if plain
            else {"old": olds, "new": news}
        )


def _with_rest(name, creation, template, label, wanted):
    """What is declared of a VM, and of the rest what the run that made it was to give it."""
    begun = creation["declared"]
    found = check_volumes(name, begun["volumes"])
    for volume, options in wanted.items():
        found[volume] = {**found.get(volume, {}), **options}
    return (
        begun["template"] if template is None else template,
        begun["label"] if label is None else label,
        found,
    )


@contextlib.contextmanager
def unfinished_told(creation):
    """Errors over a VM that was made in part name the journal of its ``creation``, if any."""
    try:
        yield
    except StoragePoolException as err:
        if creation:
            err.args = (
                f"{err}; {creation['path']} has what it was to get at its creation: declare other"
                " sizes or revisions_to_keep, or remove that file to leave it as it is",
            )
        raise
