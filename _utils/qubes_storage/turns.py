"""In which order VMs can go: those that use others before these."""


def turns(names, users):
    """
    Names of VMs, those first that none of the rest uses, else as given; ``users`` is ``{name: [who
    uses it]}``. What is in a circle comes last.
    """
    waiting = {name: {*users.get(name, ())}.intersection(names) - {name} for name in names}
    uses = {name: [other for other in names if name in waiting[other]] for name in names}
    found = [name for name in names if not waiting[name]]
    for name in found:  # it grows
        for other in uses[name]:
            waiting[other].discard(name)
            if not waiting[other]:
                found.append(other)
    return [*found, *(name for name in names if waiting[name])]
