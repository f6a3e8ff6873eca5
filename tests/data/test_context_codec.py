"""The decoder that looks at neighbours: least squares over all mirrorings, of the fixed codec's latents; its file."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.context_codec import RIDGE, ContextDCTCodec, fit
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr


def moving(seed: int, frames: int = 16, height: int = 32, width: int = 24) -> Tensor:
    """Smooth blobs that drift: what lies in a block tells of its neighbours, in every direction alike."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, frames // 4 + 2, height // 6, width // 6, generator=random).expand(-1, 3, -1, -1, -1)
    smooth = F.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0]
    return (smooth.permute(1, 2, 3, 0) * 255).round().to(torch.uint8)


CLIPS = [moving(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def fitted() -> ContextDCTCodec:
    return fit((weight, clip) for weight, clip in zip((1.0, 1.0, 2.0), CLIPS, strict=True))


def test_the_fit_is_least_squares_over_the_clips_and_all_their_mirrorings(fitted: ContextDCTCodec) -> None:
    """A sign or an axis taken wrongly, or weights left out, gives another map than the plain stacked system."""
    codec = BlockDCTCodec()
    rows, wanted = [], []
    for weight, clip in zip((1.0, 1.0, 2.0), CLIPS, strict=True):
        for mirrored in product((0, 1), repeat=3):
            seen = clip.flip([axis for axis in range(3) if mirrored[axis]])
            latent = codec.encode(seen)
            around = F.pad(latent[None], [1] * 6, mode="replicate")[0]
            _, t, h, w = latent.shape
            places = list(product(range(t), range(h), range(w)))
            part = torch.stack([around[:, i : i + 3, j : j + 3, k : k + 3].flatten() for i, j, k in places])
            share = (weight / len(places) / 8 / 4.0) ** 0.5  # of 8 mirrorings, of all weights
            rows.append(share * part.double())
            wanted.append(share * (codec.pixels(seen) - codec.blocks(latent)).double())
    inputs = rows[0].shape[1]
    ridge = RIDGE**0.5 * torch.eye(inputs, dtype=torch.float64)
    system = torch.cat([*rows, ridge]), torch.cat([*wanted, torch.zeros(inputs, wanted[0].shape[1])])
    want = torch.linalg.lstsq(*system).solution.T.float()
    found = fitted.correction.flatten(1)
    # Moments are of float32 products, and solving their normal equations loses eps times their condition (1 / RIDGE).
    assert (found - want).abs().max() < 0.02 * want.abs().max()


def test_latents_are_the_fixed_codecs_and_pictures_are_better() -> None:
    """Of clips that the fit did not see; by a correction of zero they are bitwise the same."""
    fitted = fit((1.0, moving(seed, height=64, width=48)) for seed in range(20, 36))
    fixed, unseen = BlockDCTCodec(), moving(9, height=64, width=48)
    assert fitted.fingerprint == fixed.fingerprint and torch.equal(fitted.encode(unseen), fixed.encode(unseen))
    latent = fixed.encode(unseen)
    assert psnr(fitted.decode(latent), unseen) > psnr(fixed.decode(latent), unseen) + 1
    assert torch.equal(ContextDCTCodec(torch.zeros(1536, 16, 3, 3, 3)).decode(latent), fixed.decode(latent))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_clip_gives_the_mirrored_picture(fitted: ContextDCTCodec, axis: int) -> None:
    """Within a level, where float32 sums round to the other side."""
    clip = moving(7)
    straight, mirrored = (fitted.decode(fitted.encode(of)) for of in (clip, clip.flip(axis)))
    assert (straight.flip(axis).int() - mirrored.int()).abs().max() <= 1


def test_nothing_to_learn_leaves_the_fixed_decoder() -> None:
    grey = torch.full((8, 16, 16, 3), 100, dtype=torch.uint8)
    codec, fixed = fit([(1.0, grey)]), BlockDCTCodec()
    assert torch.equal(codec.decode(codec.encode(grey)), fixed.decode(fixed.encode(grey)))


def test_a_decoder_is_written_and_read_and_another_file_is_refused(tmp_path: Path, fitted: ContextDCTCodec) -> None:
    fitted.write(tmp_path / "a.safetensors")
    clip = moving(5)
    latent = fitted.encode(clip)
    again = ContextDCTCodec.read(tmp_path / "a.safetensors").decode(latent)
    assert (again.int() - fitted.decode(latent).int()).abs().max() <= 1  # half precision
    with pytest.raises(CinemeshError, match=r"absent.*cinemesh codec fit"):
        ContextDCTCodec.read(tmp_path / "absent")
    (tmp_path / "b").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    with pytest.raises(CinemeshError, match="is no decoder"):
        ContextDCTCodec.read(tmp_path / "b")
    save_file({"correction": fitted.correction}, tmp_path / "c", metadata={"latents": "block-dct-of-another-day"})
    with pytest.raises(CinemeshError, match=r"decodes latents of block-dct-of-another-day.*fit it again"):
        ContextDCTCodec.read(tmp_path / "c")
    save_file({"correction": torch.zeros(3, 2)}, tmp_path / "d", metadata={"latents": fitted.fingerprint})
    with pytest.raises(CinemeshError, match=r"by \[3, 2\].*which need \[1536, 16, 3, 3, 3\]"):
        ContextDCTCodec.read(tmp_path / "d")
