"""Tiles: which frames, how they are joined, and what the paper's printed blend would do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.model.tae import tiles
from cinemesh.model.tae.tiles import Tiling, blended, later_weights

EIGHT = Tiling.of(8)


def test_tiles_are_the_papers() -> None:
    """3.1.1: 32 raw frames, four latent ones; decoded with 16 that overlap."""
    assert (EIGHT.latents, EIGHT.overlap) == (4, 2)
    assert EIGHT.encoded(96) == [(range(0, 32), 4), (range(32, 64), 4), (range(64, 96), 4)]
    assert EIGHT.decoded(8) == [range(0, 4), range(2, 6), range(4, 8)]
    assert Tiling.of(4) == Tiling(8, 4, 4)
    assert Tiling.of(1) == Tiling(32, 0, 1)  # frame by frame: nothing to blend


@pytest.mark.parametrize("frames", range(1, 101))
def test_every_length_is_tiled_once(frames: int) -> None:
    """Latents kept of the encoded tiles are those of the clip, in order; decoded tiles overlap by two."""
    latents = -(-frames // 8)
    kept: list[int] = []
    for span, count in EIGHT.encoded(frames):
        assert span.start % 8 == 0 and 0 < len(span) <= 32
        own = range(span.start // 8, -(-span.stop // 8))
        kept += own[-count:]
        assert len(own) == min(4, latents)  # as long as the clip allows
    assert kept == list(range(latents))
    spans = EIGHT.decoded(latents)
    assert spans[0].start == 0 and spans[-1].stop == latents
    assert all(b.start == a.stop - 2 and 2 < len(b) <= 4 for a, b in pairwise(spans))


def joined(latents: int, level: list[float]) -> Tensor:
    """Frames of a clip whose tile i is everywhere ``level[i]``."""
    spans = EIGHT.decoded(latents)
    each = [torch.full((len(span) * 8, 1), value) for span, value in zip(spans, level, strict=True)]
    return torch.cat(list(EIGHT.joined(each, latents)))[:, 0]


def test_tiles_are_blended_from_the_earlier_to_the_later() -> None:
    """By hand: over 16 frames from 0 to 1, in steps of 1/16; before and behind the tiles' own."""
    clip = joined(6, [0.0, 1.0])
    assert len(clip) == 48
    assert clip[:16].eq(0).all() and clip[32:].eq(1).all()
    torch.testing.assert_close(clip[16:32], (torch.arange(16) + 0.5) / 16)
    assert clip.diff().abs().max() == pytest.approx(1 / 16)


def test_equal_tiles_join_to_themselves() -> None:
    """What a network without borders would give: the clip, whatever its length, in pieces of constant size."""
    for latents in (3, 4, 5, 9, 12):
        clip = torch.randn(latents * 8, 2, generator=torch.Generator().manual_seed(latents))
        parts = (clip[span.start * 8 : span.stop * 8] for span in EIGHT.decoded(latents))
        pieces = list(EIGHT.joined(parts, latents))
        torch.testing.assert_close(torch.cat(pieces), clip)
        assert max(map(len, pieces)) <= 32


def printed(frames: int) -> Tensor:
    """x^j = w^j x_i^j + (1 - w^j) x_{i+1}^j, w^j = j / N: the weight of the EARLIER tile rises."""
    return 1 - torch.arange(frames) / frames


def test_the_blend_as_printed_jumps_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: from one constant tile to another the largest step is 16 times that of the corrected blend."""
    monkeypatch.setattr(tiles, "later_weights", printed)
    clip = joined(6, [0.0, 1.0])
    assert clip[15] == 0 and clip[16] == 1 and clip.diff().abs().max() == 1
    with pytest.raises(AssertionError):
        test_tiles_are_blended_from_the_earlier_to_the_later()


def test_weights_rise_and_are_fair() -> None:
    weights = later_weights(16)
    assert (weights.diff() > 0).all() and weights[0] > 0 and weights[-1] < 1
    torch.testing.assert_close(weights + weights.flip(0), torch.ones(16))
    half = blended(torch.zeros(2, 3), torch.ones(2, 3))
    torch.testing.assert_close(half[:, 0], torch.tensor([0.25, 0.75]))


def test_a_stride_that_divides_no_tile_is_refused() -> None:
    with pytest.raises(CinemeshError, match="16 % 32 = 16"):
        Tiling.of(32)
