"""``cinemesh train CONFIG --dry-run``: what a run would be on so many devices. Starts nothing, writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import CinemeshError
from ...perf_model.prices.lifetime import Lifetime, lifetime
from ...perf_model.report.explain import describe
from ..tables import new_console
from ..training.predict import steps_that_fit
from ..training.recipe import read_recipe
from ..training.resolve import cluster_under, planned, resolved_before
from ..training.setting import Setting
from . import reply
from .after_loss import loss_told, planned_after_loss
from .lifetime import print_lifetime
from .reading import bucket_readings, print_readings
from .reasons import print_start_up, start_up_cost
from .recipe_run import Steps, print_recipe_run, recipe_run
from .reply import DryRunReply, RecipeRun, Schema
from .software import print_order


def run(*, config: Path, ranks: int | None, lost: int | None, overrides: Sequence[str], as_json: bool) -> None:
    """Print the recipe's plan, its bytes, and what the cost model says of a step of every bucket.

    ``lost``: of the ranks, what is shown is what the run goes on with without these.

    Raises CinemeshError where training would refuse the recipe on so many devices: no plan that fits, or not the given
    one; and for a recipe that names no cluster.
    """
    recipe, auto = read_recipe(config, overrides)
    if recipe.cluster is None:
        raise CinemeshError(
            f"{config}: it names no cluster to price its steps on", remedy="add --set cluster=grand-teton-h100"
        )
    setting, cluster, after = Setting.of(recipe), cluster_under(recipe, recipe.cluster), None
    if auto is not None:
        if ranks is None:
            raise CinemeshError(f"{config}: its plan is auto", remedy="say for how many devices: --ranks 6144")
        chosen = resolved_before(ranks, auto, setting) or planned(ranks, auto, setting)
        if lost is not None:
            chosen, after = planned_after_loss(chosen, lost, auto, setting)
        setting = setting.under(chosen.plan, chosen.global_batches)
    elif lost is not None:
        raise CinemeshError(
            f"{config}: its plan is given, and of fewer ranks another is needed", remedy="add --plan auto", what="lost"
        )
    elif ranks is not None:
        recipe.plan.check_world_size(ranks)
    data, plan = recipe.data, setting.config.plan
    steps = Steps(recipe.schedule.steps, data.step_weights, setting.latents)
    whole = recipe_run(setting.model, cluster, plan, steps_that_fit(setting, cluster, records := list[int]()), steps)
    lives = None
    if cluster.operations is not None:
        samples = sum(bucket.share * bucket.global_batch for bucket in whole.buckets)
        lives = lifetime(setting.model, plan, cluster, whole.step_s, samples, records)
    days = whole.hours / 24.0 / (lives.usual.shares.training if lives else 1.0)
    told = DryRunReply(
        schema=Schema(name="train --dry-run"),
        model=setting.model.name,
        cluster=cluster.name,
        **vars(whole),
        readings=bucket_readings(setting, whole.buckets),
        order=cluster.order_told(),
        start_up=start_up_cost(plan, cluster),
        lifetime=lives,
        after_loss=after,
        days=days,
        verdict=_verdict(whole, lives, days),
    )
    if as_json:
        print(reply.text(told))
        return
    console = new_console()
    batches = " + ".join(dict.fromkeys(f"{bucket.global_batch:,}" for bucket in told.buckets))
    console.print(
        f"{told.model} on {told.ranks:,} devices of {told.cluster}, a global batch of {batches}. "
        f"Predicted, not measured; nothing was started or written.\n\n{describe(plan)}\n"
    )
    print_recipe_run(console, told)
    print_readings(console, told.readings, cluster.operations.read_bytes_per_s if cluster.operations else None)
    print_order(console, told.order)
    print_start_up(console, told.start_up)
    if lives is not None:
        print_lifetime(console, "the run", lives, None)
    if after is not None:
        console.print(f"\n{loss_told(after, told.ranks)}")
    console.print(f"\n{told.verdict}")


def _verdict(run: RecipeRun, lives: Lifetime | None, days: float) -> str:
    fits = f"fits: {run.peak_bytes / 1e9:.2f} of {run.limit_bytes / 1e9:.2f} GB"
    if lives is None:
        return f"{fits}; {run.steps:,} steps take {days:.3g} days where nothing fails"
    return (
        f"{fits}; {run.steps:,} steps take {days:.3g} days with failures, at a goodput of "
        f"{lives.usual.shares.training:.1%} with a checkpoint every {lives.usual.steps:,} steps"
    )
