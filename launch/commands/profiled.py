"""``cinemesh profile``: some real steps of a recipe, every op and collective beside its price.

Steps are those of the run, on its data, as it would capture and replay them; nothing is kept of what they learn. What
is written: a page, a trace, ``profile.json`` for ``calibrate --profile``, and ``rows.yaml`` for ``validate``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CinemeshError
from ...model.config import latent_text
from ...parallel.runtime.comm import gather_objects
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.played import play_program
from ..cluster.environment import device_here, processes_here, say_device, world_size
from ..cluster.processes import joined, launch, rank_main
from ..training.differences import recipe_facts
from ..training.measured_rows import NO_CLUSTER
from ..training.recipe import Config, read_recipe
from ..training.resolve import cluster_under, planned, resolved_before
from ..training.setting import Setting
from .profile_files import PAGE, write_files
from .profile_shown import FIRST, ToldProfile, print_json
from .profile_steps import batch_of, take_steps

FOLDER = "profile"  # of a run's, unless told


@dataclass(frozen=True)
class ProfileOrder:
    """What is asked. None: the recipe's own. ``latent``: of the bucket; the one with most tokens unless told."""

    config: Path
    overrides: Sequence[str]
    nproc: int | None
    steps: int
    latent: str | None
    cluster: str | None
    out: Path | None
    as_json: bool


def run(order: ProfileOrder) -> None:
    """Profile on ``nproc`` processes of this machine or on those that torchrun started. Exits with the ranks' code.

    Raises CinemeshError for what would stop training, too, and where no cluster is named to price GPUs on.
    """
    recipe, auto = read_recipe(order.config, order.overrides)
    world = world_size(order.nproc)
    setting = Setting.of(recipe)
    if auto is not None:
        chosen = resolved_before(world, auto, setting) or planned(world, auto, setting)
        setting = setting.under(chosen.plan, chosen.global_batches)
    config = setting.config
    config.plan.check_world_size(world)
    setting.check_training()
    batch_of(setting, order.latent)
    say_device(config.device, processes_here(world))
    prices_beside(config, order.cluster, device_here(config.device, processes_here(world)))
    local = order.nproc or 1
    given = config, setting.global_batches, order
    code = launch(local, _work, *given) if local > 1 else rank_main(lambda: _work(*given))
    if code:
        sys.exit(code)


def prices_beside(config: Config, named: str | None, device: str) -> tuple[str, Cluster]:
    """The cluster whose prices stand beside what is measured, and how it was named.

    Raises CinemeshError where none is named for GPUs, and for one of another kind of device.
    """
    kind = device.partition(":")[0]
    name = named or config.cluster or (NO_CLUSTER if kind == "cpu" else None)
    if name is None:
        raise CinemeshError("the recipe names no cluster to price its steps on", remedy="add --cluster h200-ib400")
    cluster = cluster_under(config, name)
    if cluster.device != kind:
        raise CinemeshError(
            f"the steps run on {kind}, and {name} has prices of {cluster.device}",
            remedy=f"name one of {kind} with --cluster" + (", as local-cpu" if kind == "cpu" else ""),
        )
    return name, cluster


def _work(config: Config, batches: tuple[int, ...], order: ProfileOrder) -> None:
    with joined(config.plan, config.device, recipe_facts(config)) as place:
        setting = Setting.of(config, batches)
        batch = batch_of(setting, order.latent)
        runner, taken = take_steps(setting, place, batch, order.steps)
        everyones: Any = gather_objects(taken) if place.mesh is not None else [taken]
        if place.rank > 0:
            return
        name, cluster = prices_beside(config, order.cluster, place.device)
        whole = play_program(runner.program, batch, cluster)
        on = place.device.partition(":")[0]
        about = f"{setting.model.name}, {latent_text(batch.latent)}, {config.plan.equation()} on {on}"
        told = ToldProfile.of(about, cluster, whole, everyones)
        out = order.out or config.logging.directory / FOLDER
        write_files(out, told, runner, config, name)
        if order.as_json:
            print_json(told)
        else:
            told.show(FIRST)
            print(f"the rest: {out / PAGE}")
