"""
A disk in a model: what lies on it, what a run does to it, and what a sync makes sure of.

All that a disk holds is *facts*: of an object, ``(kind, inode)``, each with its part and value.

    ("entry", directory)  {name: inode}           ("mode", inode)   {None: mode}
    ("data", file)        {block: bytes}          ("owner", inode)  {None: (uid, gid)}
    ("size", file)        {None: bytes}           ("times", inode)  {None: ns of the last change}

A step is a set of facts that reach the disk together or not at all: a rename takes one name and
gives another, a write is the new size and some pieces of data, each for itself. Steps reach the
disk in any order; only of one and the same fact the later value is what stays. A sync of a file or
directory makes sure of every step so far that is about it, and of nothing else: not that a new
file has a name, which is its directory's. That is all that POSIX says.
"""

from dataclasses import dataclass, field

BLOCK = 4096
PIECES = 3  # at most so many for a write: its first block, those between, its last


@dataclass
class Step:
    """Facts that reach the disk together, ``[(object, part, value)]``; the value None is gone."""

    facts: list
    text: str
    call: int
    garbage: list = field(default_factory=list)  # what may be there instead of data

    def __contains__(self, inode):
        return any(there[1] == inode for there, _, _ in self.facts)


class Disk:
    """Facts, and the steps that a run takes from there."""

    def __init__(self):
        self.before = {}  # facts as the run found them, and what new inodes are born with
        self.now = {}
        self.kinds = {}  # inode: "dir", "subvolume", "mount", "file", or the target of a link
        self.places = {}  # inode: the filesystem it lies on
        self.steps = []
        self.sure = {}  # {number of calls: numbers of the steps that a sync made sure of by then}
        self.calls = 0
        self.text = ""  # what the steps that follow are of
        self.root = self.born("mount", 0, 0o755, (0, 0))

    def born(self, kind, place, mode, owner, times=None):
        """A new inode; no name of it is anywhere yet."""
        inode = len(self.kinds) + 1
        self.kinds[inode], self.places[inode] = kind, place
        facts = {("mode", inode): mode, ("owner", inode): owner, ("times", inode): times}
        if kind == "file":
            facts["size", inode] = 0
        for there, value in facts.items():
            self.before[there] = {None: value}
            self.now[there] = {None: value}
        return inode

    def step(self, *facts, garbage=()):
        """Take a step."""
        self.steps.append(Step(list(facts), self.text, self.calls, list(garbage)))
        put(self.now, facts)

    def get(self, kind, inode):
        """What is so now of an inode: its entries, its blocks, or the one value there is."""
        found = self.now.get((kind, inode), {})
        return found if kind in ("entry", "data") else found.get(None)

    def sync(self, about):
        """Make sure of the steps so far that ``about(step)`` says are meant."""
        known = next(reversed(self.sure.values()), frozenset())
        found = (n for n, step in enumerate(self.steps) if n not in known and about(step))
        self.sure[self.calls] = known | frozenset(found)

    # What a run does to files and directories.

    def enter(self, directory, name, inode):
        """Give an inode a name, or with None take the name away."""
        self.step((("entry", directory), name, inode))

    def rename(self, old, new, exchange=False):
        """Rename, ``(directory, name)`` to another: at once, whatever else."""
        moved = self.get("entry", old[0])[old[1]]
        other = self.get("entry", new[0]).get(new[1])
        if moved == other:
            return  # two names of one file: nothing happens
        self.step(
            (("entry", new[0]), new[1], moved),
            (("entry", old[0]), old[1], other if exchange else None),
        )

    def change(self, kind, inode, value):
        """Change mode, owner or times."""
        self.step(((kind, inode), None, value))

    def resize(self, inode, size):
        """Cut a file off, or have it end in a hole."""
        facts = [(("size", inode), None, size)]
        for number, block in self.get("data", inode).items():
            start = number * BLOCK
            if start >= size:
                facts.append((("data", inode), number, None))
            elif start + BLOCK > size:
                facts.append((("data", inode), number, block[: size - start].ljust(BLOCK, b"\0")))
        self.step(*facts)

    def write(self, inode, offset, data):
        """
        Write: the size is a step, and so is each piece of data; one block is two, its first half
        and all of it, so that a write may be torn.
        """
        if not data:
            return
        if offset + len(data) > self.get("size", inode):
            self.step((("size", inode), None, offset + len(data)))
        blocks = self._blocks(inode, offset, data)
        if len(blocks) == 1:
            half = self._blocks(inode, offset, data[: (len(data) + 1) // 2])
            pieces = [half, blocks]
        else:
            numbers = sorted(blocks)
            parts = [numbers[:1], numbers[1:-1], numbers[-1:]][:PIECES]
            pieces = [{n: blocks[n] for n in part} for part in parts if part]
        for piece in pieces:
            self.step(
                *((("data", inode), number, block) for number, block in piece.items()),
                garbage=[(("data", inode), number, b"\xa5" * BLOCK) for number in piece],
            )

    def _blocks(self, inode, offset, data):
        """``{number: whole block}`` of what a write changes."""
        there, changed = self.get("data", inode), {}
        for number in range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1):
            block = bytearray(there.get(number, bytes(BLOCK)))
            start = max(offset, number * BLOCK)
            stop = min(offset + len(data), (number + 1) * BLOCK)
            block[start % BLOCK : start % BLOCK + stop - start] = data[
                start - offset : stop - offset
            ]
            changed[number] = bytes(block)
        return changed

    def share(self, inode, source):
        """Have a file share all blocks of another: its size is a step, its data another."""
        self.resize(inode, 0)
        data = self.get("data", source)
        self.step((("size", inode), None, self.get("size", source)))
        if data:
            self.step(*((("data", inode), number, block) for number, block in data.items()))

    def snapshot(self, source, directory, name):
        """A subvolume that is a copy of another, which comes whole or not at all."""
        copies = {}

        def copied(inode):
            if inode not in copies:
                kind = "subvolume" if inode == source else self.kinds[inode]
                values = [self.get(what, inode) for what in ("mode", "owner", "times")]
                made = copies[inode] = self.born(kind, self.places[inode], *values)
                entries = self.get("entry", inode)
                facts = {"size": {None: self.get("size", inode)}, "data": self.get("data", inode)}
                facts["entry"] = {name: copied(entry) for name, entry in entries.items()}
                for what, values in facts.items():
                    if values and values != {None: None}:
                        self.before[what, made] = dict(values)
                        self.now[what, made] = dict(values)
            return copies[inode]

        self.enter(directory, name, copied(source))

    def read(self, inode, offset, count):
        """What a file holds now."""
        data, size = self.get("data", inode), self.get("size", inode)
        count = max(0, min(count, size - offset))
        first, last = offset // BLOCK, (offset + count - 1) // BLOCK
        text = b"".join(data.get(number, bytes(BLOCK)) for number in range(first, last + 1))
        return text[offset - first * BLOCK :][:count]

    # What is on the disk if some of the steps have reached it.

    def after(self, chosen, garbage=False):
        """The facts if only the steps of these numbers, in ascending order, reached the disk."""
        found, own = dict(self.before), set()
        if garbage:
            for number in sorted(set(range(max(chosen, default=-1) + 1)) - set(chosen)):
                put(found, self.steps[number].garbage, own)
        for number in chosen:
            put(found, self.steps[number].facts, own)
        return found

    def touched(self):
        """The objects that any step is about."""
        return {there for step in self.steps for there, _, _ in step.facts}

    def reached(self, facts):
        """The inodes that have a name."""
        found, todo = {self.root}, [self.root]
        while todo:
            for inode in facts.get(("entry", todo.pop()), {}).values():
                if inode not in found:
                    found.add(inode)
                    todo.append(inode)
        return found


def put(facts, changed, own=None):
    """Put changes into facts; with ``own`` into a copy of each object that is not in it yet."""
    for there, part, value in changed:
        if own is not None and there not in own:
            facts[there] = dict(facts.get(there, {}))
            own.add(there)
        if value is None:
            facts.setdefault(there, {}).pop(part, None)
        else:
            facts.setdefault(there, {})[part] = value
