"""``cinemesh cluster``: every constant of a cluster with its origin, as a table or JSON (torch-free)."""

from __future__ import annotations

import json
from dataclasses import asdict

from ...perf_model.clusters.cluster import load
from ..tables import new_console, plain_table


def run(*, name: str, as_json: bool) -> None:
    """Print it, values and units as the file says them. Raises CinemeshError for what is no cluster."""
    cluster = load(name)
    tables = {"matmul.grid": cluster.matmul.grid, "nccl.correction": cluster.nccl.correction if cluster.nccl else ""}
    if as_json:
        facts = {path: asdict(fact) for path, fact in cluster.facts.items()}
        about = {"name": cluster.name, "about": cluster.about, "gpus": cluster.gpus, "device": cluster.gpu.name}
        print(json.dumps({**about, "constants": facts, "tables": {k: v for k, v in tables.items() if v}}, indent=1))
        return
    console = new_console()
    console.print(f"{cluster.name}: {cluster.about}\n{cluster.gpus:,} x {cluster.gpu.name}\n")
    shown = plain_table("constant", "value", "unit", "origin", "source", "date", right=("value",))
    for path, fact in cluster.facts.items():
        value = fact.value
        text = ", ".join(f"{k}: {v:.10g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.10g}"
        shown.add_row(path, text, fact.unit, fact.origin, fact.source, fact.date)
    for path, file in tables.items():
        if file:
            shown.add_row(path, file, "ratio", "measured", "a table beside the cluster file", "")
    console.print(shown)
