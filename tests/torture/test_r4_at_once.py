"""Several clients of R4's daemon at once: each is told the truth, and nothing is lost."""

import collections
import re

import pytest

from tests.r4.machine import RELEASES, machine
from tests.torture import crews

CREW = {"r4cli": 3, "r4core": 3}
CLEAR = re.compile(
    r"VM [\w-]+: (is there already|is not there|its move to pool [\w-]+ was cut off"
    r"|someone else created it meanwhile|was removed by someone else|.* is gone with the VM"
    r"|volume private is .* already and never shrinks"
    r"|volume private is .*, not .*: qubesd says ok)"  # another VM of that name by then
    r"|pool [\w-]+: (is there already|is not there|was not added: .* already exists)"
)


@pytest.mark.parametrize("release", RELEASES)
def test_several_clients_at_once(root, tmp_path, release, everything):
    with machine(release, root) as (daemon, system):
        for me in crews.names(CREW):
            daemon.add_pool(f"own-{me}", "file", dir_path=f"/mnt/own-{me}")
        socket = str(root / "qubesd.sock")

        def words(kind, _):
            return (
                ("admin", socket) if kind == "r4core" else ("--backend=admin", "--socket", socket)
            )

        with crews.working(CREW, tmp_path, root, 20 if everything else 2, words) as running:
            crews.watch(running, lambda: None)
            told = crews.told(CREW, tmp_path, running)
        check_told(daemon, system, told)


def check_told(daemon, system, told):
    done = collections.Counter(line["did"] for line in told if "did" in line)
    refused = [line for line in told if "refused" in line]
    print(f"{dict(done)}; {len(refused)} refused; {len(daemon.log)} calls")
    assert {line["error"] for line in refused if not CLEAR.search(line["error"])} == set()
    balance = collections.Counter()
    for line in told:
        balance[line.get("there")] += 1
        balance[line.get("gone")] -= 1
    balance.pop(None)
    if daemon.release != "later":
        # These answer nothing to who adds a pool that is there, nor to some who have added one.
        shared = [name for name in balance if re.fullmatch(r"pool p\d", name)]
        balance.update({name: 1 - balance[name] for name in shared if balance[name] > 1})
    there = {*daemon.vms, *(f"pool {name}" for name in daemon.pools)}
    assert {name: n for name, n in balance.items() if n != (name in there)} == {}
    guards = {line["set"][0]: line["set"][2] for line in told if "set" in line}
    assert {pool: system.guards(pool).get("min_free") for pool in guards} == guards
    qids = [vm.set["qid"] for vm in daemon.vms.values()]
    assert len(qids) == len(set(qids))
