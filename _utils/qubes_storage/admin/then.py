"""
R4: a machine as the states before one in a run will leave it; see ``foretelling``.

What a state needs of a pool or VM that they make is taken from what they declare, so that whatever
else is wrong with it is told; then it waits.
"""

import contextlib

from qubes_storage.admin.pools import DEFAULTS, FOLLOWING
from qubes_storage.admin.reading import Listed
from qubes_storage.admin.vm_words import OWN, check_volumes
from qubes_storage.adminapi import Property
from qubes_storage.exc import StoragePoolException


class AdminThen:
    """What differs from :py:class:`~qubes_storage.admin.AdminSystem`; ``run`` is the run."""

    _later = None  # while something is planned: {what it waits for: True}, as waits_for has it

    @contextlib.contextmanager
    def _all_told(self, who):
        """Raise if the body waits for what they make, and nothing else is wrong."""
        later = self._later = {}
        try:
            yield
        finally:
            self._later = None
        if later:
            made = " and ".join(f"{kind} {what}" for kind, what in later)
            raise StoragePoolException(f"{who}: {made} is to be made", [*later])

    def vm_plan(self, name, **declared):
        """The plan of a VM; raises if it waits."""
        with self._all_told(f"VM {name}"):
            return super().vm_plan(name, **declared)

    def default_pools_diff(self, **pools):
        """As it will be; raises if it waits."""
        with self._waiting(), self._all_told("default pools"):
            return super().default_pools_diff(**pools)

    # pools

    def pool_config(self, name):
        """``{option: value}`` of a pool; None for one that goes, and for one that is to be made."""
        return None if self.run.pools.get(name, ()) is None else super().pool_config(name)

    def _is_new_pool(self, name):
        return self.pool_config(name) is None and self.run.pools.get(name) is not None

    def check_pool(self, name, what):
        """The driver of a pool, also of one that is to be made."""
        if self._later is not None and self._is_new_pool(name):
            self._later["pool", name] = True
            return self.run.driver(name)
        return super().check_pool(name, what)

    def check_growth(self, name, needed=0):
        """What is free in a pool that is to be made, nobody can tell."""
        if not self._is_new_pool(name):
            super().check_growth(name, needed)

    def system_properties(self):
        """``{property: Property}`` of the system, with the default pools that they set."""
        found = super().system_properties()
        for pools in self.run.defaults(DEFAULTS):
            for key in sorted(pools):  # default_pool first: those that follow it change with it
                follow = [k for k in FOLLOWING if k in found and found[k].default]
                for each in follow if key == "default_pool" else ():
                    found[each] = found[each]._replace(value=pools[key])
                found[key] = found[key]._replace(value=pools[key], default=False)
        return found

    def vms_in(self, pool):
        """The VMs that a pool keeps or gets; those in it now, if all of them leave it."""
        there = super().vms_in(pool)
        names = dict.fromkeys([*there, *sorted(self.run.vms())])
        return [vm for vm in names if pool in self._places(vm).values()] or there

    def _places(self, vm):
        """``{volume: pool}`` of a VM."""
        if self.run.goes(vm):
            return {}
        found = self.volumes(vm, kernel=True) if vm in self.listed() else {}
        places = {volume.name: volume.pool for volume in found.values()}
        if found and self._klass(vm) == "AppVM":
            places.update(self._follow(vm, [v.name for v in found.values() if v.snap]))
        if vm not in self.run.vms():
            return places
        klass = self._klass(vm) or "AppVM"
        told = self.run.declared(vm)
        volumes = check_volumes(vm, told.get("volumes"))
        wanted = {v: o["pool"] for v, o in volumes.items() if "pool" in o}
        pool = told.get("pool")
        own = {v: wanted.get(v, pool) for v in OWN[klass] if wanted.get(v, pool)}
        if found:
            if own.get("private") not in (None, places["private"]):
                places["volatile"] = own["private"]  # it moves along
        else:
            source = told.get("clone_from") or (klass in _COPIES and told.get("template"))
            default = self.default_pools()
            places = {v: default.get(f"default_pool_{v}") for v in (*OWN[klass], "volatile")}
            places.update(self._places(source) if source else {})
            places["volatile"] = pool or places["volatile"]
        return {**places, **own, **wanted}

    def _follow(self, vm, snapshots):
        """``{volume: pool}`` of volumes that lie where those of a VM's template will."""
        template = self._runs_on(vm) or self.vm_properties(vm)["template"].value
        origins = self._places(template)
        return {volume: origins[volume] for volume in snapshots if volume in origins}

    # VMs

    def _klass(self, name):
        """The class of a VM, None for one that is to be a clone of what is not there yet."""
        there = self.listed().get(name)
        if there is not None:
            return there.klass
        told = self.run.declared(name)
        source = told.get("clone_from")
        return told.get("klass") or (self._klass(source) if source else "AppVM")

    def _there(self, name):
        """What admin.vm.List will say of a VM that another needs."""
        if self.run.goes(name):
            return None
        found = super()._there(name)
        if found is None and name in self.run.vms() and self._klass(name):
            self._later["VM", name] = True
            return Listed(self._klass(name), "Halted", None)
        return found

    def vm_properties(self, name):
        """What other states set of a VM that is to be made, nobody can tell: it may be right."""
        if name in self.run.vms() and self.run.others and name not in self.listed():
            return {"template_for_dispvms": Property("True", "bool", False)}
        return super().vm_properties(name)

    def _copied_volumes(self, name, plan):
        """The volumes of a VM that is to be made are not there."""
        return super()._copied_volumes(name, plan) if plan.copied in self.listed() else {}

    def named_by(self, name):
        """What names a VM, or will; what names it now, if none of that will."""
        now = super().named_by(name)
        stay = [user for user in now if not self._leaves(*user, name)]
        come = [(vm, "template") for vm in sorted(self.run.vms()) if self._runs_on(vm) == name]
        return [*stay, *(user for user in come if user not in now)] or now

    def _leaves(self, vm, key, used):
        if vm is None:
            return False
        return self.run.goes(vm) or (key == "template" and self._runs_on(vm) not in (None, used))

    def _runs_on(self, vm):
        """The template that they have a VM run on; None for no change and for a copy."""
        if self._klass(vm) not in ("AppVM", "DispVM"):
            return None
        told = self.run.declared(vm)
        if told.get("template") or vm in self.listed():
            return told.get("template")
        source = told.get("clone_from")
        if source:
            found = self.vm_properties(source).get("template") if source in self.listed() else None
            return found.value if found else self._runs_on(source)
        found = self.system_properties().get("default_template")
        return found and found.value

    def comes(self, kind, what, used=None):
        """Whether states before this one mend what ``waits_for`` of an error tells of."""
        if kind == "pool of":
            return used not in self._places(what).values()
        if (kind, what) == ("VM", None):  # unlike in R3.2, no template becomes the default itself
            return self.run.alone or self.run.others
        if used is not None:
            return self._leaves(what or None, kind.removesuffix(" of"), used)
        return super().comes(kind, what)


_COPIES = ("TemplateVM", "StandaloneVM")  # their template is what they are copied from
