"""How qubesd reads the words of a call, and where its methods are registered."""

import re
import secrets

from tests.r4.model import Refusal

LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
COLORS = ("cc0000", "f57900", "edd400", "73d216", "555555", "3465a4", "75507b", "000000")
SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def number(text, what, least=0, stripped=False):
    """A number as qubesd's methods take it."""
    text = text.strip() if stripped else text
    digits = text[1:] if text.startswith("-") and least < 0 else text
    if not re.fullmatch("[0-9]+", digits):
        raise Refusal("ProtocolError", f"{what} contains non ASCII digits")
    if len(digits) > 19:
        raise Refusal("ProtocolError", f"{what} is bigger than 19 decimal digits")
    if digits != "0" and digits.startswith("0"):
        raise Refusal("ProtocolError", f"{what} contains spurious leading zeros")
    return int(text)


def boolean(text):
    if text.lower() in ("true", "1", "on"):
        return True
    if text.lower() in ("false", "0", "off"):
        return False
    raise Refusal("ProtocolError", "Payload is not boolean ASCII")


METHODS = {}


def method(name, arg=None, payload=None, dest="dom0"):
    """Register a method: whether it takes an argument, a payload (None: maybe), and its dest."""

    def register(func):
        METHODS[name] = (func, arg, payload, dest)
        return func

    return register


def token():
    """What CloneFrom hands out."""
    return secrets.token_urlsafe(24)
