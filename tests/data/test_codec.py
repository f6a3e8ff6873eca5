"""The fixed codec: an orthonormal, normalised, invertible projection of the right blocks."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cinemesh.data import codec as codec_module
from cinemesh.data.codec import COEFFICIENTS, BlockDCTCodec, Coefficient, clip_pieces
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr


def smooth_clip(frames: int, height: int, width: int) -> Tensor:
    """Low frequencies of unequal strength along each dim, in shades of one colour."""
    t, h, w = (torch.linspace(0, 1, n) for n in (frames, height, width))
    base = 0.3 * t[:, None, None] + 0.5 * h[:, None] ** 2 + torch.sin(3 * w) * 0.2
    return (torch.stack([base, base + 0.1, base - 0.1], -1).clamp(0, 1) * 255).round().to(torch.uint8)


def cosine(frequency: int) -> Tensor:
    """One DCT-II vector of length 8 from its definition, not from the codec's table."""
    scale = math.sqrt((1 if frequency == 0 else 2) / 8)
    return torch.tensor([scale * math.cos(math.pi * frequency * (2 * i + 1) / 16) for i in range(8)])


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 16])
def test_shapes_follow_the_paper_for_any_number_of_frames(frames: int) -> None:
    """T' frames give ceil(T'/8) latent frames and 8 * ceil(T'/8) decoded ones (3.1.1)."""
    codec = BlockDCTCodec()
    clip = smooth_clip(frames, 16, 24)
    latent = codec.encode(clip)
    assert latent.shape == (16, math.ceil(frames / 8), 2, 3) and latent.dtype == torch.float32
    decoded = codec.decode(latent)
    assert decoded.shape == (8 * math.ceil(frames / 8), 16, 24, 3) and decoded.dtype == torch.uint8
    assert psnr(decoded[:frames], clip) > 30


@pytest.mark.parametrize("channel", range(16))
def test_each_channel_answers_to_its_own_cosine_in_its_own_block(channel: int) -> None:
    """Catches dims or blocks that both ways permute alike, which a round trip cannot see."""
    colour, (ft, fh, fw), mean, std = COEFFICIENTS[channel]
    axis = torch.tensor([(1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0)][colour])
    axis = axis / axis.norm()
    pattern = torch.einsum("t,h,w,c->thwc", cosine(ft), cosine(fh), cosine(fw), axis)
    amplitude = 0.8 / pattern.abs().max()  # pixels in [-0.8, 0.8]
    clip = torch.full((16, 16, 24, 3), 127.5)
    clip[8:, 8:, :8] += 127.5 * amplitude * pattern  # block (1, 1, 0)
    latent = BlockDCTCodec().encode(clip.round().to(torch.uint8))
    grey = torch.tensor([-c.mean / c.std for c in COEFFICIENTS])
    # Rounding moves a pixel by at most 1/255 (and float32), a coefficient sqrt(1536) times that.
    bound = torch.tensor([1.01 * math.sqrt(1536) / 255 / c.std for c in COEFFICIENTS])
    expected = grey.clone()
    expected[channel] = (amplitude - mean) / std
    assert ((latent[:, 1, 1, 0] - expected).abs() <= bound).all()
    assert ((latent[:, 0, 0, 0] - grey).abs() <= bound).all()
    assert (expected - grey)[channel] > 3 * bound[channel]  # the check is not blind


def test_decode_inverts_encode_up_to_rounding() -> None:
    """encode(decode(z)) = z for latents of unclamped pixels: catches a mean or std not undone."""
    codec = BlockDCTCodec()
    generator = torch.Generator().manual_seed(0)
    latent = 0.2 * torch.randn(16, 2, 3, 2, generator=generator)
    again = codec.encode(codec.decode(latent))
    # Rounding errors of pixels are uniform within 1/255, so of std 1/255/sqrt(3), and independent;
    # an orthonormal row keeps their std. Five of them.
    bound = torch.tensor([5 * (1 / 255) / math.sqrt(3) / c.std for c in COEFFICIENTS])
    assert ((again - latent).abs() <= bound[:, None, None, None]).all()


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((8, 20, 16, 3), "20 % 8 = 4"), ((8, 16, 13, 3), "13 % 8 = 5"), ((0, 16, 16, 3), "0 frames")],
)
def test_sizes_that_do_not_divide_are_refused_with_their_numbers(shape: tuple[int, ...], numbers: str) -> None:
    with pytest.raises(CinemeshError, match=numbers):
        BlockDCTCodec().encode(torch.zeros(shape, dtype=torch.uint8))


def test_float_frames_and_foreign_latents_are_refused() -> None:
    codec = BlockDCTCodec()
    with pytest.raises(CinemeshError, match=r"torch.float32 \[8, 16, 16, 3\]"):
        codec.encode(torch.zeros(8, 16, 16, 3))
    with pytest.raises(CinemeshError, match=r"\[8, 1, 2, 2\]"):
        codec.decode(torch.zeros(8, 1, 2, 2))
    latent = torch.zeros(16, 1, 2, 2)
    latent[3, 0, 1, 1] = math.nan
    with pytest.raises(CinemeshError, match="1 of 64 latent values"):
        codec.decode(latent)


def test_the_fingerprint_changes_with_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    before = BlockDCTCodec().fingerprint
    assert before == BlockDCTCodec().fingerprint
    first = Coefficient(0, (0, 0, 0), -5.5, 16.21)
    monkeypatch.setattr(codec_module, "COEFFICIENTS", (first, *COEFFICIENTS[1:]))
    assert BlockDCTCodec().fingerprint != before


class Tiled(BlockDCTCodec):
    """Decodes a frame of the latent at a time."""

    made = 0

    def decoded(self, latent: Tensor) -> Iterator[Tensor]:
        for frame in latent.split(1, 1):
            self.made += 1
            yield self.decode(frame)


def test_a_clip_comes_in_the_pieces_of_a_codec_with_tiles() -> None:
    """Cut where the clip ends; one without tiles makes it whole. A piece is made when the one before it was taken."""
    latent = BlockDCTCodec().encode(smooth_clip(40, 16, 24))
    (whole,) = clip_pieces(BlockDCTCodec(), latent, 27)
    assert len(whole) == 27
    codec = Tiled()
    pieces = clip_pieces(codec, latent, 27)
    first = next(pieces)
    assert codec.made == 1
    others = [*pieces]
    assert [len(piece) for piece in (first, *others)] == [8, 8, 8, 3]
    assert torch.equal(torch.cat([first, *others]), whole)
