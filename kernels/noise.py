"""Philox 4x32-10 in Triton, and the normals that training noise is made of: the integers of ``philox.py``, bit for bit.

    key = (seed low, seed high)   counter = (element // 4, sample id, step, purpose + 256 * place)   word = element % 4
    u = (word + 1/2) / 2^32          n = sqrt(-2 log u_even) * (cos, sin)(2 pi u_odd)        (Box-Muller)

Shapes   out [T, B, P], this rank's patches; ids [B], places [B] and counters [2] int64, on the device. ``element`` is
         the C-order index in the whole (C, T, H, W) latent, so any split of the tokens draws the same numbers.
Bytes    least: every value written once.
Tiling   elements are alone: a program draws 16 tokens of one sample, and each thread stores 16 bytes at once. Every
         element runs the rounds itself, though four share a counter: 4.7 million elements a sample, some 200
         instructions each, are 50 us on an H100 and once a micro-batch.
         From words to normals the arithmetic is fp64: an fp32 logarithm next to 1 keeps no digit of a small n. The
         angle needs no reduction by pi: the top bits of its word are the octant. Sine and cosine are then Taylor sums
         of an angle below pi / 4, whose first term left out is below 2^-40 of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .philox import ROUNDS as PHILOX_ROUNDS
from .philox import Purpose
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, Launch, cover, power_of_two

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 16
STEP = tl.constexpr(0)  # counters: [step, updates]
ROUNDS = tl.constexpr(PHILOX_ROUNDS)
MULTIPLIER0 = tl.constexpr(0xD2511F53)
MULTIPLIER1 = tl.constexpr(0xCD9E8D57)
WEYL0 = tl.constexpr(0x9E3779B9)
WEYL1 = tl.constexpr(0xBB67AE85)
UNIT = tl.constexpr(2.0**-32)
OCTANT = tl.constexpr(math.pi / 4)
TERMS = tl.constexpr(7)  # of the Taylor sums, highest power first: up to x^13 / 13! and x^12 / 12!
SINE = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in reversed(range(7))))
COSINE = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k) for k in reversed(range(7))))


@triton.jit
def philox(
    block: tl.tensor,
    sample: tl.tensor,
    step: tl.tensor,
    place: tl.tensor,
    PURPOSE: tl.constexpr,
    KEY0: tl.constexpr,
    KEY1: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four uint32 words for every counter; ``block`` int64 tensor, ``sample``, ``step``, ``place`` int64 scalars."""
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + ((place << 8) | PURPOSE).to(tl.uint32)
    k0 = tl.full((), KEY0, tl.uint32)
    k1 = tl.full((), KEY1, tl.uint32)
    multiplier0 = tl.full(c0.shape, MULTIPLIER0, tl.uint32)
    multiplier1 = tl.full(c0.shape, MULTIPLIER1, tl.uint32)
    weyl0 = tl.full((), WEYL0, tl.uint32)
    weyl1 = tl.full((), WEYL1, tl.uint32)
    for _ in tl.static_range(ROUNDS):  # pyright: ignore[reportGeneralTypeIssues]
        high0 = tl.umulhi(multiplier0, c0)
        low0 = multiplier0 * c0
        high1 = tl.umulhi(multiplier1, c2)
        low1 = multiplier1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + weyl0
        k1 = k1 + weyl1
    return c0, c1, c2, c3


@triton.jit
def _series(square: tl.tensor, COEFFICIENTS: tl.constexpr) -> tl.tensor:
    """Horner's rule in fp64; ``tl.full`` keeps the coefficients from being rounded to fp32."""
    total = tl.zeros_like(square)
    for i in tl.static_range(TERMS):  # pyright: ignore[reportGeneralTypeIssues]
        total = total * square + tl.full((), COEFFICIENTS[i], tl.float64)
    return total


@triton.jit
def box_muller(word_radius: tl.tensor, word_angle: tl.tensor, second: tl.tensor) -> tl.tensor:
    """fp64 normals: the cosine's where not ``second``, else the sine's."""
    u = (word_radius.to(tl.float64) + 0.5) * UNIT
    radius = tl.sqrt(-2.0 * tl.log(u))
    octant = (word_angle >> 29).to(tl.int32)
    rest = ((word_angle & 0x1FFFFFFF).to(tl.float64) + 0.5) * tl.full((), 2.0**-29, tl.float64)  # in (0, 1)
    # In an odd octant the angle is measured back from the next axis, so that it never exceeds pi / 4.
    rest = tl.where((octant & 1) != 0, 1.0 - rest, rest)
    angle = rest * tl.full((), OCTANT, tl.float64)
    square = angle * angle
    sine = _series(square, SINE) * angle
    cosine = _series(square, COSINE)
    # Octants 1, 2, 5, 6 lie nearer to the other axis. Sine is negative in the lower half, cosine in the left one.
    swapped = ((octant + 1) & 2) != 0
    take_sine = second != swapped
    value = tl.where(take_sine, sine, cosine)
    half = tl.where(second, octant, octant + 2) & 4
    return radius * tl.where(half != 0, -value, value)


@triton.jit
def words_kernel(
    element: tl.tensor,
    out: tl.tensor,
    sample: tl.tensor,
    step: tl.tensor,
    place: tl.tensor,
    count: int,
    PURPOSE: tl.constexpr,
    KEY0: tl.constexpr,
    KEY1: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The word of every int64 ``element``, as int64: what the tests compare with the reference's."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    index = tl.load(element + at, mask=mask, other=0)
    w0, w1, w2, w3 = philox(index >> 2, tl.load(sample), tl.load(step), tl.load(place), PURPOSE, KEY0, KEY1)
    lane = index & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    tl.store(out + at, word.to(tl.int64), mask=mask)


@triton.jit
def noise_kernel(
    ids: tl.tensor,
    places: tl.tensor,
    counters: tl.tensor,
    out: tl.tensor,
    first: int,
    count: int,
    batch: int,
    PURPOSE: tl.constexpr,
    KEY0: tl.constexpr,
    KEY1: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """``TOKENS`` tokens of one sample, of the rank's tokens ``first`` to ``first + count``."""
    VALUES: tl.constexpr = C * KT * KH * KW
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = (first + row).to(tl.int64)
    i = token // ((H // KH) * (W // KW))
    j = token // (W // KW) % (H // KH)
    k = token % (W // KW)
    corner = i * (KT * H * W) + j * (KH * W) + k * KW
    value = tl.arange(0, BLOCK)
    c = value // (KT * KH * KW)
    a = value // (KH * KW) % KT
    r = value // KW % KH
    inside = c * (T * H * W) + a * (H * W) + r * W + value % KW
    element = corner[:, None] + inside[None, :]
    step, place = tl.load(counters + STEP), tl.load(places + sample)
    w0, w1, w2, w3 = philox(element >> 2, tl.load(ids + sample), step, place, PURPOSE, KEY0, KEY1)
    late = (element & 2) != 0
    drawn = box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1), (element & 1) != 0)
    at = (row.to(tl.int64) * batch + sample)[:, None] * VALUES + value[None, :]
    mask = (row < count)[:, None] & (value < VALUES)[None, :]
    tl.store(out + at, drawn.to(tl.float32), mask=mask)


# -- launchers --------------------------------------------------------------------------------------------------------


def _key(seed: int) -> dict[str, int]:
    return {"KEY0": seed & 0xFFFFFFFF, "KEY1": (seed >> 32) & 0xFFFFFFFF}


def _launch(
    tokens: int, batch: int, latent: tuple[int, ...], patch: tuple[int, int, int], seed: int, purpose: int
) -> Launch:
    (c, t, h, w), (kt, kh, kw) = latent, patch
    extents = {"C": c, "T": t, "H": h, "W": w, "KT": kt, "KH": kh, "KW": kw}
    tile = {"BLOCK": power_of_two(c * kt * kh * kw), "TOKENS": TOKENS}
    draw = {"PURPOSE": int(purpose), **_key(seed)}
    return Launch((cover(tokens, TOKENS), batch), {**draw, **extents, **tile})


def draw_noise(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    seed: int,
    patch: tuple[int, int, int],
    latent: tuple[int, ...],
    rank: int,
    purpose: int = Purpose.NOISE,
) -> None:
    """ids, places, counters -> normals of this rank's patches; CUDA or interpreted.

    Raises CinemeshError for a bad tensor.
    """
    ids, places, counters = inputs
    (out,) = outputs
    integers = {"ids": (ids, "b"), "places": (places, "b"), "counters": (counters, "n")}
    check(
        "draw_noise",
        {name: (*given, (torch.int64,)) for name, given in integers.items()} | {"out": (out, "tbp", DTYPES)},
        unaligned=tuple(integers),
    )
    tokens, batch = out.shape[:2]
    launch = _launch(tokens, batch, latent, patch, seed, purpose)
    launch.run(noise_kernel, ids, places, counters, out, rank * tokens, tokens, batch)


def words(seed: int, purpose: int, step: Tensor, sample: Tensor, element: Tensor, place: Tensor) -> Tensor:
    """The word of every int64 ``element`` (flat), as int64; ``step``, ``sample`` and ``place`` are int64 scalars."""
    out = torch.empty_like(element)
    launch = Launch((cover(element.numel(), 1024),), {"PURPOSE": int(purpose), "BLOCK": 1024, **_key(seed)})
    launch.run(words_kernel, element, out, sample, step, place, element.numel())
    return out


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """The noise of a rank's tokens."""
    t, b, latent, patch = sizes.local_tokens, sizes.batch, sizes.latent, sizes.patch
    p = latent[0] * patch[0] * patch[1] * patch[2]
    return [
        _launch(t, b, latent, patch, 0, Purpose.NOISE).spec(
            "noise.draw",
            noise_kernel,
            {"ids": ("i64", (b,)), "places": ("i64", (b,)), "counters": ("i64", (2,)), "out": ("fp32", (t, b, p))},
            {"first": ("i32", 0), "count": ("i32", t), "batch": ("i32", b)},
            {"T": t, "B": b, "P": p},
            ITEM_BYTES["fp32"] * t * b * p + 16 * b + 8,
        )
    ]
