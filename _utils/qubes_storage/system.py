"""connect(root): this machine's pools and VMs, from storage.conf and qubes.xml."""

import codecs
import contextlib
import os
import stat
import sys

import qubes_storage
from qubes_storage import admin, asking, files, guards, registry, replacing
from qubes_storage.checking import Checking
from qubes_storage.conf import Conf
from qubes_storage.disks import Disks
from qubes_storage.exc import InvalidInput, NotSupported, StoragePoolException
from qubes_storage.looking import Looking
from qubes_storage.moving import Moving
from qubes_storage.orphans import Orphans
from qubes_storage.pool import CONF, in_force, make_pool, pick
from qubes_storage.pools import Pools
from qubes_storage.removal import Removal
from qubes_storage.report import Report
from qubes_storage.reverting import Reverting
from qubes_storage.vms import VMs

SOCKET = "/var/run/qubesd.sock"
_MAX_SOCKET = 107  # bytes, of the path of one
BACKENDS = ("auto", "local", "admin")
_HEADER = b"""\
# Storage pools of this machine: a section each, with a driver (or class) and its options.
# Kept by qubes_storage, which leaves comments and order as they are; R3.2's qvm-create reads it.

[default]
driver=xen
"""
_cache = {}


class _Conf:
    """One version of a file with sections, and the pools made of it or, where equal, before."""

    def __init__(self, data, path, made=()):
        self.sections = Conf(data or b"", path).pools()
        self.made = {n: pool for n, (config, pool) in made if self.sections.get(n) == config}
        self.made.pop("default", None)  # R3.2's defaults["pool_config"] may be another

    def items(self):
        """``(name, (section, pool))`` of those that were made."""
        return [(name, (self.sections[name], pool)) for name, pool in self.made.items()]


def _load(root, path):
    stamp = files.stamp(root, path)
    cached = _cache.get((root, path))
    if cached and stamp and cached[0] == stamp:
        return cached[1]
    data = files.read(root, path)
    if data is None:  # which is a version, too
        stamp = "not there"
        if cached and cached[0] == stamp:
            return cached[1]
    loaded = _Conf(data, path, cached[1].items() if cached else ())
    _cache[root, path] = (stamp, loaded)
    return loaded


# What only R4's daemon can do, and the way there.
_ADMIN_ONLY = {
    "default_pools": "R3.2's default pool is always the one named default",
    "default_pools_diff": "R3.2's default pool is always the one named default",
    "set_default_pools": "R3.2's default pool is always the one named default",
}


@asking.checked
class System(Looking, Pools, Orphans, VMs, Moving, Checking, Reverting, Removal, Disks, Report):
    """
    A machine in R3.2's layout below ``root``.

    Reading takes no lock and writes nothing. Whatever is written is validated first, and written
    under R3.2's lock on qubes.xml.
    """

    backend = "local"

    def __init__(self, root="/"):
        super().__init__(root)
        self._unsynced = []  # the files that were replaced, but may not be on the disk

    def _newest(self, path):
        """The newest version of storage.conf, of the guards or of qubes.xml."""
        return registry.load(self.root) if path == registry.PATH else _load(self.root, path)

    def sections(self):
        """``{pool: {option: value}}`` of storage.conf."""
        return self._version(CONF).sections

    def guards(self, pool):
        """The guards of a pool."""
        return self._version(guards.PATH).sections.get(pool, {})

    def registry(self):
        """What qubes.xml says; a machine without one has no VMs."""
        return self._version(registry.PATH) or registry.empty()

    def get_pool(self, name):
        """The :py:class:`~qubes_storage.pool.Pool` of a name."""
        loaded = self._version(CONF)
        if name not in loaded.made:
            loaded.made[name] = make_pool(name, pick(loaded.sections, name), self.root)
        return loaded.made[name]

    @contextlib.contextmanager
    def locked(self, kind=None, name=None):
        """
        Hold the lock that every writer of storage.conf and qubes.xml takes.

        What goes wrong is told of the pool or VM, as ``kind`` says, that is called ``name``.
        """
        who = f"{kind} {name}: " if kind else ""
        self._unsynced = []
        try:
            with registry.lock(self.root) as found:
                yield found
        except OSError as err:
            place = self._place(kind, name)
            raise StoragePoolException(
                f"{who}{place}: {err.strerror or err}; mend it and try again"
            ) from err
        except StoragePoolException as err:
            if not self._unsynced:
                raise
            path, why = self._unsynced[0]
            raise StoragePoolException(
                f"{err}; before that, {path} may not have come to the disk: {why.strerror}; look"
                " after the disk first"
            ) from err
        if self._unsynced:
            path, err = self._unsynced[0]
            raise StoragePoolException(
                f"{who}it is done, but {path} may not be on the disk: {err.strerror}; look after"
                " the disk"
            ) from err

    def _place(self, kind, name):
        """The directory of a pool or VM, for a message."""
        if kind == "pool":
            return in_force(name, self.sections().get(name, {})).get("dir_path", CONF)
        vm = self.find_vm(name)
        return self.pool_of(vm).vmdir(vm) if vm else registry.PATH

    def save_registry(self, changed):
        """Save qubes.xml; the lock is held."""
        with self._synced(registry.PATH):
            registry.save(self.root, changed)

    @contextlib.contextmanager
    def _synced(self, path):
        """A file that is replaced stands, though it may not be on the disk; told in the end."""
        try:
            yield
        except replacing.Unsynced as err:
            self._unsynced.append((path, err))

    def edit_conf(self, path, section, options=None):
        """Change a section of storage.conf or of the guards, or remove it; the lock is held."""
        data = files.read(self.root, path)
        conf = Conf(_HEADER if data is None and path == CONF else data or b"", path)
        if options is None:
            conf.remove(section)
        else:
            conf.edit(section, options)
        if conf.dumps() != (data or b""):
            try:
                os.close(files.make_dirs(self.root, os.path.dirname(path)))
                with files.locate(self.root, path) as (fd, name), self._synced(path):
                    replacing.replace(fd, name, conf.dumps())
            except OSError as err:
                raise StoragePoolException(
                    f"pool {section}: {path}: cannot be saved: {err.strerror}; run as root, for it"
                    " is written beside and renamed, or mend the disk; it is as it was"
                ) from err

    @contextlib.contextmanager
    def _put_back(self, path, last=CONF):
        """
        Have a file be as it was if the body fails; the lock is held. Once the ``last`` one is
        changed all is done, whatever interrupts it then.
        """
        before, stood = files.read(self.root, path), files.read(self.root, last)
        try:
            yield
        except BaseException:
            undo = files.read(self.root, last) == stood
            if undo and files.read(self.root, path) != before:
                with contextlib.suppress(OSError), files.locate(self.root, path) as (fd, name):
                    if before is None:
                        os.unlink(name, dir_fd=fd)
                    else:
                        replacing.replace(fd, name, before)
            raise


def _admin_only(verb, way):
    def refuse(self, *args, **kwargs):
        raise NotSupported(f"default pools: backend local has no such thing: {way}")

    refuse.__name__ = verb
    refuse.__doc__ = f"Not on R3.2: {way}."
    return refuse


for _verb, _way in _ADMIN_ONLY.items():
    setattr(System, _verb, _admin_only(_verb, _way))


def _check_python():
    """Names of files have to be the same bytes whoever runs it, and reachable by their handles."""
    encoding = sys.getfilesystemencoding()
    if codecs.lookup(encoding).name != "utf-8":  # C and POSIX are UTF-8 since Python 3.7
        raise StoragePoolException(
            f"this Python takes names of files for {encoding}, and would find and write others than"
            " there are; run it with LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    if not os.path.isdir("/proc/self/fd"):
        raise StoragePoolException(
            "/proc/self/fd: is not there, and files are reached by it; mount /proc with mount -t"
            " proc proc /proc"
        )


def _has_socket(path):
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _check_socket(path):
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise InvalidInput(f"qubes_storage.socket: {path!r} is no path of a socket; write one")
    if len(os.fsencode(path)) > _MAX_SOCKET:
        raise InvalidInput(
            f"qubes_storage.socket: {path} has more than {_MAX_SOCKET} bytes, the most that a"
            " socket's path has; make a shorter link to its directory, and name that"
        )


def connect_as(option):
    """The machine that the settings name; ``option(key)`` gives the value of one, or None."""
    return connect(
        option("qubes_storage.root") or "/",
        option("qubes_storage.backend") or "auto",
        option("qubes_storage.socket"),
    )


def why_not(option, version):
    """
    Why the modules do not belong on this machine, or None where they do.

    They belong in a dom0, and where ``qubes_storage.root`` or ``.backend`` is set: /srv is copied
    into VMs too. ``version`` is that of the core they were written for.
    """
    if version != qubes_storage.VERSION:
        return (
            f"is of version {version}, but the core that this Python found is of"
            f" {qubes_storage.VERSION} ({qubes_storage.__file__}); remove that one, or restart the"
            " minion, which keeps what it has loaded"
        )
    if option("qubes_storage.root") or option("qubes_storage.backend"):
        return None
    places = (CONF, registry.PATH, option("qubes_storage.socket") or SOCKET)
    if any(os.path.exists(path) for path in places):
        return None
    return (
        f"this machine is no Qubes dom0 (there is none of {', '.join(places)}); set"
        " qubes_storage.root to manage another"
    )


def connect(root="/", backend="auto", socket=None):
    """
    The machine below ``root``.

    backend
        ``local`` is R3.2's files, ``admin`` R4's Admin API; ``auto`` is ``admin`` where the socket
        exists and root is ``/`` (or the socket was given), else ``local``.

    socket : /var/run/qubesd.sock
        Where qubesd listens.
    """
    if backend not in BACKENDS:
        raise InvalidInput(
            f"qubes_storage.backend: {backend!r} is none of {', '.join(BACKENDS)}; set one of them"
        )
    if not isinstance(root, (str, os.PathLike)) or not os.path.isabs(root):
        raise InvalidInput(f"qubes_storage.root: {root!r} is not an absolute path; write one")
    _check_python()
    root = os.path.realpath(root)
    _check_socket(socket or SOCKET)
    if backend == "auto":
        there = _has_socket(socket or SOCKET) and (root == "/" or socket)
        if socket and not there and os.path.exists(socket):
            raise InvalidInput(f"qubes_storage.socket: {socket} is no socket; name qubesd's")
        backend = "admin" if there else "local"
    if backend == "admin":
        return admin.AdminSystem(socket or SOCKET, root)
    return System(root)
