"""States of any kind, by chance: what is declared may be there, may be made, or cannot be."""

FUNCTIONS = {
    "qubes_vm.present": 6, "qubes_vm.absent": 2, "qubes_pool.present": 3, "qubes_pool.absent": 2,
    "qubes_pool.default": 1,
}  # fmt: skip
SIZES = (["3GiB", 3 * 1024**3, "4 GiB", "1GiB", "20 MiB", "11GiB"], ["much", -1, "900TiB"])


class Declaring:
    """What is declared; each kind of value as ``(what there may be, what cannot be)``."""

    pools, vms, templates, klasses, drivers, places, disks = [([], [])] * 7

    def __init__(self, random):
        self.random = random

    def pick(self, values):
        """One of some values, seldom one that cannot be."""
        right, wrong = values
        return self.random.choice(wrong if wrong and self.random.random() < 0.06 else right)

    def some(self, **choices):
        """Some of what can be declared: ``word=(how often, values)``."""
        return {
            word: self.pick(values)
            for word, (often, values) in choices.items()
            if self.random.random() < often
        }

    def declare(self):
        """``(function, name, declared)`` of a state."""
        function = self.random.choices(list(FUNCTIONS), FUNCTIONS.values())[0]
        name, declared = getattr(self, f"_{function.replace('.', '_')}")()
        return function, name, declared

    def _qubes_vm_present(self):
        right, wrong = self.vms
        name = self.pick((["new", "new", "other", "third", *right], ["1bad", *wrong]))
        declared = self.some(
            klass=(0.3, self.klasses),
            template=(0.3, self.templates),
            label=(0.4, (["red", "blue", "green", "black"], ["pink", 3])),
            pool=(0.5, self.pools),
            migrate=(0.6, ([True, True, True, "yes", False], ["perhaps"])),
            create_only=(0.05, ([True, False], ["perhaps"])),
        )
        if self.random.random() < 0.3:
            origin, values = self.random.choice(
                [
                    ("clone_from", self.vms),
                    ("root_copy_from", self.disks),
                    ("root_move_from", self.disks),
                ]
            )
            declared[origin] = self.pick(values)
            if self.random.random() < 0.8:
                declared.pop("template", None)
                declared["klass"] = "StandaloneVM"
            if origin == "clone_from" and self.random.random() < 0.8:
                declared.pop("klass", None)
        if self.random.random() < 0.4:
            declared["volumes"] = self._volumes()
        return name, declared

    def _volumes(self):
        found = self.some(private=(0.8, SIZES), root=(0.2, SIZES), volatile=(0.03, SIZES))
        for volume in found:
            if self.random.random() < 0.2:
                found[volume] = {"size": found[volume], **self._of_volume()}
        return found if self.random.random() < 0.97 else [found]

    def _of_volume(self):
        kept = ([0, 1, 3, "2"], ["x", -3])
        return self.some(pool=(0.1, self.pools), revisions_to_keep=(0.1, kept), odd=(0.02, SIZES))

    def _qubes_vm_absent(self):
        right, wrong = self.vms
        name = self.pick((["new", "new", "other", *right], ["dom0", "nowhere", *wrong]))
        return name, self.some(purge=(0.8, ([True, True, "yes", False], ["perhaps"])))

    def _qubes_pool_present(self):
        right, wrong = self.pools
        name = self.pick((["new", "new", "other", *right], ["a b", "[x]", *wrong]))
        declared = self.some(
            driver=(0.3, self.drivers),
            dir_path=(0.5, self.places),
            require_mount=(0.1, (["/mnt/ssd", "/mnt/ssd/"], ["/mnt/away", "mnt"])),
            min_free=(0.3, (["1MiB", 1, "2 MiB"], ["900TiB", "little"])),
            revisions_to_keep=(0.2, ([0, 2, "3"], ["none", -7])),
            odd=(0.02, ([1], [])),
        )
        if self.random.random() < 0.3:
            declared["options"] = self.pick(
                (
                    [
                        {"min_free": None}, {"min_free": "2MiB"}, {"revisions_to_keep": None},
                        [{"require_mount": None}, {"min_free": None}], {"revisions_to_keep": 1},
                        {"class": "qubes.storage.xen.XenPool"}, {"ephemeral_volatile": True},
                    ],
                    [{"class": "nowhere.Pool"}, {"dir_path": None}, 7],
                )
            )  # fmt: skip
        return name, declared

    def _qubes_pool_absent(self):
        purge = ([True, "yes", False], ["perhaps"])
        return self.pick(self.pools), self.some(purge=(0.5, purge))

    def _qubes_pool_default(self):
        kinds = ("", "_root", "_private", "_volatile", "_kernel")
        return "default pools", self.some(
            **{f"default_pool{kind}": (0.3, self.pools) for kind in kinds}
        )
