"""What a fit of links came to, said (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ...perf_model.clusters.cluster import Cluster
from ..written import command, wrote


def show_links(out: Path, cluster: Cluster, errors: Sequence[tuple[str, float]]) -> None:
    """``errors``: of the cluster's prices, by what was measured."""
    typer.echo(f"{out}: {cluster.about}. Mean error of its prices over what was measured:")
    for title, error in errors:
        typer.echo(f"  {title:50}{error:8.1%}")
    wrote(out, command("plan", gpus=cluster.gpus, cluster=out))
