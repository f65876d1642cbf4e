"""
Set up ./demo for ``make highstate``: a masterless minion, and a scratch root as its machine.

``python3 packaging/demo.py EXAMPLE`` takes the pillar from pillar-examples/EXAMPLE.sls. What is in
./demo already stays as it is, but for the pillar and the minion's configuration.
"""

import json
import pathlib
import shutil
import sys

TREE = pathlib.Path(__file__).resolve().parent.parent
DEMO = TREE / "demo"
# What an installed dom0 has before anyone declares a pool; /opt is where the manual's pools go.
MACHINE = ("etc/qubes", "opt", "mnt", "var/lib")


def main(example):
    """Lay out ./demo."""
    source = TREE / "pillar-examples" / f"{example}.sls"
    if not source.is_file():
        known = ", ".join(sorted(p.stem for p in source.parent.glob("*.sls")))
        sys.exit(f"pillar-examples/{example}.sls is not there; EXAMPLE is one of {known}")
    for path in ("etc", "srv/pillar", *(f"root/{path}" for path in MACHINE)):
        (DEMO / path).mkdir(parents=True, exist_ok=True)
    (DEMO / "srv/salt/top.sls").write_text("base:\n  '*':\n    - qubes_storage\n")
    (DEMO / "srv/pillar/top.sls").write_text("base:\n  '*':\n    - machine\n")
    shutil.copy(source, DEMO / "srv/pillar/machine.sls")
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
