"""The op table: one row says all that holds for every record of an op (torch-free).

What an op computes stands under the same name in ``reference.py``, what else can run it in ``catalogue.py``; every
other list of ops derives from these rows. Labels of signatures:

    t local or gathered video tokens   s all tokens (keys)   b samples   d width   h heads   k head dim   f ffn
    l text tokens   w encoder width    p values of a patch   r modulation rows    c the K,V pair   n flat elements

Shapes are local when FLOPs and bytes are asked for: they are what one rank computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .signature import Signature, Sizes, parse

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}

# Draws run in chunks of this many elements: philox keeps some twenty 64-bit temporaries as large as its output.
DRAW_CHUNK = 1 << 14
# AdamW and the sum of squares walk the flat shard in chunks of this many elements: temporaries stay in cache.
FLAT_CHUNK = 1 << 16

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OpSpec:
    """What holds for every record of one kind.

    signature    input and output labels; None: each record brings its own in ``attrs["signature"]``
    linear       groups of inputs in which the op is (jointly) linear: where a Partial may enter
    whole        labels that no axis may split
    in_place     {output: input}: the output is the input's storage, updated
    fresh        it fills parts of its input, of which nothing need be written yet
    statistics   outputs that only backward needs; they may go unread in a forward program
    adds         the record may carry one more, last, input that is added into output 0 in place
    flops        of the local labels; matmul and attention count 2 per multiply-add
    matmul       the FLOPs run on tensor cores and count in MFU
    leaves_sms   leaves ``plan.sm_margin`` SMs to communication: its kernels would hold every SM from start to end. The
                 others run blocks that end soon and make room
    workspace    bytes that the CPU implementation may allocate besides its outputs, an upper bound
    unfused_passes   tensors of the first input's size that the formula reads and writes when each elementary torch
                 operation is a kernel: (in that input's dtype, in the statistics'); None: it is one such operation
    capturable   may run inside a CUDA Graph: no value is read back to the host, no shape depends on data
    """

    signature: str | None
    linear: tuple[tuple[int, ...], ...] = ()
    whole: str = ""
    in_place: dict[int, int] = field(default_factory=dict)
    statistics: tuple[int, ...] = ()
    fresh: bool = False
    adds: bool = False
    flops: Callable[[Sizes], int] = lambda sizes: 0
    matmul: bool = False
    leaves_sms: bool = False
    workspace: Callable[[list[Shape], list[str], list[Shape], list[str], Sizes], int] = lambda *_: 0
    unfused_passes: tuple[int, int] | None = None
    capturable: bool = True


def _product(sizes: Sizes) -> int:
    return math.prod(sizes.values())


def _labels(*names: str, per: int) -> Callable[[Sizes], int]:
    return lambda sizes: per * math.prod(sizes.get(name, 1) for name in "".join(names))


def _matmul_workspace(
    ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], _: Sizes
) -> int:
    """fp32 out of bf16 factors: torch's CPU matmul cannot, so both factors are cast (declared here)."""
    if out_dtypes[0] == in_dtypes[0]:
        return 0
    return sum(math.prod(shape) for shape in ins[:2]) * DTYPE_BYTES[out_dtypes[0]]


def _attention_workspace(
    ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], sizes: Sizes
) -> int:
    """Torch's fused kernel on a CPU: its own outputs, before they are copied into ours, and a key mask as floats."""
    produced = sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in zip(outs, out_dtypes, strict=True))
    mask = sizes["b"] * sizes["s"] * (DTYPE_BYTES[in_dtypes[0]] + 1) if in_dtypes[-1] == "bool" else 0
    return produced + mask


def _attention_backward_workspace(
    ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], sizes: Sizes
) -> int:
    """As forward, and the log-sum-exp in the kernel's layout."""
    logsumexp = math.prod(ins[4]) * DTYPE_BYTES[in_dtypes[4]]
    return _attention_workspace(ins, in_dtypes, outs, out_dtypes, sizes) + logsumexp


_INDEX_BYTES = 6 * 8  # of a token: its number and its (t, h, w) position as int64, and what they are computed from
_SCALARS_BYTES = 128  # a few 0-d tensors


def _temporaries(*terms: str, cast: tuple[str, ...] = (), tokens: bool = False) -> Callable[..., int]:
    """One temporary for each term, of the size of its labels, in the widest dtype met.

    ``cast``: more of them, where the compute dtype is not that of the statistics. ``tokens``: indices of local tokens.
    """

    def bound(ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], sizes: Sizes) -> int:
        items = {DTYPE_BYTES[d] for d in (*in_dtypes, *out_dtypes) if d.startswith(("float", "bfloat"))}
        held = terms + cast if len(items) > 1 else terms
        elements = sum(math.prod(sizes[label] for label in labels) for labels in held)
        return max(items) * elements + (_INDEX_BYTES * sizes["t"] if tokens else 0) + _SCALARS_BYTES

    return bound


def _sum_workspace(ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], _: Sizes) -> int:
    """The sum, before it is permuted into the output."""
    return math.prod(outs[0]) * DTYPE_BYTES[out_dtypes[0]]


def _wide_sum_workspace(
    ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], _: Sizes
) -> int:
    """bf16 is summed in fp32: the sum, and one addend."""
    return 8 * math.prod(outs[0]) if out_dtypes[0] == "bfloat16" else 0


def _draw_workspace(
    ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], sizes: Sizes
) -> int:
    """Philox keeps 16 64-bit temporaries as large as what is drawn at once: a chunk, or at least one token's values."""
    drawn = math.prod(outs[0])
    token = drawn // sizes["t"] if "t" in sizes else drawn
    at_once = max(min(DRAW_CHUNK, drawn), token)
    return 16 * 8 * at_once + _INDEX_BYTES * (sizes.get("t", 0) + sizes.get("p", 0)) + _SCALARS_BYTES


def _flat_workspace(count: int) -> Callable[..., int]:
    """``count`` temporaries of one chunk of the flat shard."""

    def bound(ins: list[Shape], in_dtypes: list[str], outs: list[Shape], out_dtypes: list[str], _: Sizes) -> int:
        return count * DTYPE_BYTES[in_dtypes[0]] * min(FLAT_CHUNK, math.prod(ins[0])) + _SCALARS_BYTES

    return bound


_NORM = "tbd,d,bd,bd->tbd,tb"
_POSITION_NORM = "tbd,td,d,bd,bd->tbd,tbd,tb"
_NORM_BACKWARD = "tbd,tbd,tb,d,bd->tbd,d,bd,bd"

OPS: dict[str, OpSpec] = {
    # -- products -----------------------------------------------------------------------------------------------
    "matmul": OpSpec(
        None,
        linear=((0,), (1,)),
        adds=True,
        flops=lambda z: 2 * _product(z),
        matmul=True,
        leaves_sms=True,
        workspace=_matmul_workspace,
    ),
    # q, kv (gathered over cp), [key mask] -> o, log-sum-exp.  o = softmax(q k^T / sqrt(K)) v; no causal mask, ever
    "attention": OpSpec(
        "tbhk,sbchk->tbhk,bht",
        whole="sck",
        statistics=(1,),
        matmul=True,
        leaves_sms=True,
        flops=_labels("tsbhk", per=4),
        workspace=_attention_workspace,
    ),
    "cross_attention": OpSpec(
        "tbhk,sbchk,bs->tbhk,bht",
        whole="sck",
        statistics=(1,),
        matmul=True,
        flops=_labels("tsbhk", per=4),
        workspace=_attention_workspace,
    ),
    # do, q, kv, o, lse -> dq, dkv.  Five products: scores again, dv, dp, dq, dk
    "attention_backward": OpSpec(
        "tbhk,tbhk,sbchk,tbhk,bht->tbhk,sbchk",
        linear=((0,),),
        whole="sck",
        matmul=True,
        leaves_sms=True,
        flops=_labels("tsbhk", per=10),
        workspace=_attention_backward_workspace,
    ),
    "cross_attention_backward": OpSpec(
        "tbhk,tbhk,sbchk,tbhk,bht,bs->tbhk,sbchk",
        linear=((0,),),
        whole="sck",
        matmul=True,
        flops=_labels("tsbhk", per=10),
        workspace=_attention_backward_workspace,
    ),
    # o and log-sum-exp over parts of the keys, one pair after the other -> over all keys
    "merge_attention": OpSpec(
        None, statistics=(1,), workspace=_temporaries("tbhk", "tbh", "tbh", "tbh", cast=("tbhk", "tbhk"))
    ),
    "sum_parts": OpSpec(None, workspace=_wide_sum_workspace),  # addends of one shape -> their sum
    # -- norms --------------------------------------------------------------------------------------------------
    # x, gain, scale, shift -> x / rms(x) * gain * (1 + scale) + shift, 1 / rms(x)
    "modulate_norm": OpSpec(
        _NORM,
        whole="d",
        statistics=(1,),
        flops=_labels("tbd", per=6),
        workspace=_temporaries("bd", "bd", cast=("tbd", "tbd", "tbd")),
        unfused_passes=(2, 13),
    ),
    # x, position, gain, scale, shift -> x0 = x + position, the modulated norm of x0, 1 / rms(x0)
    "position_modulate_norm": OpSpec(
        _POSITION_NORM,
        whole="d",
        statistics=(2,),
        flops=_labels("tbd", per=7),
        workspace=_temporaries("bd", "bd", cast=("tbd", "tbd", "tbd")),
        unfused_passes=(5, 13),
    ),
    # dy, x, rstd, gain, scale -> dx (+ residual gradient), dgain, dscale, dshift
    "modulate_norm_backward": OpSpec(
        _NORM_BACKWARD,
        linear=((0,),),
        whole="d",
        adds=True,
        flops=_labels("tbd", per=14),
        workspace=_temporaries("tbd", "tbd", "tb", "tb", "bd", "bd", "bd", "bd", cast=("tbd", "bd")),
        unfused_passes=(2, 32),
    ),
    # x, gain, bias -> layer norm, mean, 1 / std
    "layer_norm": OpSpec(
        "lbd,d,d->lbd,lb,lb",
        whole="d",
        statistics=(1, 2),
        flops=_labels("lbd", per=7),
        workspace=_temporaries("lbd", "lb", cast=("lbd",)),
    ),
    # dy, x, mean, rstd, gain -> dx, dgain, dbias
    "layer_norm_backward": OpSpec(
        "lbd,lbd,lb,lb,d->lbd,d,d",
        linear=((0,),),
        whole="d",
        flops=_labels("lbd", per=12),
        workspace=_temporaries("lbd", "lbd", "lbd", "lb", "lb", cast=("lbd",)),
    ),
    # -- token-local --------------------------------------------------------------------------------------------
    "add_position": OpSpec("tbd,td->tbd", flops=_labels("tbd", per=1)),
    "add": OpSpec("tbd->tbd", linear=((0,),), adds=True, flops=_labels("tbd", per=1)),  # the added input comes last
    "residual": OpSpec("tbd,tbd->tbd", linear=((0, 1),), flops=_labels("tbd", per=1)),
    # x, y, gate -> x + gate * y
    "gated_residual": OpSpec("tbd,tbd,bd->tbd", flops=_labels("tbd", per=2), unfused_passes=(5, 0)),
    # dout, y, gate -> dy, dgate
    "gated_residual_backward": OpSpec(
        "tbd,tbd,bd->tbd,bd",
        linear=((0,),),
        flops=_labels("tbd", per=3),
        workspace=_temporaries("tbd", cast=("tbd",)),
        unfused_passes=(6, 0),
    ),
    "swiglu": OpSpec("tbf,tbf->tbf", flops=_labels("tbf", per=5), unfused_passes=(5, 0)),  # silu(gate) * up
    # dy, gate, up -> dgate, dup
    "swiglu_backward": OpSpec(
        "tbf,tbf,tbf->tbf,tbf",
        linear=((0,),),
        flops=_labels("tbf", per=12),
        unfused_passes=(9, 0),
    ),
    # -- embeddings and conditioning ----------------------------------------------------------------------------
    "patchify": OpSpec(
        "bcfyx->tbp", whole="cfyx", workspace=_temporaries("tbp", tokens=True)
    ),  # a rank takes the tokens that it holds
    "unpatchify": OpSpec("tbp->bcfyx", whole="tp"),
    "position": OpSpec(
        "id,jd,kd->td",
        whole="ijkd",
        flops=_labels("td", per=2),
        workspace=_temporaries("td", tokens=True),
    ),
    "position_backward": OpSpec(
        "td->id,jd,kd",
        linear=((0,),),
        whole="ijkd",
        flops=_labels("td", per=3),
        workspace=_temporaries(tokens=True),
    ),
    "time_features": OpSpec("b->bw", flops=_labels("bw", per=4), workspace=_temporaries("bw", "w", "w")),
    "silu": OpSpec("bd->bd", flops=_labels("bd", per=4)),
    "silu_backward": OpSpec(
        "bd,bd->bd",
        linear=((0,),),
        adds=True,
        flops=_labels("bd", per=7),
        workspace=_temporaries("bd", cast=("bd",)),
    ),
    "add_table": OpSpec(None),  # modulation shared by the layers + this layer's table, e.g. "drb,rd->rbd"
    "sum_to": OpSpec(None, linear=((0,),), adds=True, workspace=_sum_workspace),  # sum or permute: "rbd->rd"
    "drop_caption": OpSpec("lbw,b->lbw"),  # zero the embeddings of a dropped caption
    "drop_mask": OpSpec("bs,b->bs"),  # every key of a dropped caption is valid
    # -- flow matching ------------------------------------------------------------------------------------------
    "draw_time": OpSpec("b,n->b", workspace=_draw_workspace),
    "draw_noise": OpSpec("b,n->tbp", workspace=_draw_workspace),
    "draw_keep_caption": OpSpec("b,n->b", workspace=_draw_workspace),
    # x1, x0, t -> x_t, velocity
    "interpolate": OpSpec(
        "tbp,tbp,b->tbp,tbp", flops=_labels("tbp", per=5), workspace=_temporaries("tbp", "tbp", "b", "b")
    ),
    # prediction, velocity -> sum of squares / (elements of the GLOBAL buffer * micro-batches): Partial over every axis
    "velocity_loss": OpSpec(
        "tbp,tbp->", adds=True, flops=_labels("tbp", per=3), workspace=_temporaries("tbp", cast=("tbp",))
    ),
    "velocity_loss_backward": OpSpec(
        "tbp,tbp->tbp", flops=_labels("tbp", per=2), workspace=_temporaries("tbp", cast=("tbp",))
    ),
    # -- flat units and the optimizer ---------------------------------------------------------------------------
    "cast": OpSpec(None, linear=((0,),)),
    "copy": OpSpec(None, linear=((0,),)),
    "accumulate": OpSpec(None, linear=((0,),), adds=True),  # addend, [total]: total += addend
    "zero_gaps": OpSpec(
        None, linear=((0,),), in_place={0: 0}, fresh=True
    ),  # alignment gaps and tail padding of a flat gradient
    "sum_of_squares": OpSpec("rn->", workspace=lambda *_: _SCALARS_BYTES),
    # sum of squares, counters -> gradient norm, clip factor, finite?, counters (step + 1, updates + finite)
    "clip_factor": OpSpec(",n->,,,n", in_place={3: 1}, workspace=lambda *_: _SCALARS_BYTES),
    # master, m, v, ema, gradient, clip factor, finite?, counters, lr -> master, m, v, ema
    "adamw": OpSpec(
        "rn,rn,rn,rn,rn,,,q,->rn,rn,rn,rn",
        in_place={0: 0, 1: 1, 2: 2, 3: 3},
        workspace=_flat_workspace(2),
    ),
}

LEAVE_SMS = tuple(op for op, spec in OPS.items() if spec.leaves_sms)


def signature_of(kind: str, attrs: dict[str, Any]) -> Signature:
    text = OPS[kind].signature or attrs["signature"]
    return parse(text)
