"""What plans are asked about: model, shapes, batch and cluster, by options or by a recipe under them (torch-free).

An option wins over the recipe. To read a recipe is to build its codec and text encoders, with torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ...documents import parse_yaml, quoted
from ...errors import CinemeshError
from ...kernels.selection import Software, packages_of
from ...model.config import ModelConfig, latent_text
from ...parallel.ir.fields import DtypePolicy
from ...parallel.ir.plan import Plan, fields_of
from ...perf_model.clusters.cluster import Cluster, load, names_in
from ...perf_model.prices.encoders import LoopEncoders
from ...perf_model.search.request import LatentBucket, buckets_of_batches
from ...ranges import WEIGHT_RANGE
from ..models import parse_latent, read_model
from ..options import DEFAULT_CLUSTER, DEFAULT_DTYPE, DEFAULT_MODEL, Asked, On
from ..plans import SUFFIXES, read_plan


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is planned for. ``model``: as it was asked for. ``held``: plan fields that a recipe gives the planner.

    ``encoders``: those of text that run in the loop, of a recipe that says so, else the paper's where they are asked
    for. ``gpus`` and ``steps``: of a recipe, where it says them. ``taken``: what a recipe gave, by name, in words.
    """

    model: str
    config: ModelConfig
    buckets: tuple[LatentBucket, ...]
    cluster: Cluster
    global_batch: int | None
    samples: int | None
    dtype: DtypePolicy
    held: dict[str, Any] = field(default_factory=dict)
    gpus: int | None = None
    steps: int | None = None
    taken: dict[str, str] = field(default_factory=dict)
    recipe: Path | None = None
    encoders: LoopEncoders | None = None


def workload(on: On, latents: Sequence[str], dtype: str | None = None, recipe: Path | None = None) -> Workload:
    """What the options say, and of what they leave out what the ``recipe`` says.

    Raises CinemeshError for an unknown model, cluster or package, for an illegal latent, and as reading a recipe does.
    """
    given = _buckets(latents)
    if recipe is not None:
        return _of_recipe(on, given, dtype, recipe)
    named = read_model(on.model or DEFAULT_MODEL)
    return Workload(
        model=named.given,
        config=named.config,
        buckets=given or (LatentBucket(named.latent()),),
        cluster=load(on.cluster or DEFAULT_CLUSTER, on.servers, on.packages or "", on.headroom),
        global_batch=on.global_batch,
        samples=on.samples,
        dtype=dtype or DEFAULT_DTYPE,  # type: ignore[arg-type]  # Plan checks it
        encoders=LoopEncoders.of_paper(named.config) if on.encoders else None,
    )


def _of_recipe(on: On, given: tuple[LatentBucket, ...], dtype: str | None, path: Path) -> Workload:
    from ..training.predict import loop_encoders
    from ..training.recipe import read_recipe
    from ..training.resolve import software_of
    from ..training.setting import Setting

    recipe, auto = read_recipe(path)
    setting = Setting.of(recipe)
    held = {} if auto is None else {name: value for name, value in auto.held.items() if name != "dtype" or not dtype}
    policy = held.get("dtype", DEFAULT_DTYPE) if auto else recipe.plan.dtype
    buckets, batch = buckets_of_batches(setting.latents, recipe.data.step_weights, recipe.data.global_batches)
    if given or on.global_batch or on.samples is not None:  # a batch that is asked for is every bucket's
        buckets = given or tuple(replace(bucket, times=1) for bucket in buckets)
        batch = on.global_batch or (None if on.samples is not None else recipe.data.global_batch)
    batches = " + ".join(dict.fromkeys(f"{batch * bucket.times:,}" for bucket in buckets if batch))
    config = read_model(on.model).config if on.model else setting.model
    encoders = loop_encoders(setting)
    stated = recipe if on.packages is None else replace(recipe, packages=packages_of(names_in(on.packages)))
    software = software_of(stated)
    cluster = load(on.cluster or recipe.cluster or DEFAULT_CLUSTER, on.servers, "", on.headroom)
    gives = {
        "model": None if on.model else setting.model.name,
        "latents": None if given else ", ".join(map(latent_text, setting.latents)),
        "global batch": None if on.global_batch else batches,
        "dtype": None if dtype else policy,
        "cluster": None if on.cluster else recipe.cluster,
        "packages": None if on.packages is not None else _installed(recipe.packages is not None, software),
        "encoders in the loop": ", ".join(one.name for one in encoders.encoders) if encoders else "",
        "plan fields": ", ".join(f"{name}={value}" for name, value in held.items() if name != "dtype"),
    }
    return Workload(
        model=on.model or str(path),
        config=config,
        buckets=buckets,
        cluster=cluster.running(software).capturing(recipe.capture),
        global_batch=batch,
        samples=on.samples,
        dtype=dtype or policy,  # type: ignore[arg-type]  # Plan checks it
        held=held,
        gpus=None if auto else recipe.plan.world_size,
        steps=recipe.schedule.steps,
        taken={name: said for name, said in gives.items() if said},
        recipe=path,
        encoders=encoders or (LoopEncoders.of_paper(config) if on.encoders else None),
    )


def _installed(stated: bool, software: Software) -> str:
    """Packages beside torch and Triton, and who says so."""
    return f"{', '.join(software.packages) or 'none'} ({'stated' if stated else 'what is installed here'})"


def plans_asked(given: Sequence[str], asked: Asked) -> tuple[list[Plan], Workload]:
    """Plans as a person names them, and what they are asked about: the largest bucket, where a recipe has several.

    A text that says no dtype has the recipe's. Raises CinemeshError for what is no plan, and as ``workload``.
    """
    load = workload(asked, asked.latents, recipe=asked.recipe)
    files = {text for text in given if text.endswith(SUFFIXES)}
    plans = [read_plan(text) if text in files else read_plan(text, dtype=load.dtype) for text in given]
    taken, largest = dict(load.taken), max(load.buckets, key=lambda bucket: load.config.tokens(bucket.latent))
    if all(text in files or "dtype" in fields_of(text) for text in given):
        taken.pop("dtype", None)
    if "latents" in taken and len(load.buckets) > 1:
        taken["latents"] = f"{latent_text(largest.latent)} (the largest of {len(load.buckets)})"
    batch = load.global_batch and load.global_batch * largest.times
    if "global batch" in taken:
        taken["global batch"] = f"{batch:,}"
    return plans, replace(load, buckets=(replace(largest, times=1),), global_batch=batch, taken=taken)


def print_taken(console: Console, load: Workload) -> None:
    """What a recipe gave, once."""
    if load.recipe is not None:
        given = "; ".join(f"{name} {said}" for name, said in load.taken.items())
        console.print(f"taken from {load.recipe}: {given or 'nothing'}")


def _buckets(latents: Sequence[str]) -> tuple[LatentBucket, ...]:
    buckets = tuple(map(_bucket, latents))
    shapes = [bucket.latent for bucket in buckets]
    if twice := [latent for latent in shapes if shapes.count(latent) > 1]:
        raise CinemeshError(f"--latent {latent_text(twice[0])} is given twice", remedy="leave one of them out")
    return buckets


def _bucket(text: str) -> LatentBucket:
    latent, colon, weight = text.partition(":")
    share = parse_yaml(weight, f"latent {quoted(text)}", "write for example 32x96x96:0.5") if colon else 1.0
    if must := WEIGHT_RANGE.wrong(share):
        raise CinemeshError(f"latent {quoted(text)}: the weight is {quoted(share)}", remedy=must)
    return LatentBucket(parse_latent(latent), float(share))
