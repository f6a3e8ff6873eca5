"""``cinemesh doctor``: whether this machine, or under torchrun every machine of the job, is fit to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...perf_model.clusters.cluster import Cluster, load
from ..cluster.environment import launched
from ..health.checks import Check, Wanted, check, fit
from ..health.facts import MachineFacts, machine_facts
from ..health.ranks import RankTold, run_on_ranks
from ..options import Device
from ..tables import new_console, plain_table


@dataclass(frozen=True)
class DoctorOrder:
    """What is asked. ``per_node``: ranks that will run on a machine; ``directory``: where they will write."""

    cluster: str | None
    device: Device
    per_node: int | None
    directory: Path
    as_json: bool


def run(order: DoctorOrder) -> int:
    """Look, and say what was found; 0 where all is fit, else 1. Raises CinemeshError for no cluster of that name."""
    cluster = load(order.cluster) if order.cluster is not None else None

    def say(machines: Sequence[RankTold], shared: Sequence[Check]) -> None:
        _say(machines, shared, order.as_json)

    if launched():
        return run_on_ranks(order.device, order.directory, cluster, say)
    here = machine_facts(order.directory)
    found = check(here, Wanted(device=order.device, ranks_of_a_node=_ranks(order, here, cluster), cluster=cluster))
    say([RankTold(host=here.host, software=here.software, checks=found)], [])
    return 0 if fit(found) else 1


def _ranks(order: DoctorOrder, here: MachineFacts, cluster: Cluster | None) -> int:
    if order.per_node is not None:
        return order.per_node
    return cluster.gpus_per_server if cluster is not None and cluster.device == "cuda" else max(1, len(here.cards))


def _say(machines: Sequence[RankTold], shared: Sequence[Check], as_json: bool) -> None:
    """``shared``: what was found of all machines together."""
    everything = [*(one for told in machines for one in told.checks), *shared]
    if as_json:
        told = {"fit": fit(everything), "machines": [*map(asdict, machines)], "checks": [*map(asdict, shared)]}
        print(json.dumps(told, indent=1))
        return
    console = new_console()
    for title, checks in [*((told.host, told.checks) for told in machines), ("all together", shared)]:
        if not checks:
            continue
        console.print(title)
        table = plain_table("", "verdict", "what", "found", header=False)
        for one in checks:
            table.add_row("", one.verdict, one.name, one.said + (f"; {one.remedy}" if one.remedy else ""))
        console.print(table)
    faults = sum(one.verdict == "fault" for one in everything)
    console.print("fit to train" if not faults else f"NOT fit: {faults} fault{'s' * (faults > 1)}")
