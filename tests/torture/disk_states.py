"""
What may be on a disk when the power goes: each state that the steps of a run may leave.

At every moment the steps that a sync has made sure of are there, and of the others any. Where there
are few of those, every choice is taken. Where there are more, as ALICE (Pillai and others, OSDI
2014) bounds it: each prefix, each prefix without one step, without each two that follow one
another, and with one later step that came early; and without all data, all sizes, all names, all
that is about one directory or file, or with nothing but that.
"""

import itertools

from tests.torture.disk import BLOCK

ALL_OF = 6  # steps that are not sure, of which every choice is taken


class State:
    """A state of the disk: its facts, how it came to be, and whether the run had ended by then."""

    def __init__(self, facts, text):
        self.facts, self.text, self.ended = facts, text, False


def states(disk, all_of=ALL_OF, since=0):
    """
    ``(choices, states)``: how many choices of steps there are at all moments after the first
    ``since`` calls, and the states of the disk that differ.
    """
    found, seen = {}, {}
    touched = disk.touched()
    for chosen, garbage, text, ended in _choices(disk, all_of, since):
        if (chosen, garbage) not in seen:
            facts = disk.after(sorted(chosen), garbage)
            state = State(facts, text)
            seen[chosen, garbage] = found.setdefault(fingerprint(disk, facts, touched), state)
        seen[chosen, garbage].ended |= ended
    return len(seen), list(found.values())


def fingerprint(disk, facts, touched):
    """What two states share if all that has a name is the same in both."""
    reached = disk.reached(facts)
    return hash(frozenset(
        (there, frozenset(_part(facts, there).items())) for there in touched if there[1] in reached
    ))  # fmt: skip


def _part(facts, there):
    found = facts.get(there, {})
    if there[0] == "data":  # what lies past the end is not there
        size = facts["size", there[1]][None]
        return {number: block for number, block in found.items() if number * BLOCK < size}
    return found


def _choices(disk, all_of, since):
    """
    ``(numbers of the steps that reach the disk, whether others left garbage, text, whether the run
    had ended)``.
    """
    syncs = [(since, frozenset()), *disk.sure.items()]
    syncs = [(max(call, since), sure) for call, sure in syncs]
    for at, (call, sure) in enumerate(syncs):
        # Between two syncs, the choices at the last moment are those of all moments before, too.
        ended = at + 1 == len(syncs)
        last = disk.calls + 1 if ended else syncs[at + 1][0]
        if last <= since:
            continue
        free = [n for n, step in enumerate(disk.steps) if step.call < last and n not in sure]
        new = [n for n in free if disk.steps[n].call > call] or free[-1:]
        if len(free) <= all_of:
            for some in _subsets(free):
                yield sure.union(some), False, _text(disk, call, free, some), ended
        else:
            for number in [-1, *new]:
                prefix = [n for n in free if n <= number]
                for some in _changed(disk, prefix, free):
                    end = ended and prefix == free
                    yield sure.union(some), False, _text(disk, call, prefix, some), end
        yield sure, True, f"after call {call}, with garbage for all that is not sure", ended
        for number in new:
            some = [n for n in free if n <= number and not disk.steps[n].garbage]
            text = _text(disk, call, free, some) + ", garbage for data"
            yield sure.union(some), True, text, ended and number == free[-1]


def _subsets(free):
    return itertools.chain.from_iterable(
        itertools.combinations(free, count) for count in range(len(free) + 1)
    )


def _changed(disk, prefix, free):
    yield prefix
    yield ()
    for at in range(len(prefix)):
        yield [*prefix[:at], *prefix[at + 1 :]]
        yield [*prefix[:at], *prefix[at + 2 :]]
        yield [*prefix[: at + 1], *prefix[-1:]]
        yield [prefix[at]]
    kinds = {there[0] for n in free for there, _, _ in disk.steps[n].facts}
    inodes = {there[1] for n in free for there, _, _ in disk.steps[n].facts}
    for at, each in [*((0, kind) for kind in kinds), *((1, inode) for inode in inodes)]:
        of = {n for n in prefix if any(there[at] == each for there, _, _ in disk.steps[n].facts)}
        yield [n for n in prefix if n not in of]
        yield sorted(of)


def _text(disk, call, free, some):
    lost = [disk.steps[n].text for n in free if n not in set(some)]
    return f"after call {call}, not on the disk: {', '.join(dict.fromkeys(lost)) or 'nothing'}"
