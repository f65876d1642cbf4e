"""The methods of the Admin API that the test server has, by name."""

import os

from tests.r4.model import DRIVERS, REQUIRED, Crash, Fault, Pool, Refusal
from tests.r4.words import COLORS, LABELS, SAFE, boolean, method, number, token


def _not_halted(vm):
    return Fault("QubesVMNotHaltedError", f"Domain is not powered off: {vm.name!r}")


# pools


@method("admin.pool.List", arg=False, payload=False)
def pool_list(daemon, _dest, _arg, _payload):
    return "".join(f"{name}\n" for name in daemon.pools)


@method("admin.pool.ListDrivers", arg=False, payload=False)
def pool_list_drivers(_daemon, _dest, _arg, _payload):
    return "".join(f"{name} {' '.join(options)}\n" for name, options in DRIVERS.items())


@method("admin.pool.Info", arg=True, payload=False)
def pool_info(daemon, _dest, arg, _payload):
    return daemon.pool(arg).info()


@method("admin.pool.UsageDetails", arg=True, payload=False)
def pool_usage(daemon, _dest, arg, _payload):
    return "".join(f"{key}={value}\n" for key, value in daemon.pool(arg).usage().items())


@method("admin.pool.Add", arg=True, payload=True)
def pool_add(daemon, _dest, arg, payload):
    if not payload.isascii():
        raise Refusal("ProtocolError", "Pool parameters contains non-ASCII characters")
    options = {}
    for line in payload.splitlines():
        key, equals, value = line.partition("=")
        if not equals:
            raise Refusal("ProtocolError", "Options must be separated by equal sign")
        if key in options:
            raise Refusal("ProtocolError", "Options must be unique")
        options[key] = value
    if "name" not in options:
        raise Refusal("ProtocolError", "Pool configuration must contain key: name")
    name = options.pop("name")
    if not name:
        raise Crash("an empty name")
    if set(name) - set(SAFE + "-_."):
        raise Refusal("ProtocolError", f"Pool name must be in safe set: {SAFE}-_.")
    if name in daemon.pools:
        raise Refusal("QubesPoolInUseError", f"Storage pool is in use: {name!r}")
    unknown = [key for key in options if key not in DRIVERS[arg]]
    if unknown:
        if daemon.release == "later":
            raise Refusal("ProtocolError", "Unexpected driver options found")
        raise Fault("QubesException", f"unexpected driver options: {' '.join(unknown)}")
    missing = [key for key in REQUIRED[arg] if key not in options]
    if missing:
        if daemon.release == "4.2":
            raise Crash("TypeError")
        raise Fault("QubesException", f"missing required driver options: {' '.join(missing)}")
    daemon.pools[name] = Pool(daemon, name, arg, options)


@method("admin.pool.Remove", arg=True, payload=False)
def pool_remove(daemon, _dest, arg, _payload):
    pool = daemon.pool(arg)
    if any(vm.klass == "RemoteVM" for vm in daemon.vms.values()):
        raise Crash("AttributeError: 'RemoteVM' has no volumes")
    for vm in daemon.vms.values():
        if any(volume.pool is pool for volume in vm.volumes.values()):
            shown = repr(arg)
            if daemon.release == "later":
                shown = "<qubes.storage.reflink.ReflinkPool object at 0x7fb6dd0cf770>"
            raise Fault("QubesPoolInUseError", f"Storage pool is in use: {shown}")
    for name in daemon.globals.table:
        if name.startswith("default_pool") and daemon.globals.get(daemon, name)[0] == arg:
            raise Fault("QubesPoolInUseError", f"Storage pool is in use: set as {name}")
    del daemon.pools[arg]


@method("admin.pool.Set.revisions_to_keep", arg=True, payload=True)
def pool_set_revisions(daemon, _dest, arg, payload):
    pool = daemon.pool(arg)
    least = 0 if daemon.release == "4.2" else -1
    value = number(payload, "Revisions to keep", least - (daemon.release != "4.2"))
    if value < least:
        raise Refusal("ProtocolError", f"Value can't be lower than {least}")
    if pool.driver == "linux-kernel":
        raise Fault("QubesValueError", "LinuxKernel supports only revisions_to_keep=0")
    if pool.driver == "file" and value > 1:
        raise Crash("NotImplementedError")
    pool.options["revisions_to_keep"] = str(value)


@method("admin.pool.Set.ephemeral_volatile", arg=True, payload=True)
def pool_set_ephemeral(daemon, _dest, arg, payload):
    pool = daemon.pool(arg)
    value = boolean(payload)
    if pool.driver != "linux-kernel":
        pool.options["ephemeral_volatile"] = str(value)


@method("admin.pool.volume.List", arg=True, payload=False)
def pool_volumes(daemon, _dest, arg, _payload):
    pool = daemon.pool(arg)
    if pool.driver == "linux-kernel":
        try:
            return "".join(f"{name}\n" for name in os.listdir(daemon.path(pool.place())))
        except OSError as err:
            raise Crash(str(err)) from err
    return "".join(f"{vid}\n" for vid in pool.vids)


# properties of the system, labels, classes


def _get(daemon, holder, owner, name):
    if name not in holder.table:
        raise Fault("QubesNoSuchPropertyError", f"Invalid property {name!r} of {owner}")
    return holder.shown(daemon, name)


def _get_all(daemon, holder):
    return "".join(f"{name} {holder.shown(daemon, name)}\n" for name in holder.table)


@method("admin.property.Get", arg=True, payload=False)
def property_get(daemon, _dest, arg, _payload):
    return _get(daemon, daemon.globals, "Qubes", arg)


@method("admin.property.GetDefault", arg=True, payload=False)
def property_get_default(daemon, _dest, arg, _payload):
    kept = daemon.globals.set.pop(arg, None)
    value, kind, _ = daemon.globals.get(daemon, arg)
    if kept is not None:
        daemon.globals.set[arg] = kept
    return f"type={kind} {value}" if value is not None else ""


@method("admin.property.GetAll", arg=False, payload=False)
def property_get_all(daemon, _dest, _arg, _payload):
    return _get_all(daemon, daemon.globals)


@method("admin.property.List", arg=False, payload=False)
def property_list(daemon, _dest, _arg, _payload):
    return "".join(f"{name}\n" for name in daemon.globals.table)


@method("admin.property.Set", arg=True)
def property_set(daemon, _dest, arg, payload):
    daemon.set_property(daemon.globals, arg, payload)


@method("admin.property.Reset", arg=True, payload=False)
def property_reset(daemon, _dest, arg, _payload):
    daemon.globals.set.pop(arg, None)


@method("admin.label.List", arg=False, payload=False)
def label_list(_daemon, _dest, _arg, _payload):
    return "".join(f"{name}\n" for name in LABELS)


def _label(daemon, arg):
    if arg in LABELS:
        return LABELS.index(arg)
    if daemon.release == "later":
        raise Fault("QubesLabelNotFoundError", f"Label does not exist: {arg}")
    raise Fault("QubesValueError", "")


@method("admin.label.Get", arg=True, payload=False)
def label_get(daemon, _dest, arg, _payload):
    return f"0x{COLORS[_label(daemon, arg)]}"


@method("admin.label.Index", arg=True, payload=False)
def label_index(daemon, _dest, arg, _payload):
    return str(_label(daemon, arg) + 1)


@method("admin.vmclass.List", arg=False, payload=False)
def vmclass_list(daemon, _dest, _arg, _payload):
    return "".join(f"{name}\n" for name in daemon.classes())


@method("admin.deviceclass.List", arg=False, payload=False)
def deviceclass_list(_daemon, _dest, _arg, _payload):
    return "block\npci\n"


# VMs


@method("admin.vm.List", arg=False, payload=False, dest="any")
def vm_list(daemon, dest, _arg, _payload):
    if dest.name != "dom0":
        return dest.line()
    names = sorted(name for name in daemon.vms if name != "dom0")
    return "".join(daemon.vms[name].line() for name in ["dom0", *names])


@method("admin.vm.Remove", arg=False, payload=False, dest="any")
def vm_remove(daemon, vm, _arg, _payload):
    if vm.name == "dom0":
        raise Fault("QubesVMInUseError", "'dom0' cannot be removed")
    if daemon.uses(vm.name):
        gap = "" if daemon.release == "4.2" else "  "
        raise Fault(
            "QubesVMInUseError",
            f"Domain is in use: {vm.name!r};{gap}see 'journalctl -u qubesd -e' in dom0 for details",
        )
    if vm.running and vm.klass != "RemoteVM":
        raise _not_halted(vm)
    if vm.set.get("installed_by_rpm") == "True":
        raise Fault("QubesVMInUseError", f"VM installed by package manager: {vm.name}")
    for volume in vm.volumes.values():
        volume.pool.forget(volume.vid)
        volume.image(False)
    del daemon.vms[vm.name]


@method("admin.vm.Start", arg=False, payload=False, dest="any")
def vm_start(daemon, vm, _arg, _payload):
    if vm.running:
        return
    if daemon.release != "4.2" and vm.features.get("prohibit-start"):
        reason = vm.features["prohibit-start"]
        raise Fault("QubesVMNotStartedError", f"Domain {vm.name!r} may not start: {reason}")
    for volume in vm.volumes.values():
        volume.start()
    vm.running = True


@method("admin.vm.Kill", arg=False, payload=False, dest="any")
@method("admin.vm.Shutdown", payload=False, dest="any")
def vm_kill(_daemon, vm, _arg, _payload):
    if not vm.running:
        raise Fault("QubesVMNotStartedError", f"Domain is powered off: {vm.name!r}")
    for volume in vm.volumes.values():
        volume.stop()
    vm.running = False


@method("admin.vm.property.Get", arg=True, payload=False, dest="any")
def vm_property_get(daemon, vm, arg, _payload):
    return _get(daemon, vm, vm.name, arg)


@method("admin.vm.property.GetAll", arg=False, payload=False, dest="any")
def vm_property_get_all(daemon, vm, _arg, _payload):
    return _get_all(daemon, vm)


@method("admin.vm.property.List", arg=False, payload=False, dest="any")
def vm_property_list(_daemon, vm, _arg, _payload):
    return "".join(f"{name}\n" for name in vm.table)


@method("admin.vm.property.Set", arg=True, dest="any")
def vm_property_set(daemon, vm, arg, payload):
    daemon.set_property(vm, arg, payload)


@method("admin.vm.property.Reset", arg=True, payload=False, dest="any")
def vm_property_reset(_daemon, vm, arg, _payload):
    vm.set.pop(arg, None)


@method("admin.vm.tag.List", arg=False, payload=False, dest="any")
def tag_list(_daemon, vm, _arg, _payload):
    return "".join(f"{name}\n" for name in sorted(vm.tags))


@method("admin.vm.tag.Set", arg=True, payload=False, dest="any")
def tag_set(_daemon, vm, arg, _payload):
    vm.tags[arg] = None


@method("admin.vm.feature.List", arg=False, payload=False, dest="any")
def feature_list(_daemon, vm, _arg, _payload):
    return "".join(f"{name}\n" for name in vm.features)


@method("admin.vm.feature.Get", arg=True, payload=False, dest="any")
def feature_get(_daemon, vm, arg, _payload):
    if arg not in vm.features:
        raise Fault("QubesFeatureNotFoundError", f"Feature not set for domain {vm.name}: {arg}")
    return vm.features[arg]


@method("admin.vm.feature.Set", arg=True, dest="any")
def feature_set(_daemon, vm, arg, payload):
    vm.features[arg] = payload


@method("admin.vm.feature.Remove", arg=True, payload=False, dest="any")
def feature_remove(_daemon, vm, arg, _payload):
    if arg not in vm.features:
        raise Fault("QubesFeatureNotFoundError", f"Feature not set for domain {vm.name}: {arg}")
    del vm.features[arg]


@method("admin.vm.notes.Get", arg=False, payload=False, dest="any")
def notes_get(_daemon, vm, _arg, _payload):
    return vm.notes


@method("admin.vm.notes.Set", arg=False, dest="any")
def notes_set(_daemon, vm, _arg, payload):
    vm.notes = payload


@method("admin.vm.firewall.Get", arg=False, payload=False, dest="any")
def firewall_get(_daemon, vm, _arg, _payload):
    return vm.firewall


@method("admin.vm.firewall.Set", arg=False, dest="any")
def firewall_set(_daemon, vm, _arg, payload):
    vm.firewall = payload


# volumes; the third parameter is the volume itself


@method("admin.vm.volume.List", arg=False, payload=False, dest="any")
def volume_list(_daemon, vm, _arg, _payload):
    return "".join(f"{name}\n" for name in vm.volumes)


@method("admin.vm.volume.Info", arg=True, payload=False, dest="any")
def volume_info(_daemon, _vm, volume, _payload):
    return volume.info()


@method("admin.vm.volume.Resize", arg=True, payload=True, dest="any")
def volume_resize(_daemon, vm, volume, payload):
    volume.resize(number(payload, "Volume size", stripped=True), vm if vm.running else None)


@method("admin.vm.volume.Set.rw", arg=True, payload=True, dest="any")
def volume_set_rw(_daemon, vm, volume, payload):
    value = boolean(payload)
    if volume.name == "kernel":
        raise Fault("QubesValueError", "LinuxModules supports only read-only volumes")
    if vm.running:
        raise _not_halted(vm)
    volume.rw = value


@method("admin.vm.volume.Set.revisions_to_keep", arg=True, payload=True, dest="any")
def volume_set_revisions(daemon, vm, volume, payload):
    value = number(payload, "Revisions to keep", 0 if daemon.release == "4.2" else -1)
    if volume.name == "kernel":
        raise Fault("QubesValueError", "LinuxModules supports only revisions_to_keep=0")
    if value < -1:
        raise Fault("QubesValueError", "Invalid value for revisions_to_keep")
    if volume.pool.driver == "file" and value > 1:
        raise Crash("NotImplementedError")
    if value == -1 and vm.running:
        raise _not_halted(vm)
    volume.revisions_to_keep = str(value)


@method("admin.vm.volume.Set.ephemeral", arg=True, payload=True, dest="any")
def volume_set_ephemeral(_daemon, _vm, volume, payload):
    value = boolean(payload)
    if value and (volume.snap or volume.save or not volume.rw):
        raise Fault(
            "QubesValueError",
            "Cannot enable ephemeral on snap_on_start or save_on_stop or non-dom0 or not writable"
            " volume",
        )
    volume.set_ephemeral = value


@method("admin.vm.volume.ListSnapshots", arg=True, payload=False, dest="any")
def volume_revisions(_daemon, _vm, volume, _payload):
    return "".join(f"{name}\n" for name in volume.list_revisions())


@method("admin.vm.volume.Revert", arg=True, payload=True, dest="any")
def volume_revert(_daemon, vm, volume, payload):
    if set(payload) - set(SAFE + ":-_."):
        raise Refusal("ProtocolError", f"Revision name must be in safe set: {SAFE}:-_.")
    volume.revert(payload, vm.running)


@method("admin.vm.volume.Clear", arg=True, payload=False, dest="any")
def volume_clear(_daemon, _vm, volume, _payload):
    if not volume.save:
        raise Crash("NotImplementedError")
    volume.commit("")


@method("admin.vm.volume.CloneFrom", arg=True, payload=False, dest="any")
def volume_clone_from(daemon, vm, volume, _payload):
    made = token()
    daemon.tokens[made] = (vm.name, volume.name)
    return made


@method("admin.vm.volume.CloneTo", arg=True, payload=True, dest="any")
def volume_clone_to(daemon, _vm, volume, payload):
    found = daemon.tokens.pop(payload.strip(), None)
    if found is None:
        raise Refusal(
            "QubesVolumeCopyTokenNotFoundError", "'Token to clone volume of qube was not found'"
        )
    source = daemon.vms.get(found[0])
    volume.import_from(
        source.volumes[found[1]] if source else None, bool(source and source.running)
    )
