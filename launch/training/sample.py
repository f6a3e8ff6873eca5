"""``cinemesh sample``: from prompts and a checkpoint to clips; and the clips that a training run ends with.

The clips of a file of prompts are written as they are made: started again, the command makes those that are not there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ...data.clips import playable, write_pieces
from ...data.codec import clip_pieces
from ...data.scenes import read_captions
from ...data.text import with_fps
from ...documents import exactly, quoted, read_json
from ...errors import CinemeshError
from ...evaluation.bench import read_prompts
from ...evaluation.rewriting.rewriter import Rewriter
from ...files import atomic_file, check_output_file
from ...kernels.dtypes import TORCH_DTYPES
from ...model.step import unit_layout
from ...parallel.runtime.mesh import coordinates
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.processes import joined, launch, rank_main
from ..rewritten import read_rewriter, rewrite_all, unlike, write_prompts
from ..storage.places import Location, location_of
from ..written import wrote
from .average import remark
from .base import check_base, read_base
from .change_drawn import check_change_file, write_change
from .checkpoint.choosing import check_files, kept_in, latest
from .checkpoint.loading import load_weights
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.same_model import check_model
from .clip_sampler import ClipSampler
from .differences import recipe_facts
from .needs import check_sampling_memory
from .recipe import Config, read_config
from .setting import Setting

FRAME_RATE = "frame_rate"  # of a checkpoint's note: frames/s of most of what the model was trained on, as a fraction
ONE_CLIP = Path("sample.mp4")  # of a prompt, where no other file is named
MADE_WITH = "sampled.json"  # in a folder of clips: what all of them have alike
REWRITTEN = "rewritten.yaml"  # in a folder of clips: the prompts that they were sampled of
OTHER_FOLDER = "name a new folder"
OF_TRAINING = ("scenes", "every")  # keys of ``sample`` that no prompt heeds
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
    change_in: Path | None  # the picture of what every block changes


def run(  # noqa: PLR0913  what the command line says of clips, one argument each
    *,
    config: Path,
    prompt: str | None,
    prompts: Path | None = None,
    rewrite: Path | None = None,
    checkpoint: str | Location | None,
    out: Path | None,
    trace_change: Path | None = None,
    asked: Mapping[str, object],
    nproc: int | None,
    overrides: Sequence[str] = (),
) -> None:
    """Sample clips with the weights of ``checkpoint``, by default the newest of the recipe's run, and write them.

    One of the ``prompt``, to the file ``out``; or those of a file of ``prompts``, each called after its prompt's name,
    to the folder ``out``, but for those that are there. ``rewrite``: whose file says how each is rewritten first.
    On one process any recipe's plan is left aside; on several, the plan must be of that many. ``asked``: values of the
    recipe's keys; one that is None is the recipe's. ``trace_change``: a picture to draw of what every block changes in
    every step.
    """
    clips = _asked_for(prompt, prompts, out)
    if trace_change is not None:
        check_change_file(trace_change)
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
    for line in _told_losses(setting, clips, several=prompts is not None):
        print(line, file=sys.stderr)
    order = ClipOrder(recipe, newest, tuple(clips), rate, trace_change)
    if said := remark(recipe, written.updates):
        print(said, file=sys.stderr)
    code = launch(nproc, sample, order) if nproc and nproc > 1 else rank_main(lambda: sample(order))
    if code:
        sys.exit(code)


def _told_losses(setting: Setting, clips: Sequence[Clip], *, several: bool) -> list[str]:
    """What text encoders cut or do not know of the prompts."""
    if several:
        texts = {clip.out.stem: clip.prompt for clip in clips}
        return [str(loss) for loss in (*setting.encoding.cuts(texts), *setting.encoding.unknown(texts))]
    text, told = {"the prompt": clips[0].prompt}, list[str]()
    if cuts := setting.encoding.cuts(text):
        taken = ", ".join(f"text encoder {cut.encoder} takes {cut.tokens} of its {cut.length} tokens" for cut in cuts)
        told.append(f"the prompt is cut: {taken}")
    if unknown := setting.encoding.unknown(text):
        of = ", ".join(f"text encoder {each.encoder} never learnt {each.share:.0%} of its letters" for each in unknown)
        told.append(f"the prompt is in words, or a script, that the model does not know: {of}")
    return told


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
    section = {f"sample.{key}": str(value) for key, value in asdict(recipe.sample).items() if key not in OF_TRAINING}
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
        traced = order.change_in is not None
        sampler = ClipSampler(setting, place, weights, prompts, frozen=frozen, traced=traced)
        for number, latent in sampler.latents():
            frames = clip_pieces(setting.encoding.codec, latent, order.config.sampled.frames)
            write_pieces(outs[number], frames, order.frame_rate)
            about = f"{float(order.frame_rate):.4g} frames/s"
            wrote(outs[number], "open it in a video player; another --seed makes another clip", about)
        if sampler.change is not None and order.change_in is not None:
            changes = sampler.change.changes()
            if place.rank == 0:
                write_change(order.change_in, changes, sampler.times, sampler.section, len(prompts))
