"""What can go wrong. Every message names the pool or VM, the path and the cure."""


class StoragePoolException(Exception):
    """
    It could not be done. R3.2's own name for whatever goes wrong with a pool.

    ``waits_for`` names what is in the way and nothing else wrong, so that who knows that it is
    about to be mended can wait for it. What is missing: ``("pool", name)``, ``("VM", name)`` (name
    None for any template), ``("path", path)`` and ``("mount", path)`` of the machine, ``("file",
    path)`` of the caller's. What is still used: ``("pool of", VM, name)`` for each VM in pool
    ``name``, likewise ``"template of"`` and ``"NetVM of"``.
    """

    def __init__(self, message, waits_for=()):
        super().__init__(message)
        self.waits_for = waits_for


class Waits(StoragePoolException):
    """Nothing is wrong that states before this one in the run will not have mended."""

    waits = True


class OutOfStep(StoragePoolException):
    """Disk and registry do not agree: something is gone, or is there and known to nobody."""


class AlreadyThere(StoragePoolException):
    """What was to be made is there: another was first, and nothing was done."""

    untouched = True


class InvalidInput(StoragePoolException, ValueError):
    """It was asked for wrongly: a name, an option, a size or a combination that cannot be."""


class NotSupported(StoragePoolException):
    """What this backend or driver cannot do; the message names it and the way there."""
