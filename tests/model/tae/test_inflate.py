"""Inflation: an image autoencoder, made temporal, is bit for bit itself until it is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.model.tae.autoencoder import Autoencoder
from cinemesh.model.tae.building import build
from cinemesh.model.tae.config import TAEConfig, image_half, tae_preset
from cinemesh.model.tae.inflate import inflate, read_diffusers_image

TINY = tae_preset("tiny")


def made(config: TAEConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Autoencoder:
    net = build(config).to(dtype)
    net.initialise(seed)
    return net.eval().requires_grad_(False)


def inflated(config: TAEConfig, dtype: torch.dtype = torch.float64) -> tuple[Autoencoder, Autoencoder]:
    """An image autoencoder with biases that are not zero, and what it inflates to."""
    image = made(image_half(config), dtype=dtype)
    random = torch.Generator().manual_seed(0)
    for parameter in image.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(dtype))
    net = made(config, seed=1, dtype=dtype)
    inflate(net, dict(image.named_parameters()))
    return image, net


@pytest.fixture
def one_way_to_convolve() -> Iterator[None]:
    """As matrix products, one frame after the other: oneDNN and NNPACK choose by how many frames there are."""
    before = torch._C._get_mkldnn_enabled(), torch.backends.nnpack.set_flags(False)[0]
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before[0])
    torch.backends.nnpack.set_flags(before[1])


def frames(count: int, size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("one_way_to_convolve")
def test_an_inflated_autoencoder_is_the_image_autoencoder_bit_for_bit(dtype: torch.dtype) -> None:
    """Of an image: the same moments; of its latent: eight equal frames, each the image."""
    image, net = inflated(TINY, dtype)
    pixels = frames(1, dtype=dtype)
    for ours, its in zip(net.encode(pixels), image.encode(pixels), strict=True):
        assert torch.equal(ours, its) and ours.std() > 0.01
    latent = image.encode(pixels).mean
    again, its = net.decode(latent), image.decode(latent)
    assert again.shape[1] == 8 and its.shape[1] == 1 and its.std() > 0.01
    assert all(torch.equal(again[:, i], its[:, 0]) for i in range(8))


def test_of_a_clip_it_sees_every_eighth_frame() -> None:
    image, net = inflated(TINY)
    clip = frames(19)
    assert torch.equal(net.encode(clip).mean, image.encode(clip[:, ::8]).mean)


@pytest.mark.parametrize(
    "part", ["encoder.conv_in.temporal.weight", "decoder.mid_block.attentions.0.temporal.to_out.0.weight"]
)
def test_a_temporal_layer_that_begins_as_something_is_seen(part: str) -> None:
    """Planted: a convolution over time that is no identity, an attention that is not zero; each at several frames."""
    image, net = inflated(TINY)
    clip = frames(17)
    latent = image.encode(clip[:, ::8]).mean
    before = net.encode(clip).mean, net.decode(latent)
    dict(net.named_parameters())[part].add_(0.1)
    after = net.encode(clip).mean, net.decode(latent)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_with_joint_convolutions_the_image_lies_in_the_middle_frame() -> None:
    """3D: equal up to the order of sums; with the image in the first frame's kernel it would see the frame before."""
    image, net = inflated(replace(TINY, time="3d"))
    pixels = frames(1)
    torch.testing.assert_close(net.encode(pixels).mean, image.encode(pixels).mean, rtol=1e-12, atol=1e-12)
    clip = frames(17)
    weight = dict(net.named_parameters())["encoder.conv_in.weight"]
    assert weight.shape[2] == 3 and weight[:, :, (0, 2)].count_nonzero() == 0
    assert not torch.equal(net.encode(clip).mean[:, 1], net.encode(clip[:, :9]).mean[:, 0])


def test_what_has_another_shape_begins_anew_and_is_named() -> None:
    """The paper's latents have 16 channels, an image autoencoder's 8 or 4."""
    image = made(replace(image_half(TINY), channels=2))
    net = made(TINY, seed=1)
    fresh = {name: value.clone() for name, value in net.named_parameters()}
    found = inflate(net, dict(image.named_parameters()))
    others = {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight", "post_quant_conv.weight"}
    assert others < set(found.other_shape) and not found.unknown and "encoder.conv_in.weight" in found.taken
    after = dict(net.named_parameters())
    assert all(torch.equal(after[name], fresh[name]) for name in found.other_shape)
    assert all(torch.equal(after[name], dict(image.named_parameters())[name]) for name in found.taken)
    assert "encoder.conv_out.weight" in str(found)


def written(path: Path, image: Autoencoder, *, old: bool = False, named: str = "AutoencoderKL") -> Path:
    """As diffusers' save_pretrained does; ``old``: attention as before its version 0.17."""
    path.mkdir()
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state: dict[str, Tensor] = {}
    for name, value in image.state_dict().items():
        for new, before in names.items() if old else ():
            if new in name:
                name, value = name.replace(new, before), value[..., None, None] if value.dim() == 2 else value
        state[name] = value.float().contiguous()
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps({"_class_name": named}), encoding="utf-8")
    return path


@pytest.mark.parametrize("old", [False, True])
def test_weights_of_diffusers_are_taken_by_their_names(tmp_path: Path, old: bool) -> None:
    image = made(image_half(TINY))
    net = made(TINY, seed=1)
    found = inflate(net, read_diffusers_image(written(tmp_path / "image", image, old=old)))
    assert len(found.taken) == len(list(image.parameters())) and not found.other_shape and not found.unknown
    pixels = frames(1)
    torch.testing.assert_close(
        net.encode(pixels).mean, image.encode(pixels).mean, rtol=1e-4, atol=1e-5
    )  # float32 there


def test_what_is_no_image_autoencoder_is_refused(tmp_path: Path) -> None:
    other = written(tmp_path / "wan", made(image_half(TINY)), named="AutoencoderKLWan")
    with pytest.raises(CinemeshError, match="AutoencoderKLWan"):
        read_diffusers_image(other)
    with pytest.raises(CinemeshError, match="holds no autoencoder"):
        read_diffusers_image(tmp_path / "gone")
    with pytest.raises(CinemeshError, match="none of its 1 parameters"):
        inflate(made(TINY), {"conv.weight": torch.zeros(1)})
    with pytest.raises(CinemeshError, match="inflated from none"):
        image_half(tae_preset("grid"))
