"""Every implementation of every op: where it can run, what it needs besides its outputs, how fast (torch-free).

One list, read by ``registry.py`` on the machine that trains and by whatever plans a step where no GPU is. The choice
(``selection.py``) goes by rate class; of equal ones the earlier in the list wins. On a CPU the list's order decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from .op_spec import OpSpec
from .ops import OPS
from .rates import capability_of, rate
from .signature import Sizes
from .tiles import flat_sums, gate_slices, layer_norm_slices, norm_slices
from .tuning import DEFAULT_DEVICE

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "apex", "triton", "cudnn", "torch", "reference")

Workspace = Callable[[Sizes, int], int]  # sizes, bytes of an element -> bytes

ANY_CAPABILITY = (0, 0)
BY_ATOMICS = ("position_backward",)  # whose plain form has an operator of torch that adds by atomics on CUDA
HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Implementation:
    """``function`` of ``module`` runs ``op``, if device, dtype and sizes allow.

    ``capability``: the least compute capability; ``below``: the first one that is too new. ``sizes``: label -> (rule in
    words, test). ``workspace``: bytes besides its outputs. ``why``: what it is, for people. ``margin``: it can leave
    SMs alone (``sm_margin``). ``ordered``: whether it sums in one fixed order on a GPU, and so gives the same bits
    every time: always, when asked (``deterministic=True``), or never. On a CPU all do.
    """

    op: str
    package: str
    module: str
    function: str
    devices: tuple[str, ...]
    rate_class: str
    why: str
    capability: tuple[int, int] = ANY_CAPABILITY
    below: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ()  # empty: every dtype
    sizes: tuple[tuple[str, str, Callable[[int], bool]], ...] = ()
    workspace: Workspace = lambda sizes, item: 0
    margin: bool = False
    ordered: Literal["always", "asked", "never"] = "always"


# -- workspaces ----------------------------------------------------------------------------------------------------


def _queries(z: Sizes) -> int:
    return z["t"] * z["b"] * z["h"]


def _outputs(z: Sizes, item: int) -> int:
    """o and log-sum-exp, allocated by the library and copied into ours."""
    return _queries(z) * (z["k"] * item + 4)


def _delta(z: Sizes, item: int) -> int:
    """Row sums of do * o in fp32."""
    return _queries(z) * 4


def _flash_backward(z: Sizes, item: int) -> int:
    """Row sums of do * o, a scaled log-sum-exp, and dq summed in fp32; rows padded to blocks of 128."""
    rows = -(-z["t"] // 128) * 128
    return rows * z["b"] * z["h"] * (2 * 4 + 4 * z["k"])


def _copied_backward(z: Sizes, item: int) -> int:
    """As flash-attn, and dq, dk, dv before they are copied into ours."""
    return _flash_backward(z, item) + (_queries(z) + 2 * z["s"] * z["b"] * z["h"]) * z["k"] * item


def _torch_backward(z: Sizes, item: int) -> int:
    """The same, and of several samples do and o with the samples first in memory."""
    return _copied_backward(z, item) + (2 * _queries(z) * z["k"] * item if z["b"] > 1 else 0)


def _cudnn_backward(z: Sizes, item: int) -> int:
    """Its copies, and the log-sum-exp of a slice of heads in C order."""
    return _copied_backward(z, item) + _delta(z, item)


def _apex_norm(z: Sizes, item: int) -> int:
    """Output or gradients and statistics, allocated by apex and copied into ours, and a cast gradient."""
    rows = z.get("t", z.get("l", 1)) * z["b"]
    return rows * (2 * z["d"] * item + 8) + 2 * z["d"] * item


def _rows_of_tokens(z: Sizes, item: int) -> int:
    """Each token's row in three tables, the comparison with the rows of one, and that as a factor."""
    return z["t"] * (32 + (1 + item) * max(z["i"], z["j"], z["k"]))


def _nothing(z: Sizes) -> int:
    return 0


# -- the list ------------------------------------------------------------------------------------------------------


def _attention_entries() -> Iterable[Implementation]:
    flash_dims = (("k", "a multiple of 8, at most 256", lambda k: k % 8 == 0 and k <= 256),)
    cute_dims = (("k", "a multiple of 8, at most 128", lambda k: k % 8 == 0 and k <= 128),)
    triton_dims = (("k", "64 or 128", lambda k: k in (64, 128)),)
    for plain, masked in product(("attention", "attention_backward"), (False, True)):
        op = f"cross_{plain}" if masked else plain
        backward = OPS[op].backward
        direction = "backward" if backward else "forward"
        held = _flash_backward if backward else _outputs
        copied = _torch_backward if backward else _outputs
        asked: Literal["asked", "always"] = "asked" if backward else "always"
        if not masked:  # none of the four takes a key mask
            yield Implementation(
                op, "flash-attn", "flash_attention", f"{plain}_2", ("cuda",), "fa2",
                "FlashAttention-2, package flash-attn", (8, 0), None, HALF, flash_dims, held, ordered=asked,
            )  # fmt: skip
            yield Implementation(
                op, "flash-attn-3", "flash_attention", f"{plain}_3", ("cuda",), "fa3",
                "FlashAttention-3 for Hopper, built from source", (9, 0), (10, 0), HALF, flash_dims, held, True, asked,
            )  # fmt: skip
            yield Implementation(
                op, "flash-attn-4", "flash_attention", f"{plain}_4", ("cuda",), "fa4",
                "FlashAttention in CuTe, package flash-attn-4", (9, 0), (12, 0), HALF, cute_dims,
                _flash_backward if backward else lambda z, item: 0, ordered=asked,
            )  # fmt: skip
            yield Implementation(
                op, "cudnn", "torch_cuda", f"cudnn_{plain}", ("cuda",), "cudnn",
                "cuDNN's attention, in torch's CUDA builds" + (", sums in any order" if backward else ""),
                (8, 0), None, HALF, cute_dims, _cudnn_backward if backward else _outputs,
                ordered="never" if backward else "always",
            )  # fmt: skip
        yield Implementation(
            op, "triton", plain, plain, ("cuda",), "triton",
            f"our Triton {direction}, deterministic", (8, 0), None, ("bfloat16", "float32"), triton_dims,
            _delta if backward else lambda z, item: 0,
        )  # fmt: skip
        yield Implementation(
            op, "torch", "torch_cuda", op, ("cuda",), "masked" if masked else "torch",
            "torch's memory-efficient attention with a bias" if masked else "FlashAttention-2 as torch ships it",
            (8, 0), None, (*HALF, "float32") if masked else HALF, flash_dims, copied, ordered=asked,
        )  # fmt: skip
        yield Implementation(
            op, "torch", "sdpa", plain, ("cpu",), "sdpa",
            "torch's fused CPU attention: no score matrix in memory", workspace=_outputs,
        )  # fmt: skip


def _apex_entries() -> Iterable[Implementation]:
    why = {
        "modulate_norm": "apex's fused RMSNorm, then scale and shift",
        "layer_norm": "apex's fused LayerNorm",
        "layer_norm_backward": "apex's fused LayerNorm",
        "adamw": "apex's multi-tensor Adam, then EMA; overwrites the gradient with the clipped one",
    }
    for op, reason in why.items():
        flat = op == "adamw"
        yield Implementation(
            op, "apex", "apex", op, ("cuda",), "memory.passes", reason, (7, 0),
            dtypes=("float32",) if flat else (*HALF, "float32"),
            sizes=(("n", "below 2**31 elements", lambda n: n < 2**31),) if flat else (),
            workspace=(lambda z, item: 0) if flat else _apex_norm,
        )  # fmt: skip


# Op, its module, and bytes of fp32 partial sums that its kernels take besides its outputs; attention apart.
_TRITON: tuple[tuple[str, str, Callable[[Sizes], int]], ...] = (
    ("modulate_norm", "modulate_norm", _nothing),
    ("position_modulate_norm", "modulate_norm", _nothing),
    ("modulate_norm_backward", "modulate_norm", lambda z: 8 * norm_slices(z["t"], z["b"]) * z["b"] * z["d"]),
    ("layer_norm", "layer_norm", _nothing),
    ("layer_norm_backward", "layer_norm", lambda z: 8 * layer_norm_slices(z["l"] * z["b"]) * z["d"]),
    ("gated_residual", "gated_residual", _nothing),
    ("gated_residual_backward", "gated_residual", lambda z: 4 * gate_slices(z["t"]) * z["b"] * z["d"]),
    ("swiglu", "swiglu", _nothing),
    ("swiglu_backward", "swiglu", _nothing),
    ("merge_attention", "merge", _nothing),
    ("sum_parts", "merge", _nothing),
    ("interpolate", "velocity", _nothing),
    ("velocity_loss", "velocity", lambda z: 4 * flat_sums(z["t"] * z["b"] * z["p"])),
    ("velocity_loss_backward", "velocity", _nothing),
    ("patchify", "patches", _nothing),
    ("unpatchify", "patches", _nothing),
    ("sum_of_squares", "adamw", lambda z: 4 * flat_sums(z["n"])),  # of the flat shard [1, n]
    ("adamw", "adamw", _nothing),
    ("draw_noise", "noise", _nothing),
)


def _triton_entries() -> Iterable[Implementation]:
    """Only fp32 is summed, so float64 is for the reference."""
    for op, module, scratch in _TRITON:
        yield Implementation(
            op, "triton", module, op, ("cuda",), "memory.fused", "our Triton kernel, one pass over memory",
            (8, 0), None, ("bfloat16", "float32"), workspace=lambda sizes, item, scratch=scratch: scratch(sizes),
        )  # fmt: skip


def _reference_class(spec: OpSpec) -> str:
    """A product's, or that of a memory-bound op that is one kernel of torch already or several."""
    if spec.is_product:
        return "matmul" if spec.law == "matmul" else "unfused"
    return "memory.one_pass" if spec.plain_bytes is None else "memory.passes"


def _entries() -> Iterable[Implementation]:
    yield from _attention_entries()
    yield from _apex_entries()
    yield from _triton_entries()
    yield Implementation(
        "matmul", "torch", "torch_cuda", "matmul", ("cuda",), "matmul",
        "cuBLAS through torch, fp32 written from bf16 factors", (8, 0), None, HALF,
    )  # fmt: skip
    yield Implementation(
        "position_backward", "torch", "torch_cuda", "position_backward", ("cuda",), "memory.passes",
        "cuBLAS through torch: rows summed by products, in one fixed order", workspace=_rows_of_tokens,
    )  # fmt: skip
    for op, spec in OPS.items():
        yield Implementation(
            op, "reference", "reference", op, ("cpu", "cuda"), _reference_class(spec), "plain torch, any dtype",
            ordered="never" if op in BY_ATOMICS else "always",
        )  # fmt: skip


IMPLEMENTATIONS: tuple[Implementation, ...] = tuple(_entries())
_BY_OP: dict[str, tuple[Implementation, ...]] = {
    op: tuple(sorted((entry for entry in IMPLEMENTATIONS if entry.op == op), key=lambda e: PACKAGES.index(e.package)))
    for op in OPS
}

OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4", "apex")
NOT_ASSUMED: Mapping[str, str] = dict.fromkeys(OPTIONAL, "not part of a plain install")


def candidates(op: str) -> tuple[Implementation, ...]:
    """Every implementation of ``op``, in the list's order; the reference comes last."""
    return _BY_OP[op]


def refusal(
    entry: Implementation,
    device: str,
    *,
    dtype: str | None = None,
    sizes: Sizes | None = None,
    missing: Mapping[str, str] = NOT_ASSUMED,
    deterministic: bool = False,
    interpreter: bool = False,
) -> str | None:
    """Why ``entry`` cannot run there, or None. What is not given (dtype, sizes) refuses nothing.

    ``missing``: package -> why it cannot be used. ``deterministic``: sums in one fixed order are asked for.
    ``interpreter``: Triton's, which runs on a CPU to prove a kernel.
    """
    capability = capability_of(device)
    kind = "cpu" if capability is None else "cuda"
    interpreted = interpreter and entry.package == "triton" and kind == "cpu"
    if kind not in entry.devices and not interpreted:
        return f"runs on {' and '.join(entry.devices)}, not on {kind}"
    if entry.package in missing:
        return missing[entry.package]
    if deterministic and kind == "cuda" and entry.ordered == "never":
        return "sums in any order, and deterministic kernels are asked for"
    if capability is not None and capability < entry.capability:
        return f"needs sm_{_digits(entry.capability)} or newer, got sm_{_digits(capability)}"
    if capability is not None and entry.below is not None and capability >= entry.below:
        return f"needs a device older than sm_{_digits(entry.below)}, got sm_{_digits(capability)}"
    if dtype is not None and entry.dtypes and dtype not in entry.dtypes:
        return f"takes {' or '.join(entry.dtypes)}, got {dtype}"
    for label, rule, allows in entry.sizes:
        if sizes is not None and label in sizes and not allows(sizes[label]):
            return f"wants {label} {rule}, got {sizes[label]}"
    return None


def share(entry: Implementation, device: str, deterministic: bool = False, tuned: str = DEFAULT_DEVICE) -> float:
    """Share of the limit (tensor cores or memory) that the implementation reaches, as its rate class tells.

    ``device``: ``cpu`` or ``sm_90``; ``tuned``: the card whose tuning table is read.
    """
    known = rate(entry.rate_class, device, tuned)
    return known.share(OPS[entry.op].backward, deterministic and entry.ordered == "asked")


def _digits(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"
