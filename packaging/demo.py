"""
Set up ./demo for ``make highstate``: a masterless minion, and a scratch root as its machine.

``python3 packaging/demo.py [EXAMPLE]`` takes the pillar from pillar-examples/EXAMPLE.sls. What is
in ./demo already stays as it is, the pillar too until another example is asked for.
"""

import json
import pathlib
import shutil
import sys

TREE = pathlib.Path(__file__).resolve().parent.parent
DEMO = TREE / "demo"
# What an installed dom0 has before anyone declares a pool; /opt is where the manual's pools go.
MACHINE = ("etc/qubes", "opt", "mnt", "var/lib")
# The examples that need more than that, which ./demo cannot have.
NEEDS = {"external-disk": "a disk at /mnt/backup", "r4": "the daemon of R4"}


def _source(example):
    """The file of an example; the error of one that cannot be applied names those that can."""
    files = {path.stem: path for path in (TREE / "pillar-examples").glob("*.sls")}
    pillars = [n for n, path in files.items() if "\nqubes_storage:" in path.read_text()]
    known = ", ".join(sorted(set(pillars) - set(NEEDS)))
    what = None
    if example in NEEDS:
        what = f"needs {NEEDS[example]}, which ./demo has not"
    elif example not in pillars:
        what = "is a state file, no pillar" if example in files else "is not there"
    if what:
        sys.exit(f"pillar-examples/{example}.sls {what}; EXAMPLE is one of {known}")
    return files[example]


def main(example=None):
    """Lay out ./demo."""
    taken, pillar = DEMO / "example", DEMO / "srv/pillar/machine.sls"
    last = taken.read_text() if taken.is_file() else None
    kept = pillar.is_file() and example in (None, last)
    example = example or last or "workstation"
    source = None if kept else _source(example)
    for path in ("etc", "srv/pillar", *(f"root/{path}" for path in MACHINE)):
        (DEMO / path).mkdir(parents=True, exist_ok=True)
    (DEMO / "srv/salt/top.sls").write_text("base:\n  '*':\n    - qubes_storage\n")
    (DEMO / "srv/pillar/top.sls").write_text("base:\n  '*':\n    - machine\n")
    if source:
        shutil.copy(source, pillar)
        taken.write_text(example)
    minion = {
        "id": "dom0",
        "root_dir": str(DEMO / "minion"),
        "file_client": "local",
        "file_roots": {"base": [str(DEMO / "srv/salt")]},
        "pillar_roots": {"base": [str(DEMO / "srv/pillar")]},
        "clean_dynamic_modules": True,
        "qubes_storage.root": str(DEMO / "root"),
    }
    # JSON is YAML, and needs no library.
    (DEMO / "etc/minion").write_text(json.dumps(minion, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
