"""The work of a rank that makes clips larger: windows that overlap, sampled together, decoded, cropped, written.

A clip is enlarged bilinearly, its sides filled up to what codec and patches divide, encoded frame by frame, sampled
and cropped (Movie Gen 3.1.5). What each rank reads is decoded from the file there; rank 0 writes.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.clips import write_mp4
from ...data.low_resolution import enlarged, padded
from ...data.text import with_fps
from ...data.video import ShownClip, read_frames
from ...kernels.dtypes import TORCH_DTYPES
from ...model.inputs import BatchShape
from ...model.runner import Batch
from ...model.sampler import Sampler
from ...model.solvers import SCHEDULES, ScheduleName
from ...model.step import unit_layout
from ...model.windowed import WindowedSampler
from ...model.windows import UPSAMPLING_STEPS, OverlappingWindows
from ...parallel.runtime.mesh import coordinates
from ..cluster.processes import Joined, joined
from ..progress import progress
from ..storage.places import Location
from ..written import wrote
from .checkpoint.loading import load_weights
from .differences import recipe_facts
from .recipe import Config
from .setting import Setting


@dataclass(frozen=True)
class UpsampleChoices:
    """What is asked for beside the clips. ``size``: (height, width) of the result; None: the scale that was learnt.

    ``window``, ``overlap``: frames; None: as many as were trained on, and the paper's 4, or half of a shorter window.
    """

    size: tuple[int, int] | None = None
    window: int | None = None
    overlap: int | None = None
    steps: int = UPSAMPLING_STEPS
    schedule: ScheduleName = "linear-quadratic"
    seed: int = 0
    prompt: str | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class Enlargement:
    """A clip to make. Its noise depends on the seed and ``clip``'s name."""

    clip: Path
    out: Path
    shown: ShownClip
    height: int
    width: int
    windows: OverlappingWindows


@dataclass(frozen=True)
class UpsampleOrder:
    """Everything that a rank needs."""

    config: Config
    checkpoint: Location
    choices: UpsampleChoices
    clips: tuple[Enlargement, ...]
    as_json: bool


def filled_up_to(setting: Setting) -> int:
    """What the sides of a clip are filled up to multiples of."""
    return setting.encoding.codec.spatial_stride * max(setting.model.patch[1:])


def latent_of(one: Enlargement, setting: Setting) -> tuple[int, int, int]:
    """Of a window."""
    stride, multiple = setting.encoding.codec.spatial_stride, filled_up_to(setting)
    height, width = (-(-side // multiple) * multiple // stride for side in (one.height, one.width))
    return one.windows.length, height, width


@dataclass
class _SmallClip:
    """What is shown of a clip, window by window."""

    one: Enlargement
    setting: Setting
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
            windows = self.one.windows
            start = windows.starts[number]
            frames = self.frames[start : start + windows.length]
            large = padded(enlarged(frames, self.one.height, self.one.width), filled_up_to(self.setting))
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
            begun, latent = time.monotonic(), latent_of(one, setting)
            if sampler is None or sampler.batch.latent != latent:
                sampler = _sampler(setting, place, weights, latent, choices)
            made = _made(setting, place, sampler, order, number)
            if place.rank == 0:
                frames = _decoded(setting, made, one.windows.length)[:, : one.height, : one.width]
                write_mp4(one.out, frames.contiguous(), one.shown.rate)
                wrote(one.out, "open it in a video player", f"{one.shown.frames} frames of {one.height}x{one.width}")
                done.append(_told(one, time.monotonic() - begun))
    if order.as_json and done:
        print_made(done)


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


def _made(setting: Setting, place: Joined, sampler: Sampler, order: UpsampleOrder, number: int) -> Tensor:
    """The latent of clip ``number`` of an order, from 1, on the CPU."""
    one, choices = order.clips[number - 1], order.choices
    windowed = WindowedSampler(sampler, one.windows)
    text = setting.encoding.captions([with_fps(one.shown.rate, choices.prompt or "")])
    small = _SmallClip(one, setting, text)
    clip = torch.tensor([zlib.crc32(one.clip.name.encode(errors="replace"))])
    times = SCHEDULES[choices.schedule](choices.steps)
    pieces = choices.steps * len(windowed.rounds)
    with progress("upsampling", pieces, silent=place.rank > 0 or order.as_json) as begin:

        def watch(step: int, first: int) -> None:
            begin(
                f"clip {number} of {len(order.clips)}, step {step + 1}, window {first + 1} of {len(one.windows.starts)}"
            )

        return windowed.sample(small.conditions, choices.seed, clip, times, watch=watch).float().cpu()


def _decoded(setting: Setting, latent: Tensor, at_once: int) -> Tensor:
    """Frames uint8 [T, H, W, 3], so many at once."""
    return torch.cat([setting.encoding.codec.decode(part) for part in latent.split(at_once, 1)])


def _told(one: Enlargement, seconds: float) -> dict[str, Any]:
    return {
        "clip": str(one.clip),
        "out": str(one.out),
        "frames": one.shown.frames,
        "fps": float(one.shown.rate),
        "from": f"{one.shown.height}x{one.shown.width}",
        "to": f"{one.height}x{one.width}",
        "windows": len(one.windows.starts),
        "seconds": round(seconds, 3),
    }


def print_made(clips: list[dict[str, Any]]) -> None:
    print(json.dumps({"clips": clips}, indent=1))
