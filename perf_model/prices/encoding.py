"""What it takes to make the latents of many clips, and to decode them: FLOPs, bytes, GPU hours (torch-free).

An autoencoder runs tile by tile (Movie Gen 3.1.1: 32 raw frames, decoded with 16 that overlap), each GPU by itself.
Every layer is priced as its matrix products, plus the passes over memory of what stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...model.tae.config import COLOURS, TAEConfig
from ...model.tae.tile_shapes import OVERLAP_FRAMES, TILE_FRAMES
from ...model.tae.work import LayerWork, decoder_work, encoder_work
from .compute import Compute

DTYPE, ITEM_BYTES = "bfloat16", 2  # of weights, activations and kept latents
# Accesses to every value that a layer writes, beside the product's own, by torch's eager ops: GroupNorm (read twice,
# written), SiLU (read, written), and half of an addition of two (read, read, written).
PASSES = 6.5
SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class EncodingPrice:
    """Of one clip, and of all; every time is predicted."""

    clips: int
    tiles: int  # of one clip
    flops: int  # of encoding one clip
    seconds: float  # of encoding one clip on one GPU
    gpu_hours: float  # of encoding all
    decode_flops: int
    decode_seconds: float
    latent_bytes: int  # of one clip's latent
    pixel_bytes: int  # of its frames, 8 bit
    all_latents_bytes: int
    weight_bytes: int  # of encoder and decoder
    largest_map_bytes: int  # of one tile: the largest that a layer writes; two or three live at once


def price_encoding(
    config: TAEConfig, frames: int, height: int, width: int, clips: int, compute: Compute
) -> EncodingPrice:
    """Raises CinemeshError for sizes that the autoencoder's stride does not divide."""
    t, h, w = config.latent(frames, height, width)
    size, overlap = TILE_FRAMES, OVERLAP_FRAMES if config.temporal_stride > 1 else 0
    whole, rest = divmod(frames, size)
    spans = [size] * whole + [min(size, frames) if rest else 0] * bool(rest)  # a short last one begins earlier
    shown = range(0, max(1, frames - overlap), size - overlap)
    encoder = {span: encoder_work(config, span, height, width) for span in set(spans)}
    lengths = [min(size, frames - start) for start in shown]
    decoder = {length: decoder_work(config, length, height, width) for length in set(lengths)}
    seconds = sum(_seconds(encoder[span], compute) for span in spans)
    latent_bytes = ITEM_BYTES * config.channels * t * h * w
    layers = [layer for work in (*encoder.values(), *decoder.values()) for layer in work]
    return EncodingPrice(
        clips=clips,
        tiles=len(spans),
        flops=sum(layer.flops for span in spans for layer in encoder[span]),
        seconds=seconds,
        gpu_hours=seconds * clips / SECONDS_AN_HOUR,
        decode_flops=sum(layer.flops for length in lengths for layer in decoder[length]),
        decode_seconds=sum(_seconds(decoder[length], compute) for length in lengths),
        latent_bytes=latent_bytes,
        pixel_bytes=COLOURS * frames * height * width,
        all_latents_bytes=latent_bytes * clips,
        weight_bytes=ITEM_BYTES * sum(layer.weights for of in (encoder, decoder) for layer in next(iter(of.values()))),
        largest_map_bytes=ITEM_BYTES * max(layer.outputs for layer in layers),
    )


def _seconds(layers: Sequence[LayerWork], compute: Compute) -> float:
    """Of one tile."""
    products = sum(compute.matmul_s(p.m, p.n, p.k, DTYPE, batch=p.batch) for layer in layers for p in layer.products)
    return products + compute.stream_s(PASSES * ITEM_BYTES * sum(layer.outputs for layer in layers))
