"""How a crew is set to work on a machine, and what it tells of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from tests.conftest import TREE

PATIENCE = 240  # s; far more than any wait, so that only a deadlock gets there


def names(kinds):
    """``KIND-N`` of each in ``{kind: how many}``."""
    return [f"{kind}-{number}" for kind, count in kinds.items() for number in range(count)]


@contextlib.contextmanager
def working(kinds, place, root, seconds, words):
    """
    The crew at work on ``root``; yields ``{name: process}``, none of which outlives the block.

    ``words(kind, name)`` are a worker's further arguments; logs and errors are in ``place``.
    """
    running = {}
    paths = [os.environ.get("PYTHONPATH"), str(TREE / "_utils")]
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}
    try:
        for me in names(kinds):
            kind, number = me.split("-")
            command = [sys.executable, "-m", "tests.torture.crew", kind, number, str(root)]
            command += [str(seconds), str(place / f"{me}.log"), *words(kind, me)]
            with open(place / f"{me}.err", "wb") as err:
                running[me] = subprocess.Popen(
                    command, cwd=TREE, env=env, stdout=err, stderr=err, start_new_session=True
                )
        yield running
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watch(running, look):
    """Look until all are done; returns how often."""
    looks = 0
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in running.values()):
        late = [me for me, process in running.items() if process.poll() is None]
        assert time.monotonic() < deadline, late
        look()
        looks += 1
        time.sleep(0.005)
    return looks


def told(kinds, place, running):
    """Every line of every log; what a worker itself stumbled over fails the test."""
    wrong = {me: (place / f"{me}.err").read_text() for me in names(kinds) if running[me].returncode}
    assert not wrong, "\n".join(f"{me}: {text}" for me, text in wrong.items())
    lines = ((place / f"{me}.log").read_text().splitlines() for me in names(kinds))
    return [json.loads(line) for each in lines for line in each]
