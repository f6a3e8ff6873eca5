"""A trained autoencoder as a codec: every length, its directory, tiles over ranks, memory, borders of real clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import Pool
from safetensors.torch import load_file, save_file
from torch import Tensor

from cinemesh.data.cache.decoding import decoded_windows
from cinemesh.data.codec import LatentCodec
from cinemesh.data.context_codec import SHIPPED, ContextDCTCodec
from cinemesh.data.encoding import TAE, codec_of
from cinemesh.data.scenes import read_captions
from cinemesh.data.settings import CAPTIONS, DataSettings
from cinemesh.errors import CinemeshError
from cinemesh.model.tae import files, tiles
from cinemesh.model.tae.building import build
from cinemesh.model.tae.codec import TAECodec, latent_statistics, to_frames, to_pixels
from cinemesh.model.tae.config import TAEConfig, tae_preset
from cinemesh.model.tae.files import Trained
from cinemesh.model.tae.tiles import Tiling
from cinemesh.parallel.ir.layout import Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import Communicator
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.parallel.runtime.witness import Witness

TINY = tae_preset("tiny")
SMALL_GRID = replace(tae_preset("grid"), width=8, groups=4, blocks=1)


def clip(frames: int, size: int = 16, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8, generator=random)


def trained(config: TAEConfig, tiling: Tiling | None = None) -> Trained:
    net = build(config)
    net.initialise(0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "temporal" in name:  # else no frame would know of another
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    tiling = tiling or Tiling.of(config.temporal_stride)
    mean, std = latent_statistics(net, tiling, [clip(40), clip(9, seed=1)])
    images = latent_statistics(net, tiling, [clip(1, seed=n) for n in range(20)])
    return Trained(net.eval().requires_grad_(False), mean, std, tiling, "0", images)


def directory(path: Path, config: TAEConfig = TINY) -> Path:
    made = trained(config)
    files.write(path, made.net, made.mean, made.std, {"steps": 0}, made.images)
    return path


@pytest.mark.parametrize("config", [TINY, SMALL_GRID, replace(TINY, time="none"), replace(TINY, time="3d")], ids=str)
def test_every_length_to_its_latents_and_back(config: TAEConfig) -> None:
    """T from 1 to 40: ceil(T / 8) latent frames (T of an image autoencoder), and at least T frames again."""
    codec: LatentCodec = TAECodec(trained(config))
    for frames in range(1, 41):
        latent = codec.encode(clip(frames))
        t = -(-frames // config.temporal_stride)
        assert codec.latent_frames(frames) == t and latent.shape == (config.channels, t, 2, 2)
        again = codec.decode(latent)
        assert again.shape == (t * config.temporal_stride, 16, 16, 3) and again.dtype == torch.uint8


@pytest.mark.parametrize("config", [TINY, SMALL_GRID, replace(TINY, time="3d"), replace(TINY, time="none")], ids=str)
def test_the_image_half_takes_every_frame_by_itself(config: TAEConfig) -> None:
    """Temporal stride 1; a frame's latent and picture are those of it alone, whatever stands beside it."""
    codec: LatentCodec = TAECodec(trained(config), images=True)
    frames = clip(37)  # more than a tile
    latent = codec.encode(frames)
    assert codec.temporal_stride == 1 and codec.latent_frames(37) == 37 and latent.shape == (config.channels, 37, 2, 2)
    again = codec.decode(latent)
    assert again.shape == frames.shape
    for at in (0, 20, 36):
        torch.testing.assert_close(latent[:, at : at + 1], codec.encode(frames[at : at + 1]), atol=1e-5, rtol=1e-4)
        apart = codec.decode(latent[:, at : at + 1])[0].int() - again[at].int()
        assert apart.abs().max() <= 1
    assert not torch.equal(codec.encode(frames.flip(0)), latent)
    torch.testing.assert_close(codec.encode(frames.flip(0)).flip(1), latent, atol=1e-5, rtol=1e-4)


def test_an_image_is_what_the_clip_of_it_is_but_for_its_statistics() -> None:
    """All frames of a decoded latent of one frame are alike: one of them is the picture."""
    made, frame = trained(TINY), clip(1, seed=4)
    clips, images = TAECodec(made), TAECodec(made, images=True)
    assert made.images is not None and clips.fingerprint != images.fingerprint

    def raw(codec: TAECodec) -> Tensor:
        return codec.encode(frame) * codec.std.view(-1, 1, 1, 1) + codec.mean.view(-1, 1, 1, 1)

    torch.testing.assert_close(raw(clips), raw(images), atol=1e-5, rtol=1e-4)
    shown = clips.decode(clips.encode(frame))
    assert len(shown) == 8 and (shown.int() - images.decode(images.encode(frame)).int()).abs().max() <= 1
    latents = torch.cat([images.encode(clip(1, seed=n)).flatten(1) for n in range(20)], 1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert (torch.cat([clips.encode(clip(1, seed=n)).flatten(1) for n in range(20)], 1).std(1) - 1).abs().max() > 0.01


def test_a_directory_holds_the_statistics_of_images(tmp_path: Path) -> None:
    """One that was written before they were measured is a codec of clips, and says why it is none of images."""
    path = directory(tmp_path / "tae")
    codec = TAE(path=path, images=True).build()
    torch.testing.assert_close(codec.encode(clip(3)), TAECodec(trained(TINY), images=True).encode(clip(3)))

    def older(values: dict) -> None:
        del values["images"]
        values["format"] = 1

    described(path, older)
    assert TAE(path=path).build().channels == 4
    with pytest.raises(CinemeshError, match="knows no mean and std of its images' latents") as refused:
        TAE(path=path, images=True).build()
    assert "time: none" in str(refused.value.remedy)
    described(path, lambda values: values.update(format=2, images=[[0.0] * 4]))
    with pytest.raises(CinemeshError, match=r"images is .*, no mean and std"):
        TAE(path=path).build()
    described(path, lambda values: values.update(images=[[0.0] * 4, [1.0] * 3]))
    with pytest.raises(CinemeshError, match="of 4 channels"):
        TAE(path=path).build()


def test_a_clip_is_encoded_as_each_of_its_tiles_is() -> None:
    """No tile sees another: 64 frames are two clips of 32; the last of 72 is encoded with the 24 frames before it."""
    codec, frames = TAECodec(trained(TINY)), clip(72)
    whole = codec.encode(frames)
    parts = [codec.encode(frames[:32]), codec.encode(frames[32:64]), codec.encode(frames[40:72])[:, -1:]]
    assert torch.equal(whole, torch.cat(parts, 1))
    untiled = TAECodec(trained(TINY, Tiling(16, 0, 8))).encode(frames)
    apart = (whole - untiled).square().mean((0, 2, 3)).sqrt()
    assert apart[3:5].min() > 2 * apart[:2].max()  # at the border; elsewhere little


def test_latents_are_normalised_means(tmp_path: Path) -> None:
    """By hand from the module: the posterior's mean, never a sample, less each channel's mean, over its std."""
    codec, made = TAECodec(trained(TINY)), trained(TINY)
    frames = clip(8)
    mean = made.net.encode(to_pixels(frames)[None]).mean[0].transpose(0, 1)
    expected = (mean - made.mean.view(-1, 1, 1, 1)) / made.std.view(-1, 1, 1, 1)
    torch.testing.assert_close(codec.encode(frames), expected)
    latents = torch.cat([codec.encode(clip(40)).flatten(1), codec.encode(clip(9, seed=1)).flatten(1)], 1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_red_stays_red() -> None:
    """Channel order: pixels are COLOURS to the network, as frames are."""
    red = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    red[..., 0] = 255
    pixels = to_pixels(red)
    assert pixels[0, 0].eq(1).all() and pixels[0, 1:].eq(-1).all() and torch.equal(to_frames(pixels), red)


def test_a_directory_is_the_autoencoder_again(tmp_path: Path) -> None:
    made = trained(TINY)
    codec = codec_of(str(directory(tmp_path / "tae"))).build()
    frames = clip(20)
    torch.testing.assert_close(codec.encode(frames), TAECodec(made).encode(frames))
    assert (
        codec.fingerprint.startswith("tae-")
        and codec.fingerprint == codec_of(str(tmp_path / "tae")).build().fingerprint
    )
    assert TAE(path=tmp_path / "tae", dtype="bfloat16").build().fingerprint != codec.fingerprint
    coarse = TAE(path=tmp_path / "tae", dtype="bfloat16").build().encode(frames)
    assert coarse.dtype == torch.float32 and 1e-4 < (coarse - codec.encode(frames)).abs().max() < 0.3


def described(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((path / "autoencoder.json").read_text())
    change(values)
    (path / "autoencoder.json").write_text(json.dumps(values))


def weights(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(path / "autoencoder.safetensors")
    change(state)
    save_file(state, path / "autoencoder.safetensors")
    digest = files._digest(path / "autoencoder.safetensors")
    described(path, lambda values: values.update(weights=digest))


def first_nan(state: dict[str, Tensor]) -> None:
    state["encoder.conv_in.weight"].view(-1)[0] = torch.nan


def without_a_bias(state: dict[str, Tensor]) -> None:
    del state["quant_conv.bias"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "autoencoder.safetensors").unlink(), "has no weights"),
        (lambda path: (path / "autoencoder.safetensors").write_bytes(b"{"), "has no weights"),
        (lambda path: save_file({"a": torch.zeros(1)}, path / files.WEIGHTS), "is not what autoencoder.json"),
        (lambda path: weights(path, first_nan), "encoder.conv_in.weight holds values that are not finite"),
        (lambda path: weights(path, without_a_bias), "quant_conv.bias is absent"),
        (lambda path: described(path, lambda v: v["config"].update(width=16)), r"is \[8, 3, 3, 3\] in the weights"),
        (lambda path: described(path, lambda v: v["config"].update(time="2d")), "config.time is '2d'"),
        (lambda path: described(path, lambda v: v["config"].update(width="wide")), "width is 'wide'"),
        (lambda path: described(path, lambda v: v.update(mean=[0.0])), r"mean is \[0.0\], of 4 channels"),
        (lambda path: described(path, lambda v: v.update(format=3)), "has format 3"),
        (lambda path: described(path, lambda v: v.pop("std")), "has no std"),
        (lambda path: (path / "autoencoder.json").write_text("{"), "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_directory_that_is_not_whole_is_refused(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    path = directory(tmp_path / "tae")
    spoil(path)
    with pytest.raises(CinemeshError, match=said):
        codec_of(str(path)).build()


def test_what_cannot_be_encoded_or_decoded_is_refused() -> None:
    codec = TAECodec(trained(TINY))
    for frames, said in (
        (clip(8)[:0], "0 frames of 16 x 16"),
        (clip(8)[:, :12], "12 % 8 = 4"),
        (clip(8).float(), "uint8"),
    ):
        with pytest.raises(CinemeshError, match=said):
            codec.encode(frames)
    for latent, said in (
        (torch.zeros(16, 1, 2, 2), r"read are \[4, t, h, w\]"),
        (torch.full((4, 1, 2, 2), torch.nan), "16 of 16 latent values"),
        (torch.zeros(4, 0, 2, 2), r"latent of \[4, 0, 2, 2\]"),
    ):
        with pytest.raises(CinemeshError, match=said):
            codec.decode(latent)
    with pytest.raises(CinemeshError, match=r"channels \[0, 1, 2, 3\] are the same everywhere"):
        flat = torch.zeros(8, 16, 16, 3, dtype=torch.uint8)
        net = build(replace(TINY, time="none"))
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
        latent_statistics(net, Tiling.of(1), [flat])


def spread(frames: Tensor) -> tuple[Tensor, list[Tensor]]:
    """On a rank of several: the latent, and the pieces of the clip."""
    mesh = Mesh(Plan(dp_replicate=torch.distributed.get_world_size()))
    codec, communicator = TAECodec(trained(TINY)), Communicator(mesh)
    latent = codec.encode(frames, communicator)
    found = latent, list(codec.decoded(latent, communicator))
    mesh.close()
    return found


class _NoData(Exception):
    """A gather was bound of tensors that have no values."""


class _Placed:
    """A communicator of two ranks, of which this is the first; what it is to gather is noted."""

    def __init__(self) -> None:
        self.mesh = SimpleNamespace(rank=0, plan=SimpleNamespace(world_size=2))
        self.devices: list[str] = []

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> None:
        self.devices = [source.device.type, output.device.type]
        raise _NoData


@pytest.mark.parametrize("images", [False, True], ids=["clips", "images"])
def test_tiles_are_gathered_where_they_are_made(images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes tensors of a GPU alone: what was brought to the host before, it refuses. ``meta`` stands for one."""
    monkeypatch.setattr(TAECodec, "_autocast", lambda _: nullcontext())  # there is none of that kind
    for call in (
        lambda codec, to: codec.encode(clip(40), to),
        lambda codec, to: [*codec.decoded(torch.ones(4, 9, 2, 2), to)],
    ):
        to = _Placed()
        with pytest.raises(_NoData):
            call(TAECodec(trained(TINY), "meta", images=images), to)
        assert to.devices == ["meta", "meta"]


def test_a_network_comes_to_its_device_with_the_first_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads its recipe before it takes its GPU: until then "cuda" is GPU 0, for the ranks of all GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TAE(path=directory(tmp_path / "tae")).build().channels == 4  # there is no CUDA here to bring it to
    made = trained(TINY)
    codec = TAECodec(made, "meta")
    assert next(made.net.parameters()).device.type == "cpu"
    assert {p.device.type for p in codec.net.parameters()} == {"meta"} and codec.net is made.net


@pytest.mark.parametrize("frames", [5, 40, 130])
def test_tiles_over_ranks_are_those_of_one_process_bit_for_bit(pool: Pool, frames: int) -> None:
    """One tile for four ranks, as many as ranks, and rounds of them; the last one is short."""
    codec, given = TAECodec(trained(TINY)), clip(frames)
    latent = codec.encode(given)
    pieces = list(codec.decoded(latent))
    for ranks in (2, 4):
        for found, parts in pool.run(ranks, spread, given):
            assert torch.equal(found, latent)
            assert len(parts) == len(pieces) and all(map(torch.equal, parts, pieces))


def test_decoding_takes_as_much_memory_for_a_long_clip_as_for_a_short_one() -> None:
    """Bytes alive at most, beside the latent: 64 and 256 frames differ by less than 5 %; untiled by 4 times."""

    def peak(codec: TAECodec, frames: int) -> int:
        latent = torch.randn(4, frames // 8, 4, 4, generator=torch.Generator().manual_seed(0))
        with Witness([]) as live:
            for piece in codec.decoded(latent):
                assert len(piece)
                del piece
        return live.peak_bytes - latent.nbytes

    codec, untiled = TAECodec(trained(TINY)), TAECodec(trained(TINY, Tiling(64, 0, 8)))
    assert peak(codec, 256) == pytest.approx(peak(codec, 64), rel=0.05)
    assert peak(untiled, 256) > 3 * peak(untiled, 64)


# -- borders of tiles, on real clips ----------------------------------------------------------------------------------


def linear(tiling: Tiling) -> TAECodec:
    """The grid as it begins: the linear decoder of 3x3x3 latents, which knows the next tile's less well."""
    context, net = ContextDCTCodec.read(SHIPPED), build(SMALL_GRID)
    net.initialise(0)
    net.begin_as(context.basis, context.mean, context.std, context.correction)  # pyright: ignore[reportCallIssue]
    return TAECodec(Trained(net.eval().requires_grad_(False), torch.zeros(16), torch.ones(16), tiling, "0"))


SCENES = ("rabbit", "passenger")  # of 96 frames and more


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """A clip of each, 96 frames of 128 px."""
    told = [asdict(scene) for scene in read_captions(CAPTIONS) if scene.name in SCENES]
    rows = [{key: scene[key] for key in ("name", "file", "first_frame", "last_frame", "caption")} for scene in told]
    own = tmp_path_factory.mktemp("real") / "captions.yaml"
    own.write_text(json.dumps(rows), encoding="utf-8")
    settings = DataSettings(captions=own, frames=96, stride=1000, validation_share=0.0)
    return [frames for _, _, _, _, frames in decoded_windows(settings, progress=False)]


def border_error(codec: TAECodec, frames: Tensor) -> float:
    """How much the error changes from a frame to the next, at the ends of overlaps over elsewhere."""
    error = codec.decode(codec.encode(frames)).double() - frames.double()
    change = error.diff(dim=0).abs().mean((1, 2, 3))
    spans = Tiling.of(8).decoded(len(frames) // 8)
    ends = sorted({8 * edge for span in spans for edge in (span.start, span.stop)} - {0, len(frames)})
    at = torch.zeros(len(change), dtype=torch.bool)
    at[torch.tensor(ends) - 1] = True
    return (change[at].mean() / change[~at].mean()).item()


def printed(frames: int) -> Tensor:
    return 1 - torch.arange(frames) / frames


def test_borders_of_tiles_are_hardly_seen_and_the_printed_blend_would_be(
    real: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real clips: at most 1.03 of the untiled one's; with the blend as the paper prints it, more than 1.1."""
    assert len(real) == 2
    for frames in real:
        untiled = border_error(linear(Tiling(12, 0, 8)), frames)
        tiled = border_error(linear(Tiling.of(8)), frames)
        with monkeypatch.context() as planted:
            planted.setattr(tiles, "later_weights", printed)
            wrong = border_error(linear(Tiling.of(8)), frames)
        assert tiled / untiled <= 1.03 and wrong / untiled > 1.1, (untiled, tiled, wrong)
