"""What is declared of a pool, and what R3.2's own tools would say of it."""

from qubes_storage import guards
from qubes_storage.exc import InvalidInput
from qubes_storage.values import as_text

_XEN = {"qubes.storage.xen.XenPool"}  # what R3.2's own tools can load


def foreign(name, config):
    """What R3.2's own tools cannot do with a section that is right for us, as sentences."""
    found = []
    extra = sorted(set(config) - {"driver", "class"})
    if name == "default" and extra:
        found.append(f"R3.2's own tools fail on [default] with options ({', '.join(extra)})")
    if config.get("class", "") not in ("", *_XEN):
        found.append(f"R3.2's own tools may not have class {config['class']}")
    elif "class" not in config and config.get("driver", "xen") != "xen":
        found.append(f"R3.2's own tools have no driver {config['driver']}")
    return found


class Declared:
    """What is declared of a pool: options as text, None to remove one, and guards apart."""

    def __init__(self, name, driver, options, require_mount, min_free, config):
        given = {"driver": driver, "require_mount": require_mount, "min_free": min_free}
        self.options = {}
        declared = {key: value for key, value in given.items() if value is not None}
        for source in (declared, *self._maps(name, options), config):
            for key, value in source.items():
                self._put(name, key, value)
        self.guards = {k: self.options.pop(k) for k in guards.NAMES if k in self.options}
        self.guards = guards.clean(name, self.guards)

    @staticmethod
    def _maps(name, options):
        maps = [options or {}] if isinstance(options or {}, dict) else options
        if not isinstance(maps, (list, tuple)) or not all(isinstance(m, dict) for m in maps):
            raise InvalidInput(
                f"pool {name}: options {options!r} are no map; write option: value, one a line"
            )
        return maps

    def _put(self, name, key, value):
        if not isinstance(key, str):
            raise InvalidInput(f"pool {name}: option {key!r} is not a text; put it in quotes")
        key = key.lower()
        if key in self.options:
            raise InvalidInput(f"pool {name}: {key} is given twice; keep one")
        if value is not None and (key != key.strip() or not key or set(key) & set("[]=:\n\r")):
            raise InvalidInput(
                f"pool {name}: option {key!r} is no name that storage.conf gives back; leave out"
                " brackets, = and :, new lines, and spaces at the ends"
            )
        self.options[key] = value if value is None else as_text(key, value, f"pool {name}")
