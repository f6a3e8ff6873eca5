"""``cinemesh codec``: how well a codec gives back held-out windows; and the decoder of dct-context, fitted to clips."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ...data.cache.decoding import decoded_windows
from ...data.context_codec import STRIDE, fit
from ...data.encoding import codec_of
from ...data.settings import CAPTIONS
from ...errors import CinemeshError
from ...evaluation.reconstruction import WINDOW_PX, reconstruct
from ...files import check_output_file
from ...model.tae.codec import to_pixels
from ...model.tae.features import Lite0
from ..tables import new_console
from ..training.recipe import read_config
from ..written import command, wrote

QUICK_START = CAPTIONS.with_name("quickstart.yaml")


def run_eval(
    *,
    config: Path | None,
    named: str | None,
    overrides: Sequence[str],
    as_json: bool,
    frechet: bool = False,
    unseen: bool = False,
) -> None:
    """Print what a codec, by default the recipe's, loses of the held-out windows of its first bucket's shape.

    ``unseen``: of all its windows, since the codec was trained on none of these clips. Raises CinemeshError for a
    recipe without such windows, or too small ones.
    """
    recipe = read_config(config or QUICK_START, overrides)
    settings = recipe.codec if named is None else codec_of(named)
    codec = settings.build()
    bucket = recipe.data.shapes[0]
    bucket.latent(codec)
    if min(bucket.height, bucket.width) < WINDOW_PX:
        raise CinemeshError(
            f"bucket {bucket} has windows of {bucket.height}x{bucket.width} pixels, and SSIM looks at "
            f"{WINDOW_PX}x{WINDOW_PX}",
            remedy="measure larger ones: --set data.size=64",
        )
    asked = (
        (scene.name, frames)
        for scene, cut, validation, _, frames in decoded_windows(recipe.data, progress=not as_json)
        if (validation or unseen) and cut.bucket == bucket
    )
    if (first := next(asked, None)) is None:
        raise CinemeshError(
            f"no scene of {recipe.data.captions} has held-out windows of bucket {bucket}",
            remedy="raise data.validation_share, take shorter windows (--set data.frames=8), or, of clips that the "
            "codec was not trained on, all windows: --unseen",
        )
    found = reconstruct(codec, chain([first], asked), embedded() if frechet else None)
    values = {"codec": settings.kind, "latents": codec.fingerprint} | asdict(found)
    if as_json:
        print(json.dumps(values, indent=1))
        return
    new_console().print(
        f"{settings.kind}, {found.windows} {'' if unseen else 'held-out '}windows {bucket} of {found.scenes} scenes:\n"
        f"video  {found.video_psnr_db:.2f} dB, SSIM {found.video_ssim:.3f}\n"
        f"image  {found.image_psnr_db:.2f} dB, SSIM {found.image_ssim:.3f}"
    )
    if found.frechet is not None:
        new_console().print(
            f"Frechet distance {found.frechet:.4f} of EfficientNet-lite0's features of all frames: no FID, no FVD, for "
            "comparison within this project alone"
        )


def embedded() -> Callable[[Tensor], Tensor]:
    """Features of frames uint8 [T, H, W, 3]. Raises CinemeshError where the packages of the extra tae are missing."""
    net = Lite0()

    def features(frames: Tensor) -> Tensor:
        with torch.inference_mode():
            return net.embedding(to_pixels(frames))

    return features


def run_fit(*, config: Path | None, overrides: Sequence[str], out: Path) -> None:
    """Fit the decoder to a recipe's training windows and write it.

    Raises CinemeshError for windows that are no whole blocks of frames.
    """
    recipe = read_config(config or QUICK_START, overrides)
    check_output_file(out, "--out")
    buckets = [bucket for bucket in recipe.data.shapes if bucket.frames % STRIDE == 0]
    if not buckets:
        raise CinemeshError(
            f"no bucket of {config or QUICK_START} has a multiple of {STRIDE} frames",
            remedy="fit to one: --set data.frames=16",
        )
    began = time.perf_counter()
    fit(
        (1 / len(cut.train), frames)
        for _, cut, validation, _, frames in decoded_windows(recipe.data)
        if not validation and cut.bucket in buckets
    ).write(out)
    wrote(
        out,
        command("codec", "eval", *([] if config is None else [config]), codec=out),
        f"{time.perf_counter() - began:.1f} s",
    )
