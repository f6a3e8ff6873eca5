"""``cinemesh upsample``: clips made larger by a trained spatial upsampler, in windows that overlap (Movie Gen 3.1.5).

A clip is enlarged bilinearly, its sides filled up to what codec and patches divide, encoded frame by frame, sampled
and cropped. What each rank reads is decoded from the file there; rank 0 writes.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.clips import write_mp4
from ...data.low_resolution import enlarged, padded
from ...data.scenes import VIDEO_SUFFIXES, files_in
from ...data.text import with_fps
from ...data.video import ShownClip, look_at_clip, read_frames
from ...errors import CinemeshError
from ...files import check_output_file, check_output_folder
from ...kernels.dtypes import TORCH_DTYPES
from ...model.forward import build_velocity
from ...model.inputs import BatchShape
from ...model.runner import Batch
from ...model.sampler import Sampler
from ...model.solvers import SCHEDULES, ScheduleName
from ...model.step import check, unit_layout
from ...model.windowed import WindowedSampler
from ...model.windows import OverlappingWindows
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.mesh import coordinates
from ..cluster.environment import device_here, processes_here, say_device, world_size
from ..cluster.processes import Joined, joined, launch, rank_main
from ..exchange.exporting import found_checkpoint
from ..preflight import check_host_memory
from ..progress import progress
from ..storage.places import Location
from ..training.checkpoint.choosing import check_files
from ..training.checkpoint.loading import load_weights
from ..training.checkpoint.manifest import read_manifest
from ..training.checkpoint.same_model import check_model
from ..training.differences import recipe_facts
from ..training.noted import noted_recipe
from ..training.recipe import Config
from ..training.setting import Setting
from ..written import wrote

FARTHEST = 1.25  # times the scale that was learnt, or the inverse: the paper's 576x1008 to 1080x1920 is 0.94 of it

MOST_SIDE = 8192  # pixels: no codec here encodes a larger frame at once


@dataclass(frozen=True)
class UpsampleChoices:
    """What is asked for beside the clips. ``size``: (height, width) of the result; None: the scale that was learnt."""

    size: tuple[int, int] | None
    window: int
    overlap: int
    steps: int
    schedule: ScheduleName
    seed: int
    prompt: str | None
    guidance: float


@dataclass(frozen=True)
class Enlargement:
    """A clip to make. Its noise depends on the seed and ``clip``'s name."""

    clip: Path
    out: Path
    shown: ShownClip
    height: int
    width: int


@dataclass(frozen=True)
class UpsampleOrder:
    """Everything that a rank needs."""

    config: Config
    checkpoint: Location
    choices: UpsampleChoices
    clips: tuple[Enlargement, ...]
    as_json: bool


def run(  # noqa: PLR0913  what the command line says of a clip, one argument each
    *,
    checkpoint: str,
    clip: Path,
    out: Path | None,
    choices: UpsampleChoices,
    weights: str | None,
    plan: Plan | None,
    device: str | None,
    nproc: int | None,
    as_json: bool,
) -> None:
    """Make a clip, or all of a folder but those that are there, larger. Exits with the ranks' code.

    Raises CinemeshError for a checkpoint of no upsampler, and for clips that it cannot make larger.
    """
    path = found_checkpoint(checkpoint)
    found = read_manifest(path)
    processes = world_size(nproc)
    given = Plan.from_dict(found.plan)
    given = plan or replace(given.with_degrees(tp=1, cp=1, dp_shard=processes, dp_replicate=1), dtype=given.dtype)
    changed = {"weights": weights, "device": device}
    config = noted_recipe(path, found, {key: value for key, value in changed.items() if value is not None})
    config = replace(config, plan=given)
    config.plan.check_world_size(processes)
    say_device(config.device, processes_here(processes))
    setting = Setting.of(config)
    check_model(path, found, setting.model)
    check_files(path, found)
    _check_upsampler(path, setting)
    clips = _asked_for(clip, out, setting, choices, as_json)
    if clips:
        order = UpsampleOrder(config, path, choices, tuple(clips), as_json)
        code = launch(nproc, upsample, order) if nproc and nproc > 1 else rank_main(lambda: upsample(order))
        if code:
            sys.exit(code)
    elif as_json:
        _print([])


def size_asked(text: str) -> tuple[int, int]:
    """(height, width) as ``1080x1920``. Raises CinemeshError for another text."""
    height, cross, width = text.lower().partition("x")
    if not cross or not (height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
        raise CinemeshError(f"--size {text!r:.100} is no size", remedy="write height and width, as 1080x1920")
    if not 1 <= int(height) <= MOST_SIDE or not 1 <= int(width) <= MOST_SIDE:
        raise CinemeshError(f"--size {text:.100}: a side is 1 to {MOST_SIDE} pixels", remedy="name another")
    return int(height), int(width)


def _check_upsampler(path: Location, setting: Setting) -> None:
    if setting.encoding.low_resolution is None:
        raise CinemeshError(
            f"checkpoint {path} is of {setting.model.name}, which is shown no low-resolution clip",
            remedy="name one that was trained with data.low_resolution, as by configs/upsampler.yaml; cinemesh sample "
            "makes clips of prompts",
        )
    if setting.model.lora is not None:
        raise CinemeshError(
            f"checkpoint {path} holds low-rank factors alone", remedy="cinemesh merge makes weights of it and its base"
        )


# -- what is asked for ------------------------------------------------------------------------------------------------


def _asked_for(
    clip: Path, out: Path | None, setting: Setting, choices: UpsampleChoices, as_json: bool
) -> list[Enlargement]:
    """Each clip looked through, and whether it can be made; of a folder, those that are not there yet."""
    if clip.is_dir():
        folder = out or Path("upsampled")
        files = files_in(clip, VIDEO_SUFFIXES)
        if not files:
            raise CinemeshError(f"no video file in {clip}", remedy="name a video, or a folder of videos")
        if twice := [stem for stem, times in Counter(file.stem for file in files).items() if times > 1]:
            raise CinemeshError(
                f"two videos of {clip} are named {twice[0]}, and would both be written to {folder / twice[0]}.mp4",
                remedy="rename one",
            )
        check_output_folder(folder, "--out")
        pairs = [(file, folder / f"{file.stem}.mp4") for file in files]
        left = [(file, target) for file, target in pairs if not target.exists() or target.samefile(file)]
        if len(left) < len(pairs):
            print(
                f"{len(pairs) - len(left)} of {len(pairs)} clips are in {folder}, and stay as they are", file=sys.stderr
            )
        pairs = left
    else:
        pairs = [(clip, out or Path("upsampled.mp4"))]
        check_output_file(pairs[0][1], "--out")
    for file, target in pairs:
        if target.exists() and target.samefile(file):
            raise CinemeshError(f"--out {target} is the clip itself", remedy="name another place")
    with progress("looking at clips", len(pairs), silent=as_json) as begin:
        made: list[Enlargement] = []
        for file, target in pairs:
            begin(file.name)
            made.append(_enlargement(file, target, setting, choices))
    return sorted(made, key=lambda one: (one.height, one.width, str(one.clip)))  # one program for those of a size


def _enlargement(clip: Path, out: Path, setting: Setting, choices: UpsampleChoices) -> Enlargement:
    """Raises CinemeshError for a clip that the model cannot make larger."""
    shown = look_at_clip(clip)
    small = setting.config.data.low_resolution
    assert small is not None
    height, width = choices.size or (small.scale * shown.height, small.scale * shown.width)
    for side, there, wanted in (("height", shown.height, height), ("width", shown.width, width)):
        times = wanted / there
        if not small.scale / FARTHEST <= times <= small.scale * FARTHEST:
            raise CinemeshError(
                f"{clip}: from {shown.height}x{shown.width} to {height}x{width}, its {side} is {times:.3g} times as "
                f"large, and the model learnt {small.scale} times",
                remedy=f"name a --size about {small.scale * shown.height}x{small.scale * shown.width}, or leave it out",
            )
    if height % 2 or width % 2:
        raise CinemeshError(
            f"{clip}: a video of {height}x{width} pixels has half a pixel of colour", remedy="name an even --size"
        )
    try:
        OverlappingWindows(shown.frames, choices.window, choices.overlap)
    except CinemeshError as error:
        remedy = f"add --window {shown.frames}: it is then sampled whole" if shown.frames < choices.window else None
        raise CinemeshError(f"{clip}: {error.problem}", remedy=remedy or error.remedy) from None
    one = Enlargement(clip, out, shown, height, width)
    latent = _latent(one, setting, choices.window)
    stride, patch, table = setting.encoding.codec.spatial_stride, setting.model.patch, setting.model.position_lengths
    most = [patch[0] * table[0], stride * patch[1] * table[1], stride * patch[2] * table[2]]
    if latent[0] > most[0] or stride * latent[1] > most[1] or stride * latent[2] > most[2]:
        raise CinemeshError(
            f"{clip}: windows of {choices.window} frames of {height}x{width} pixels, and the model has positions for "
            f"{most[0]} frames of {most[1]}x{most[2]}",
            remedy="name a smaller --size or --window, take a smaller clip, or a model of larger ones",
        )
    plan, batch = setting.config.plan, BatchShape(1, latent)
    check(setting.model, plan, batch)
    if device_here(setting.config.device, local := processes_here(plan.world_size)) == "cpu":
        check_host_memory([prepare(build_velocity(setting.model, plan, batch), backend="gloo")], local)
    return one


def _filled(setting: Setting) -> int:
    """What the sides of a clip are filled up to multiples of."""
    return setting.encoding.codec.spatial_stride * max(setting.model.patch[1:])


def _latent(one: Enlargement, setting: Setting, window: int) -> tuple[int, int, int]:
    """Of a window."""
    stride, multiple = setting.encoding.codec.spatial_stride, _filled(setting)
    height, width = (-(-side // multiple) * multiple // stride for side in (one.height, one.width))
    return window, height, width


# -- the work of a rank -----------------------------------------------------------------------------------------------


@dataclass
class _SmallClip:
    """What is shown of a clip, window by window."""

    one: Enlargement
    setting: Setting
    windows: OverlappingWindows
    text: Mapping[str, Tensor]
    latents: dict[int, Tensor] = field(default_factory=dict)  # of windows, as they were encoded

    @cached_property
    def frames(self) -> Tensor:
        shown = self.one.shown
        return read_frames(self.one.clip, shown.height, shown.width)[: shown.frames]

    def conditions(self, number: int) -> Batch:
        """Of a window, encoded when it is first asked for."""
        codec, small = self.setting.encoding.codec, self.setting.encoding.low_resolution
        assert small is not None
        if number not in self.latents:
            start = self.windows.starts[number]
            frames = self.frames[start : start + self.windows.length]
            large = padded(enlarged(frames, self.one.height, self.one.width), _filled(self.setting))
            self.latents[number] = codec.encode(large)[None]
        return {**self.text, small.condition(codec).input: self.latents[number]}


def upsample(order: UpsampleOrder) -> None:
    """The work of one rank; rank 0 writes the files."""
    setting, plan, choices = Setting.of(order.config), order.config.plan, order.choices
    alike = recipe_facts(order.config) | {"checkpoint": str(order.checkpoint), "clips": str(order.clips)}
    done: list[dict[str, Any]] = []
    with joined(plan, order.config.device, alike | {"choices": str(choices)}) as place:
        units = unit_layout(setting.model, plan)
        position = place.mesh.coordinates if place.mesh else coordinates(plan, 0)
        weights = torch.empty(1, units.flat_elements, dtype=TORCH_DTYPES[plan.stat_dtype], device=place.device)
        load_weights(order.checkpoint, order.config.weights, weights, units, position)
        sampler: Sampler | None = None
        for number, one in enumerate(order.clips, 1):
            begun, latent = time.monotonic(), _latent(one, setting, choices.window)
            if sampler is None or sampler.batch.latent != latent:
                sampler = _sampler(setting, place, weights, latent, choices)
            windows = OverlappingWindows(one.shown.frames, choices.window, choices.overlap)
            made = _made(setting, place, sampler, windows, order, number)
            if place.rank == 0:
                frames = _decoded(setting, made, choices.window)[:, : one.height, : one.width]
                write_mp4(one.out, frames.contiguous(), one.shown.rate)
                wrote(one.out, "open it in a video player", f"{one.shown.frames} frames of {one.height}x{one.width}")
                done.append(_told(one, windows, time.monotonic() - begun))
    if order.as_json and done:
        _print(done)


def _sampler(
    setting: Setting, place: Joined, weights: Tensor, latent: tuple[int, int, int], choices: UpsampleChoices
) -> Sampler:
    guidance = 0.0 if choices.prompt is None else choices.guidance
    kernels = setting.kernels(place.device)
    batch = BatchShape(1, latent)
    plan = setting.config.plan
    sampler = Sampler(setting.model, plan, batch, place.mesh, weights, place.device, guidance=guidance, kernels=kernels)
    if (failure := sampler.capture(setting.config.capture)) is not None and place.rank == 0:
        print(f"sampling is NOT captured, on any rank: {failure}; it runs from the executor", file=sys.stderr)
    return sampler


def _made(
    setting: Setting,
    place: Joined,
    sampler: Sampler,
    windows: OverlappingWindows,
    order: UpsampleOrder,
    number: int,
) -> Tensor:
    """The latent of clip ``number`` of an order, from 1, on the CPU."""
    one, choices = order.clips[number - 1], order.choices
    windowed = WindowedSampler(sampler, windows)
    text = setting.encoding.captions([with_fps(one.shown.rate, choices.prompt or "")])
    small = _SmallClip(one, setting, windows, text)
    clip = torch.tensor([zlib.crc32(one.clip.name.encode(errors="replace"))])
    times = SCHEDULES[choices.schedule](choices.steps)
    pieces = choices.steps * len(windowed.rounds)
    with progress("upsampling", pieces, silent=place.rank > 0 or order.as_json) as begin:

        def watch(step: int, first: int) -> None:
            begin(f"clip {number} of {len(order.clips)}, step {step + 1}, window {first + 1} of {len(windows.starts)}")

        return windowed.sample(small.conditions, choices.seed, clip, times, watch=watch).float().cpu()


def _decoded(setting: Setting, latent: Tensor, at_once: int) -> Tensor:
    """Frames uint8 [T, H, W, 3], so many at once."""
    return torch.cat([setting.encoding.codec.decode(part) for part in latent.split(at_once, 1)])


def _told(one: Enlargement, windows: OverlappingWindows, seconds: float) -> dict[str, Any]:
    return {
        "clip": str(one.clip),
        "out": str(one.out),
        "frames": one.shown.frames,
        "fps": float(one.shown.rate),
        "from": f"{one.shown.height}x{one.shown.width}",
        "to": f"{one.height}x{one.width}",
        "windows": len(windows.starts),
        "seconds": round(seconds, 3),
    }


def _print(clips: list[dict[str, Any]]) -> None:
    print(json.dumps({"clips": clips}, indent=1))
