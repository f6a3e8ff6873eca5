"""Autoencoders of diffusers as codecs: tiny random ones, written and read as real ones are."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cinemesh.data.codec import LatentCodec
from cinemesh.data.encoding import Diffusers, codec_of
from cinemesh.errors import CinemeshError

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.5, 2.0, 2.5, 3.0]


def of_diffusers(name: str) -> Any:
    """A class of the package, which takes seconds to import."""
    return getattr(importlib.import_module("diffusers"), name)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of clips: 1 + 4 k frames to 1 + k."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wan")
    stated = {"latents_mean": MEAN, "latents_std": STD, "temperal_downsample": [False, True, True]}
    of_diffusers("AutoencoderKLWan")(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **stated
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of images, with a stride of 2."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("image")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    of_diffusers("AutoencoderKL")(
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.5,
        shift_factor=0.25,
        **blocks,
    ).save_pretrained(path)
    return path


def clip(frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [1, 5, 6, 9])
def test_latents_of_clips_are_the_autoencoders_own_normalised(wan: Path, frames: int) -> None:
    """By the package itself, on frames filled up to 1 + 4 k: a mean taken for a sample, or an axis, shows."""
    codec: LatentCodec = codec_of(str(wan)).build()
    own = of_diffusers("AutoencoderKLWan").from_pretrained(wan)
    pixels = clip(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    filled = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, -(frames - 1) % 4, -1, -1)], 2)
    with torch.no_grad():
        said = own.encode(filled).latent_dist.mean[0]
    latent = codec.encode(clip(frames))
    want = (said - torch.tensor(MEAN).view(4, 1, 1, 1)) / torch.tensor(STD).view(4, 1, 1, 1)
    assert latent.shape == (4, codec.latent_frames(frames), 2, 3) and (codec.temporal_stride, codec.spatial_stride) == (
        4,
        8,
    )
    assert torch.allclose(latent, want, atol=1e-5)
    with torch.no_grad():
        picture = own.decode(said[None]).sample[0].permute(1, 2, 3, 0)
    shown = codec.decode(latent)
    assert shown.dtype == torch.uint8 and len(shown) >= frames
    assert (shown.float() - ((picture + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.51


def test_an_image_autoencoder_takes_frame_by_frame(image: Path) -> None:
    codec = codec_of(str(image)).build()
    latent = codec.encode(clip(3))
    assert latent.shape == (4, 3, 8, 12) and codec.latent_frames(3) == 3
    assert torch.allclose(codec.encode(clip(3)[2:])[:, 0], latent[:, 2], atol=1e-5)
    assert codec.mean.tolist() == [0.25] * 4 and codec.std.tolist() == [2.0] * 4
    assert codec.decode(latent).shape == (3, 16, 24, 3)


def test_what_is_no_autoencoder_is_refused_and_other_weights_are_another_fingerprint(
    image: Path, tmp_path: Path
) -> None:
    with pytest.raises(CinemeshError, match=r"holds no autoencoder"):
        Diffusers(path=tmp_path).build()
    before = Diffusers(path=image).build().fingerprint
    assert before == Diffusers(path=image).build().fingerprint
    stated = json.loads((image / "config.json").read_text(encoding="utf-8"))
    for name, values in (("other", stated | {"scaling_factor": 0.6}), ("unknown", stated | {"_class_name": "UNet"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values), encoding="utf-8")
        (tmp_path / name / "diffusion_pytorch_model.safetensors").symlink_to(
            image / "diffusion_pytorch_model.safetensors"
        )
    assert Diffusers(path=tmp_path / "other").build().fingerprint != before
    with pytest.raises(CinemeshError, match=r"unknown is a UNet"):
        Diffusers(path=tmp_path / "unknown").build()
