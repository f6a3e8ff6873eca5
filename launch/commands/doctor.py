"""``cinemesh doctor``: whether this machine is fit to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...perf_model.clusters.cluster import Cluster, load
from ..health.checks import Check, Wanted, check, fit
from ..health.facts import MachineFacts, machine_facts
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
    here = machine_facts(order.directory)
    found = check(here, Wanted(device=order.device, ranks_of_a_node=_ranks(order, here, cluster), cluster=cluster))
    _say(here, found, order.as_json)
    return 0 if fit(found) else 1


def _ranks(order: DoctorOrder, here: MachineFacts, cluster: Cluster | None) -> int:
    if order.per_node is not None:
        return order.per_node
    return cluster.gpus_per_server if cluster is not None and cluster.device == "cuda" else max(1, len(here.cards))


def _say(here: MachineFacts, checks: Sequence[Check], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"fit": fit(checks)} | asdict(here) | {"checks": [asdict(one) for one in checks]}, indent=1))
        return
    console = new_console()
    console.print(here.host)
    table = plain_table("", "verdict", "what", "found", header=False)
    for one in checks:
        table.add_row("", one.verdict, one.name, one.said + (f"; {one.remedy}" if one.remedy else ""))
    console.print(table)
    faults = sum(one.verdict == "fault" for one in checks)
    console.print("fit to train" if not faults else f"NOT fit: {faults} fault{'s' * (faults > 1)}")
