"""
Both readers, on inputs that are guided by the branches they reach, until no more are found.

What has to hold for each input is in reading_conf.py and reading_xml.py.
"""

import json
import multiprocessing
import random
import shutil
import subprocess

import pytest

from tests.r32 import python27
from tests.torture import guided, reading_conf, reading_xml

READERS = {"storage.conf": reading_conf, "qubes.xml": reading_xml}
FURTHER = 1_000_000  # inputs that add no branch, and then it is done
PYTHON27 = """
import ConfigParser, StringIO, json, sys
for line in sys.stdin:
    parser = ConfigParser.RawConfigParser()
    try:
        parser.readfp(StringIO.StringIO(line.strip().decode("hex")))
    except ConfigParser.MissingSectionHeaderError as err:
        print(json.dumps([err.lineno]))
    except ConfigParser.ParsingError as err:
        print(json.dumps([number for number, _ in err.errors]))
    else:
        found = dict((name, dict(parser.items(name))) for name in parser.sections())
        print(json.dumps(found, encoding="latin-1"))
"""


def walk(asked):
    """Try inputs on a reader, in a process of its own: it is traced."""
    reader, *how = asked
    return reader, guided.walk(READERS[reader], *how)


def test_inputs_that_add_no_branch_find_nothing_wrong(everything, scratch, figures):
    until = FURTHER if everything else 2000
    seed = random.SystemRandom().randrange(2**32) if everything else 7
    walks = [(reader, until, seed, str(scratch(template=False).root)) for reader in READERS]
    with multiprocessing.get_context("spawn").Pool(len(READERS)) as pool:
        for reader, walked in pool.imap_unordered(walk, walks):
            of = f"the reader of {reader}"
            figures[f"inputs tried on {of}"] = walked.inputs
            figures[f"inputs tried on {of} since one took a new branch"] = walked.since
            figures[f"branches reached in {of}, of {walked.possible}"] = walked.branches
            assert walked.since == until
            assert walked.branches > walked.possible / 3  # what writes is among them too


def test_the_measure_is_python_2_7():
    chance = random.Random(27)
    texts = reading_conf.seeds()
    for _ in range(5000):
        text = reading_conf.grammar(chance)
        texts += [text, guided.changed(chance, [*texts[-50:], text], reading_conf.WORDS)]
    sent = b"".join(text.hex().encode() + b"\n" for text in texts)
    command = [shutil.which("python2.7") or "false", "-c", PYTHON27]
    run = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=False)
    if run.returncode:
        pytest.skip("there is no Python 2.7 to hold it to")
    told = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(told) == len(texts)
    for text, wanted in zip(texts, told):
        try:
            found = _as_latin1(python27.read(text).pools())
        except python27.Wrong as err:
            found = err.lines
        assert found == wanted, text


def _as_latin1(value):
    if isinstance(value, dict):
        return {_as_latin1(key): _as_latin1(inner) for key, inner in value.items()}
    return value.encode("utf-8", "surrogateescape").decode("latin-1")
