"""A class of someone else: it records what it is given."""


class Rec:
    """Takes any option, as no pool of ours does."""

    def __init__(self, vm=None, **kw):
        self.vm = vm
        self.kw = kw
