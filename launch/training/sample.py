"""``cinemesh sample``: from prompts and a checkpoint to clips; and the clips that a training run ends with.

The clips of a file of prompts are written as they are made: started again, the command makes those that are not there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.clips import playable, write_mp4
from ...data.scenes import read_captions
from ...data.text import with_fps
from ...documents import exactly, quoted, read_json
from ...errors import CinemeshError
from ...evaluation.bench import read_prompts
from ...evaluation.rewriting.rewriter import Rewriter
from ...files import atomic_file, check_output_file
from ...kernels.dtypes import TORCH_DTYPES
from ...model.codec import LatentCodec
from ...model.inputs import BatchShape
from ...model.paths import PATHS
from ...model.runner import StepRunner
from ...model.sampler import Sampler
from ...model.solvers import SOLVERS
from ...model.step import unit_layout
from ...parallel.runtime.comm import gather_objects
from ...parallel.runtime.mesh import coordinates
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.marks import Doing, Marks
from ..cluster.processes import Joined, joined, launch, rank_main
from ..progress import progress
from ..rewritten import read_rewriter, rewrite_all, unlike, write_prompts
from ..storage.places import Location, location_of
from ..written import wrote
from .average import remark
from .base import check_base, read_base
from .checkpoint.choosing import check_files, kept_in, latest
from .checkpoint.loading import load_weights
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.same_model import check_model
from .differences import recipe_facts
from .needs import check_sampling_memory
from .recipe import Config, read_config
from .setting import Setting

FRAME_RATE = "frame_rate"  # of a checkpoint's note: frames/s of most of what the model was trained on, as a fraction
ONE_CLIP = Path("sample.mp4")  # of a prompt, where no other file is named
MADE_WITH = "sampled.json"  # in a folder of clips: what all of them have alike
REWRITTEN = "rewritten.yaml"  # in a folder of clips: the prompts that they were sampled of
OTHER_FOLDER = "name a new folder"
UNTOLD_RATE = Fraction(25)  # frames/s, where an older checkpoint has none: PAL, and most quick-start clips


@dataclass(frozen=True)
class Clip:
    """One to make. Its noise depends on the seed and its ``number`` alone."""

    number: int
    prompt: str
    out: Path


@dataclass(frozen=True)
class ClipOrder:
    """Clips to make, by the recipe's plan and its section ``sample``: everything that a rank needs."""

    config: Config
    checkpoint: Location
    clips: tuple[Clip, ...]
    frame_rate: Fraction


def run(  # noqa: PLR0913  what the command line says of clips, one argument each
    *,
    config: Path,
    prompt: str | None,
    prompts: Path | None = None,
    rewrite: Path | None = None,
    checkpoint: str | Location | None,
    out: Path | None,
    asked: Mapping[str, object],
    nproc: int | None,
    overrides: Sequence[str] = (),
) -> None:
    """Sample clips with the weights of ``checkpoint``, by default the newest of the recipe's run, and write them.

    One of the ``prompt``, to the file ``out``; or those of a file of ``prompts``, each called after its prompt's name,
    to the folder ``out``, but for those that are there. ``rewrite``: whose file says how each is rewritten first.
    On one process any recipe's plan is left aside; on several, the plan must be of that many. ``asked``: values of the
    recipe's keys; one that is None is the recipe's.
    """
    clips = _asked_for(prompt, prompts, out)
    asked_for = [f"{key}={value}" for key, value in asked.items() if value is not None]
    recipe = read_config(config, [*overrides, *asked_for])
    processes = world_size(nproc)
    if processes == 1:
        recipe = replace(recipe, plan=recipe.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1))
    recipe.plan.check_world_size(processes)
    say_device(recipe.device, processes_here(processes))
    for clip in clips:
        check_output_file(clip.out, "--out")
    folder = kept_in(recipe)
    newest = location_of(checkpoint) if checkpoint is not None else latest(folder)
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
    if recipe.start_from is not None and setting.model.lora is not None:
        check_base(recipe.start_from, setting.model, written.note)
    rate = _frame_rate(newest, written.note)
    rewriter = None if rewrite is None else _rewriter(rewrite, recipe, ranks_here=nproc is None and processes > 1)
    if prompts is not None:
        clips = _left(clips, _facts(recipe, written) | ({"rewriter": rewriter.identity} if rewriter else {}))
        if not clips:
            return
    if rewriter is not None:
        clips = _rewritten(clips, rewriter, told=prompts is not None)
    clips = [replace(clip, prompt=with_fps(rate, clip.prompt)) for clip in clips]  # as in training
    if prompts is not None:
        for cut in setting.encoding.cuts({clip.out.stem: clip.prompt for clip in clips}):
            print(cut, file=sys.stderr)
    elif cuts := setting.encoding.cuts({"the prompt": clips[0].prompt}):
        taken = ", ".join(f"text encoder {cut.encoder} takes {cut.tokens} of its {cut.length} tokens" for cut in cuts)
        print(f"the prompt is cut: {taken}", file=sys.stderr)
    order = ClipOrder(recipe, newest, tuple(clips), rate)
    if said := remark(recipe, written.updates):
        print(said, file=sys.stderr)
    code = launch(nproc, sample, order) if nproc and nproc > 1 else rank_main(lambda: sample(order))
    if code:
        sys.exit(code)


def _asked_for(prompt: str | None, prompts: Path | None, out: Path | None) -> list[Clip]:
    """Raises CinemeshError unless there is one prompt, or a file of them and a folder for their clips."""
    if (prompt is None) == (prompts is None):
        raise CinemeshError("sample takes --prompt or --prompts", remedy="give one of them")
    if prompt is not None:
        if any("\ud800" <= sign <= "\udfff" for sign in prompt):  # what a terminal sent was no UTF-8
            raise CinemeshError(f"--prompt {prompt!r:.100} is no text", remedy="write it in UTF-8")
        return [Clip(0, prompt, out or ONE_CLIP)]
    assert prompts is not None
    if out is None:
        raise CinemeshError("--prompts makes several clips", remedy="name a folder for them with --out")
    return [Clip(number, each.prompt, out / f"{each.name}.mp4") for number, each in enumerate(read_prompts(prompts))]


def _rewriter(path: Path, recipe: Config, *, ranks_here: bool) -> Rewriter:
    """The rewriter of a file; says where the recipe's captions have another length. Raises CinemeshError."""
    if ranks_here:
        raise CinemeshError(
            "--rewrite under torchrun would ask for every prompt once a rank",
            remedy="rewrite first, with cinemesh rewrite make, and sample the prompts.yaml that it writes",
        )
    rewriter = read_rewriter(path)
    try:
        captions = [scene.caption for scene in read_captions(recipe.data.captions)]
    except CinemeshError:
        return rewriter  # a machine that samples need not have what trained
    if said := unlike(rewriter.guideline, captions):
        print(said, file=sys.stderr)
    return rewriter


def _rewritten(clips: list[Clip], rewriter: Rewriter, *, told: bool) -> list[Clip]:
    """The same clips of rewritten prompts. ``told``: in a file beside them, else on standard error."""
    found = rewrite_all(rewriter, {clip.out.stem if told else "the prompt": clip.prompt for clip in clips})
    texts = [one.text for one in found.values()]
    if told:
        write_prompts(clips[0].out.parent / REWRITTEN, found)
    elif texts != [clips[0].prompt]:
        print(f"the clip is of: {texts[0]}", file=sys.stderr)
    return [replace(clip, prompt=text) for clip, text in zip(clips, texts, strict=True)]


def _facts(recipe: Config, written: Manifest) -> dict[str, str]:
    """What all clips of a folder have alike: the weights, and how they are sampled."""
    assert recipe.sample is not None
    section = {f"sample.{key}": str(value) for key, value in asdict(recipe.sample).items() if key != "scenes"}
    return section | {"weights": recipe.weights, "digest of the weights": written.digests[recipe.weights]}


def _left(clips: list[Clip], facts: dict[str, str]) -> list[Clip]:
    """Those that are not in their folder yet; says how many are. Raises CinemeshError for a folder of other clips."""
    told = clips[0].out.parent / MADE_WITH
    if told.exists():
        there = exactly(read_json(told, "what made the clips", OTHER_FOLDER), str(told), dict.fromkeys(facts, str),
                        remedy=OTHER_FOLDER)  # fmt: skip
        for key, value in facts.items():
            if there[key] != value:
                raise CinemeshError(f"{told}: its clips have {key} {there[key]}, not {value}", remedy=OTHER_FOLDER)
    else:
        told.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(told) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    left = [clip for clip in clips if not clip.out.exists()]
    if len(left) < len(clips):
        print(f"{len(clips) - len(left)} of {len(clips)} clips are in {told.parent}", file=sys.stderr)
    return left


def _frame_rate(checkpoint: Location, note: Mapping[str, object]) -> Fraction:
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
    alike = recipe_facts(order.config) | {"checkpoint": str(order.checkpoint), "clips": str(order.clips)}
    with joined(plan, order.config.device, alike) as place:
        units = unit_layout(setting.model, plan)
        position = place.mesh.coordinates if place.mesh else coordinates(plan, 0)
        weights = torch.empty(1, units.flat_elements, dtype=TORCH_DTYPES[plan.stat_dtype], device=place.device)
        load_weights(order.checkpoint, order.config.weights, weights, units, position)
        frozen: Tensor | None = None
        if order.config.start_from is not None and setting.model.lora is not None:
            dtype = TORCH_DTYPES[plan.compute_dtype]
            frozen = torch.empty(1, units.frozen_elements, dtype=dtype, device=place.device)
            read_base(order.config.start_from, frozen, units, position)
        prompts = {clip.number: clip.prompt for clip in order.clips}
        outs = {clip.number: clip.out for clip in order.clips}
        for number, clip in sample_clips(setting, place, weights, prompts, frozen=frozen):
            write_mp4(outs[number], clip[: order.config.sampled.frames], order.frame_rate)
            about = f"{float(order.frame_rate):.4g} frames/s"
            wrote(outs[number], "open it in a video player; another --seed makes another clip", about)


def sample_clips(
    setting: Setting,
    place: Joined,
    weights: Tensor,
    prompts: Mapping[int, str],
    *,
    samples: int = 1,
    beside: StepRunner | None = None,
    frozen: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """A clip of each prompt with its number, uint8 [T, H, W, 3], as it is made, as the recipe's ``sample`` says.

    On rank 0, none elsewhere; collective, and every rank asks for all. ``weights`` is this rank's flat shard. Each data
    rank makes at most ``samples`` clips at once. A prompt's noise depends on (seed, its number) alone. ``beside``: the
    runner of a training that is over. ``frozen``: as the sampler takes it. Raises CinemeshError when the model has
    diverged.
    """
    plan, mesh, section, codec = setting.config.plan, place.mesh, setting.config.sample, setting.encoding.codec
    assert section is not None
    ordered = list(prompts)
    # A second replica that would have no clip of its own makes the halves without the caption.
    apart = plan.dp_replicate == 2 and len(ordered) <= plan.dp_shard and section.guidance not in (0.0, 1.0)
    ranks, rank = plan.data_ranks, mesh.data_rank if mesh else 0
    if apart and mesh is not None:
        ranks, rank = plan.dp_shard, mesh.coordinates["dp_shard"]
    samples = min(samples, -(-len(ordered) // ranks))
    batch = BatchShape(samples, setting.config.sampled.latent(codec))
    kernels = setting.kernels(place.device)
    choices: dict[str, Any] = {"guidance": section.guidance, "kernels": kernels, "beside": beside, "frozen": frozen}
    choices["apart"] = apart
    sampler = Sampler(setting.model, plan, batch, mesh, weights, place.device, **choices)
    if (failure := sampler.capture(setting.config.capture)) is not None and place.rank == 0:
        print(f"sampling is NOT captured, on any rank: {failure}; it runs from the executor", file=sys.stderr)
    times = PATHS[setting.model.objective].times(section.schedule, section.steps)
    # Ranks that share a sample all end with all of it: one of them hands it on.
    speaks = sampler.coordinates["tp"] == sampler.coordinates["cp"] == 0
    rounds = range(0, len(ordered), samples * ranks)
    with progress("sampling", len(rounds) * section.steps, silent=place.rank > 0) as begin:
        for start in rounds:
            mine = range(start + rank * samples, start + (rank + 1) * samples)  # past the end: such clips are dropped
            at = [ordered[i % len(ordered)] for i in mine]
            conditions = setting.encoding.captions([prompts[number] for number in at])
            which = f"clips {start + 1} to {min(start + samples * ranks, len(ordered))}"
            place.marks.at(start, Doing.SAMPLING)
            made = sampler.sample(
                conditions,
                section.seed,
                torch.tensor(at),
                times,
                SOLVERS[section.solver],
                lambda step, which=which: begin(f"{which}, step {step + 1}"),
            ).cpu()
            kept = {i: clip for i, clip in zip(mine, made, strict=True) if i < len(ordered) and speaks}
            latents: dict[int, Tensor] = {}
            for part in gather_objects(kept) if mesh else [kept]:
                assert isinstance(part, dict)
                latents |= part
            if mesh is None or mesh.rank == 0:
                for i in sorted(latents):
                    place.marks.at(i, Doing.DECODING)
                    yield ordered[i], codec.decode(latents[i])


def decoded(codec: LatentCodec, latents: Iterable[Tensor], marks: Marks) -> list[Tensor]:
    """Their clips, one after the other."""
    clips: list[Tensor] = []
    for number, latent in enumerate(latents):
        marks.at(number, Doing.DECODING)
        clips.append(codec.decode(latent))
    return clips
