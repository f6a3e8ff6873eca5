"""``cinemesh upsample``: which clips a trained spatial upsampler makes larger, and whether it can."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ...data.scenes import VIDEO_SUFFIXES, files_in
from ...data.video import look_at_clip
from ...errors import CinemeshError
from ...files import check_output_file, check_output_folder
from ...model.forward import build_velocity
from ...model.inputs import BatchShape
from ...model.step import check
from ...model.windows import OVERLAP, OverlappingWindows
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ..cluster.environment import device_here, processes_here, say_device, world_size
from ..cluster.processes import launch, rank_main
from ..exchange.exporting import found_checkpoint
from ..preflight import check_host_memory
from ..progress import progress
from ..storage.places import Location
from ..training.checkpoint.choosing import check_files
from ..training.checkpoint.manifest import read_manifest
from ..training.checkpoint.same_model import check_model
from ..training.noted import noted_recipe
from ..training.setting import Setting
from ..training.upsampling import Enlargement, UpsampleChoices, UpsampleOrder, latent_of, print_made, upsample

FARTHEST = 1.25  # times the scale that was learnt, or the inverse: the paper's 576x1008 to 1080x1920 is 0.94 of it

MOST_SIDE = 8192  # pixels: no codec here encodes a larger frame at once


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
        print_made([])


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
    length = choices.window or max(bucket.frames for bucket in setting.config.data.shapes)
    overlap = min(OVERLAP, length // 2) if choices.overlap is None else choices.overlap
    try:
        windows = OverlappingWindows(shown.frames, length, overlap)
    except CinemeshError as error:
        remedy = f"add --window {shown.frames}: it is then sampled whole" if shown.frames < length else None
        raise CinemeshError(f"{clip}: {error.problem}", remedy=remedy or error.remedy) from None
    one = Enlargement(clip, out, shown, height, width, windows)
    latent = latent_of(one, setting)
    stride, patch, table = setting.encoding.codec.spatial_stride, setting.model.patch, setting.model.position_lengths
    most = [patch[0] * table[0], stride * patch[1] * table[1], stride * patch[2] * table[2]]
    if latent[0] > most[0] or stride * latent[1] > most[1] or stride * latent[2] > most[2]:
        raise CinemeshError(
            f"{clip}: windows of {length} frames of {height}x{width} pixels, and the model has positions for "
            f"{most[0]} frames of {most[1]}x{most[2]}",
            remedy="name a smaller --size or --window, take a smaller clip, or a model of larger ones",
        )
    plan, batch = setting.config.plan, BatchShape(1, latent)
    check(setting.model, plan, batch)
    if device_here(setting.config.device, local := processes_here(plan.world_size)) == "cpu":
        check_host_memory([prepare(build_velocity(setting.model, plan, batch), backend="gloo")], local)
    return one
