"""What qubesd keeps: pools, volumes and VMs, with the quirks of each driver and release."""

import os
import uuid

GIB = 1024**3
EXTENT = 4 * 1024**2  # what LVM allocates at once
SIZES = {"private": 2 * GIB, "root": 10 * GIB, "volatile": 10 * GIB}
VOLUMES = ("root", "private", "volatile", "kernel")
DRIVERS = {
    "callback": ("conf_id",),
    "file": ("revisions_to_keep", "dir_path", "ephemeral_volatile"),
    "file-reflink": ("revisions_to_keep", "dir_path", "setup_check", "ephemeral_volatile"),
    "linux-kernel": ("dir_path",),
    "lvm_thin": ("revisions_to_keep", "volume_group", "thin_pool", "ephemeral_volatile"),
    "zfs": ("revisions_to_keep", "container", "ephemeral_volatile", "snap_on_start_forensics"),
}
REQUIRED = {
    "callback": ("conf_id",),
    "file": ("dir_path",),
    "file-reflink": ("dir_path",),
    "linux-kernel": ("dir_path",),
    "lvm_thin": ("volume_group", "thin_pool"),
    "zfs": ("container",),
}


class Fault(Exception):
    """A QubesException: every release answers it."""

    def __init__(self, error, message):
        super().__init__(message)
        self.error = error
        self.message = message


class Refusal(Fault):
    """A ProtocolError or PermissionDenied and the like: 4.2 and 4.3 answer nothing."""


class Crash(Exception):
    """Any other exception in the daemon: no release answers anything."""


def to_bool(text):
    """A boolean property as qubesd reads one."""
    if text.lower() in ("1", "yes", "true", "on"):
        return True
    if text.lower() in ("0", "no", "false", "off"):
        return False
    raise Fault("QubesValueError", f"Invalid literal for boolean property: {text!r}")


class Pool:
    """A pool: its driver, its options as text, and the volumes it was told of."""

    def __init__(self, daemon, name, driver, options):
        self.daemon = daemon
        self.name = name
        self.driver = driver
        self.options = options
        self.vids = []
        self.setup()

    def setup(self):
        options = self.options
        if self.driver == "callback":
            raise Crash("no such conf_id")
        if self.driver == "lvm_thin":
            where = f"{options['volume_group']}/{options['thin_pool']}"
            if where not in self.daemon.thin_pools:
                raise Fault("StoragePoolException", f"Thin pool {where} does not exist")
        if self.driver == "zfs":
            raise Fault("StoragePoolException", "ZFS is not available on this system")
        if self.driver == "file" and int_or_crash(options.get("revisions_to_keep", "1")) > 1:
            raise Crash("NotImplementedError")
        if self.driver != "linux-kernel":
            options.setdefault("revisions_to_keep", "1")
            given = options.get("ephemeral_volatile", "False")
            if self.daemon.release != "4.2":
                if given.lower() not in ("true", "1", "on", "false", "0", "off"):
                    raise Crash("not a boolean")
                given = str(given.lower() in ("true", "1", "on"))
            options["ephemeral_volatile"] = given
        check = options.pop("setup_check", "True")
        if "dir_path" in options:
            self.make_dir(to_bool(check))

    def make_dir(self, check):
        path = self.options["dir_path"]
        if not path.startswith("/"):
            raise Crash("relative")
        path = self.options["dir_path"] = os.path.normpath(path)
        if self.driver == "linux-kernel":
            return
        if self.driver == "file-reflink" and check:
            if not os.path.isdir(self.daemon.path(os.path.dirname(path))):
                raise Crash("FileNotFoundError")
            if not path.startswith(self.daemon.reflink):
                later = "live with delays on VM startup/shutdown/etc. and wasted disk space, pass"
                now = "live with VM startup delays and wasted disk space, pass"
                option = "the 'setup_check=False' option."
                if self.daemon.release != "later":
                    later, option = now, 'the "setup_check=False" option.'
                raise Fault(
                    "StoragePoolException",
                    f"The filesystem for '{path}' does not support reflinks. If you can {later}"
                    f" {option}",
                )
        try:
            for place in (path, f"{path}/appvms", f"{path}/vm-templates"):
                if not os.path.isdir(self.daemon.path(place)):
                    os.mkdir(self.daemon.path(place))
        except OSError as err:
            raise Crash(str(err)) from err

    def place(self):
        options = self.options
        if self.driver == "lvm_thin":
            return options["volume_group"]
        return options.get("dir_path")

    def info(self):
        found = {"driver": self.driver, "name": self.name, **self.options}
        lines = [f"{key}={found[key]}\n" for key in sorted(found)]
        usage = self.usage()
        if usage:
            lines.append(f"size={usage['data_size']}\nusage={usage['data_usage']}\n")
        if "dir_path" in self.options:
            inside = [
                (len(other.options["dir_path"]), other.name)
                for other in self.daemon.pools.values()
                if other is not self
                and "dir_path" in other.options
                and (self.options["dir_path"] + "/").startswith(other.options["dir_path"] + "/")
            ]
            if inside:
                lines.append(f"included_in={max(inside)[1]}\n")
        return "".join(lines)

    def usage(self):
        if self.driver == "linux-kernel":
            return {}
        if self.driver == "lvm_thin":
            options = self.options
            return self.daemon.thin_pools[f"{options['volume_group']}/{options['thin_pool']}"]
        return self.daemon.usage.get(self.name, {"data_size": 256 * GIB, "data_usage": 25 * GIB})

    def told(self, vid):
        """The file driver keeps a list of every volume it was ever told of, again and again."""
        if self.driver == "file" or vid not in self.vids:
            self.vids.append(vid)

    def forget(self, vid):
        if self.driver != "file" and vid in self.vids:
            self.vids.remove(vid)


def int_or_crash(text):
    try:
        return int(text)
    except ValueError as err:
        raise Crash(str(err)) from err


class Volume:
    """A volume of a VM. ``data`` is what it holds: some text instead of an image."""

    def __init__(self, daemon, pool, vm, name):
        self.daemon = daemon
        self.pool = pool
        self.name = name
        self.vid = f"{vm.subdir}/{vm.name}/{name}"
        if pool.driver == "lvm_thin":
            self.vid = f"{pool.place()}/vm-{vm.name}-{name}"
        self.snap = name in vm.snapshots()
        self.rw = name != "kernel"
        self.save = self.rw and not self.snap and name != "volatile"
        self.source = vm.origin().volumes[name] if self.snap else None
        self.size = self.source.size if self.snap else SIZES.get(name, 0)
        self.revisions_to_keep = pool.options.get("revisions_to_keep", "0")
        if not self.save and pool.driver == "file":
            self.revisions_to_keep = "0"
        self.set_ephemeral = None  # else it is that of its pool
        self.data = "" if self.rw else None
        self.dirty = None  # what a running VM writes
        self.clean_size = self.size
        self.cow = self.old = False
        self.revisions = {}
        self.next_revision = 1
        pool.told(self.vid)

    @property
    def ephemeral(self):
        if self.set_ephemeral is not None:
            return self.set_ephemeral
        kept = self.snap or self.save or not self.rw
        return not kept and self.pool.options.get("ephemeral_volatile") == "True"

    def path(self):
        place = self.pool.place()
        if self.pool.driver == "file":
            return f"{place}/{(self.source or self).vid}.img"
        if self.pool.driver == "file-reflink":
            return f"{place}/{self.vid}-dirty.img"
        return f"/dev/{self.vid}"

    def image(self, there):
        """Make or remove the file that keeps the volume, for those who look at the disk."""
        if not self.save or self.pool.driver not in ("file", "file-reflink"):
            return
        path = self.daemon.path(f"{self.pool.place()}/{self.vid}.img")
        if there:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(self.data or "")
        elif os.path.exists(path):
            os.unlink(path)

    def info(self):
        return (
            f"pool={self.pool.name}\nvid={self.vid}\nsize={self.size}\n"
            f"usage={4096 * len(self.data or '')}\nrw={self.rw}\n"
            f"source={self.source.vid if self.source else ''}\npath={self.path()}\n"
            f"save_on_stop={self.save}\nsnap_on_start={self.snap}\n"
            f"revisions_to_keep={self.revisions_to_keep}\nephemeral={self.ephemeral}\n"
            "is_outdated=False\n"
        )

    def start(self):
        if self.data is None and self.save:
            raise Fault("StoragePoolException", f"Missing image file: {self.path()}.")
        if self.source:
            self.size = self.source.size
        self.dirty, self.clean_size = self.data, self.size
        if self.save:
            self.cow = True

    def stop(self):
        if self.save:
            self.commit(self.dirty)
            self.old, self.cow = self.old or self.cow, True
        self.dirty = None

    def restarted(self):
        """What a start of the daemon does to a halted VM's volume."""
        if self.save:
            self.old, self.cow = self.cow, True

    def commit(self, data):
        """New content; the file-reflink and lvm_thin drivers keep the old one as a revision."""
        if self.pool.driver in ("file-reflink", "lvm_thin"):
            self.revisions[str(self.next_revision)] = self.data
            self.next_revision += 1
            keep = max(int(self.revisions_to_keep), 0)
            for revision in list(self.revisions)[: max(len(self.revisions) - keep, 0)]:
                del self.revisions[revision]
        self.data = data
        self.image(True)

    def list_revisions(self):
        if self.pool.driver == "file":
            return ["old"] if self.old and self.save else []
        return list(self.revisions)

    def revert(self, revision, running):
        if revision not in self.list_revisions():
            raise Crash("QubesVolumeRevisionNotFoundError")
        if self.pool.driver == "file":
            raise Crash("NotImplementedError")
        if running:
            raise Fault("StoragePoolException", f"Cannot revert: {self.vid} is not cleanly stopped")
        data = self.revisions.pop(revision)
        self.commit(data)

    def resize(self, size, running):
        if self.name == "kernel":
            raise Crash("kernel")
        if self.pool.driver == "file":
            if self.snap:
                raise Fault(
                    "StoragePoolException",
                    "Cannot resize volume based on a template - resizethe template instead",
                )
            if not self.rw:
                raise Fault("StoragePoolException", f"Can not resize readonly volume {self.vid}")
            if size < self.size and self.daemon.release != "later":
                raise Fault(
                    "StoragePoolException",
                    f"For your own safety, shrinking of {self.name} is disabled. If you really"
                    f" know what you are doing, use `truncate` on {self.vid} manually.",
                )
        elif not self.rw:
            raise Fault("StoragePoolException", f"Cannot resize: {self.vid} is read-only")
        if size > 2**44:
            raise Crash("File too large")
        self.size = size
        if running and not self.daemon.qrexec:
            vm = running.name
            raise Fault("QubesVMError", f"Domain {vm!r}: qrexec not connected")

    def import_from(self, source, source_runs):
        if not self.save:
            return
        if source is None:
            raise Crash("QubesVolumeNotFoundError")
        if not source.save:
            if self.pool.driver == "file":
                self.data = None  # the target's image is deleted before the source is opened
                self.image(False)
            raise Crash("NotImplementedError")
        if source.pool.driver == "file" and source_runs:
            raise Fault("StoragePoolException", "file pool cannot export running volumes")
        # Of a running VM the state before its start is copied.
        self.size = source.clean_size if source_runs else source.size
        if self.pool.driver == "lvm_thin":
            self.size += -self.size % EXTENT
        self.commit(source.data)


# name, type, default; a default that is None shows as nothing, and as None where it is named.
# what 4.3 and later have, 4.2 has not: devices_denied, stubdom_uuid, bootmode.
PROPERTIES = """\
autostart bool False|backup_timestamp int|debug bool False|default_user str user
devices_denied str ''|dns str|gateway str|gateway6 str|icon str appvm-LABEL
include_in_backups bool True|installed_by_rpm bool False|ip str|ip6 str|kernel str @default_kernel
keyboard_layout str us++|klass str KLASS|label label red|mac str 00:16:3e:5e:6c:00|maxmem int 4000
memory int 400|name str|provides_network bool False|qid int|qrexec_timeout int 60
shutdown_timeout int 60|start_time str|stubdom_mem int|stubdom_uuid str ''|stubdom_xid int -1
template_for_dispvms bool False|updateable bool False|uuid str|vcpus int 2|virt_mode str pvh
visible_gateway str|visible_gateway6 str|visible_ip str|visible_ip6 str|visible_netmask str
xid int -1|audiovm vm dom0|bootmode str default|default_dispvm vm @default_dispvm|guivm vm dom0
kernelopts str swiotlb=2048|management_dispvm vm @management_dispvm|netvm vm @default_netvm
template vm""".replace("\n", "|").split("|")
READ_ONLY = {"name", "qid", "uuid", "xid", "stubdom_xid", "stubdom_uuid", "start_time", "icon"}
NEW_IN_43 = {"devices_denied", "stubdom_uuid", "bootmode"}
GLOBALS = """\
check_updates_vm bool True|clockvm vm|default_audiovm vm dom0|default_dispvm vm
default_guivm vm dom0|default_kernel str|default_netvm vm|default_pool str varlibqubes
default_pool_kernel str varlibqubes|default_pool_private str @default_pool
default_pool_root str @default_pool|default_pool_volatile str @default_pool
default_qrexec_timeout int 60|default_shutdown_timeout int 60|default_template vm
management_dispvm vm|maxmem int 16384|no_cpus int 4|stats_interval int 3|updatevm vm""".replace(
    "\n", "|"
).split("|")


NEW_LATER = ("maxmem int 16384", "no_cpus int 4")  # of the whole system


class Holder:
    """What has properties: the whole system, or a VM."""

    def __init__(self, table):
        self.table = {}
        for line in table:
            name, kind, default = (*line.split(" "), None)[:3]
            self.table[name] = (kind, "" if default == "''" else default)
        self.set = {}

    def get(self, daemon, name):
        """``(value or None, type, whether it is the default)``."""
        kind, default = self.table[name]
        if name in self.set:
            return self.set[name], kind, False
        if default and default.startswith("@"):
            return daemon.globals.get(daemon, default[1:])[0], kind, True
        return default, kind, True

    def shown(self, daemon, name):
        value, kind, default = self.get(daemon, name)
        value = (value or "").replace("\\", "\\\\").replace("\n", "\\n")
        return f"default={default} type={kind} {value}"


class VM(Holder):
    """A VM and its volumes."""

    def __init__(self, daemon, name, klass, label, template, qid):
        table = PROPERTIES
        if daemon.release == "4.2":
            table = [line for line in table if line.split(" ")[0] not in NEW_IN_43]
            table = [
                line.replace(" int -1", " str -1")
                if line.startswith(("xid", "stubdom_xid"))
                else line
                for line in table
            ]
        if daemon.release == "later":
            table = ["maxmem int 0" if line == "maxmem int 4000" else line for line in table]
        if klass in ("TemplateVM", "StandaloneVM", "RemoteVM", "AdminVM"):
            table = [line for line in table if not line.startswith("template vm")]
        super().__init__(table)
        self.daemon = daemon
        self.name = name
        self.klass = klass
        self.uuid = str(uuid.UUID(int=0)) if klass == "AdminVM" else str(uuid.uuid4())
        self.set.update(name=name, qid=str(qid), uuid=self.uuid, label=label)
        if template:
            self.set["template"] = template
        if klass == "TemplateVM":
            self.table["updateable"] = ("bool", "True")
        self.table["klass"] = ("str", klass)
        self.volumes = {}
        self.features = {}
        self.tags = {} if klass == "AdminVM" else dict.fromkeys(
            ("audiovm-dom0", "created-by-dom0", "guivm-dom0")
        )  # fmt: skip
        self.notes = ""
        self.firewall = "action=accept\n"
        self.devices = {}  # {class: {ident: options}}
        self.running = klass in ("AdminVM", "RemoteVM")

    def get(self, daemon, name):
        value, kind, default = super().get(daemon, name)
        if name == "icon" and default:
            value = f"appvm-{self.set['label']}"
        return value, kind, default

    @property
    def subdir(self):
        return "vm-templates" if self.klass == "TemplateVM" else "appvms"

    def snapshots(self):
        return {"AppVM": ("root",), "DispVM": ("root", "private")}.get(self.klass, ())

    def origin(self):
        return self.daemon.vms[self.set["template"]]

    def init_volumes(self, pools):
        """Tell the pools of the volumes; a failure leaves those told before."""
        for name in VOLUMES:
            default = self.daemon.globals.get(self.daemon, f"default_pool_{name}")[0]
            pool = self.daemon.pools[pools.get(name, default)]
            if name in self.snapshots():
                pool = self.origin().volumes[name].pool
            if name == "kernel" and pool.driver == "linux-kernel":
                self.volumes[name] = Kernel(self, pool)
                continue
            if pool.driver == "linux-kernel":
                raise Crash(f"{name} in linux-kernel")
            self.volumes[name] = Volume(self.daemon, pool, self, name)

    def rebase(self):
        """The snapshot volumes follow a new template."""
        for name in self.snapshots():
            pool = self.origin().volumes[name].pool
            self.volumes[name] = Volume(self.daemon, pool, self, name)

    def line(self):
        state = "Running" if self.running else "Halted"
        tail = "" if self.daemon.release == "4.2" else f" uuid={self.uuid}"
        return f"{self.name} class={self.klass} state={state}{tail}\n"

    def repr(self):
        names = ["name", "qid", *(n for n in self.table if n not in ("name", "qid"))]
        values = ((n, self.get(self.daemon, n)[0]) for n in names)
        shown = " ".join(f"{n}={v!r}" if n == "name" else f"{n}={v}" for n, v in values)
        return f"<{self.klass} at 0x7fb6dd0cf770 {shown}>"


class Kernel(Volume):
    """The kernel of a VM, a directory of the linux-kernel pool."""

    def __init__(self, vm, pool):
        super().__init__(vm.daemon, pool, vm, "kernel")
        pool.forget(self.vid)
        self.vid = vm.get(vm.daemon, "kernel")[0] or ""
        self.revisions_to_keep = "0"

    def path(self):
        return f"{self.pool.place()}/{self.vid}/modules.img"
