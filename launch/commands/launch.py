"""``cinemesh launch``: a recipe's run as a script for Slurm, as manifests for Kubernetes, or started here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import CinemeshError
from ...files import atomic_file, check_output_file
from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster
from ..jobs import kubernetes, local, slurm
from ..jobs.job import ClusterJob, make_job
from ..options import JobOptions
from ..training.chain import is_chain, read_chain
from ..training.recipe import Auto, Config, read_recipe
from ..training.resolve import cluster_under, planned, resolved_before
from ..training.setting import Setting
from ..written import wrote

Target = Literal["slurm", "kubernetes", "local"]
OWN: dict[Target, tuple[str, ...]] = {  # options that say something to one target alone
    "slurm": ("spares", "time", "partition", "account", "container"),
    "kubernetes": ("image", "kind", "claim", "mount", "rdma", "topology"),
    "local": (),
}


@dataclass(frozen=True)
class LaunchOrder:
    """What a run is launched as. ``ranks``: of a plan that is still to be chosen."""

    target: Target
    recipe: Path
    overrides: Sequence[str]
    ranks: int | None
    out: Path | None


def run(order: LaunchOrder, options: JobOptions) -> int:
    """Print or write what starts the run, or start it here; the exit code.

    Raises CinemeshError for a recipe that training would refuse under its plan, and for options of another target.
    """
    target = order.target
    given = [name for name, value in vars(options).items() if value is not None]
    for other, names in OWN.items():
        if other != target and (idle := [name for name in given if name in names]):
            raise CinemeshError(
                f"--{idle[0]} says nothing to {target}", remedy=f"leave it out, or launch {other}", what=idle[0]
            )
    if order.out is not None:
        if target == "local":
            raise CinemeshError("--out: local starts the run, and writes no file", remedy="leave --out out")
        check_output_file(order.out, "--out")
    jobs = _stages(order, options.per_node) if is_chain(order.recipe) else [_job(order, options.per_node)]
    job = jobs[0]
    if target == "local":
        print("\n".join(job.about()), flush=True)
        return local.run(job, options.interface)
    if target == "slurm":
        text, start = slurm.script(jobs, _slurm(options)), "sbatch"
    else:
        text, start = kubernetes.manifests(job, _kubernetes(options)), "kubectl apply -f"
    if order.out is None:
        print(text, end="")
        return 0
    with atomic_file(order.out) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    about = ", ".join(dict.fromkeys(f"{one.plan.world_size:,} ranks on {one.nodes:,} nodes" for one in jobs))
    wrote(order.out, f"{start} {shlex.quote(str(order.out))}", about)
    return 0


def _stages(order: LaunchOrder, per_node: int | None) -> list[ClusterJob]:
    """Of a chain, each as ``cinemesh stages CHAIN --stage NAME`` does it. Raises CinemeshError for other targets."""
    if order.target != "slurm":
        raise CinemeshError(
            f"{order.recipe} is a chain of stages, and {order.target} starts one run",
            remedy="launch slurm makes an array of them; cinemesh stages runs them here",
        )
    if order.ranks is not None:
        raise CinemeshError(
            f"--ranks {order.ranks}: the stages of {order.recipe} have their own plans", remedy="leave it out"
        )
    jobs: list[ClusterJob] = []
    for link in read_chain(order.recipe, order.overrides):
        recipe, auto = read_recipe(link.recipe, link.overrides)
        if auto is not None:
            raise CinemeshError(f"{order.recipe}: the plan of {link.stage.name} is auto", remedy="name one in its set")
        plan = Plan() if link.stage.average else recipe.plan
        cluster, on_gpus = _where(recipe)
        if per_node is None and cluster is None:
            per_node = plan.world_size
        fewer = None if per_node is None else min(per_node, plan.world_size)
        job = make_job(
            order.recipe,
            plan,
            order.overrides,
            cluster=cluster,
            per_node=fewer,
            on_gpus=on_gpus and not link.stage.average,
            stage=link.stage.name,
            short=not link.stage.is_run,
        )
        jobs.append(job)
    return jobs


def _where(recipe: Config) -> tuple[Cluster | None, bool]:
    """The cluster that a recipe names, and whether it runs on GPUs."""
    cluster = None if recipe.cluster is None else cluster_under(recipe, recipe.cluster)
    return cluster, recipe.device == "cuda" or (
        recipe.device == "auto" and (cluster is None or cluster.device == "cuda")
    )


def _job(order: LaunchOrder, per_node: int | None) -> ClusterJob:
    recipe, auto = read_recipe(order.recipe, order.overrides)
    setting = _under_its_plan(recipe, auto, order)
    plan = setting.config.plan
    _ = setting.batches  # raises where the plan does not divide one
    cluster, on_gpus = _where(recipe)
    if per_node is None and cluster is None and order.target == "local":
        per_node = max(1, plan.world_size // 2)
    given = [one for one in order.overrides if one.partition("=")[0].strip().split(".")[0] != "plan"]
    return make_job(order.recipe, plan, given, cluster=cluster, per_node=per_node, on_gpus=on_gpus)


def _under_its_plan(recipe: Config, auto: Auto | None, order: LaunchOrder) -> Setting:
    setting = Setting.of(recipe)
    if auto is None:
        if order.ranks is not None:
            recipe.plan.check_world_size(order.ranks)
        return setting
    if order.ranks is None:
        raise CinemeshError(f"{order.recipe}: its plan is auto", remedy="say for how many ranks: --ranks 6144")
    chosen = resolved_before(order.ranks, auto, setting) or planned(order.ranks, auto, setting)
    return setting.under(chosen.plan, chosen.global_batches)


def _slurm(options: JobOptions) -> slurm.SlurmAsked:
    plain = slurm.SlurmAsked()
    return slurm.SlurmAsked(
        spares=plain.spares if options.spares is None else options.spares,
        time_limit=plain.time_limit if options.time is None else options.time,
        partition=options.partition,
        account=options.account,
        container=options.container,
        interface=options.interface,
    )


def _kubernetes(options: JobOptions) -> kubernetes.KubernetesAsked:
    if options.image is None:
        raise CinemeshError(
            "kubernetes: no image is named", remedy="add --image REGISTRY/NAME:TAG, one with cinemesh in it"
        )
    named = {name: getattr(options, name) for name in ("kind", "claim", "mount", "rdma", "topology", "interface")}
    return kubernetes.KubernetesAsked(image=options.image, **{k: v for k, v in named.items() if v is not None})
