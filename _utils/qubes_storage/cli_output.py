"""What the command line shows: tables of aligned columns, sizes, the report, and a progress bar."""

import os
import sys
import time

from qubes_storage.values import format_size


def printable(text):
    """A text on one line in which nothing speaks to the terminal: names may be of anyone."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def size(value):
    """A size for people; None is one that cannot be told."""
    return "-" if value is None else format_size(value)


def table(head, rows, right=()):
    """Lines of aligned columns; those with a number in ``right`` are aligned there."""
    rows = [["-" if cell in (None, "") else printable(cell) for cell in row] for row in rows]
    if head:
        rows.insert(0, head)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def report(pools):
    """The lines of a report: the pools, the VMs in them, what is wrong, and what sizes mean."""
    head = ["POOL", "DRIVER", "FILESYSTEM", "SIZE", "USED", "FREE", "PROVISIONED", "DIR_PATH"]
    sizes = ("size", "used", "free", "provisioned")
    rows = [
        [
            name,
            pool.get("class") or pool.get("driver"),
            pool.get("filesystem"),
            *(size(pool.get(key)) for key in sizes),
            pool.get("dir_path"),
        ]
        for name, pool in pools.items()
    ]
    lines = [*table(head, rows, right=(3, 4, 5, 6)), ""]
    rows = []
    for name, pool in pools.items():
        for vm, volumes in sorted(pool["vms"].items()):
            rows.append([name, vm, *(size(_sum(volumes, key)) for key in ("allocated", "size"))])
    lines += table(["POOL", "VM", "ALLOCATED", "VIRTUAL SIZE"], rows, right=(2, 3))
    problems = [(n, problem) for n, pool in pools.items() for problem in pool.get("problems", ())]
    if problems:
        lines += ["", "Problems:"]
        lines += [p if p.startswith(f"pool {n}: ") else f"pool {n}: {p}" for n, p in problems]
    sharing = [name for name, pool in pools.items() if pool.get("shared")]
    if sharing:
        lines += ["", f"Allocated may be shared with other images in {', '.join(sharing)}: there,"]
        lines += ["copies share blocks, and each of them counts those blocks."]
    return lines


def _sum(volumes, key):
    sizes = [volume[key] for volume in volumes.values() if volume[key] is not None]
    return sum(sizes) if sizes else None


def progress():
    """
    What shows how far a copy is, or None where nobody would see it: no terminal, or no tqdm, which
    Qubes' own tools use.
    """
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # noqa: PLC0415
    except ImportError:
        return None
    return _Progress(tqdm)


class _Progress:
    """A bar for each copy that takes longer than a second."""

    def __init__(self, tqdm):
        self.tqdm = tqdm
        self.path = self.bar = None

    def __call__(self, path, copied, total):
        if path != self.path:
            self.close()
            self.path, self.began = path, time.monotonic()
        if self.bar is None and time.monotonic() - self.began > 1 and copied < total:
            name = os.path.basename(path)
            units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
            self.bar = self.tqdm(
                total=total, desc=name, file=sys.stderr, initial=copied, leave=False, **units
            )
        if self.bar is not None:
            self.bar.update(copied - self.bar.n)
            if copied >= total:
                self.close()

    def close(self):
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
        self.path = self.bar = None
