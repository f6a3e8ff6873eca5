"""Every op's plain-torch truth against the formula in its comment, differentiated by autograd, in float64.

The step is only as right as these: parity compares whole models on friendly shapes, this compares one op at a time on
shapes that no kernel likes. Outputs are poisoned first, so that an element that was not written shows; and what an
op allocates besides its outputs stays within what ``parallel/ir/ops.py`` declares for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinemesh.kernels.ops import FLAT_CHUNK, OPS, signature_of
from cinemesh.kernels.reference import REFERENCE, Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER, run_rank
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import flow
from cinemesh.model import reference as model
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.witness import Witness

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.bool: "bool",
}
EPS = 1e-5
CHOSEN = kernels_for("cpu")


@dataclass
class Example:
    """The ``wanted`` outputs for ``inputs``.

    ``add``: output 0 is added onto what is there.
    """

    inputs: list[Tensor]
    wanted: list[Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)
    add: bool = False


def declared_workspace(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: dict[str, Any]) -> int:
    signature = signature_of(kind, attrs)
    sizes: dict[str, int] = {}
    tensors = (*inputs[: len(signature.inputs)], *outputs)
    for labels, tensor in zip((*signature.inputs, *signature.outputs), tensors, strict=True):
        sizes.update(zip(labels, tensor.shape, strict=True))
    return OPS[kind].workspace(
        [tuple(x.shape) for x in inputs],
        [DTYPE_NAMES[x.dtype] for x in inputs],
        [tuple(x.shape) for x in outputs],
        [DTYPE_NAMES[x.dtype] for x in outputs],
        sizes,
    )


def allocated(kernel: Kernel, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: dict[str, Any]) -> int:
    """Run, and return the most bytes that were alive besides inputs and outputs."""
    witness = Witness([*inputs, *outputs])
    before = witness.live_bytes()
    with witness:
        kernel(inputs, outputs, **attrs)
    return witness.peak_bytes - before


def poisoned(like: Tensor) -> Tensor:
    """Finite poison for integers and booleans, NaN for the rest."""
    if like.dtype.is_floating_point:
        return torch.full_like(like, torch.nan)
    return torch.full_like(like, 77) if like.dtype == torch.int64 else torch.ones_like(like)


def check(kind: str, example: Example, kernel: Kernel) -> None:
    outputs = [poisoned(x).contiguous() for x in example.wanted]
    inputs = [x.contiguous() for x in example.inputs]
    wanted, attrs = list(example.wanted), dict(example.attrs)
    for output, source in OPS[kind].in_place.items():
        outputs[output] = inputs[source] = inputs[source].clone()
    if example.add:
        so_far = torch.randn_like(wanted[0])
        outputs[0] = so_far.clone()
        wanted[0] = wanted[0] + so_far
        inputs.append(outputs[0])
        attrs["add"] = True
    only_read = {i: x.clone() for i, x in enumerate(inputs) if not any(x is y for y in outputs)}
    work = allocated(kernel, inputs, outputs, attrs)
    if kernel is CHOSEN[kind]:  # the reference's attention, which writes its scores down, is for comparison alone
        declared = declared_workspace(kind, inputs, outputs, attrs)
        assert work <= declared, f"{work} B of workspace, {declared} B declared"
    for i, before in only_read.items():
        torch.testing.assert_close(inputs[i], before, rtol=0, atol=0, equal_nan=True, msg=f"input {i} was changed")
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        if want.dtype.is_floating_point:
            scale = max(want.abs().max().item(), 0.1)  # some gradients are zero, with one key for example
            # Rounding is 1e-16; a norm over one or two numbers divides by as little as sqrt(eps).
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * scale, msg=lambda m, i=i: f"output {i}: {m}")
        else:
            assert torch.equal(got, want), f"output {i}"


# -- examples ---------------------------------------------------------------------------------------------------------

UGLY = [(1, 1, 1), (5, 1, 129), (123, 2, 5), (129, 3, 123)]  # tokens, samples, width


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gradients(formula: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """What autograd says of the formula."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(formula(*leaves), leaves, dy))


# Every signature that the step's products have, and the einsum that they mean.
MATMULS = (
    *("bw,wd->bd", "bi,io->bo", "lbw,wd->lbd", "tbp,pd->tbd", "tbi,ip->tbp", "ori,bi->orb"),
    *("tbi,ihk->tbhk", "tbi,ichk->tbchk", "tbhk,hko->tbo", "lbi,ichk->lbchk", "tbi,if->tbf", "tbf,fo->tbo"),
    *("tbo,hko->tbhk", "tbhk,tbo->hko", "tbf,if->tbi", "tbi,tbf->if", "orb,bi->ori", "orb,ori->bi"),
)


def matmul(t: int, b: int, d: int) -> Iterator[Example]:
    extents = {"t": t, "l": t, "b": b, "d": d, "i": d, "o": 7, "f": 11, "h": 3, "k": 4, "c": 2, "r": 6, "p": 8, "w": 9}
    for signature in MATMULS:
        left, _ = signature.split("->")
        factors = [rand(*(extents[label] for label in labels)) for labels in left.split(",")]
        for add in (False, True):
            yield Example(factors, [torch.einsum(signature, *factors)], {"signature": signature}, add)


def plain_attention(q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
    return model.attention(q, kv[:, :, 0], kv[:, :, 1], mask)


def attention_inputs(t: int, b: int, d: int, masked: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """q, kv, mask and log-sum-exp; d keys, of which one sample sees a single one."""
    q, kv = rand(t, b, 3, 8), rand(d, b, 2, 3, 8)
    scores = torch.einsum("tbhk,sbhk->bhts", q, kv[:, :, 0]) / math.sqrt(8)
    mask = None
    if masked:
        mask = torch.rand(b, d) > 0.5
        mask[:, d // 2] = True
        mask[0] = False
        mask[0, -1] = True
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return q, kv, mask, scores.logsumexp(-1)


def attention(t: int, b: int, d: int, *, masked: bool = False) -> Iterator[Example]:
    q, kv, mask, lse = attention_inputs(t, b, d, masked)
    yield Example([q, kv] + ([] if mask is None else [mask]), [plain_attention(q, kv, mask), lse])


def attention_backward(t: int, b: int, d: int, *, masked: bool = False) -> Iterator[Example]:
    q, kv, mask, lse = attention_inputs(t, b, d, masked)
    do, o = rand(t, b, 3, 8), plain_attention(q, kv, mask)
    wanted = gradients(lambda q, kv: plain_attention(q, kv, mask), do, q, kv)
    yield Example([do, q, kv, o, lse] + ([] if mask is None else [mask]), wanted)


def cross_attention(t: int, b: int, d: int) -> Iterator[Example]:
    return attention(t, b, d, masked=True)


def cross_attention_backward(t: int, b: int, d: int) -> Iterator[Example]:
    return attention_backward(t, b, d, masked=True)


def merge_attention(t: int, b: int, d: int) -> Iterator[Example]:
    """Against attention over all keys at once. With more parts than keys, some have none, and NaN for an o."""
    q, kv, _, lse = attention_inputs(t, b, d, masked=False)
    for count in (1, 2, 5):
        parts: list[Tensor] = []
        for keys in kv.tensor_split(count):
            scores = torch.einsum("tbhk,sbhk->bhts", q, keys[:, :, 0]) / math.sqrt(8)
            parts += [plain_attention(q, keys, None) if len(keys) else q * math.nan, scores.logsumexp(-1)]
        signature = ",".join(["tbhk,bht"] * count) + "->tbhk,bht"
        yield Example(parts, [plain_attention(q, kv, None), lse], {"signature": signature})


def sum_parts(t: int, b: int, d: int) -> Iterator[Example]:
    for count in (1, 2, 5):
        parts = rand(count, t, b, 3, d)
        yield Example(list(parts), [parts.sum(0)], {"signature": ",".join(["tbhk"] * count) + "->tbhk"})


def modulated(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return model.rms_norm(x, gain, EPS) * (1 + scale) + shift


def modulate_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, gain, scale, shift = rand(t, b, d), rand(d), rand(b, d), rand(b, d)
    rstd = (x.pow(2).mean(-1) + EPS).rsqrt()
    yield Example([x, gain, scale, shift], [modulated(x, gain, scale, shift), rstd], {"eps": EPS})


def position_modulate_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, position, gain, scale, shift = rand(t, b, d), rand(t, d), rand(d), rand(b, d), rand(b, d)
    x0 = x + position[:, None]
    rstd = (x0.pow(2).mean(-1) + EPS).rsqrt()
    yield Example([x, position, gain, scale, shift], [x0, modulated(x0, gain, scale, shift), rstd], {"eps": EPS})


def modulate_norm_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x, gain, scale, shift = rand(t, b, d), rand(t, b, d), rand(d), rand(b, d), rand(b, d)
    rstd = (x.pow(2).mean(-1) + EPS).rsqrt()
    wanted = gradients(modulated, dy, x, gain, scale, shift)
    for add in (False, True):
        yield Example([dy, x, rstd, gain, scale], wanted, add=add)


def layer_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, gain, bias = rand(t, b, d), rand(d), rand(d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    yield Example([x, gain, bias], [F.layer_norm(x, (d,), gain, bias, EPS), x.mean(-1), rstd], {"eps": EPS})


def layer_norm_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x, gain, bias = rand(t, b, d), rand(t, b, d), rand(d), rand(d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    wanted = gradients(lambda x, gain, bias: F.layer_norm(x, (d,), gain, bias, EPS), dy, x, gain, bias)
    yield Example([dy, x, x.mean(-1), rstd, gain], wanted)


def add_position(t: int, b: int, d: int) -> Iterator[Example]:
    x, position = rand(t, b, d), rand(t, d)
    yield Example([x, position], [x + position[:, None]])


def add(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example([x], [x.clone()], add=True)


def residual(t: int, b: int, d: int) -> Iterator[Example]:
    x, y = rand(t, b, d), rand(t, b, d)
    yield Example([x, y], [x + y])


def gated_residual(t: int, b: int, d: int) -> Iterator[Example]:
    x, y, gate = rand(t, b, d), rand(t, b, d), rand(b, d)
    yield Example([x, y, gate], [x + gate * y])


def gated_residual_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dout, y, gate = rand(t, b, d), rand(t, b, d), rand(b, d)
    yield Example([dout, y, gate], gradients(lambda y, gate: gate * y, dout, y, gate))


def swiglu(t: int, b: int, d: int) -> Iterator[Example]:
    gate, up = rand(t, b, d), rand(t, b, d)
    yield Example([gate, up], [F.silu(gate) * up])


def swiglu_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, gate, up = rand(t, b, d), rand(t, b, d), rand(t, b, d)
    yield Example([dy, gate, up], gradients(lambda gate, up: F.silu(gate) * up, dy, gate, up))


def silu(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(b, d)
    yield Example([x], [F.silu(x)])


def silu_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x = rand(b, d), rand(b, d)
    for add in (False, True):
        yield Example([dy, x], gradients(F.silu, dy, x), add=add)


PATCH = (1, 2, 2)


def patchify(t: int, b: int, d: int) -> Iterator[Example]:
    """Every rank's tokens, for ranks that split the grid's rows in the middle."""
    latent = rand(b, 4, 3, 4, 6)
    tokens = model.patchify(latent, PATCH)
    for ranks in (1, 2, 9):
        for rank, part in enumerate(tokens.chunk(ranks)):
            yield Example([latent], [part], {"patch": PATCH, "latent": tuple(latent.shape[1:]), "rank": rank})


def unpatchify(t: int, b: int, d: int) -> Iterator[Example]:
    latent = rand(b, 4, 3, 4, 6)
    yield Example([model.patchify(latent, PATCH)], [latent], {"patch": PATCH, "grid": (3, 2, 3)})


GRID = (3, 2, 5)


def positions(tables: Sequence[Tensor]) -> Tensor:
    gt, gh, gw = GRID
    table_t, table_h, table_w = tables
    return (table_t[:gt, None, None] + table_h[None, :gh, None] + table_w[None, None, :gw]).reshape(
        -1, table_t.shape[1]
    )


def position(t: int, b: int, d: int) -> Iterator[Example]:
    tables = [rand(4, d), rand(3, d), rand(5, d)]  # longer than the grid, in part
    for ranks in (1, 3, 5):
        for rank, part in enumerate(positions(tables).chunk(ranks)):
            yield Example(tables, [part], {"grid": GRID, "rank": rank})


def position_backward(t: int, b: int, d: int) -> Iterator[Example]:
    """A rank's tables get its own tokens' gradients, zero elsewhere; the ranks' sum is the whole."""
    tables = [rand(4, d), rand(3, d), rand(5, d)]
    whole = rand(30, d)
    for ranks in (1, 3, 5):
        for rank, part in enumerate(whole.chunk(ranks)):
            alone = torch.zeros_like(whole)
            alone.chunk(ranks)[rank].copy_(part)
            wanted = gradients(lambda *tables: positions(tables), alone, *tables)
            yield Example([part], wanted, {"grid": GRID, "rank": rank})


def time_features(t: int, b: int, d: int) -> Iterator[Example]:
    time = torch.rand(b, dtype=torch.float64)
    yield Example([time], [model.time_features(time)])


def add_table(t: int, b: int, d: int) -> Iterator[Example]:
    shared, table = rand(d, 6, b), rand(6, d)
    yield Example([shared, table], [shared.permute(1, 2, 0) + table[:, None]], {"signature": "drb,rd->rbd"})
    time, table = rand(b, d), rand(2, d)
    yield Example([time, table], [time[None] + table[:, None]], {"signature": "bd,rd->rbd"})


def sum_to(t: int, b: int, d: int) -> Iterator[Example]:
    stacked, tokens = rand(6, b, d), rand(t, b, d)
    for add in (False, True):
        yield Example([stacked], [stacked.sum(1)], {"signature": "rbd->rd"}, add)
        yield Example([stacked], [stacked.sum(0)], {"signature": "rbd->bd"}, add)
        yield Example([stacked], [stacked.permute(2, 0, 1)], {"signature": "rbd->drb"}, add)
        yield Example([tokens], [tokens.sum(1)], {"signature": "tbd->td"}, add)


def drop_caption(t: int, b: int, d: int) -> Iterator[Example]:
    text, keep = rand(t, b, d), torch.rand(b) > 0.5
    yield Example([text, keep], [torch.where(keep[None, :, None], text, 0.0)])


def drop_mask(t: int, b: int, d: int) -> Iterator[Example]:
    mask, keep = torch.rand(b, d) > 0.5, torch.rand(b) > 0.5
    yield Example([mask, keep], [mask | ~keep[:, None]])


SEED = (7 << 32) + 3


def drawn_from(b: int) -> tuple[Tensor, Tensor]:
    """Sample ids, and counters (step, updates)."""
    return torch.randint(1 << 40, (b,)), torch.tensor([5, 3])


def draw_time(t: int, b: int, d: int) -> Iterator[Example]:
    ids, counters = drawn_from(b)
    yield Example([ids, counters], [flow.draw_time(SEED, counters[0], ids)], {"seed": SEED})


def draw_keep_caption(t: int, b: int, d: int) -> Iterator[Example]:
    ids, counters = drawn_from(max(b, 40))
    kept = flow.draw_keep_caption(SEED, counters[0], ids, 0.4)
    assert b == 1 or 0 < kept.sum() < len(ids)
    yield Example([ids, counters], [kept], {"seed": SEED, "dropout": 0.4})


def draw_noise(t: int, b: int, d: int) -> Iterator[Example]:
    """The slices that ranks draw are those of the whole."""
    ids, counters = drawn_from(b)
    for latent, ranks in (((4, 3, 4, 6), (1, 2, 9)), ((16, 2, 32, 34), (1, 4))):  # the second in several chunks
        whole = model.patchify(flow.draw_noise(SEED, counters[0], ids, latent), PATCH)
        attrs = {"seed": SEED, "patch": PATCH, "latent": latent}
        for n in ranks:
            for rank, part in enumerate(whole.chunk(n)):
                yield Example([ids, counters], [part], {**attrs, "rank": rank})


def interpolate(t: int, b: int, d: int) -> Iterator[Example]:
    x1, x0, time = rand(t, b, d), rand(t, b, d), torch.rand(b, dtype=torch.float64)
    path = flow.interpolate(x1.transpose(0, 1), x0.transpose(0, 1), time)
    yield Example([x1, x0, time], [x.transpose(0, 1) for x in path], {"sigma_min": 1e-5})


def velocity_loss(t: int, b: int, d: int) -> Iterator[Example]:
    prediction, velocity = rand(t, b, d), rand(t, b, d)
    attrs = {"elements": 4 * t * b * d, "micro_batches": 3}  # of the global buffer: this rank holds a quarter
    for add in (False, True):
        yield Example([prediction, velocity], [(prediction - velocity).pow(2).sum() / (12 * t * b * d)], attrs, add)


def velocity_loss_backward(t: int, b: int, d: int) -> Iterator[Example]:
    prediction, velocity = rand(t, b, d), rand(t, b, d)
    one = torch.ones((), dtype=torch.float64)
    wanted = gradients(lambda p: (p - velocity).pow(2).sum() / (12 * t * b * d), one, prediction)
    yield Example([prediction, velocity], wanted, {"elements": 4 * t * b * d, "micro_batches": 3})


def cast(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example([x], [x.to(torch.bfloat16)], {"signature": "abc->abc"})


def copy(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(1, t * b * d)
    yield Example([x], [x.clone()], {"signature": "xn->xn"})


def accumulate(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b * d)
    yield Example([x], [x.clone()], {"signature": "xn->xn"}, add=True)


def zero_gaps(t: int, b: int, d: int) -> Iterator[Example]:
    flat = rand(1, 3 * t * b * d)
    wanted, n = flat.clone(), t * b * d
    wanted[0, :1] = wanted[0, n : 2 * n] = 0
    yield Example([flat], [wanted], {"signature": "xn->xn", "gaps": ((0, 1), (n, 2 * n))})


def sum_of_squares(t: int, b: int, d: int) -> Iterator[Example]:
    for n in (t * b * d, 3 * FLAT_CHUNK + 7):
        x = rand(1, n)
        yield Example([x], [x.square().sum()])


def clip_factor(t: int, b: int, d: int) -> Iterator[Example]:
    """Clipped, not clipped, not finite."""
    for norm in (10.0, 0.1, math.nan, math.inf):
        squares, counters = torch.tensor(norm, dtype=torch.float64) ** 2, torch.tensor([4, 2])
        finite = math.isfinite(norm)
        factor = torch.tensor(min(1.0, 0.5 / (norm + 1e-6)), dtype=torch.float64)
        if finite:
            wanted = [squares.sqrt(), factor, torch.tensor(True), torch.tensor([5, 3])]
            yield Example([squares, counters], wanted, {"clip_norm": 0.5})


def adamw(t: int, b: int, d: int) -> Iterator[Example]:
    """Against torch's own, from its third update on; decay for the first elements of the shard alone.

    Each part of a long shard spans whole chunks, one after the other.
    """
    for n in (max(t * b * d, 20), 3 * FLAT_CHUNK + 7):
        offset, held = n // 2, n - n // 2
        for rank, decayed in ((0, held + 5), (1, held + 3), (1, 2 * held), (2, held)):
            boundary = offset + min(max(decayed - rank * held, 0), held)
            start = rand(n)
            parts = [torch.nn.Parameter(start[:boundary].clone()), torch.nn.Parameter(start[boundary:].clone())]
            groups = [{"params": [p], "weight_decay": w} for p, w in zip(parts, (0.1, 0.0), strict=True) if len(p)]
            optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
            before: list[Tensor] = []
            for update in range(3):
                gradient = rand(n)
                if update == 2:
                    before = [x.clone() for x in state_of(optimizer, parts)]
                for part, g in zip(parts, gradient.split([boundary, n - boundary]), strict=True):
                    part.grad = g * 0.25
                optimizer.step()
                if update == 2:
                    ema, clip = rand(n), torch.tensor(0.25, dtype=torch.float64)
                    master, m, v = state_of(optimizer, parts)
                    lr, finite = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(True)
                    flat = [x[None] for x in (*before, ema, gradient)]
                    inputs = [*flat, clip, finite, torch.tensor([9, 3]), lr]
                    wanted = [x[None] for x in (master, m, v, torch.lerp(ema, master, 0.1))]
                    attrs = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.9}
                    attrs |= {"last_offset": offset, "last_elements": held, "last_decayed": decayed, "rank": rank}
                    yield Example(inputs, wanted, attrs)


def state_of(optimizer: torch.optim.Optimizer, parts: list[torch.nn.Parameter]) -> list[Tensor]:
    """Weights and both moments, flat."""
    moments = [[optimizer.state[p].get(key, torch.zeros_like(p)) for p in parts] for key in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([x.detach() for x in xs]) for xs in ([*parts], *moments)]


EXAMPLES: dict[str, Callable[[int, int, int], Iterator[Example]]] = {
    maker.__name__: maker
    for maker in (
        *(matmul, attention, attention_backward, cross_attention, cross_attention_backward, merge_attention, sum_parts),
        *(modulate_norm, position_modulate_norm, modulate_norm_backward, layer_norm, layer_norm_backward),
        *(add_position, add, residual),
        *(gated_residual, gated_residual_backward, swiglu, swiglu_backward, silu, silu_backward),
        *(patchify, unpatchify, position, position_backward, time_features, add_table, sum_to),
        *(drop_caption, drop_mask, draw_time, draw_keep_caption, draw_noise, interpolate),
        *(velocity_loss, velocity_loss_backward, cast, copy, accumulate, zero_gaps, sum_of_squares),
        *(clip_factor, adamw),
    )
}


def test_every_op_has_a_reference_and_examples() -> None:
    assert set(EXAMPLES) == set(OPS) == set(REFERENCE)


@pytest.mark.parametrize("shape", UGLY, ids=str)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_reference_is_the_formula(kind: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    for example in EXAMPLES[kind](*shape):
        check(kind, example, REFERENCE[kind])


IN_CHUNKS_OF_THEIR_OWN = {"adamw", "draw_noise", "patchify", "unpatchify", "matmul"}  # shapes above are theirs


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(sorted({*EXAMPLES} - IN_CHUNKS_OF_THEIR_OWN)),
)
def test_reference_is_the_formula_on_any_shape(t: int, b: int, d: int, kind: str) -> None:
    torch.manual_seed(t + b + d)
    for example in EXAMPLES[kind](t, b, d):
        check(kind, example, REFERENCE[kind])


FAST = {kind: kernel for kind, kernel in CHOSEN.items() if kernel is not REFERENCE[kind]}


@pytest.mark.parametrize("shape", [*UGLY, (7, 2, 1)], ids=str)  # the last: one key
@pytest.mark.parametrize("kind", FAST)
def test_what_the_registry_chose_is_the_formula_too(kind: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    for example in EXAMPLES[kind](*shape):
        check(kind, example, FAST[kind])


def test_attention_on_a_cpu_is_the_fused_one() -> None:
    assert set(FAST) == {"attention", "cross_attention", "attention_backward", "cross_attention_backward"}


def test_a_norm_that_is_not_finite_clips_nothing_and_counts_no_update() -> None:
    for bad in (math.nan, math.inf):
        squares = torch.tensor(bad, dtype=torch.float64)
        counters = torch.tensor([4, 2])
        norm, factor = poisoned(squares), poisoned(squares)
        finite = torch.tensor(True)
        REFERENCE["clip_factor"]([squares, counters], [norm, factor, finite, counters], clip_norm=0.5)
        assert not finite and counters.tolist() == [5, 2]


@pytest.mark.parametrize("updates", [0, 2])
def test_adamw_that_is_skipped_changes_nothing(updates: int) -> None:
    """Not even where the gradient is NaN, and not before the first update, whose bias correction would divide by 0."""
    states = [rand(1, 300) for _ in range(4)]
    states[2].square_()
    before = [x.clone() for x in states]
    gradient = torch.full((1, 300), torch.nan, dtype=torch.float64)
    bad, lr = torch.tensor(math.nan, dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)
    counters = torch.tensor([3, updates])
    attrs = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.9, "rank": 0}
    attrs |= {"last_offset": 100, "last_elements": 200, "last_decayed": 50}
    REFERENCE["adamw"]([*states, gradient, bad, torch.tensor(False), counters, lr], states, **attrs)
    assert all(torch.equal(x, y) for x, y in zip(states, before, strict=True))


# -- workspace, on the records of a real step -------------------------------------------------------------------------

OF_TOKEN_CHUNKS = ("merge_attention", "sum_parts")  # not in a step of one rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OF_TOKEN_CHUNKS)
def test_token_chunks_allocate_what_they_declare(kind: str, dtype: torch.dtype) -> None:
    """At most, and with bf16, which is summed in fp32, at least half of it."""
    stat = torch.float32 if dtype == torch.bfloat16 else dtype
    for example in EXAMPLES[kind](123, 2, 16):
        inputs, outputs = (
            [x.to(dtype if x.shape[0] == 123 else stat) for x in xs] for xs in (example.inputs, example.wanted)
        )
        work = allocated(REFERENCE[kind], inputs, outputs, example.attrs)
        declared = declared_workspace(kind, inputs, outputs, example.attrs)
        assert work <= declared <= 2 * work + 4096


@pytest.mark.parametrize("dtype", ["float64", "float32", "bf16"])
def test_no_record_allocates_more_than_it_declares(dtype: str) -> None:
    """With the dtypes that a plan mixes; memory planning reserves exactly what is declared."""
    case = small_case(Plan.parse("micro_batches=2", dtype=dtype), steps=1)
    found: dict[str, tuple[int, int]] = {}

    def watched(kind: str) -> Kernel:
        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], **attrs: Any) -> None:
            work = allocated(CHOSEN[kind], inputs, outputs, attrs)
            declared = declared_workspace(kind, inputs, outputs, attrs)
            if work > found.get(kind, (-1, 0))[0]:
                found[kind] = (work, declared)
            if work > declared:
                excess.append(f"{kind} {attrs.get('signature', '')}: {work} > {declared} B")

        return run

    excess: list[str] = []
    doors = {kind: watched(kind) for kind in CHOSEN}
    run_rank(
        case,
        None,
        StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed, kernels=doors),
        watched=False,
    )
    for kind, (work, declared) in sorted(found.items()):
        print(f"{dtype:8} {kind:26} {work:>10,} of {declared:>10,} B")
    assert not excess, "\n".join(excess)
    assert set(found) >= set(OPS) - {"unpatchify", "cast", "copy", *OF_TOKEN_CHUNKS}
    # Declared is no more than twice what is used, where it is more than a few scalars: else the bound says nothing.
    loose = {kind: both for kind, both in found.items() if both[1] > 2 * both[0] + 4096}
    assert loose == {}
