"""
Inputs without end, guided by the branches that they reach.

An input that takes the reader along a way which none took before is kept, and later ones are made
by changing what was kept. Ways are told apart by pairs of instructions that followed on each other
in one of the reader's files, so a branch inside an expression counts as one across lines does.
"""

import dis
import random
import sys
import types
from typing import NamedTuple

_BYTES = [bytes([n]) for n in range(256)]
_LONGEST = 4096  # an input that has grown beyond it is not kept: it would only be slow


class Figures(NamedTuple):
    """How far it went."""

    inputs: int
    since: int  # inputs since the last that took a new way
    kept: int  # inputs that took a new way
    branches: int  # ways out of conditional jumps that were taken
    possible: int  # those there are, with those that no input can take


class Ways:
    """What was run of some modules: ``taken`` grows with each new pair of instructions."""

    def __init__(self, modules):
        self.taken = set()
        self._files = [module.__file__ for module in modules]
        self._numbers = {}  # {id of a code object: number}, 0 for one of another file
        self._codes = [None]  # by number; they are kept, so that an id is no other's later
        self._others = []

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        code = frame.f_code
        number = self._numbers.get(id(code))
        if number is None:
            wanted = code.co_filename in self._files
            (self._codes if wanted else self._others).append(code)
            number = self._numbers[id(code)] = len(self._codes) - 1 if wanted else 0
        if not number:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        taken, base, last = self.taken.add, number << 32, 0

        def step(frame, event, arg):
            nonlocal last
            now = frame.f_lasti
            taken(base | last << 16 | now)
            last = now
            return step

        return step

    def branches(self):
        """``(ways out of conditional jumps that were taken, those there are)``"""
        jumps = [_conditional(code) if code else () for code in self._codes]
        outs = sum((way >> 16 & 0xFFFF) in jumps[way >> 32] for way in self.taken)
        return outs, sum(2 * len(_conditional(code)) for code in self._compiled())

    def _compiled(self):
        for path in self._files:
            with open(path, "rb") as file:
                todo = [compile(file.read(), path, "exec")]
            while todo:
                code = todo.pop()
                yield code
                todo += [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _conditional(code):
    return {
        step.offset
        for step in dis.get_instructions(code)
        if step.opname == "FOR_ITER" or ("JUMP" in step.opname and "IF" in step.opname)
    }


def changed(chance, inputs, words):
    """An input made of others by a few changes: words, bytes, pieces taken out, doubled, joined."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((0, 1, 1, 2, 4, 16, 64)))
        kind = chance.randrange(8)
        if kind < 3:
            data[at:end] = chance.choice(words)
        elif kind == 3:
            data[at:end] = chance.choice(_BYTES)
        elif kind == 4:
            del data[at:end]
        elif kind == 5:
            data[at:at] = data[at:end] * chance.choice((1, 1, 2, 9))
        elif kind == 6:
            other = chance.choice(inputs)
            cut = chance.randrange(len(other) + 1)
            data[at:] = other[cut:]
        else:
            lines = data.splitlines(True)
            chance.shuffle(lines)
            data = bytearray().join(lines)
    return bytes(data)


def walk(reader, until, seed, root):
    """
    Have ``reader.check(data, chance, root)`` try inputs until ``until`` of them in a row took no
    new way in its ``MODULES``. Its seeds are tried first; then some are made by its grammar, most
    of those that were kept and its ``WORDS``.
    """
    chance = random.Random(seed)
    kept, since, inputs = reader.seeds(), 0, 0
    first = iter(reader.seeds())
    with Ways(reader.MODULES) as ways:
        while since < until:
            inputs += 1
            data = next(first, None)
            if data is None and chance.random() < 0.3:
                data = reader.grammar(chance)
            elif data is None:
                data = changed(chance, kept, reader.WORDS)
            before = len(ways.taken)
            reader.check(data, chance, root)
            since += 1
            if len(ways.taken) != before:
                since = 0
                if len(data) <= _LONGEST:
                    kept.append(data)
    return Figures(inputs, since, len(kept) - len(reader.seeds()), *ways.branches())
