"""The plain-torch truth of every op, under the op's name in ``ops.py``.

Every kernel is called ``kernel(inputs, outputs, **attrs)`` with contiguous local tensors and writes its outputs.
``add`` says that the last input is output 0's own storage and the result is added to it. Statistics are computed in
their outputs' dtype (fp32 under bf16). Labels of shapes: ``ops.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .measures import DRAW_CHUNK, FLAT_CHUNK
from .ops import OPS
from .philox import Purpose, normal, uniform

Tensors = Sequence[Tensor]
Kernel = Callable[..., None]


# -- products -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _factor(signature: str) -> tuple[int, bool, int, bool, bool]:
    """How a product of two tensors is one matrix product: (split of a, transposed, split of b, transposed, swap)."""
    left, out = signature.split("->")
    a, b = left.split(",")
    summed = [label for label in a if label in b]
    free_a, free_b = [x for x in a if x not in b], [x for x in b if x not in a]
    assert not set(summed) & set(out), signature

    def order(labels: str, free: list[str]) -> tuple[int, bool]:
        if labels == "".join(free + summed):
            return len(free), False
        assert labels == "".join(summed + free), f"{signature}: {labels} is not one matrix"
        return len(summed), True

    swap = out == "".join(free_b + free_a)
    assert swap or out == "".join(free_a + free_b), signature
    (split_a, transposed_a), (split_b, transposed_b) = order(a, free_a), order(b, free_b)
    return split_a, transposed_a, split_b, transposed_b, swap


def _matrix(x: Tensor, split: int) -> Tensor:
    return x.view(math.prod(x.shape[:split]), -1)


def product_of(signature: str, left: Tensor, right: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, target), views with ``target = a @ b`` for ``out = einsum(signature, left, right)``."""
    split_a, transposed_a, split_b, transposed_b, swap = _factor(signature)
    a, b = _matrix(left, split_a), _matrix(right, split_b)
    a = a.t() if transposed_a else a  # [free_a, summed]
    b = b if transposed_b else b.t()  # [summed, free_b]
    if swap:
        a, b = b.t(), a.t()
    return a, b, out.view(a.shape[0], b.shape[1])


def matmul(inputs: Tensors, outputs: Tensors, *, signature: str, add: bool = False) -> None:
    """``out (+)= einsum(signature, a, b)`` as one matrix product."""
    a, b, target = product_of(signature, inputs[0], inputs[1], outputs[0])
    if a.dtype != target.dtype:
        a, b = a.to(target.dtype), b.to(target.dtype)  # fp32 out of bf16: the declared cast
    if add:
        target.addmm_(a, b)
    else:
        torch.mm(a, b, out=target)


# -- attention ------------------------------------------------------------------------------------------------------


def _scores(q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("tbhk,sbhk->bhts", q, kv[:, :, 0]) / math.sqrt(q.shape[-1])
    return scores if mask is None else scores.masked_fill(~mask[:, None, None, :], -math.inf)


def attention(inputs: Tensors, outputs: Tensors) -> None:
    """o = softmax(q k^T / sqrt(K)) v and its log-sum-exp; bidirectional. A key mask, if given, is True where valid."""
    q, kv, *mask = inputs
    stat = outputs[1].dtype
    scores = _scores(q.to(stat), kv.to(stat), mask[0] if mask else None)
    torch.logsumexp(scores, -1, out=outputs[1])
    outputs[0].copy_(torch.einsum("bhts,sbhk->tbhk", scores.softmax(-1), kv[:, :, 1].to(stat)))


def attention_backward(inputs: Tensors, outputs: Tensors) -> None:
    do, q, kv, o, lse, *mask = inputs
    stat = lse.dtype
    do, q, kv, o = (x.to(stat) for x in (do, q, kv, o))
    probability = torch.exp(_scores(q, kv, mask[0] if mask else None) - lse[..., None])
    dprobability = torch.einsum("tbhk,sbhk->bhts", do, kv[:, :, 1])
    delta = (do * o).sum(-1).permute(1, 2, 0)
    dscores = probability * (dprobability - delta[..., None]) / math.sqrt(q.shape[-1])
    outputs[0].copy_(torch.einsum("bhts,sbhk->tbhk", dscores, kv[:, :, 0]))
    outputs[1][:, :, 0].copy_(torch.einsum("bhts,tbhk->sbhk", dscores, q))
    outputs[1][:, :, 1].copy_(torch.einsum("bhts,tbhk->sbhk", probability, do))


cross_attention, cross_attention_backward = attention, attention_backward  # a key mask is one more input


def merge_attention(inputs: Tensors, outputs: Tensors, *, signature: str) -> None:
    """Attention over all keys from that over parts: o = sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i).

    A part without keys has lse_i = -inf and counts for nothing.
    """
    o, lse = outputs
    lse.copy_(inputs[1])
    for part_lse in inputs[3::2]:
        torch.logaddexp(lse, part_lse, out=lse)
    shift = lse.masked_fill(lse == -math.inf, 0.0)
    total = o if o.dtype == lse.dtype else torch.empty(o.shape, dtype=lse.dtype, device=o.device)
    total.zero_()
    for part, part_lse in zip(inputs[0::2], inputs[1::2], strict=True):
        rows = (part_lse == -math.inf, torch.exp(part_lse - shift))
        empty, weight = (row.permute(2, 0, 1)[..., None] for row in rows)
        total.addcmul_(part.masked_fill(empty, 0.0).to(lse.dtype), weight)
    if total is not o:
        o.copy_(total)


def sum_parts(inputs: Tensors, outputs: Tensors, *, signature: str) -> None:
    """The sum of all inputs; of bf16 in fp32."""
    (out,) = outputs
    total = out if out.dtype != torch.bfloat16 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    total.copy_(inputs[0])
    for part in inputs[1:]:
        total += part
    if total is not out:
        out.copy_(total)


# -- norms ----------------------------------------------------------------------------------------------------------


def modulate_norm(inputs: Tensors, outputs: Tensors, *, eps: float) -> None:
    """h = x / rms(x) * gain * (1 + scale) + shift."""
    x, gain, scale, shift = inputs
    h, rstd = outputs
    wide = x.to(rstd.dtype)
    torch.linalg.vector_norm(wide, dim=-1, out=rstd)
    rstd.pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
    slope = gain * (1 + scale)
    if h.dtype == rstd.dtype:
        torch.mul(wide, rstd[..., None], out=h)
        torch.addcmul(shift, h, slope, out=h)
    else:
        h.copy_(wide * rstd[..., None] * slope + shift)


def position_modulate_norm(inputs: Tensors, outputs: Tensors, *, eps: float) -> None:
    """x0 = x + position, then :func:`modulate_norm` of x0 as it is stored."""
    x, position, *vectors = inputs
    add_position((x, position), outputs[:1])
    modulate_norm((outputs[0], *vectors), outputs[1:], eps=eps)


def modulate_norm_backward(inputs: Tensors, outputs: Tensors, *, add: bool = False) -> None:
    """dx (+)=, dgain, dscale, dshift in one pass; sums in the dtype of dgain."""
    dy, x, rstd, gain, scale = inputs[:5]
    dx, dgain, dscale, dshift = outputs
    stat = dgain.dtype
    dy, gain, scale = dy.to(stat), gain.to(stat), scale.to(stat)
    torch.sum(dy, 0, out=dshift)
    normed = x * rstd[..., None]
    product = dy * normed
    by_sample = product.sum(0)
    torch.mul(by_sample, gain, out=dscale)
    torch.sum(by_sample.mul_(1 + scale), 0, out=dgain)
    slope = gain * (1 + scale)
    mean = product.mul_(slope).sum(-1, keepdim=True).div_(x.shape[-1])
    torch.mul(dy, slope, out=product)
    product.addcmul_(normed, mean, value=-1).mul_(rstd[..., None])
    if add:
        dx.add_(product)
    else:
        dx.copy_(product)


def _standardised(x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """(x - mean) * rstd over the last dim, in the dtype of both, which are written too."""
    wide = x.to(mean.dtype)
    torch.mean(wide, -1, out=mean)
    centered = wide - mean[..., None]
    torch.linalg.vector_norm(centered, dim=-1, out=rstd)
    rstd.pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
    return centered.mul_(rstd[..., None])


def _standardised_backward(slope: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x, of that of ``normed``, in whose place it is."""
    projection = (slope * normed).mean(-1, keepdim=True)
    return slope.sub_(slope.mean(-1, keepdim=True)).addcmul_(normed, projection, value=-1).mul_(rstd[..., None])


def modulate_layer_norm(inputs: Tensors, outputs: Tensors, *, eps: float) -> None:
    """h = (x - mean) / std * (1 + scale) + shift, as in DiT: no gain, no bias."""
    x, scale, shift = inputs
    h, mean, rstd = outputs
    h.copy_(_standardised(x, mean, rstd, eps).mul_(1 + scale.to(mean.dtype)).add_(shift))


def modulate_layer_norm_backward(inputs: Tensors, outputs: Tensors, *, add: bool = False) -> None:
    """dx (+)=, dscale, dshift; sums in the dtype of dscale."""
    dy, x, mean, rstd, scale = inputs[:5]
    dx, dscale, dshift = outputs
    stat = dscale.dtype
    dy = dy.to(stat)
    torch.sum(dy, 0, out=dshift)
    normed = (x.to(stat) - mean[..., None]).mul_(rstd[..., None])
    torch.sum(dy * normed, 0, out=dscale)
    slope = _standardised_backward(dy * (1 + scale.to(stat)), normed, rstd)
    dx.add_(slope) if add else dx.copy_(slope)


def layer_norm(inputs: Tensors, outputs: Tensors, *, eps: float) -> None:
    x, gain, bias = inputs
    y, mean, rstd = outputs
    y.copy_(_standardised(x, mean, rstd, eps).mul_(gain).add_(bias))


def layer_norm_backward(inputs: Tensors, outputs: Tensors) -> None:
    dy, x, mean, rstd, gain = inputs
    dx, dgain, dbias = outputs
    dy = dy.to(mean.dtype)
    normed = (x.to(mean.dtype) - mean[..., None]).mul_(rstd[..., None])
    torch.sum(dy, (0, 1), out=dbias)
    torch.sum(dy * normed, (0, 1), out=dgain)
    dx.copy_(_standardised_backward(dy * gain, normed, rstd))


# -- token-local ----------------------------------------------------------------------------------------------------


def add_position(inputs: Tensors, outputs: Tensors) -> None:
    torch.add(inputs[0], inputs[1][:, None, :], out=outputs[0])


def add(inputs: Tensors, outputs: Tensors, *, add: bool) -> None:
    outputs[0].add_(inputs[0])


def residual(inputs: Tensors, outputs: Tensors) -> None:
    torch.add(inputs[0], inputs[1], out=outputs[0])


def gated_residual(inputs: Tensors, outputs: Tensors) -> None:
    x, y, gate = inputs
    torch.addcmul(x, y, gate.expand_as(y), out=outputs[0])


def gated_residual_backward(inputs: Tensors, outputs: Tensors) -> None:
    dout, y, gate = inputs
    dy, dgate = outputs
    product = dout.to(dgate.dtype) * y
    torch.sum(product, 0, out=dgate)
    torch.mul(dout, gate, out=dy)


def swiglu(inputs: Tensors, outputs: Tensors) -> None:
    gate, up = inputs
    torch.ops.aten.silu.out(gate, out=outputs[0])
    outputs[0].mul_(up)


def swiglu_backward(inputs: Tensors, outputs: Tensors) -> None:
    """Sigma = sigmoid(gate): dup = dy * gate * sigma; dgate = dy * up * silu'(gate)."""
    dy, gate, up = inputs
    dgate, dup = outputs
    torch.mul(dy, up, out=dup)
    torch.ops.aten.silu_backward.grad_input(dup, gate, grad_input=dgate)
    torch.ops.aten.silu.out(gate, out=dup)
    dup.mul_(dy)


def activate_backward(inputs: Tensors, outputs: Tensors) -> None:
    torch.ops.aten.silu_backward.grad_input(inputs[0], inputs[1], grad_input=outputs[0])


def silu(inputs: Tensors, outputs: Tensors) -> None:
    torch.ops.aten.silu.out(inputs[0], out=outputs[0])


activate = silu


def silu_backward(inputs: Tensors, outputs: Tensors, *, add: bool = False) -> None:
    dy, x = inputs[:2]
    gradient = torch.ops.aten.silu_backward(dy, x.to(dy.dtype))
    outputs[0].add_(gradient) if add else outputs[0].copy_(gradient)


# -- embeddings and conditioning ------------------------------------------------------------------------------------


def _tiles(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] as a view [t, h, w, B, C, kt, kh, kw]."""
    b, c, t, h, w = latent.shape
    kt, kh, kw = patch
    return latent.view(b, c, t // kt, kt, h // kh, kh, w // kw, kw).permute(2, 4, 6, 0, 1, 3, 5, 7)


def token_coordinates(first: int, count: int, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, ...]:
    """(t, h, w) of ``count`` tokens from ``first`` on, in the order of the grid."""
    token = torch.arange(first, first + count, device=device)
    return token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]


def _grid(latent: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    return latent[1] // patch[0], latent[2] // patch[1], latent[3] // patch[2]


def patchify(
    inputs: Tensors,
    outputs: Tensors,
    *,
    patch: tuple[int, int, int],
    latent: tuple[int, ...],
    rank: int,
) -> None:
    """This rank's tokens of [B, C, T, H, W]; a token's values in (C, kt, kh, kw) order."""
    out = outputs[0]
    tiles = _tiles(inputs[0], patch)
    where = token_coordinates(rank * out.shape[0], out.shape[0], _grid(latent, patch), out.device)
    out.view(out.shape[0], *tiles.shape[3:]).copy_(tiles[where])


def unpatchify(inputs: Tensors, outputs: Tensors, *, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    tiles = _tiles(outputs[0], patch)
    tiles.copy_(inputs[0].view(tiles.shape))


def position(inputs: Tensors, outputs: Tensors, *, grid: tuple[int, int, int], rank: int) -> None:
    """phi_t + phi_h + phi_w of this rank's tokens."""
    out = outputs[0]
    where = token_coordinates(rank * out.shape[0], out.shape[0], grid, out.device)
    torch.index_select(inputs[0], 0, where[0], out=out)
    for table, index in zip(inputs[1:], where[1:], strict=True):
        out.add_(table[index])


def position_backward(inputs: Tensors, outputs: Tensors, *, grid: tuple[int, int, int], rank: int) -> None:
    gradient = inputs[0]
    where = token_coordinates(rank * gradient.shape[0], gradient.shape[0], grid, gradient.device)
    for table, index in zip(outputs, where, strict=True):
        table.zero_().index_add_(0, index, gradient)


def time_features(inputs: Tensors, outputs: Tensors) -> None:
    """[cos(1000 t f_i), sin(1000 t f_i)], f_i = 10000 ** (-i / half)."""
    t, out = inputs[0], outputs[0]
    half = out.shape[1] // 2
    frequency = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000.0) / half))
    angle = 1000.0 * t[:, None] * frequency
    out[:, :half].copy_(torch.cos(angle))
    out[:, half:].copy_(torch.sin(angle))


def add_table(inputs: Tensors, outputs: Tensors, *, signature: str) -> None:
    """Broadcast sum of two labelled tensors, permuted to the output's labels."""
    left, out_labels = signature.split("->")
    x, table = (_aligned(t, labels, out_labels) for t, labels in zip(inputs, left.split(","), strict=True))
    torch.add(x, table, out=outputs[0])


def _aligned(x: Tensor, labels: str, out_labels: str) -> Tensor:
    ordered = [label for label in out_labels if label in labels]
    view = x.permute([labels.index(label) for label in ordered])
    return view[tuple(slice(None) if label in labels else None for label in out_labels)]


def sum_to(inputs: Tensors, outputs: Tensors, *, signature: str, add: bool = False) -> None:
    """Sum over the labels that the output lacks and permute to its order."""
    labels, out_labels = signature.split("->")
    out = outputs[0]
    gone = [i for i, label in enumerate(labels) if label not in out_labels]
    rest = "".join(label for label in labels if label in out_labels)
    x = inputs[0]
    if gone:
        x = x.squeeze(gone) if all(x.shape[i] == 1 for i in gone) else x.sum(gone, dtype=out.dtype)
    x = x.permute([rest.index(label) for label in out_labels])
    out.add_(x) if add else out.copy_(x)


def drop_caption(inputs: Tensors, outputs: Tensors) -> None:
    torch.mul(inputs[0], inputs[1][None, :, None], out=outputs[0])


def drop_mask(inputs: Tensors, outputs: Tensors) -> None:
    torch.le(inputs[1][:, None], inputs[0], out=outputs[0])  # mask or not keep


# -- flow matching --------------------------------------------------------------------------------------------------

STEP = 0  # counters: [step, updates]
UPDATES = 1


def draw_time(inputs: Tensors, outputs: Tensors, *, seed: int) -> None:
    """t = sigmoid(n): logit-normal."""
    ids, places, counters = inputs
    outputs[0].copy_(torch.sigmoid(normal(seed, Purpose.TIME, counters[STEP], ids, torch.zeros_like(ids), places)))


def draw_keep_caption(inputs: Tensors, outputs: Tensors, *, seed: int, dropout: float) -> None:
    ids, places, counters = inputs
    outputs[0].copy_(uniform(seed, Purpose.CAPTION, counters[STEP], ids, torch.zeros_like(ids), places) >= dropout)


def draw_noise(
    inputs: Tensors,
    outputs: Tensors,
    *,
    seed: int,
    patch: tuple[int, int, int],
    latent: tuple[int, ...],
    rank: int,
    purpose: int = Purpose.NOISE,
) -> None:
    """Normals of this rank's tokens, by their C-order index in the whole (C, T, H, W) latent."""
    ids, places, counters = inputs
    out = outputs[0]
    tokens, samples, values = out.shape
    (_, t, h, w), (kt, kh, kw) = latent, patch
    grid = _grid(latent, patch)
    value = torch.arange(values, device=out.device)
    channel, at, ah, aw = (
        value // (kt * kh * kw),
        value // (kh * kw) % kt,
        value // kw % kh,
        value % kw,
    )
    inside = channel * (t * h * w) + at * (h * w) + ah * w + aw
    i, j, k = token_coordinates(rank * tokens, tokens, grid, out.device)
    corner = i * (kt * h * w) + j * (kh * w) + k * kw
    rows = max(1, DRAW_CHUNK // (samples * values))
    for start in range(0, tokens, rows):
        element = corner[start : start + rows, None, None] + inside
        out[start : start + rows].copy_(normal(seed, purpose, counters[STEP], ids[:, None], element, places[:, None]))


def interpolate(inputs: Tensors, outputs: Tensors, *, sigma_min: float) -> None:
    """x_t = t x1 + (1 - (1 - sigma_min) t) x0;  v = x1 - (1 - sigma_min) x0.  Movie Gen 3.1.2."""
    x1, x0, t = inputs
    x_t, velocity = outputs
    t = t[:, None]
    x_t.copy_((t * x1).add_((1 - (1 - sigma_min) * t) * x0))
    torch.sub(x1, x0, alpha=1 - sigma_min, out=velocity)


def draw_step(inputs: Tensors, outputs: Tensors, *, seed: int, steps: int) -> None:
    """t = 1 - n / steps, n uniform in 1 ... steps: t = 0 is pure noise."""
    ids, places, counters = inputs
    drawn = uniform(seed, Purpose.TIME, counters[STEP], ids, torch.zeros_like(ids), places)
    outputs[0].copy_((steps - 1 - (drawn * steps).long()).to(drawn.dtype).div_(steps))


def diffuse(inputs: Tensors, outputs: Tensors, *, steps: int, first_beta: float, last_beta: float) -> None:
    """x_t = alpha x1 + sigma x0;  v = alpha x0 - sigma x1, at step n = (1 - t) steps (Salimans and Ho 2022).

    With b_i between the roots of both betas and a_n = prod_1^n (1 - b_i^2) the levels are the roots of a_n, shifted
    and stretched until the last is 0 and the first stays: no signal is left at t = 0 (Lin et al. 2023, algorithm 1).
    """
    x1, x0, t = inputs
    x_t, v = outputs
    first, last, wide = first_beta**0.5, last_beta**0.5, torch.float64
    roots = torch.arange(steps, dtype=wide, device=t.device).mul_((last - first) / (steps - 1)).add_(first)
    kept, reach = 1 - roots * roots, 1
    while reach < steps:  # products of all before, in one order on every device, which cumprod has not
        kept[reach:].copy_(kept[reach:] * kept[:-reach])
        reach *= 2
    signal = kept.sqrt_()
    signal = (signal - signal[-1:]).mul_(signal[:1] / (signal[:1] - signal[-1:]))
    step = ((1 - t.to(wide)) * steps + 0.5).long()  # the nearest
    alpha = signal.index_select(0, step - 1)
    sigma = (1 - alpha * alpha).sqrt_().to(t.dtype)[:, None]
    alpha = alpha.to(t.dtype)[:, None]
    x_t.copy_((alpha * x1).add_(sigma * x0))
    torch.mul(alpha, x0, out=v).sub_(sigma * x1)


def weigh(inputs: Tensors, outputs: Tensors) -> None:
    halves, shares = inputs
    torch.mul(halves[:, 0], shares[:1], out=outputs[0])
    for half in range(1, halves.shape[1]):
        outputs[0].add_(halves[:, half] * shares[half : half + 1])


def velocity_loss(inputs: Tensors, outputs: Tensors, *, elements: int, micro_batches: int, add: bool = False) -> None:
    """Sum of squares over ``elements`` (of the global buffer) and micro-batches."""
    error = inputs[0].to(outputs[0].dtype) - inputs[1]
    loss = error.mul_(error).sum().div_(elements * micro_batches)
    outputs[0].add_(loss) if add else outputs[0].copy_(loss)


def velocity_loss_backward(inputs: Tensors, outputs: Tensors, *, elements: int, micro_batches: int) -> None:
    error = inputs[0].to(inputs[1].dtype) - inputs[1]
    outputs[0].copy_(error.mul_(2.0 / (elements * micro_batches)))


# -- flat units and the optimizer -----------------------------------------------------------------------------------


def cast(inputs: Tensors, outputs: Tensors, *, signature: str) -> None:
    outputs[0].copy_(inputs[0])


def scale(inputs: Tensors, outputs: Tensors, *, signature: str, factor: float) -> None:
    torch.mul(inputs[0], factor, out=outputs[0])


def copy(inputs: Tensors, outputs: Tensors, *, signature: str) -> None:
    outputs[0].copy_(inputs[0].view(outputs[0].shape))


def accumulate(inputs: Tensors, outputs: Tensors, *, signature: str, add: bool) -> None:
    outputs[0].add_(inputs[0])


def zero_gaps(inputs: Tensors, outputs: Tensors, *, signature: str, gaps: tuple[tuple[int, int], ...]) -> None:
    flat = outputs[0].view(-1)
    for start, stop in gaps:
        flat[start:stop].zero_()


def mark(inputs: Tensors, outputs: Tensors) -> None:
    """The output lies in host memory; of a GPU's step it is pinned, and the copy is captured."""
    outputs[0].copy_(inputs[0], non_blocking=True)


def sum_of_squares(inputs: Tensors, outputs: Tensors) -> None:
    """In chunks, in order: the same sum on every run."""
    total = outputs[0].zero_()
    for chunk in inputs[0].view(-1).split(FLAT_CHUNK):
        total.add_(torch.dot(chunk, chunk))


def clip_factor(inputs: Tensors, outputs: Tensors, *, clip_norm: float) -> None:
    """Norm; min(1, clip_norm / (norm + 1e-6)); whether it is finite; step + 1 always, updates + 1 only when finite."""
    squares = inputs[0]
    norm, factor, finite, advanced = outputs
    torch.sqrt(squares, out=norm)
    finite.copy_(torch.isfinite(norm))
    factor.copy_((clip_norm / (norm + 1e-6)).clamp_(max=1.0))
    advanced[STEP].add_(1)
    advanced[UPDATES].add_(finite)


def ema_rate(updates: Tensor, decay: float) -> Tensor:
    """1 - min(decay, (1 + n) / (10 + n)) of update ``n`` = ``updates``, a floating scalar on the device."""
    return (9 / (10 + updates)).clamp_(min=1 - decay)


def decay_boundary(last_offset: int, last_elements: int, last_decayed: int, rank: int) -> int:
    """Elements of a rank's flat shard before this one decay.

    All units but the last hold only weights that do; the last, of which a rank holds ``last_elements`` from
    ``last_offset`` on, holds ``last_decayed`` of them first.
    """
    return last_offset + min(max(last_decayed - rank * last_elements, 0), last_elements)


def adamw(
    inputs: Tensors,
    outputs: Tensors,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    **decay: int,
) -> None:
    """AdamW (Loshchilov and Hutter 2019) and EMA on the flat shard; nothing changes when the norm is not finite.

    The EMA's decay warms up: min(ema_decay, (1 + n) / (10 + n)) at update n, the rule of TensorFlow's
    ``tf.train.ExponentialMovingAverage(num_updates=...)``, so that an early average is not its random start.
    ``decay``: which elements do, see :func:`decay_boundary`.
    """
    master, exp_avg, exp_avg_sq, ema, gradient, clip, finite, counters, lr = inputs
    updates = counters[UPDATES].clamp(min=1).to(master.dtype)  # 0 only when the first update is skipped
    taken = finite.to(master.dtype)  # every rate is 0 in a step that is skipped
    rate1, rate2 = (taken * (1 - beta) for beta in betas)
    rate_ema = ema_rate(updates, ema_decay).mul_(taken)
    step_size = taken * lr / (1 - betas[0] ** updates)
    root_correction = torch.sqrt(1 - betas[1] ** updates)
    flat = [x.view(-1) for x in (master, exp_avg, exp_avg_sq, ema, gradient)]
    edges = [0, decay_boundary(**decay), flat[0].numel()]
    for rate, begin, end in zip((weight_decay, 0.0), edges[:-1], edges[1:], strict=True):
        kept = 1 - taken * lr * rate
        for start in range(begin, end, FLAT_CHUNK):
            w, m, v, average, g = (x[start : min(start + FLAT_CHUNK, end)] for x in flat)
            g = torch.where(finite, g * clip, 0.0)
            m.lerp_(g, rate1)
            v.lerp_(g.mul_(g), rate2)
            denominator = torch.sqrt(v, out=g).div_(root_correction).add_(eps)
            w.mul_(kept).sub_(torch.div(m, denominator, out=g).mul_(step_size))
            average.lerp_(w, rate_ema)
            del g, denominator  # else the last chunk's temporary lives while the next one's two are made


REFERENCE: dict[str, Kernel] = {op: globals()[op] for op in OPS}
