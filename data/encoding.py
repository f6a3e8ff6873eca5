"""What clips and captions become: latents by a codec, embeddings by text encoders. Built here from a recipe's settings.

A kind of codec is one dataclass below: its fields are the kind's settings, ``build`` makes it. It is listed in
``CODECS`` and named nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from ..documents import quoted
from ..errors import CinemeshError, did_you_mean
from ..model.inputs import LATENTS, MASK, text_input
from ..model.tae.codec import Precision, TAECodec
from ..model.tae.files import is_autoencoder
from ..parallel.ir.frozen_layers import sharing_ranks
from ..parallel.ir.plan import Plan
from ..parallel.runtime.comm import Communicator
from .codec import BlockDCTCodec, LatentCodec
from .context_codec import SHIPPED, ContextDCTCodec
from .diffusers_codec import DiffusersCodec
from .frame_codec import FrameDCTCodec
from .low_resolution import LowResolution, LowResolutionSettings
from .text import EncoderSettings, TextEncoder, build_encoders


@dataclass(frozen=True, kw_only=True)
class CodecSettings(ABC):
    """The section ``codec`` of a recipe: a kind, and that kind's settings."""

    kind: str

    @abstractmethod
    def build(self) -> LatentCodec:
        """The codec on this process. Raises CinemeshError for settings that make none."""


@dataclass(frozen=True, kw_only=True)
class BlockDCT(CodecSettings):
    """The fixed block DCT of ``data/codec.py``, which needs no training and has nothing to set."""

    kind: Literal["block-dct"] = "block-dct"

    def build(self) -> LatentCodec:
        return BlockDCTCodec()


@dataclass(frozen=True, kw_only=True)
class ContextDCT(CodecSettings):
    """The same latents, decoded with their neighbours' by a linear map that `cinemesh codec fit` fitted to clips."""

    decoder: Annotated[Path, "the fitted map; default: that of the quick start's clips, which ships"] = SHIPPED
    kind: Literal["dct-context"] = "dct-context"

    def build(self) -> LatentCodec:
        return ContextDCTCodec.read(self.decoder)


@dataclass(frozen=True, kw_only=True)
class FrameDCT(CodecSettings):
    """The fixed DCT of blocks of one frame: frame by frame, as images and the spatial upsampler want it."""

    side: Annotated[Literal[8, 4], "of a block, in pixels: 16 values are kept of its 192 or 48"] = 8
    kind: Literal["frame-dct"] = "frame-dct"

    def build(self) -> LatentCodec:
        return FrameDCTCodec(self.side)


@dataclass(frozen=True, kw_only=True)
class Diffusers(CodecSettings):
    """An autoencoder of the package diffusers: of clips (Wan, Hunyuan) or of images, which takes frame by frame."""

    path: Annotated[Path, "the directory that its save_pretrained wrote"]
    kind: Literal["diffusers"] = "diffusers"

    def build(self) -> LatentCodec:
        return DiffusersCodec(self.path)


@dataclass(frozen=True, kw_only=True)
class TAE(CodecSettings):
    """A temporal autoencoder that `cinemesh tae train` trained: tiles of 32 frames, in constant memory."""

    path: Annotated[Path, "the directory that cinemesh tae train wrote"]
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: a GPU where the process sees one, else the CPU"] = "auto"
    dtype: Annotated[Precision, "of products and convolutions; latents are float32, of another fingerprint"] = "float32"
    images: Annotated[
        bool, "its image half: every frame by itself, of temporal stride 1, standardised as images are"
    ] = False
    kind: Literal["tae"] = "tae"

    def build(self) -> LatentCodec:
        return TAECodec.of(self.path, self.device, self.dtype, "codec.path", images=self.images)


KINDS: tuple[type[CodecSettings], ...] = (BlockDCT, ContextDCT, FrameDCT, Diffusers, TAE)
CODECS: dict[str, type[CodecSettings]] = {settings.kind: settings for settings in KINDS}
UNKNOWN_SHARE = 0.5  # of a caption's letters, above which an encoder is said not to know it


def codec_kind(name: object) -> type[CodecSettings]:
    """The settings that a kind of codec has. Raises CinemeshError for a kind that nobody knows."""
    if not isinstance(name, str) or name not in CODECS:
        raise CinemeshError(f"codec.kind is {quoted(name)}", remedy=did_you_mean(name, CODECS))
    return CODECS[name]


def codec_of(name: str) -> CodecSettings:
    """The codec of a kind without settings, of what `cinemesh codec fit` wrote, or of a directory.

    The directory is one of `cinemesh tae train`, or of diffusers.

    Raises CinemeshError for a name that is none of them.
    """
    path = Path(name)
    if name not in CODECS and path.exists():
        directory = TAE if is_autoencoder(path) else Diffusers
        return directory(path=path) if path.is_dir() else ContextDCT(decoder=path)
    if codec_kind(name) in (Diffusers, TAE):
        raise CinemeshError(f"--codec {name} says not which", remedy="name the directory of the autoencoder")
    return codec_kind(name)(kind=name)


@dataclass(frozen=True)
class CutCaptions:
    """Captions that an encoder of ``tokens`` cuts: ``count`` of ``captions``; ``longest`` is the worst one's name."""

    encoder: str
    tokens: int
    count: int
    captions: int
    longest: str
    length: int

    def __str__(self) -> str:
        return (
            f"text encoder {self.encoder}: {self.count} of {self.captions} captions ({self.count / self.captions:.0%}) "
            f"have more than its {self.tokens} tokens and are cut; the longest, {self.longest}, has {self.length}"
        )


@dataclass(frozen=True)
class UnknownCaptions:
    """Captions of which an encoder knows less than half: ``count`` of ``captions``; ``worst`` is one's name."""

    encoder: str
    count: int
    captions: int
    worst: str
    share: float  # of the worst one's letters

    def __str__(self) -> str:
        return (
            f"text encoder {self.encoder}: of {self.count} of {self.captions} captions "
            f"({self.count / self.captions:.0%}) it never learnt most letters, as of another script, and sees nothing "
            f"of them; of the worst, {self.worst}, {self.share:.0%}"
        )


@dataclass(frozen=True)
class Encoding:
    """The codec of a run, the settings that it was built from, and the text encoders in the recipe's order.

    ``low_resolution``: of a spatial upsampler, what it is shown of every window.
    """

    settings: CodecSettings
    codec: LatentCodec
    encoders: tuple[TextEncoder, ...]
    low_resolution: LowResolution | None = None

    @classmethod
    def of(
        cls,
        codec: CodecSettings,
        encoders: Sequence[EncoderSettings],
        low_resolution: LowResolutionSettings | None = None,
    ) -> Self:
        """Raises CinemeshError for a codec or an encoder that cannot be built, and for an upsampler of no frames."""
        built, small = codec.build(), None
        if low_resolution is not None and built.temporal_stride != 1:
            raise CinemeshError(
                f"data.low_resolution with codec {codec.kind}, whose latents are of {built.temporal_stride} frames: a "
                "spatial upsampler takes frame by frame",
                remedy="name a codec of single frames: kind frame-dct, an image autoencoder of diffusers, or a TAE "
                "that was trained with time: none",
            )
        if low_resolution is not None:
            trip = low_resolution.round_trip
            small = LowResolution(low_resolution, None if trip is None else codec_of(trip).build())
        return cls(codec, built, tuple(build_encoders(encoders)), small)

    def window(self, frames: Tensor, clip: str, first_frame: int) -> dict[str, Tensor]:
        """What a model is trained on of a window, by input name: its latent, and that of its small clip."""
        made = {LATENTS: self.codec.encode(frames)}
        if self.low_resolution is not None:
            shown = self.low_resolution.latent(self.codec, frames, clip, first_frame)
            made[self.low_resolution.condition(self.codec).input] = shown
        return made

    def cuts(self, captions: Mapping[str, str]) -> list[CutCaptions]:
        """Which encoders cut how many of the captions, given by name."""
        found: list[CutCaptions] = []
        for encoder in self.encoders:
            lengths = {name: encoder.length(caption) for name, caption in captions.items()}
            longest = max(lengths, key=lambda name: lengths[name])
            if count := sum(length > encoder.tokens for length in lengths.values()):
                said = CutCaptions(encoder.name, encoder.tokens, count, len(captions), longest, lengths[longest])
                found.append(said)
        return found

    def unknown(self, captions: Mapping[str, str]) -> list[UnknownCaptions]:
        """Which encoders know less than half of how many of the captions, given by name."""
        found: list[UnknownCaptions] = []
        for encoder in self.encoders:
            shares = {name: encoder.unknown_share(caption) for name, caption in captions.items()}
            worst = max(shares, key=lambda name: shares[name])
            if count := sum(share > UNKNOWN_SHARE for share in shares.values()):
                found.append(UnknownCaptions(encoder.name, count, len(captions), worst, shares[worst]))
        return found

    def place(self, device: str, comm: Communicator | None) -> None:
        """Bring the text encoders' weights to a device, once; see ``TextEncoder.place``."""
        for encoder in self.encoders:
            encoder.place(device, comm)

    def held_bytes(self, plan: Plan) -> int:
        """Of the text encoders' weights on one rank of a plan, shards and what they are gathered into."""
        held = [(encoder.layers, sharing_ranks(plan) if encoder.sharded else 1) for encoder in self.encoders]
        return sum(layers.held_bytes(ranks) for layers, ranks in held if layers is not None)

    def captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """By input name: embeddings of every encoder, float32 [L, B, W]; bool mask [B, sum of L], encoders in order.

        Collective, where weights of an encoder are in shards.
        """
        encoded = {encoder.name: encoder.encode_all(captions) for encoder in self.encoders}
        text = {text_input(name): embeddings for name, (embeddings, _) in encoded.items()}
        return {**text, MASK: torch.cat([mask for _, mask in encoded.values()], 1)}

    @property
    def without_text(self) -> Self:
        """Of a run that encodes captions in its loop: what its cache holds."""
        return replace(self, encoders=())
