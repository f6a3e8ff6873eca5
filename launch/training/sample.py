"""``cinemesh sample``: from a prompt and a checkpoint to a clip; and the clips that a training run ends with."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ...data.clips import playable, write_mp4
from ...data.text import with_fps
from ...documents import quoted
from ...errors import CinemeshError
from ...files import check_output_file
from ...kernels.dtypes import TORCH_DTYPES
from ...model.codec import LatentCodec
from ...model.inputs import BatchShape
from ...model.runner import StepRunner
from ...model.sampler import Sampler
from ...model.step import unit_layout
from ...parallel.runtime.comm import gather_objects
from ...parallel.runtime.mesh import coordinates
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.marks import Doing, Marks
from ..cluster.processes import Joined, joined, launch, rank_main
from ..progress import progress
from ..written import wrote
from .average import remark
from .checkpoint.choosing import FOLDER, check_files, latest
from .checkpoint.loading import load_weights
from .checkpoint.manifest import check_model, read_manifest
from .differences import recipe_facts
from .needs import check_sampling_memory
from .recipe import Config, read_config
from .setting import Setting

FRAME_RATE = "frame_rate"  # of a checkpoint's note: frames/s of most of what the model was trained on, as a fraction
UNTOLD_RATE = Fraction(25)  # frames/s, where an older checkpoint has none: PAL, and most quick-start clips


@dataclass(frozen=True)
class ClipOrder:
    """One clip to make, by the recipe's plan and its section ``sample``: everything that a rank needs."""

    config: Config
    checkpoint: Path
    prompt: str
    out: Path
    frame_rate: Fraction


def run(
    *,
    config: Path,
    prompt: str,
    checkpoint: Path | None,
    out: Path,
    asked: Mapping[str, object],
    nproc: int | None,
    overrides: Sequence[str] = (),
) -> None:
    """Sample a clip with the weights of ``checkpoint``, by default the newest of the recipe's run, and write it.

    On one process any recipe's plan is left aside; on several, the plan must be of that many. ``asked``: values of the
    recipe's keys; one that is None is the recipe's.
    """
    if any("\ud800" <= sign <= "\udfff" for sign in prompt):  # what a terminal sent was no UTF-8
        raise CinemeshError(f"--prompt {prompt!r:.100} is no text", remedy="write it in UTF-8")
    asked_for = [f"{key}={value}" for key, value in asked.items() if value is not None]
    recipe = read_config(config, [*overrides, *asked_for])
    processes = world_size(nproc)
    if processes == 1:
        recipe = replace(recipe, plan=recipe.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1))
    recipe.plan.check_world_size(processes)
    say_device(recipe.device, processes_here(processes))
    check_output_file(out, "--out")
    folder = recipe.logging.directory / FOLDER
    newest = checkpoint or latest(folder)
    if newest is None:
        raise CinemeshError(
            f"no checkpoint in {folder}", remedy="train with this recipe first, or name one with --checkpoint"
        )
    setting = Setting.of(recipe)
    setting.check_sampling()
    check_sampling_memory(setting)
    written = read_manifest(newest)
    check_model(newest, written, setting.model)
    check_files(newest, written)
    rate = _frame_rate(newest, written.note)
    prompt = with_fps(rate, prompt)  # as in training
    if cuts := setting.encoding.cuts({"the prompt": prompt}):
        taken = ", ".join(f"text encoder {cut.encoder} takes {cut.tokens} of its {cut.length} tokens" for cut in cuts)
        print(f"the prompt is cut: {taken}", file=sys.stderr)
    order = ClipOrder(recipe, newest, prompt, out, rate)
    if said := remark(recipe, written.updates):
        print(said, file=sys.stderr)
    code = launch(nproc, sample, order) if nproc and nproc > 1 else rank_main(lambda: sample(order))
    if code:
        sys.exit(code)


def _frame_rate(checkpoint: Path, note: Mapping[str, object]) -> Fraction:
    """Of the clips of this checkpoint, whose manifest has the ``note``."""
    if FRAME_RATE not in note:
        print(
            f"checkpoint {checkpoint} does not say at how many frames/s its clips play: {UNTOLD_RATE}", file=sys.stderr
        )
        return UNTOLD_RATE
    try:
        return playable(Fraction(str(note[FRAME_RATE])), f"checkpoint {checkpoint}")
    except (ValueError, ZeroDivisionError):
        raise CinemeshError(
            f"checkpoint {checkpoint} is damaged: its clips play at {quoted(note[FRAME_RATE])} frames/s",
            remedy="restore the file, or sample from an earlier checkpoint",
        ) from None


def sample(order: ClipOrder) -> None:
    """The work of one rank; rank 0 writes the file."""
    setting, plan = Setting.of(order.config), order.config.plan
    alike = recipe_facts(order.config) | {"checkpoint": str(order.checkpoint), "prompt": order.prompt}
    with joined(plan, order.config.device, alike) as place:
        units = unit_layout(setting.model, plan)
        position = place.mesh.coordinates if place.mesh else coordinates(plan, 0)
        weights = torch.empty(1, units.flat_elements, dtype=TORCH_DTYPES[plan.stat_dtype], device=place.device)
        load_weights(order.checkpoint, order.config.weights, weights, units, position)
        for clip in sample_clips(setting, place, weights, [order.prompt]):
            write_mp4(order.out, clip[: order.config.sampled.frames], order.frame_rate)
            about = f"{float(order.frame_rate):.4g} frames/s"
            wrote(order.out, "open it in a video player; another --seed makes another clip", about)


def sample_clips(
    setting: Setting,
    place: Joined,
    weights: Tensor,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    beside: StepRunner | None = None,
) -> list[Tensor]:
    """A clip of each prompt, uint8 [T, H, W, 3], as the recipe's section ``sample`` says; on rank 0, none elsewhere.

    Collective. ``weights`` is this rank's flat shard. Each data rank makes at most ``samples`` clips at once. A
    prompt's noise depends on (seed, its index) alone. ``beside``: the runner of a training that is over. Raises
    CinemeshError when the model has diverged.
    """
    plan, mesh, section, codec = setting.config.plan, place.mesh, setting.config.sample, setting.encoding.codec
    assert section is not None
    ranks, rank = plan.data_ranks, mesh.data_rank if mesh else 0
    samples = min(samples, -(-len(prompts) // ranks))
    batch = BatchShape(samples, setting.config.sampled.latent(codec))
    sampler = Sampler(
        setting.model, plan, batch, mesh, weights, place.device, kernels=setting.kernels(place.device), beside=beside
    )
    # Ranks that share a sample all end with all of it: one of them hands it on.
    speaks = sampler.coordinates["tp"] == sampler.coordinates["cp"] == 0
    latents: dict[int, Tensor] = {}
    rounds = range(0, len(prompts), samples * ranks)
    with progress("sampling", len(rounds) * section.steps, silent=place.rank > 0) as begin:
        for start in rounds:
            mine = range(start + rank * samples, start + (rank + 1) * samples)  # past the end: such clips are dropped
            conditions = setting.encoding.captions([prompts[i % len(prompts)] for i in mine])
            numbers = f"clips {start + 1} to {min(start + samples * ranks, len(prompts))}"
            place.marks.at(start, Doing.SAMPLING)
            made = sampler.sample(
                conditions,
                section.seed,
                torch.tensor(mine),
                section.steps,
                section.guidance,
                lambda step, numbers=numbers: begin(f"{numbers}, step {step + 1}"),
            ).cpu()
            kept = {i: clip for i, clip in zip(mine, made, strict=True) if i < len(prompts) and speaks}
            for part in gather_objects(kept) if mesh else [kept]:
                assert isinstance(part, dict)
                latents |= part
    if mesh is not None and mesh.rank:
        return []
    return decoded(codec, [latents[i] for i in range(len(prompts))], place.marks)


def decoded(codec: LatentCodec, latents: Iterable[Tensor], marks: Marks) -> list[Tensor]:
    """Their clips, one after the other."""
    clips: list[Tensor] = []
    for number, latent in enumerate(latents):
        marks.at(number, Doing.DECODING)
        clips.append(codec.decode(latent))
    return clips
