"""States as a run of Salt calls them: one set of loaders, and a call is short."""

import salt.state
from qubes_storage.adminapi import Client


class Salted:
    """Salt on the machine below the root that ``link`` leads to, with settings of its own."""

    def __init__(self, opts, link, **settings):
        self.link = link
        self._state = salt.state.State({**opts, "qubes_storage.root": str(link), **settings})

    def on(self, root):
        """Have the next calls be made on another machine."""
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(root)
        self.look_anew()

    def look_anew(self):
        """Forget what R4's daemon told."""
        Client(str(self.link / "qubesd.sock")).refresh()

    def call(self, function, name, test=False, **declared):
        """``{result, changes, comment}`` of a state, the only one of its run."""
        state, fun = function.split(".")
        low = {"state": state, "fun": fun, "name": name, "__id__": name, **declared}
        self._state.states.opts["test"] = test
        ret = self._state.call(low, [low])
        return {key: ret[key] for key in ("result", "changes", "comment")}

    def look(self, function, *args, **kwargs):
        """What an execution function returns."""
        return self._state.functions[function](*args, **kwargs)
