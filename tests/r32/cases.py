"""The recorded cases: what R3.2 does, and beside it, under ``ours``, what we do otherwise."""

import base64
import json
import pathlib

import pytest

HERE = pathlib.Path(__file__).resolve().parent


def load(topic):
    """The cases of a topic, such as ``A_storage_conf``."""
    return json.loads((HERE / f"{topic}.json").read_text(encoding="utf-8"))["cases"]


def cases(topic):
    """The cases of a topic as parameters of a test, each named by its id."""
    return [pytest.param(case, id=case["id"]) for case in load(topic)]


def raw(value):
    """The bytes of a recorded text, which is ``{"b64": ...}`` where it is not UTF-8."""
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode("utf-8", "surrogateescape")


def text(value):
    """A recorded text as a str; bytes that are not UTF-8 are surrogate escapes."""
    return raw(value).decode("utf-8", "surrogateescape")
