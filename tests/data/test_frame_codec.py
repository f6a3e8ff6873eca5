"""The fixed codec of single frames: its blocks, its coefficients, and that frames know nothing of one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cinemesh.data.codec import OPPONENT_AXES
from cinemesh.data.frame_codec import FRAME_COEFFICIENTS, FrameDCTCodec
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr


def noise(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("side", [8, 4])
def test_a_latent_is_of_one_frame(side: int) -> None:
    codec = FrameDCTCodec(side)
    clip = noise(5, 16, 24)
    latent = codec.encode(clip)
    assert latent.shape == (16, 5, 16 // side, 24 // side) and codec.latent_frames(5) == 5
    assert codec.temporal_stride == 1 and codec.spatial_stride == side
    assert codec.decode(latent).shape == clip.shape
    for frame in range(5):
        torch.testing.assert_close(latent[:, frame], codec.encode(clip[frame : frame + 1])[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [8, 4])
def test_each_channel_answers_to_its_own_cosine_in_its_own_block(side: int) -> None:
    """By the definition of the DCT-II, not the codec's table."""
    codec = FrameDCTCodec(side)
    place = torch.arange(side, dtype=torch.float64)
    for channel, (colour, (_, down, across), mean, std) in enumerate(FRAME_COEFFICIENTS[side]):
        axis = torch.tensor(OPPONENT_AXES[colour], dtype=torch.float64)
        waves = [torch.cos(torch.pi * k * (2 * place + 1) / (2 * side)) for k in (down, across)]
        pattern = torch.einsum("h,w,c->hwc", waves[0], waves[1], axis)
        pattern /= pattern.norm()
        clip = torch.full((2, 2 * side, side, 3), 127.5, dtype=torch.float64)
        clip[1, side:] += 127.5 * 0.8 / pattern.abs().max() * pattern
        latent = codec.encode(clip.round().to(torch.uint8))
        wanted = (0.8 / pattern.abs().max().item() - mean) / std
        bound = 1.01 * (3 * side * side) ** 0.5 / 255 / std  # rounding of pixels
        assert abs(latent[channel, 1, 1, 0].item() - wanted) <= bound
        assert abs(latent[channel, 0, 1, 0].item() + mean / std) <= bound


def test_blocks_of_four_lose_little_and_the_two_are_not_taken_for_each_other() -> None:
    ramp = torch.linspace(0, 255, 32)[None, :, None, None] * torch.ones(2, 32, 32, 3)
    clip = (ramp + 20 * torch.sin(torch.arange(32.0))[None, None, :, None]).clamp(0, 255).to(torch.uint8)
    four, eight = FrameDCTCodec(4), FrameDCTCodec(8)
    assert psnr(four.decode(four.encode(clip)), clip) > psnr(eight.decode(eight.encode(clip)), clip) > 20
    assert four.fingerprint != eight.fingerprint
    with pytest.raises(CinemeshError, match="20 % 8 = 4"):
        eight.encode(noise(1, 20, 16))
