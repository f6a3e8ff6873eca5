"""``cinemesh train CONFIG --dry-run``: what a run would be on so many devices. Starts nothing, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import CinemeshError
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.lifetime import Lifetime, lifetime
from ...perf_model.prices.played import PlayedStep
from ...perf_model.report.explain import describe
from ..tables import new_console
from ..training.batches import told as batches_told
from ..training.predict import check_memory, play_buckets
from ..training.recipe import Config, read_recipe
from ..training.resolve import cluster_under, planned, resolved_before
from ..training.resolved import Resolved
from ..training.setting import Setting
from . import reply
from .lifetime import print_lifetime
from .reasons import print_start_up, start_up_cost
from .recipe_run import Steps, print_recipe_run, recipe_run
from .reply import AfterLoss, DryRunReply, RecipeRun, Schema
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
            whole, chosen = chosen, planned(_left(ranks, lost), auto, setting, ranks)
            after = _after_loss(recipe, whole, chosen)
        setting = setting.under(chosen.plan, chosen.global_batches)
    elif lost is not None:
        raise CinemeshError(
            f"{config}: its plan is given, and of fewer ranks another is needed", remedy="add --plan auto", what="lost"
        )
    elif ranks is not None:
        recipe.plan.check_world_size(ranks)
    data, plan = recipe.data, setting.config.plan
    steps = Steps(recipe.schedule.steps, [bucket.weight for bucket in data.shapes])
    whole = recipe_run(setting.model, cluster, plan, _that_fit(setting, cluster), steps)
    lives = None
    if cluster.operations is not None:
        samples = sum(bucket.share * bucket.global_batch for bucket in whole.buckets)
        lives = lifetime(setting.model, plan, cluster, whole.step_s, samples)
    days = whole.hours / 24.0 / (lives.usual.shares.training if lives else 1.0)
    told = DryRunReply(
        schema=Schema(name="train --dry-run"),
        model=setting.model.name,
        cluster=cluster.name,
        **vars(whole),
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
    print_order(console, told.order)
    print_start_up(console, told.start_up)
    if lives is not None:
        print_lifetime(console, "the run", lives, None)
    if after is not None:
        console.print(
            f"\n{told.ranks:,} of {after.full_ranks:,} ranks are left: a step takes {after.batches}, "
            f"{after.samples_per_s:.4g} samples/s of {after.full_samples_per_s:.4g} before, which is "
            f"{after.of_proportional:.2%} of their share"
        )
    console.print(f"\n{told.verdict}")


def _left(ranks: int, lost: int) -> int:
    if not 0 < lost < ranks:
        raise CinemeshError(f"--lost {lost} of {ranks} ranks", remedy="some must be left", what="lost", value=lost)
    return ranks - lost


def _after_loss(recipe: Config, before: Resolved, left: Resolved) -> AfterLoss:
    def samples_per_s(of: Resolved) -> float:
        weights = [bucket.weight for bucket in recipe.data.shapes]
        mean = sum(w * b for w, b in zip(weights, of.global_batches, strict=True)) / sum(weights)
        return mean / of.step_s

    proportional = samples_per_s(before) * left.plan.world_size / before.plan.world_size
    return AfterLoss(
        full_ranks=before.plan.world_size,
        batches=batches_told(left.global_batches, tuple(recipe.data.global_batches)),
        samples_per_s=samples_per_s(left),
        full_samples_per_s=samples_per_s(before),
        of_proportional=samples_per_s(left) / proportional,
    )


def _verdict(run: RecipeRun, lives: Lifetime | None, days: float) -> str:
    fits = f"fits: {run.peak_bytes / 1e9:.2f} of {run.limit_bytes / 1e9:.2f} GB"
    if lives is None:
        return f"{fits}; {run.steps:,} steps take {days:.3g} days where nothing fails"
    return (
        f"{fits}; {run.steps:,} steps take {days:.3g} days with failures, at a goodput of "
        f"{lives.usual.shares.training:.1%} with a checkpoint every {lives.usual.steps:,} steps"
    )


def _that_fit(setting: Setting, cluster: Cluster) -> Iterator[PlayedStep]:
    for step in play_buckets(setting, cluster):
        check_memory(step, cluster)
        yield step
