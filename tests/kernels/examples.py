"""An example of every op: inputs, and what its formula makes of them in float64.

Whoever adds an op adds its example here, a function of its name: values (``test_reference.py``), counts
(``test_ops.py``) and every faster implementation are checked on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cinemesh.kernels.measures import FLAT_CHUNK
from cinemesh.kernels.ops import OPS
from cinemesh.kernels.philox import Purpose, uniform
from cinemesh.model import flow
from cinemesh.model import reference as model
from cinemesh.model.objective import VPrediction
from cinemesh.model.paths import DiffusionPath

EPS = 1e-5


@dataclass
class Example:
    """The ``wanted`` outputs for ``inputs``, in float64.

    dtypes   of inputs and outputs in a step of policy bf16, a letter each: c compute (bf16), s statistics (fp32),
             i int64, b bool
    add      output 0 is added onto what is there
    counted  its record tells exactly how much it does; not so where a rank's share is cut at a place of its own
    """

    dtypes: str
    inputs: list[Tensor]
    wanted: list[Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)
    add: bool = False
    counted: bool = True


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
        dtypes = "cc->c" if "b" in signature.split("->")[1] else "cc->s"  # a weight's gradient
        for add in (False, True):
            yield Example(dtypes, factors, [torch.einsum(signature, *factors)], {"signature": signature}, add)


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
    wanted = [plain_attention(q, kv, mask), lse]
    yield Example("cc->cs", [q, kv], wanted) if mask is None else Example("ccb->cs", [q, kv, mask], wanted)


def attention_backward(t: int, b: int, d: int, *, masked: bool = False) -> Iterator[Example]:
    q, kv, mask, lse = attention_inputs(t, b, d, masked)
    do, o = rand(t, b, 3, 8), plain_attention(q, kv, mask)
    wanted = gradients(lambda q, kv: plain_attention(q, kv, mask), do, q, kv)
    inputs = [do, q, kv, o, lse]
    yield Example("ccccs->cc", inputs, wanted) if mask is None else Example("ccccsb->cc", [*inputs, mask], wanted)


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
        yield Example("cs" * count + "->cs", parts, [plain_attention(q, kv, None), lse], {"signature": signature})


def sum_parts(t: int, b: int, d: int) -> Iterator[Example]:
    for count in (1, 2, 5):
        parts = rand(count, t, b, 3, d)
        attrs = {"signature": ",".join(["tbhk"] * count) + "->tbhk"}
        yield Example("c" * count + "->c", list(parts), [parts.sum(0)], attrs)


def modulated(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return model.rms_norm(x, gain, EPS) * (1 + scale) + shift


def modulate_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, gain, scale, shift = rand(t, b, d), rand(d), rand(b, d), rand(b, d)
    rstd = (x.pow(2).mean(-1) + EPS).rsqrt()
    yield Example("cccc->cs", [x, gain, scale, shift], [modulated(x, gain, scale, shift), rstd], {"eps": EPS})


def position_modulate_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, position, gain, scale, shift = rand(t, b, d), rand(t, d), rand(d), rand(b, d), rand(b, d)
    x0 = x + position[:, None]
    rstd = (x0.pow(2).mean(-1) + EPS).rsqrt()
    yield Example(
        "ccccc->ccs", [x, position, gain, scale, shift], [x0, modulated(x0, gain, scale, shift), rstd], {"eps": EPS}
    )


def modulate_norm_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x, gain, scale, shift = rand(t, b, d), rand(t, b, d), rand(d), rand(b, d), rand(b, d)
    rstd = (x.pow(2).mean(-1) + EPS).rsqrt()
    wanted = gradients(modulated, dy, x, gain, scale, shift)
    for add in (False, True):
        yield Example("ccscc->csss", [dy, x, rstd, gain, scale], wanted, add=add)


def layer_modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def modulate_layer_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, scale, shift = rand(t, b, d), rand(b, d), rand(b, d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    yield Example("ccc->css", [x, scale, shift], [layer_modulated(x, scale, shift), x.mean(-1), rstd], {"eps": EPS})


def modulate_layer_norm_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x, scale, shift = rand(t, b, d), rand(t, b, d), rand(b, d), rand(b, d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    for add in (False, True):
        yield Example(
            "ccssc->css", [dy, x, x.mean(-1), rstd, scale], gradients(layer_modulated, dy, x, scale, shift), add=add
        )


def layer_norm(t: int, b: int, d: int) -> Iterator[Example]:
    x, gain, bias = rand(t, b, d), rand(d), rand(d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    yield Example("ccc->css", [x, gain, bias], [F.layer_norm(x, (d,), gain, bias, EPS), x.mean(-1), rstd], {"eps": EPS})


def layer_norm_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x, gain, bias = rand(t, b, d), rand(t, b, d), rand(d), rand(d)
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    wanted = gradients(lambda x, gain, bias: F.layer_norm(x, (d,), gain, bias, EPS), dy, x, gain, bias)
    yield Example("scssc->css", [dy, x, x.mean(-1), rstd, gain], wanted)


def add_position(t: int, b: int, d: int) -> Iterator[Example]:
    x, position = rand(t, b, d), rand(t, d)
    yield Example("cc->c", [x, position], [x + position[:, None]])


def add(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example("c->c", [x], [x.clone()], add=True)


def residual(t: int, b: int, d: int) -> Iterator[Example]:
    x, y = rand(t, b, d), rand(t, b, d)
    yield Example("cc->c", [x, y], [x + y])


def gated_residual(t: int, b: int, d: int) -> Iterator[Example]:
    x, y, gate = rand(t, b, d), rand(t, b, d), rand(b, d)
    yield Example("ccc->c", [x, y, gate], [x + gate * y])


def gated_residual_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dout, y, gate = rand(t, b, d), rand(t, b, d), rand(b, d)
    yield Example("ccc->cs", [dout, y, gate], gradients(lambda y, gate: gate * y, dout, y, gate))


def swiglu(t: int, b: int, d: int) -> Iterator[Example]:
    gate, up = rand(t, b, d), rand(t, b, d)
    yield Example("cc->c", [gate, up], [F.silu(gate) * up])


def swiglu_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, gate, up = rand(t, b, d), rand(t, b, d), rand(t, b, d)
    yield Example("ccc->cc", [dy, gate, up], gradients(lambda gate, up: F.silu(gate) * up, dy, gate, up))


def activate(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example("c->c", [x], [F.silu(x)])


def activate_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x = rand(t, b, d), rand(t, b, d)
    yield Example("cc->c", [dy, x], gradients(F.silu, dy, x))


def silu(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(b, d)
    yield Example("c->c", [x], [F.silu(x)])


def silu_backward(t: int, b: int, d: int) -> Iterator[Example]:
    dy, x = rand(b, d), rand(b, d)
    for add in (False, True):
        yield Example("sc->s", [dy, x], gradients(F.silu, dy, x), add=add)


PATCH = (1, 2, 2)


def patchify(t: int, b: int, d: int) -> Iterator[Example]:
    """Every rank's tokens, for ranks that split the grid's rows in the middle."""
    latent = rand(b, 4, 3, 4, 6)
    tokens = model.patchify(latent, PATCH)
    for ranks in (1, 2, 9):
        for rank, part in enumerate(tokens.chunk(ranks)):
            yield Example("s->s", [latent], [part], {"patch": PATCH, "latent": tuple(latent.shape[1:]), "rank": rank})


def unpatchify(t: int, b: int, d: int) -> Iterator[Example]:
    latent = rand(b, 4, 3, 4, 6)
    yield Example("c->c", [model.patchify(latent, PATCH)], [latent], {"patch": PATCH, "grid": (3, 2, 3)})


GRID = (3, 2, 5)


def positions(tables: Sequence[Tensor]) -> Tensor:
    gt, gh, gw = GRID
    table_t, table_h, table_w = tables
    return (table_t[:gt, None, None] + table_h[None, :gh, None] + table_w[None, None, :gw]).reshape(
        -1, table_t.shape[1]
    )


def position(t: int, b: int, d: int) -> Iterator[Example]:
    """Tables as long as the grid, and longer ones of which several ranks read their share."""
    tables = [rand(n, d) for n in GRID]
    yield Example("ccc->c", tables, [positions(tables)], {"grid": GRID, "rank": 0})
    tables = [rand(4, d), rand(3, d), rand(5, d)]
    for ranks in (1, 3, 5):
        for rank, share in enumerate(positions(tables).chunk(ranks)):
            yield Example("ccc->c", tables, [share], {"grid": GRID, "rank": rank}, counted=False)


def position_backward(t: int, b: int, d: int) -> Iterator[Example]:
    """A rank's tables get its own tokens' gradients, zero elsewhere; the ranks' sum is the whole."""
    tables = [rand(4, d), rand(3, d), rand(5, d)]
    whole = rand(30, d)
    for ranks in (1, 3, 5):
        for rank, part in enumerate(whole.chunk(ranks)):
            alone = torch.zeros_like(whole)
            alone.chunk(ranks)[rank].copy_(part)
            wanted = gradients(lambda *tables: positions(tables), alone, *tables)
            yield Example("s->sss", [part], wanted, {"grid": GRID, "rank": rank})


def time_features(t: int, b: int, d: int) -> Iterator[Example]:
    time = torch.rand(b, dtype=torch.float64)
    yield Example("s->c", [time], [model.time_features(time)])


def add_table(t: int, b: int, d: int) -> Iterator[Example]:
    shared, table = rand(d, 6, b), rand(6, d)
    yield Example("cc->c", [shared, table], [shared.permute(1, 2, 0) + table[:, None]], {"signature": "drb,rd->rbd"})
    hidden, bias = rand(t, b, d), rand(d)
    yield Example("cc->c", [hidden, bias], [hidden + bias], {"signature": "tbd,d->tbd"})
    time, table = rand(b, d), rand(2, d)
    yield Example("cc->c", [time, table], [time[None] + table[:, None]], {"signature": "bd,rd->rbd"})


def sum_to(t: int, b: int, d: int) -> Iterator[Example]:
    stacked, tokens = rand(6, b, d), rand(t, b, d)
    for add in (False, True):
        yield Example("s->s", [stacked], [stacked.sum(1)], {"signature": "rbd->rd"}, add)
        yield Example("s->s", [stacked], [stacked.sum(0)], {"signature": "rbd->bd"}, add)
        yield Example("s->c", [stacked], [stacked.permute(2, 0, 1)], {"signature": "rbd->drb"}, add)
        yield Example("c->s", [tokens], [tokens.sum(1)], {"signature": "tbd->td"}, add)


def drop_caption(t: int, b: int, d: int) -> Iterator[Example]:
    text, keep = rand(t, b, d), torch.rand(b) > 0.5
    yield Example("cb->c", [text, keep], [torch.where(keep[None, :, None], text, 0.0)])


def drop_mask(t: int, b: int, d: int) -> Iterator[Example]:
    mask, keep = torch.rand(b, d) > 0.5, torch.rand(b) > 0.5
    yield Example("bb->b", [mask, keep], [mask | ~keep[:, None]])


SEED = (7 << 32) + 3


def drawn_for(b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample ids, places in the batch, and counters (step, updates)."""
    return torch.randint(1 << 40, (b,)), (1 << 24) - 1 - torch.arange(b), torch.tensor([5, 3])


def draw_time(t: int, b: int, d: int) -> Iterator[Example]:
    ids, places, counters = drawn_for(b)
    drawn = flow.draw_time(SEED, counters[0], ids, places)
    yield Example("iii->s", [ids, places, counters], [drawn], {"seed": SEED})


def draw_keep_caption(t: int, b: int, d: int) -> Iterator[Example]:
    ids, places, counters = drawn_for(max(b, 40))
    kept = flow.draw_keep_caption(SEED, counters[0], ids, places, 0.4)
    assert b == 1 or 0 < kept.sum() < len(ids)
    yield Example("iii->b", [ids, places, counters], [kept], {"seed": SEED, "dropout": 0.4})


def draw_noise(t: int, b: int, d: int) -> Iterator[Example]:
    """The slices that ranks draw are those of the whole."""
    ids, places, counters = drawn_for(b)
    for latent, ranks in (((4, 3, 4, 6), (1, 2, 9)), ((16, 2, 32, 34), (1, 4))):  # the second in several chunks
        whole = model.patchify(flow.draw_noise(SEED, counters[0], ids, places, latent), PATCH)
        attrs = {"seed": SEED, "patch": PATCH, "latent": latent}
        for n in ranks:
            for rank, part in enumerate(whole.chunk(n)):
                yield Example("iii->s", [ids, places, counters], [part], {**attrs, "rank": rank})


def interpolate(t: int, b: int, d: int) -> Iterator[Example]:
    x1, x0, time = rand(t, b, d), rand(t, b, d), torch.rand(b, dtype=torch.float64)
    path = flow.interpolate(x1.transpose(0, 1), x0.transpose(0, 1), time)
    yield Example("sss->cs", [x1, x0, time], [x.transpose(0, 1) for x in path], {"sigma_min": 1e-5})


def draw_step(t: int, b: int, d: int) -> Iterator[Example]:
    """Also of many samples: every step from the first to the last."""
    for samples in (b, 400):
        ids, places, counters = drawn_for(samples)
        drawn = uniform(SEED, Purpose.TIME, counters[0], ids, torch.zeros_like(ids), places)
        steps = torch.ceil(7 * drawn)
        assert samples < 400 or sorted(set(steps.tolist())) == [1, 2, 3, 4, 5, 6, 7]
        yield Example("iii->s", [ids, places, counters], [1 - steps / 7], {"seed": SEED, "steps": 7})


def diffuse(t: int, b: int, d: int) -> Iterator[Example]:
    """At levels of every kind: the last has no signal at all."""
    steps, path = 50, DiffusionPath(VPrediction(50))
    x1, x0 = rand(t, b, d), rand(t, b, d)
    time = 1 - torch.tensor([steps, 1, *range(2, b)])[:b].to(torch.float64) / steps
    made = path.noised(x1.transpose(0, 1), x0.transpose(0, 1), time)
    attrs = {"steps": steps, "first_beta": path.objective.first_beta, "last_beta": path.objective.last_beta}
    yield Example("sss->cs", [x1, x0, time], [x.transpose(0, 1) for x in made], attrs)


def weigh(t: int, b: int, d: int) -> Iterator[Example]:
    x, share = rand(t, 1, b, d), rand(1)
    yield Example("cs->s", [x, share], [x[:, 0] * share], {})


def velocity_loss(t: int, b: int, d: int) -> Iterator[Example]:
    prediction, velocity = rand(t, b, d), rand(t, b, d)
    attrs = {"elements": 4 * t * b * d, "micro_batches": 3}  # of the global buffer: this rank holds a quarter
    for add in (False, True):
        yield Example(
            "cs->s", [prediction, velocity], [(prediction - velocity).pow(2).sum() / (12 * t * b * d)], attrs, add
        )


def velocity_loss_backward(t: int, b: int, d: int) -> Iterator[Example]:
    prediction, velocity = rand(t, b, d), rand(t, b, d)
    one = torch.ones((), dtype=torch.float64)
    wanted = gradients(lambda p: (p - velocity).pow(2).sum() / (12 * t * b * d), one, prediction)
    yield Example("cs->c", [prediction, velocity], wanted, {"elements": 4 * t * b * d, "micro_batches": 3})


def cast(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example("s->c", [x], [x.to(torch.bfloat16)], {"signature": "abc->abc"})


def scale(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b, d)
    yield Example("c->c", [x], [-2.5 * x], {"signature": "abc->abc", "factor": -2.5})


def copy(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(1, t * b * d)
    yield Example("s->s", [x], [x.clone()], {"signature": "xn->xn"})


def accumulate(t: int, b: int, d: int) -> Iterator[Example]:
    x = rand(t, b * d)
    yield Example("s->s", [x], [x.clone()], {"signature": "xn->xn"}, add=True)


def zero_gaps(t: int, b: int, d: int) -> Iterator[Example]:
    flat = rand(1, 3 * t * b * d)
    wanted, n = flat.clone(), t * b * d
    wanted[0, :1] = wanted[0, n : 2 * n] = 0
    yield Example("s->s", [flat], [wanted], {"signature": "xn->xn", "gaps": ((0, 1), (n, 2 * n))})


def sum_of_squares(t: int, b: int, d: int) -> Iterator[Example]:
    for n in (t * b * d, 3 * FLAT_CHUNK + 7):
        x = rand(1, n)
        yield Example("s->s", [x], [x.square().sum()])


def clip_factor(t: int, b: int, d: int) -> Iterator[Example]:
    """Clipped, not clipped, not finite."""
    for norm in (10.0, 0.1, math.nan, math.inf):
        squares, counters = torch.tensor(norm, dtype=torch.float64) ** 2, torch.tensor([4, 2])
        finite = math.isfinite(norm)
        factor = torch.tensor(min(1.0, 0.5 / (norm + 1e-6)), dtype=torch.float64)
        if finite:
            wanted = [squares.sqrt(), factor, torch.tensor(True), torch.tensor([5, 3])]
            yield Example("si->ssbi", [squares, counters], wanted, {"clip_norm": 0.5})


def mark(t: int, b: int, d: int) -> Iterator[Example]:
    yield Example("i->i", [torch.tensor([t * b])], [torch.tensor([t * b])])


def adamw(t: int, b: int, d: int) -> Iterator[Example]:
    """Against torch's own, from its third update on; decay for the first elements of the shard alone.

    Each part of a long shard spans whole chunks, one after the other. The EMA's decay is that of its warm-up, 4 / 13,
    or the optimizer's where that is smaller.
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
                    ema_decay, decay = (0.9, 4 / 13) if rank else (0.2, 0.2)
                    wanted = [x[None] for x in (master, m, v, decay * ema + (1 - decay) * master)]
                    attrs = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": ema_decay}
                    attrs |= {"last_offset": offset, "last_elements": held, "last_decayed": decayed, "rank": rank}
                    yield Example("ssssssbis->ssss", inputs, wanted, attrs, counted=boundary == n)


def state_of(optimizer: torch.optim.Optimizer, parts: list[torch.nn.Parameter]) -> list[Tensor]:
    """Weights and both moments, flat."""
    moments = [[optimizer.state[p].get(key, torch.zeros_like(p)) for p in parts] for key in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([x.detach() for x in xs]) for xs in ([*parts], *moments)]


EXAMPLES: dict[str, Callable[[int, int, int], Iterator[Example]]] = {op: globals()[op] for op in OPS}
