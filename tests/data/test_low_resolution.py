"""What an upsampler is shown: degraded once a clip, the same at every build, or an autoencoder's round trip; cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.data import degrade
from cinemesh.data.cache.building import CacheBuild, build_cache
from cinemesh.data.cache.samples import Cache, collate
from cinemesh.data.clips import write_mp4
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.degrade import (
    CRF,
    FIRST_ROUND,
    SECOND_ROUND,
    ClipDraws,
    Degradation,
    blurred,
    degraded,
    drawn_kernel,
    h264,
    jpeg,
)
from cinemesh.data.encoding import BlockDCT, Encoding, FrameDCT
from cinemesh.data.frame_codec import FrameDCTCodec
from cinemesh.data.low_resolution import LowResolution, LowResolutionSettings, enlarged, padded, reduced, there_and_back
from cinemesh.data.settings import DataSettings
from cinemesh.data.text import EncoderSettings
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr
from cinemesh.model.inputs import LATENTS

CONDITION = "latents.low_resolution"


def moving(frames: int, height: int = 32, width: int = 48) -> Tensor:
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    base = 127 + 60 * torch.sin((x + 2 * t) / 5.0) + 50 * torch.cos(y / 4.0)
    return torch.stack([base, base * 0.8, 255 - base], -1).clamp(0, 255).to(torch.uint8)


# -- degradation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_clip_is_a_function_of_seed_name_and_first_frame(strength: float) -> None:
    """A resumed build makes the same; another window, clip or seed another one."""
    frames = moving(6)
    made = degraded(frames, 16, 24, strength, ClipDraws(3, "a", 4))
    assert made.shape == (6, 16, 24, 3) and made.dtype == torch.uint8
    for _ in range(2):
        assert torch.equal(made, degraded(frames, 16, 24, strength, ClipDraws(3, "a", 4)))
    for other in (ClipDraws(4, "a", 4), ClipDraws(3, "b", 4), ClipDraws(3, "a", 5)):
        assert not torch.equal(made, degraded(frames, 16, 24, strength, other))


def test_parameters_are_drawn_once_a_clip() -> None:
    """Frames that are alike stay alike but for their grain; drawn a frame each, blur and size would flicker."""
    still = moving(1).expand(5, -1, -1, -1).contiguous()
    for first in range(4):
        draws = ClipDraws(0, "still", first)
        drawn = Degradation.drawn(draws, 1.0)
        silent = tuple(replace(one, grain=0.0) for one in drawn.rounds)
        pixels = still.permute(0, 3, 1, 2).float() / 255
        for one in silent:
            pixels = degrade._rounded(pixels, one, draws, (16, 24))
        assert torch.equal(pixels, pixels[:1].expand_as(pixels))
        grains = [ClipDraws(0, "still", first).grain(5, 3, 8, 8) for _ in range(2)]
        assert torch.equal(*grains) and not torch.equal(grains[0][0], grains[0][1])
        assert abs(grains[0].mean()) < 0.15 and 0.9 < grains[0].std() < 1.1


def test_every_draw_lies_in_its_range_and_all_kinds_occur() -> None:
    """Of 120 clips: nothing outside of the published ranges, and no choice that never falls."""
    drawn = [Degradation.drawn(ClipDraws(1, "clip", first), 1.0) for first in range(120)]
    for which, ranges in ((0, FIRST_ROUND), (1, SECOND_ROUND)):
        rounds = [one.rounds[which] for one in drawn]
        assert all(ranges.factor[0] <= one.factor <= ranges.factor[1] for one in rounds)
        assert all(ranges.quality[0] <= one.quality <= ranges.quality[1] for one in rounds)
        for one in rounds:
            low, high = ranges.shot if one.shot else ranges.grain_std
            assert low <= one.grain <= high
        grown, shrunk_ = (sum(one.factor > 1 for one in rounds) / 120, sum(one.factor < 1 for one in rounds) / 120)
        assert abs(grown - ranges.directions[0]) < 0.12 and abs(shrunk_ - ranges.directions[1]) < 0.13
        assert abs(sum(one.kernel is not None for one in rounds) / 120 - ranges.blurred) < 0.12
        assert {one.filter for one in rounds} == {"area", "bilinear", "bicubic"}
        assert {one.shot for one in rounds} == {one.grey for one in rounds} == {True, False}
    assert all(CRF[0] <= one.crf <= CRF[1] for one in drawn) and len({one.crf for one in drawn}) > 8
    assert abs(sum(one.ringing is not None for one in drawn) / 120 - 0.8) < 0.12


def test_kernels_keep_brightness_and_blur() -> None:
    flat, grid = torch.full((1, 3, 9, 13), 0.3), moving(1).permute(0, 3, 1, 2).float() / 255
    for first in range(40):
        kernel = drawn_kernel(ClipDraws(0, "k", first), (0.2, 3.0), 1.0)
        assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1 and 7 <= len(kernel) <= 21
        assert abs(kernel.sum() - 1) < 1e-5 and torch.allclose(kernel, kernel.flip([0, 1]), atol=1e-6)
        torch.testing.assert_close(blurred(flat, kernel), flat, rtol=0, atol=1e-5)
        assert blurred(grid, kernel).shape == grid.shape


def test_worse_quality_loses_more() -> None:
    frames = moving(4)
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    errors = [(jpeg(pixels, quality) - pixels).square().mean() for quality in (95, 60, 30)]
    assert errors[0] < errors[1] < errors[2]
    levels = [psnr(h264(frames, crf), frames) for crf in (10, 25, 40)]
    assert levels[0] > levels[1] > levels[2] > 8
    odd = h264(frames[:, :31, :45].contiguous(), 10)
    assert odd.shape == (4, 31, 45, 3) and psnr(odd, frames[:, :31, :45]) > 25


def test_strength_goes_from_hardly_anything_to_much() -> None:
    frames = moving(4)
    plain = enlarged(reduced(frames, 16, 24), 32, 48)
    levels = []
    for strength in (0.0, 1.0):
        small = LowResolution(LowResolutionSettings(strength=strength), None)
        shown = [psnr(enlarged(small.small(frames, "a", first), 32, 48), frames) for first in range(8)]
        levels.append(sum(shown) / len(shown))
    assert psnr(plain, frames) + 0.5 > levels[0] > levels[1] + 2


# -- a round trip, sizes ----------------------------------------------------------------------------------------------


def test_a_round_trip_takes_the_place_of_the_degradation_at_times() -> None:
    frames, trip = moving(5), BlockDCTCodec()
    faults = there_and_back(trip, reduced(frames, 16, 24))
    for share, wanted in ((0.0, 0), (1.0, 24), (0.5, 12)):
        small = LowResolution(LowResolutionSettings(round_trip_share=share), trip)
        same = sum(torch.equal(small.small(frames, "a", first), faults) for first in range(24))
        assert abs(same - wanted) <= (8 if share == 0.5 else 0)


def test_odd_sizes_are_filled_up_and_cropped() -> None:
    frames = moving(3, 30, 45)
    assert padded(frames, 8).shape == (3, 32, 48, 3) and padded(frames, 1) is frames
    assert torch.equal(padded(frames, 8)[:, 31], padded(frames, 8)[:, 29])
    assert there_and_back(BlockDCTCodec(), frames).shape == frames.shape


def test_a_clip_is_enlarged_bilinearly_between_pixel_centres() -> None:
    ramp = torch.tensor([[[[0, 0, 0], [100, 100, 100]]]], dtype=torch.uint8)
    assert enlarged(ramp, 1, 4)[0, 0, :, 0].tolist() == [0, 25, 75, 100]
    assert torch.equal(enlarged(moving(2), 32, 48), moving(2))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"scale": 1}, {"scale": 9}, {"strength": 1.5}, {"seed": -1}, {"round_trip_share": 2}]
)
def test_settings_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(CinemeshError, match=f"data.low_resolution.{next(iter(given))}"):
        LowResolutionSettings(**given)


def test_a_window_that_the_scale_does_not_divide() -> None:
    with pytest.raises(CinemeshError, match="33 % 2 = 1"):
        DataSettings(size=33, low_resolution=LowResolutionSettings())


def test_a_codec_of_several_frames_is_no_upsamplers() -> None:
    with pytest.raises(CinemeshError, match="codec block-dct, whose latents are of 8 frames"):
        Encoding.of(BlockDCT(), [EncoderSettings()], LowResolutionSettings())
    with pytest.raises(CinemeshError, match=r"codec.kind is 'absent'"):
        Encoding.of(FrameDCT(), [EncoderSettings()], LowResolutionSettings(round_trip="absent"))


# -- the cache --------------------------------------------------------------------------------------------------------


def settings_of(folder: Path, **small: Any) -> DataSettings:
    write_mp4(folder / "a.mp4", moving(20, 32, 32), degrade.Fraction(24))
    text = '- {name: one, file: a.mp4, first_frame: 0, last_frame: 19, caption: "It moves."}\n'
    (folder / "captions.yaml").write_text(text)
    return DataSettings(
        clips=(str(folder / "a.mp4"),), captions=folder / "captions.yaml", size=32, frames=5, stride=5,
        encoders=(EncoderSettings("bytes", 4, 20),), low_resolution=LowResolutionSettings(**small),
    )  # fmt: skip


def encoding_of(settings: DataSettings) -> Encoding:
    return Encoding.of(FrameDCT(side=4), settings.encoders, settings.low_resolution)


def test_the_cache_holds_both_latents_of_a_window(tmp_path: Path) -> None:
    """Of a batch, each row's own; built anew elsewhere, bit by bit."""
    settings = settings_of(tmp_path)
    batches = []
    for name in ("first", "second"):
        version = build_cache(settings, encoding_of(settings), tmp_path / name, progress=False)
        train = Cache.open(str(tmp_path / name), version).buckets[0].train
        batches.append(collate([train[i] for i in range(len(train))], 0, 1))
    assert torch.equal(batches[0][CONDITION], batches[1][CONDITION])
    batch, codec = batches[0], FrameDCTCodec(4)
    assert len(batch[LATENTS]) >= 3 and batch[CONDITION].shape == batch[LATENTS].shape
    decoded = [codec.decode(latent) for latent in batch[LATENTS]]
    for number, shown in enumerate(batch[CONDITION]):
        near = [psnr(codec.decode(shown), clip) for clip in decoded]
        assert near.index(max(near)) == number, "the row of another window"
        assert near[number] < psnr(decoded[number], moving(20, 32, 32)[5 * number : 5 * number + 5])


def test_other_settings_are_another_cache(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    keys = {CacheBuild.planned(settings, encoding_of(settings), tmp_path).digest}
    others: tuple[dict[str, Any], ...] = ({"scale": 4}, {"strength": 0.5}, {"seed": 1}, {"round_trip": "block-dct"})
    for changed in others:
        other = replace(settings, low_resolution=LowResolutionSettings(**changed))
        keys.add(CacheBuild.planned(other, encoding_of(other), tmp_path).digest)
    plain = replace(settings, low_resolution=None)
    keys.add(CacheBuild.planned(plain, encoding_of(plain), tmp_path).digest)
    assert len(keys) == 6
