"""``cinemesh sample``: from a prompt and a checkpoint to a clip; and the clips that a training run ends with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...data.clips import write_mp4
from ...data.text import TextEncoder, build_encoders
from ...errors import CinemeshError
from ...model.codec import BlockDCTCodec, LatentCodec
from ...model.config import ModelConfig
from ...model.inputs import MASK, BatchShape, text_input
from ...model.runner import as_dtype
from ...model.sampler import GUIDANCE, Sampler
from ...model.step import check, unit_layout
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import gather_objects
from ...parallel.runtime.mesh import Mesh, coordinates
from ..cluster.processes import joined, launch, rank_main, world_size
from . import checkpoint as checkpoints
from .recipe import Config, read_config


@dataclass(frozen=True)
class Order:
    """One clip to make: everything that a rank needs."""

    config: Config
    plan: Plan
    checkpoint: Path
    prompt: str
    out: Path
    steps: int
    guidance: float
    seed: int


def run(
    *,
    config: Path,
    prompt: str,
    checkpoint: Path | None,
    out: Path,
    steps: int,
    guidance: float | None,
    seed: int,
    nproc: int | None,
) -> None:
    """Sample a clip with the EMA weights of ``checkpoint``, by default the newest of the recipe's run, and write it.

    On one process any recipe's plan is left aside; on several, the plan must be of that many.
    """
    recipe = read_config(config)
    processes = world_size(nproc)
    plan = recipe.plan if processes > 1 else replace(recipe.plan, tp=1, cp=1, dp_shard=1, dp_replicate=1)
    plan.check_world_size(processes)
    if out.is_dir():
        raise CinemeshError(f"--out {out} is a directory", remedy="name the mp4 file")
    folder = recipe.logging.directory / checkpoints.FOLDER
    newest = checkpoint or checkpoints.latest(folder)
    if newest is None:
        raise CinemeshError(
            f"no checkpoint in {folder}", remedy="train with this recipe first, or name one with --checkpoint"
        )
    if guidance is None:
        guidance = recipe.sample.guidance if recipe.sample else GUIDANCE
    codec, encoders = BlockDCTCodec(), build_encoders(recipe.data.encoders)
    model = recipe.model.build(codec, encoders)
    check(model, plan, BatchShape(1, recipe.sampled.latent(codec)))
    checkpoints.check_model(newest, model)
    order = Order(recipe, plan, newest, prompt, out, steps, guidance, seed)
    code = launch(nproc, sample, order) if nproc and nproc > 1 else rank_main(lambda: sample(order))
    if code:
        sys.exit(code)


def sample(order: Order) -> None:
    """The work of one rank; rank 0 writes the file and prints its path."""
    config, codec = order.config, BlockDCTCodec()
    encoders = build_encoders(config.data.encoders)
    model = config.model.build(codec, encoders)
    with joined(order.plan) as place:
        units = unit_layout(model, order.plan)
        position = place.mesh.coordinates if place.mesh else coordinates(order.plan, 0)
        dtype = as_dtype(order.plan.stat_dtype)
        weights = torch.empty(1, units.flat_elements, dtype=dtype, device=place.device)
        checkpoints.load_weights(order.checkpoint, "ema", weights, units, position)
        clips = sample_clips(
            model,
            order.plan,
            place.mesh,
            weights,
            codec,
            encoders,
            [order.prompt],
            config.sampled.latent(codec),
            order.steps,
            order.guidance,
            order.seed,
            device=place.device,
        )
        for clip in clips:
            write_mp4(order.out, clip[: config.sampled.frames])
            print(order.out)


def sample_clips(
    config: ModelConfig,
    plan: Plan,
    mesh: Mesh | None,
    weights: Tensor,
    codec: LatentCodec,
    encoders: Sequence[TextEncoder],
    prompts: Sequence[str],
    latent: tuple[int, int, int],
    steps: int,
    guidance: float,
    seed: int,
    *,
    samples: int = 1,
    device: str = "cpu",
) -> list[Tensor]:
    """A clip of each prompt, uint8 [T, H, W, 3], on rank 0 (none elsewhere); collective.

    ``weights`` is this rank's flat shard, ``latent`` (T, H, W). Each data rank makes at most ``samples`` clips at once.
    A prompt's noise depends on (``seed``, its index) alone. Raises CinemeshError when the model has diverged.
    """
    ranks, rank = plan.data_ranks, mesh.data_rank if mesh else 0
    samples = min(samples, -(-len(prompts) // ranks))
    sampler = Sampler(config, plan, BatchShape(samples, latent), mesh, weights, device)
    # Ranks that share a sample all end with all of it: one of them hands it on.
    speaks = sampler.coordinates["tp"] == sampler.coordinates["cp"] == 0
    latents: dict[int, Tensor] = {}
    for start in range(0, len(prompts), samples * ranks):
        mine = range(start + rank * samples, start + (rank + 1) * samples)  # may pass the end: such clips are dropped
        encoded = [[encoder.encode(prompts[i % len(prompts)]) for encoder in encoders] for i in mine]
        conditions = {
            text_input(e.name): torch.stack([row[k][0] for row in encoded], 1) for k, e in enumerate(encoders)
        }
        conditions[MASK] = torch.stack([torch.cat([valid for _, valid in row]) for row in encoded])
        made = sampler.sample(conditions, seed, torch.tensor(mine), steps, guidance).cpu()
        kept = {i: clip for i, clip in zip(mine, made, strict=True) if i < len(prompts) and speaks}
        for part in gather_objects(kept) if mesh else [kept]:
            assert isinstance(part, dict)
            latents |= part
    if mesh is not None and mesh.rank:
        return []
    return [codec.decode(latents[i]) for i in range(len(prompts))]
