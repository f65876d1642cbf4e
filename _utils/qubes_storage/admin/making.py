"""
R4: making a VM.

The daemon makes one of its own sizes, so what is declared beyond that is set on it afterwards. A
run that dies in between is finished by the next one, which finds that it differs. With
``create_only`` that one would leave it alone, so a journal is on the disk before the VM is, and
goes once it is as declared.
"""

import contextlib

from qubes_storage.admin.journal import Journal
from qubes_storage.admin.reading import vanished
from qubes_storage.admin.vm_plan import AdminVMPlan
from qubes_storage.admin.vm_words import check_volumes
from qubes_storage.exc import AlreadyThere, StoragePoolException
from qubes_storage.values import check_admin_vm_name


class AdminMaking(AdminVMPlan):
    """The part of :py:class:`~qubes_storage.admin.AdminSystem` that makes VMs."""

    @property
    def creations(self):
        """The journals of VMs that ``create_only`` leaves alone once they are as declared."""
        return Journal(self.root, "creation")

    def pending_creation(self, name):
        """The journal of a VM that is there and was not given all that it was to have, or None."""
        creation = self.creations.read(name)
        if creation is None or name not in self.listed():
            return None
        if creation["uuid"] is None:
            return creation if self._is_fresh(name, creation) else None
        return creation if creation["uuid"] == self._uuid(name) else None

    def _is_fresh(self, name, creation):
        """Whether a VM can be the one that a run made which died then: nobody has used it."""
        there = self.listed()[name]
        properties = self.vm_properties(name)
        is_ = {k: properties[k].value if k in properties else None for k in ("template", "label")}
        made = (there.klass, there.state, is_["template"] or None, is_["label"])
        if made != (creation["klass"], "Halted", creation["template"], creation["label"]):
            return False
        volumes = self.volumes(name).values()
        elsewhere = any(v.pool != creation["pools"].get(v.name, v.pool) for v in volumes)
        return not elsewhere and not any(volume.usage for volume in volumes if volume.save)

    @staticmethod
    def _creation(name, plan, declared, copied):
        """What a journal keeps of a VM that is to be made; only a copy gets some of it later."""
        volumes = check_volumes(name, declared.get("volumes"))
        later = declared if copied else {}
        return {
            "uuid": None,
            "klass": plan.klass,
            "template": plan.template,
            "label": plan.label,
            "pools": plan.pools,
            "declared": {
                "template": later.get("template"),
                "label": later.get("label"),
                "volumes": {
                    volume: {key: value for key, value in options.items() if key != "pool"}
                    for volume, options in volumes.items()
                },
            },
        }

    def create_vm(self, name, **declared):
        """
        Create a VM, its volumes in their pools, grown to the sizes declared.

        Whether it came to be is read afterwards: without a default_kernel the daemon answers
        nothing although the VM exists. One that was made and could not be grown stays, and
        :py:meth:`set_vm` finishes it. What a copy that was cut off left is removed first. Returns
        the changes.
        """
        self.refresh()
        if check_admin_vm_name(name) in self.listed() and not self.pending_copy(name):
            raise AlreadyThere(f"VM {name}: is there already; change it with qubes_vm.set")
        plan = self.vm_plan(name, **declared)
        if "created" not in plan.changes:
            return self.set_vm(name, **declared)
        if "unfinished" in plan.changes:
            self.drop_unfinished(name)
        self.creations.remove(name)  # of one that was to be made, and was not
        creation = None
        if declared.get("create_only"):
            creation = self._creation(name, plan, declared, plan.copied)
        if plan.copied:
            self.copy_vm(plan.copied, name, plan.klass, plan.pools)
            self.release(name, creation)
        else:
            with self._told(name, creation):
                self.make_vm(name, plan.klass, plan.template, plan.label, plan.pools)
        self.set_vm(name, **{**declared, "create_only": False})
        return plan.changes

    def release(self, name, creation):
        """Let a VM that is a whole copy be started; ``creation`` has what it still is to get."""
        if creation:
            self.creations.write(name, {**creation, "uuid": self._uuid(name)})
        self.finish_copy(name)

    @contextlib.contextmanager
    def _told(self, name, creation):
        """A journal of the creation of a VM, if it needs one, which goes if there is no such VM."""
        if not creation:
            yield
            return
        self.creations.write(name, creation)
        try:
            yield
        except Exception as err:
            with contextlib.suppress(StoragePoolException):
                self.refresh()
                if isinstance(err, AlreadyThere) or name not in self.listed():
                    self.creations.remove(name)
            raise
        self.creations.write(name, {**creation, "uuid": self._uuid(name)})

    def make_vm(self, name, klass, template, label, pools):
        """Create a VM and see that it is there and what was asked for."""
        verb = f"admin.vm.Create{'InPool' if pools else ''}.{klass}"
        words = [f"name={name}", f"label={label}", *(f"pool:{v}={p}" for v, p in pools.items())]
        answer = self.client.call(verb, arg=template or "", payload=" ".join(words))
        there = self.listed().get(name)
        if there is None and answer.ok:
            raise vanished(name)
        if there is None:
            raise StoragePoolException(f"VM {name}: was not created: {answer}")
        properties = self.vm_properties(name)
        is_ = properties["template"].value if "template" in properties else None
        if answer.kind == "exception" or (there.klass, is_) != (klass, template or None):
            raise AlreadyThere(
                f"VM {name}: someone else created it meanwhile, as {there.klass} on {is_}; run"
                " again"
            )
