"""
A qubesd to test against: the Admin API on a unix socket, with pools, VMs and volumes that it keeps.

It behaves as the recorded daemons did: ``r4.2/``, ``r4.3/``, and for the later one, which raises
where these two answer nothing, ``differences-by-release.json``. ``tests/unit/test_r4_server.py``
holds it to every recorded answer.
"""

import contextlib
import os
import re
import socketserver
import threading
import time
from typing import NamedTuple

import tests.r4.methods  # noqa: F401  (they register themselves)
from tests.r4.model import (
    DRIVERS,
    GLOBALS,
    NEW_LATER,
    READ_ONLY,
    VM,
    VOLUMES,
    Crash,
    Fault,
    Holder,
    Pool,
    Refusal,
    to_bool,
)
from tests.r4.words import LABELS, METHODS, SAFE

RELEASES = ("4.2", "4.3", "later")
READING = ("List", "ListDrivers", "Info", "Get", "GetAll", "GetDefault", "Index", "UsageDetails")
READING += ("ListSnapshots", "CurrentState", "Assigned")


class Call(NamedTuple):
    """A call that came in."""

    method: str
    src: str
    dest: str
    arg: str
    payload: bytes

    @property
    def writes(self):
        return self.method.rpartition(".")[2] not in READING


class Qubesd:
    """The daemon's state; :py:meth:`handle` answers the bytes of a request."""

    def __init__(self, release="4.3", root="/", reflink=("/mnt/",), fresh=False):
        assert release in RELEASES
        self.release = release
        self.root = str(root)
        self.reflink = reflink  # where the file system can share blocks
        self.kernels = ("6.12.1-1",)
        self.thin_pools = {}  # {"vg/thin": what UsageDetails says}
        self.usage = {}  # {pool: what UsageDetails says}
        self.qrexec = True  # whether a running VM's system can be told of a new size
        self.debug = False
        self.log = []
        self.before = self.after = None  # hooks(call): what they return is answered instead
        self.lock = threading.RLock()
        self.tokens = {}
        known = [g for g in GLOBALS if release == "later" or g not in NEW_LATER]
        self.globals = Holder(known)
        self.globals.set["default_pool_kernel"] = "linux-kernel"
        self.pools = {}
        self.vms = {"dom0": VM(self, "dom0", "AdminVM", "black", None, 0)}
        for path in ("/var/lib/qubes/vm-kernels/6.12.1-1", "/var/lib/pools", "/mnt"):
            os.makedirs(self.path(path), exist_ok=True)
        self.add_pool("varlibqubes", "file", dir_path="/var/lib/qubes")
        self.add_pool("linux-kernel", "linux-kernel", dir_path="/var/lib/qubes/vm-kernels")
        if not fresh:
            self.globals.set["default_kernel"] = "6.12.1-1"

    def path(self, path):
        return os.path.join(self.root, path.lstrip("/"))

    def add_pool(self, name, driver, **options):
        self.pools[name] = Pool(self, name, driver, options)

    def add_vm(self, name, klass="AppVM", template="", pool=None, label="red"):
        """A VM as one that was there before."""
        if klass in ("AppVM", "DispVM"):
            template = template or self.globals.set["default_template"]
        payload = f"name={name} label={label}" + (f" pool={pool}" if pool else "")
        self.create(klass, template, payload, True)
        return self.vms[name]

    def restart(self):
        for vm in self.vms.values():
            for volume in vm.volumes.values():
                volume.restarted()
        for pool in self.pools.values():
            pool.vids.clear()
        for name in sorted(self.vms):
            for volume in self.vms[name].volumes.values():
                if type(volume).__name__ != "Kernel":
                    volume.pool.told(volume.vid)

    # the wire

    def handle(self, data):
        call = self.parse(data)
        if call is None:
            return b""
        with self.lock:
            self.log.append(call)
            return self.answer(call)

    @staticmethod
    def parse(data):
        if len(data) > 65536 or b"\0" not in data or not data.partition(b"\0")[0].isascii():
            return None
        header, _, payload = data.partition(b"\0")
        parts = header.decode("ascii").split(" ", 3)
        if len(parts) < 4:
            return None
        word, src, kind, dest = parts
        if kind == "keyword" and dest == "adminvm":
            kind, dest = "name", "dom0"
        if kind != "name":
            return None
        name, _, arg = word.partition("+")
        return Call(name, src, dest, arg, payload)

    def answer(self, call):
        try:
            if call.method == "admin.Events" and self.find(call.dest):
                return b"1\0\0connection-established\0\0"  # and no event: the stream ends here
            return b"0\0" + self.run(call).encode()
        except Crash:
            return b""
        except Fault as err:
            if isinstance(err, Refusal) and self.release != "later":
                return b""
            traceback = "Traceback: ..." if self.debug else ""
            return f"2\0{err.error}\0{traceback}\0{err.message}\0".encode()

    def run(self, call):
        self.find(call.src)
        dest = self.find(call.dest)
        name, arg = call.method, call.arg
        match = re.fullmatch(r"admin\.vm\.Create(InPool)?\.(\w+)", name)
        if match and match[2] in self.classes():
            payload = call.payload.decode("ascii")
            return self.create(match[2], arg, payload, bool(match[1]))
        match = re.fullmatch(r"admin\.vm\.device\.(block|pci)\.(\w+)", name)
        if match:
            return self.device(dest, match[1], match[2], arg, call.payload.decode())
        if name not in METHODS or (name.startswith("admin.vm.notes") and self.release == "4.2"):
            raise Refusal("ProtocolError", f"no such method: {name!r}")
        func, takes_arg, takes_payload, wanted = METHODS[name]
        if name == "admin.pool.Add" and self.release != "later":
            takes_arg = None  # it is looked up first
        if takes_arg and not arg:
            raise Refusal("ProtocolError", "expected an argument")
        if takes_arg is False and arg:
            raise Refusal("ProtocolError", "unexpected argument")
        if name == "admin.pool.Add":
            self.check_driver(arg)
        if takes_payload and not call.payload:
            raise Refusal("ProtocolError", "expected payload")
        if takes_payload is False and call.payload:
            raise Refusal("ProtocolError", "unexpected payload")
        if wanted == "dom0" and dest.name != "dom0":
            raise Refusal("ProtocolError", "expected destination to be AdminVM")
        if name == "admin.vm.List" and call.src != "dom0":
            raise Crash("no policy")
        payload = call.payload.decode("utf-8", "surrogateescape")
        if name.startswith("admin.vm.volume.") and name != "admin.vm.volume.List":
            if arg not in dest.volumes:
                raise Refusal("PermissionDenied", f"Argument not in '{dest.name} volumes'")
            return func(self, dest, dest.volumes[arg], payload) or ""
        return func(self, dest, arg, payload) or ""

    def check_name(self, name):
        if self.release == "4.2" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise Fault("QubesValueError", "VM name contains illegal characters")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise Fault("QubesValueError", "VM name contains illegal characters")
        if not name[0].isalpha():
            start = "VM name cannot start with hyphen, underscore, dot or numbers"
            raise Fault("QubesValueError", start)
        if len(name) > 31:
            raise Fault("QubesValueError", "VM name must be shorter than 32 characters")
        if name in ("none", "default"):
            raise Fault("QubesValueError", "VM name cannot be 'none' nor 'default'")
        if name == "Domain-0":
            raise Fault("QubesValueError", "VM name cannot be 'Domain-0'")
        if name.endswith("-dm"):
            raise Fault("QubesValueError", "VM name cannot end with -dm")

    def find(self, name):
        if self.release != "4.2":
            if name.startswith("uuid:"):
                if not re.fullmatch(r"uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name):
                    shown = name[5:]
                    raise Fault("QubesVMInvalidUUIDError", f"VM UUID is not valid: {shown!r}")
                for vm in self.vms.values():
                    if vm.uuid == name[5:]:
                        return vm
            else:
                self.check_name(name)
        if name not in self.vms:
            raise Fault("QubesVMNotFoundError", f"No such domain: {name!r}")
        return self.vms[name]

    def pool(self, name):
        if name not in self.pools:
            raise Refusal("PermissionDenied", "Argument not in 'pools'")
        return self.pools[name]

    def classes(self):
        names = ["AdminVM", "AppVM", "DispVM", "RemoteVM", "StandaloneVM", "TemplateVM"]
        return [n for n in names if n != "RemoteVM" or self.release != "4.2"]

    def check_driver(self, driver):
        if driver in DRIVERS:
            return
        if self.release == "later":
            raise Refusal("PermissionDenied", "Argument not in 'available drivers'")
        raise Fault("QubesException", f"unexpected driver name: {driver}")

    # VMs

    def create(self, klass, template, payload, in_pool):
        options = {}
        for part in payload.split(" "):
            key, equals, value = part.partition("=")
            if not equals:
                raise Crash("ValueError")
            if key in options:
                raise Refusal("ProtocolError", "Options must be unique")
            options[key] = value
        pools = {k.partition(":")[2]: v for k, v in options.items() if k.startswith("pool:")}
        if set(options) - {"name", "label", "pool"} - {f"pool:{p}" for p in pools}:
            raise Refusal("ProtocolError", "Options does not match: name, label, pool, pool:")
        if (pools or "pool" in options) and not in_pool:
            raise Refusal("ProtocolError", "Pool option specified but 'allow_pool' is False")
        if pools and "pool" in options:
            raise Refusal("ProtocolError", "Conflicting options specified: 'pool=', 'pool:volume='")
        if set(pools) - set(VOLUMES):
            allowed = "Volume must be one of: root, private, volatile, kernel"
            raise Refusal("ProtocolError", allowed)
        for pool in (*pools.values(), *([options["pool"]] if "pool" in options else [])):
            if pool not in self.pools:
                raise Fault("QubesException", f"Unknown storage pool {pool}")
        label = self.check_new(klass, template, options)
        return self.create_checked(klass, template, label, options, pools)

    def check_new(self, klass, template, options):
        for key in ("name", "label"):
            if key not in options:
                raise Refusal("ProtocolError", f"Creation requested without key: {key}")
        if template and klass not in ("AppVM", "DispVM"):
            error = Refusal if self.release == "later" else Fault
            kind = "ProtocolError" if self.release == "later" else "QubesValueError"
            raise error(kind, f"{klass} cannot be based on template")
        if template:
            self.find(template)
        self.check_name(options["name"])
        label = options["label"]
        if label.isdigit():
            raise Refusal("QubesInvalidLabelError", "Label must not be a digit")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", label):
            safe = f"Label must be in safe set: {SAFE}-_."
            raise Refusal("QubesInvalidLabelError", safe)
        if label not in LABELS:
            if self.release == "later":
                raise Refusal("ProtocolError", "Creation requested without key: label")
            raise Fault("QubesLabelNotFoundError", f"Label does not exist: {label}")
        if klass == "AdminVM":
            no = "property 'qid' on AdminVM instance cannot be set"
            raise Fault("QubesPropertyValueError", no)
        name = options["name"]
        if name in self.vms:
            if self.release == "later":
                raise Fault("QubesVMAlreadyExistsError", f"Qube already exists: {name}")
            raise Fault("QubesValueError", f"VM {name} already exists")
        return label

    def check_template(self, klass, template):
        if klass == "AppVM" and template.klass != "TemplateVM":
            raise Fault(
                "QubesPropertyValueError",
                f"wrong VM class: domains[{template.repr()}] is of type {template.klass} and not"
                " TemplateVM",
            )
        for_disposables = template.set.get("template_for_dispvms") == "True"
        if klass == "DispVM" and not (template.klass == "AppVM" and for_disposables):
            word = "DispVM" if self.release == "4.2" else "disposable"
            raise Fault(
                "QubesValueError",
                f"template for {word} ({template.name}) needs to be an AppVM with"
                " template_for_dispvms=True",
            )

    def create_checked(self, klass, template, label, options, pools):
        name = options["name"]
        if klass in ("AppVM", "DispVM"):
            template = template or self.globals.get(self, "default_template")[0]
            if not template:
                raise Crash("no template")
            self.check_template(klass, self.vms[template])
        used = {int(vm.set["qid"]) for vm in self.vms.values()}
        qid = next(n for n in range(1, len(used) + 2) if n not in used)
        vm = VM(self, name, klass, label, template, qid)
        if klass == "RemoteVM":
            self.vms[name] = vm
            return ""
        os.makedirs(self.path(f"/var/lib/qubes/{vm.subdir}/{name}"), exist_ok=True)
        vm.init_volumes({})
        if "pool" in options:
            pools = {
                volume: options["pool"]
                for volume in ("root", "private", "volatile")
                if volume not in vm.snapshots()
            }
        for volume in pools:
            if volume in vm.snapshots():
                raise Fault(
                    "QubesException",
                    f"Snapshot volume {volume} must be in the same pool as its origin ({volume}"
                    f" volume of template),cannot move to pool {pools[volume]} ",
                )
        if pools:
            vm.init_volumes(pools)
        self.vms[name] = vm
        for volume in vm.volumes.values():
            volume.image(True)
        if not self.globals.get(self, "default_kernel")[0]:
            raise Crash("AttributeError while saving, after the VM came to be")
        return ""

    def uses(self, name):
        """Whether anything names a VM in a property that is not a default."""
        if name in (v for k, v in self.globals.set.items() if self.globals.table[k][0] == "vm"):
            return True
        return any(
            vm.table[key][0] == "vm" and value == name
            for vm in self.vms.values()
            if vm.name != name
            for key, value in vm.set.items()
            if key in vm.table
        )

    def set_property(self, holder, name, value):
        owner = getattr(holder, "name", "Qubes")
        if name not in holder.table:
            raise Fault("QubesNoSuchPropertyError", f"Invalid property {name!r} of {owner}")
        if "\0" in value:
            raise Fault("QubesValueError", "Invalid characters in property value")
        if not value.isascii():
            raise Fault("QubesValueError", "Non-ASCII bytes in property value")
        if isinstance(holder, VM) and name in READ_ONLY:
            raise Crash("read only")
        kind = holder.table[name][0]
        if name == "klass":
            no = f"property 'klass' on {holder.klass} instance cannot be set"
            raise Fault("QubesPropertyValueError", no)
        if kind == "int":
            try:
                value = str(int(value))
            except ValueError as err:
                no = "Failed to parse property value as int"
                raise Fault("QubesValueError", no) from err
        elif kind == "bool":
            value = str(to_bool(value))
        elif kind == "label" and value not in LABELS:
            raise Fault("QubesLabelNotFoundError", f"Label does not exist: {value}")
        elif kind == "vm" and value:
            self.check_vm_value(name, value)
        elif name.startswith("default_pool") and value not in self.pools:
            raise Fault("QubesPropertyValueError", "No such storage pool")
        elif name == "default_kernel" and value not in self.kernels:
            raise Fault("QubesPropertyValueError", f"Kernel {value!r} not installed")
        if name == "template" and isinstance(holder, VM):
            self.set_template(holder, value)
        holder.set[name] = value

    def check_vm_value(self, name, value):
        self.check_name(value)
        if value not in self.vms:
            no = f"Can't set {name} to non-existing qube {value}"
            raise Fault("QubesPropertyValueError", no)

    def set_template(self, vm, value):
        template = self.vms[value]
        if vm.klass == "AppVM" and template.klass != "TemplateVM":
            no = (
                f"wrong VM class: domains[{value!r}] is of type {template.klass} and not TemplateVM"
            )
            raise Fault("QubesPropertyValueError", no)
        if vm.klass == "DispVM":
            self.check_template("DispVM", template)
        if vm.running:
            raise Fault("QubesVMNotHaltedError", "Cannot change template while qube is running")
        vm.set["template"] = value
        vm.rebase()

    def device(self, vm, kind, verb, arg, payload):
        """Devices; the words changed with 4.3."""
        words = {"Assigned": "List", "Assign": "Attach", "Unassign": "Detach"}
        if self.release == "4.2":
            words = {new: old for old, new in words.items()}
        elif verb in words.values():
            raise Refusal("ProtocolError", f"no such method: 'admin.vm.device.{kind}.{verb}'")
        verb = words.get(verb, verb) if self.release == "4.2" else verb
        devices = vm.devices.setdefault(kind, {})
        if verb == "Assigned":
            return "".join(f"{ident} {options}\n" for ident, options in devices.items())
        if verb == "Assign":
            devices[arg] = payload
            return ""
        raise Refusal("ProtocolError", f"no such method: 'admin.vm.device.{kind}.{verb}'")


class _Handler(socketserver.BaseRequestHandler):
    def handle(self):
        data = b"".join(iter(lambda: self.request.recv(65536), b""))
        daemon = self.server.daemon_state
        call = daemon.parse(data)
        answer = daemon.before and daemon.before(call)
        if not answer:
            answer = daemon.handle(data)
        if daemon.after:
            answer = daemon.after(call, answer)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = daemon.handle(data)
        with contextlib.suppress(OSError):
            self.request.sendall(answer)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


@contextlib.contextmanager
def serve(daemon, path):
    """Serve a :py:class:`Qubesd` on a socket; yields the daemon."""
    with _Server(str(path), _Handler) as server:
        server.daemon_state = daemon
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield daemon
        finally:
            server.shutdown()
            thread.join()
            os.unlink(path)
