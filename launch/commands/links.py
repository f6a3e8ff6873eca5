"""What a fit to measured links, or to a profile, came to, said (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ...perf_model.calibration.levels import write_leveled
from ...perf_model.clusters.cluster import Cluster
from ..written import command, wrote


def show_links(out: Path, cluster: Cluster, errors: Sequence[tuple[str, float]]) -> None:
    """``errors``: of the cluster's prices, by what was measured."""
    typer.echo(f"{out}: {cluster.about}. Mean error of its prices over what was measured:")
    for title, error in errors:
        typer.echo(f"  {title:50}{error:8.1%}")
    wrote(out, command("plan", gpus=cluster.gpus, cluster=out))


def show_levels(profile: Path, base: str | None, out: Path) -> None:
    """Write a base's cluster file at the levels of a profile. Raises CinemeshError as :func:`levels.write_leveled`."""
    cluster, errors = write_leveled(profile, base, out)
    typer.echo(f"{out}: {cluster.about}. Errors of its prices, of the time that the profile's records took, were, are:")
    for part, (before, after) in errors.items():
        typer.echo(f"  {part:20}{before:8.1%}{after:8.1%}")
    wrote(out, command("plan", gpus=cluster.gpus, cluster=out))
