"""In which order VMs can go: those that use others before these."""


def turns(names, users):
    """
    Names of VMs, those first that none of the rest uses, else as given; ``users`` is ``{name: [who
    uses it]}``. What is in a circle comes last.
    """
    those = set(names)
    waiting = {name: those.intersection(users.get(name, ())) - {name} for name in names}
    uses = {name: [] for name in names}
    for name in names:
        for user in waiting[name]:
            uses[user].append(name)
    found = [name for name in names if not waiting[name]]
    for name in found:  # it grows
        for other in uses[name]:
            waiting[other].discard(name)
            if not waiting[other]:
                found.append(other)
    return [*found, *(name for name in names if waiting[name])]
