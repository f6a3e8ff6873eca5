"""Every implementation of every op: where it can run, what it needs besides its outputs, how fast (torch-free).

One list, read by ``registry.py`` on the machine that trains and by whatever plans a step where no GPU is. The choice
among the usable ones goes by rate class; of equal ones the earlier in the list wins. On a CPU the list's order decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import CinemeshError
from .ops import OPS
from .rates import rate
from .signature import Sizes
from .tiles import SCRATCH_BYTES
from .tuning import DEFAULT_DEVICE

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "apex", "triton", "torch", "reference")

Workspace = Callable[[Sizes, int], int]  # sizes, bytes of an element -> bytes

ANY_CAPABILITY = (0, 0)
HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Implementation:
    """``function`` of ``module`` runs ``op``, if device, dtype and sizes allow.

    ``capability``: the least compute capability; ``below``: the first one that is too new. ``sizes``: label -> (rule in
    words, test). ``workspace``: bytes besides its outputs. ``why``: what it is, for people. ``margin``: it can leave
    SMs alone (``sm_margin``).
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


def _torch_backward(z: Sizes, item: int) -> int:
    """As flash-attn, and dq, dk, dv before they are copied into ours."""
    return _flash_backward(z, item) + (_queries(z) + 2 * z["s"] * z["b"] * z["h"]) * z["k"] * item


def _apex_norm(z: Sizes, item: int) -> int:
    """Output or gradients and statistics, allocated by apex and copied into ours, and a cast gradient."""
    rows = z.get("t", z.get("l", 1)) * z["b"]
    return rows * (2 * z["d"] * item + 8) + 2 * z["d"] * item


# -- the list ------------------------------------------------------------------------------------------------------


def _attention_entries() -> Iterable[Implementation]:
    flash_dims = (("k", "a multiple of 8, at most 256", lambda k: k % 8 == 0 and k <= 256),)
    cute_dims = (("k", "a multiple of 8, at most 128", lambda k: k % 8 == 0 and k <= 128),)
    triton_dims = (("k", "64 or 128", lambda k: k in (64, 128)),)
    for op in ("attention", "attention_backward", "cross_attention", "cross_attention_backward"):
        backward = op.endswith("backward")
        masked = op.startswith("cross_")
        plain = op.removeprefix("cross_")
        direction = "backward" if backward else "forward"
        held = _flash_backward if backward else _outputs
        if not masked:  # none of the three takes a key mask
            yield Implementation(
                op, "flash-attn", "flash_attention", f"{plain}_2", ("cuda",), "attention.fa2",
                "FlashAttention-2, package flash-attn", (8, 0), None, HALF, flash_dims, held,
            )  # fmt: skip
            yield Implementation(
                op, "flash-attn-3", "flash_attention", f"{plain}_3", ("cuda",), "attention.fa3",
                "FlashAttention-3 for Hopper, built from source", (9, 0), (10, 0), HALF, flash_dims, held, True,
            )  # fmt: skip
            yield Implementation(
                op, "flash-attn-4", "flash_attention", f"{plain}_4", ("cuda",), "attention.fa4",
                "FlashAttention in CuTe, package flash-attn-4", (9, 0), (12, 0), HALF, cute_dims,
                _flash_backward if backward else lambda z, item: 0,
            )  # fmt: skip
        yield Implementation(
            op, "triton", plain, plain, ("cuda",), "attention.triton",
            f"our Triton {direction}, deterministic", (8, 0), None, ("bfloat16", "float32"), triton_dims,
            _delta if backward else lambda z, item: 0,
        )  # fmt: skip
        yield Implementation(
            op, "torch", "torch_cuda", op, ("cuda",), "attention.masked" if masked else "attention.torch",
            "torch's memory-efficient attention with a bias" if masked else "FlashAttention-2 as torch ships it",
            (8, 0), None, (*HALF, "float32") if masked else HALF, flash_dims,
            _torch_backward if backward else _outputs,
        )  # fmt: skip
        yield Implementation(
            op, "torch", "sdpa", plain, ("cpu",), "attention.cpu",
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


# Module of each op that Triton runs; attention apart. Only fp32 is summed, so float64 is for the reference.
TRITON_OPS = {
    "modulate_norm": "modulate_norm",
    "position_modulate_norm": "modulate_norm",
    "modulate_norm_backward": "modulate_norm",
    "layer_norm": "layer_norm",
    "layer_norm_backward": "layer_norm",
    "gated_residual": "gated_residual",
    "gated_residual_backward": "gated_residual",
    "swiglu": "swiglu",
    "swiglu_backward": "swiglu",
    "merge_attention": "merge",
    "sum_parts": "merge",
    "interpolate": "velocity",
    "velocity_loss": "velocity",
    "velocity_loss_backward": "velocity",
    "patchify": "patches",
    "unpatchify": "patches",
    "sum_of_squares": "adamw",
    "adamw": "adamw",
    "draw_noise": "noise",
}


def _triton_entries() -> Iterable[Implementation]:
    for op, module in TRITON_OPS.items():
        yield Implementation(
            op, "triton", module, op, ("cuda",), "memory.fused", "our Triton kernel, one pass over memory",
            (8, 0), None, ("bfloat16", "float32"), workspace=_scratch(op),
        )  # fmt: skip


def _scratch(op: str) -> Workspace:
    """Partial sums of the op's kernels."""
    taken = SCRATCH_BYTES.get(op)
    return lambda sizes, item: taken(sizes) if taken else 0


# Ops whose plain torch is one kernel on CUDA already: nothing is left to fuse.
ONE_PASS = (
    *("add_position", "add", "residual", "gated_residual", "silu", "time_features", "add_table", "sum_to"),
    *("drop_caption", "drop_mask", "cast", "copy", "accumulate", "zero_gaps", "clip_factor"),
)
ATTENTION = ("attention", "attention_backward", "cross_attention", "cross_attention_backward")


def _entries() -> Iterable[Implementation]:
    yield from _attention_entries()
    yield from _apex_entries()
    yield from _triton_entries()
    yield Implementation(
        "matmul", "torch", "torch_cuda", "matmul", ("cuda",), "matmul",
        "cuBLAS through torch, fp32 written from bf16 factors", (8, 0), None, HALF,
    )  # fmt: skip
    for op in OPS:
        if op in ATTENTION:
            rate_class = "attention.reference"
        else:
            rate_class = "matmul" if op == "matmul" else "memory.one_pass" if op in ONE_PASS else "memory.passes"
        plain = op.removeprefix("cross_") if op in ATTENTION else op
        yield Implementation(op, "reference", "reference", plain, ("cpu", "cuda"), rate_class, "plain torch, any dtype")


IMPLEMENTATIONS: tuple[Implementation, ...] = tuple(_entries())
_BY_OP: dict[str, tuple[Implementation, ...]] = {
    op: tuple(sorted((entry for entry in IMPLEMENTATIONS if entry.op == op), key=lambda e: PACKAGES.index(e.package)))
    for op in OPS
}

OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4", "apex")
NOT_ASSUMED: Mapping[str, str] = dict.fromkeys(OPTIONAL, "not part of a plain install")


def capability_of(device: str) -> tuple[int, int] | None:
    """``cpu`` -> None, ``sm_90`` -> (9, 0); ``cuda`` is taken for an H100 where none is at hand."""
    if device == "cpu":
        return None
    digits = "90" if device == "cuda" else device.removeprefix("sm_")
    if not digits.isdigit() or len(digits) < 2:
        raise CinemeshError(f"device {device!r} is unknown", remedy="write cpu, cuda or a capability such as sm_90")
    return int(digits[:-1]), int(digits[-1])


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
    interpreter: bool = False,
) -> str | None:
    """Why ``entry`` cannot run there, or None. What is not given (dtype, sizes) refuses nothing.

    ``missing``: package -> why it cannot be used. ``interpreter``: Triton's, which runs on a CPU to prove a kernel.
    """
    capability = capability_of(device)
    kind = "cpu" if capability is None else "cuda"
    interpreted = interpreter and entry.package == "triton" and kind == "cpu"
    if kind not in entry.devices and not interpreted:
        return f"runs on {' and '.join(entry.devices)}, not on {kind}"
    if entry.package in missing:
        return missing[entry.package]
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


def choose(
    op: str,
    device: str = "cuda",
    *,
    dtype: str | None = None,
    sizes: Sizes | None = None,
    missing: Mapping[str, str] = NOT_ASSUMED,
    tuned: str = DEFAULT_DEVICE,
) -> Implementation | None:
    """What runs ``op`` on ``device`` (``cpu``, ``cuda`` or ``sm_90``): the usable one of the best rate class.

    None: the plain reference, which runs everywhere. ``dtype`` is that of the activations, ``sizes`` maps labels of the
    op table to local sizes, ``tuned`` the device whose tuning table is read.
    """
    usable = [e for e in candidates(op) if refusal(e, device, dtype=dtype, sizes=sizes, missing=missing) is None]
    best = usable[0] if device == "cpu" else max(usable, key=lambda entry: share(entry, tuned))
    return None if best.package == "reference" else best


def share(entry: Implementation, tuned: str = DEFAULT_DEVICE) -> float:
    """Share of the limit (tensor cores or memory) that the implementation's rate class reaches on a tuned device."""
    return rate(entry.rate_class, tuned).share(entry.op.endswith("backward"))


def _digits(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"
