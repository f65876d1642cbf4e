"""
What is told to Salt: texts that can be written as UTF-8, whatever files are named.

In the core a byte of a name that is no UTF-8 is a lone surrogate, as everywhere in Python. Salt
cannot write one, and would lose the report of the whole run for it.
"""


def printable(value):
    """The value with each byte that is no UTF-8 written as ``\\xff``; in maps and lists too."""
    if isinstance(value, str) and not value.isascii():
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # a surrogate that stands for no byte
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(each) for each in value]
    return value


class Told:
    """A machine whose verbs return only what is printable."""

    def __init__(self, machine):
        self._machine = machine

    def __getattr__(self, verb):
        method = getattr(self._machine, verb)
        return lambda *args, **kwargs: printable(method(*args, **kwargs))
