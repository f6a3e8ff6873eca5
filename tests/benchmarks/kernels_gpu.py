"""Every kernel and adapter on one GPU, on the calls of a training step, against the limits of that card.

    python tests/benchmarks/kernels_gpu.py [--out kernels.json] [--model movie-gen-30b] [--plan tp=4,cp=2,dp_shard=768]
        [--only attention swiglu] [--seconds 420]

Measures first what the card gives: a copy of 2 GiB (bytes read and written) and a bf16 product of 8192^3. Then, for
each distinct call of the step, what takes most of it first: the plain reference (torch eager), torch's own kernels,
cuDNN's, ours in Triton, and flash-attn and apex where they are installed. Last, if there is time, the reference under
torch.compile. L2 is flushed before each timed launch. ``of limit`` is

    memory-bound    least bytes of the call / time / measured copy bandwidth
    tensor          model FLOPs of the call / time / measured matmul rate

What disagrees with the reference by more than 2 % of its largest value is marked wrong. No kernel begins when
``--seconds`` are over, and the JSON is written after every call: whatever ends a run, what it measured is there.

The JSON: ``device``, ``capability``, ``date``, ``torch``, ``triton``, ``copy_bytes_per_s``, ``matmul_flops_per_s``, and
``kernels``, a list of ``op``, ``package``, ``dtype``, ``sizes``, ``calls`` (a step), ``seconds``, ``flops``, ``bytes``,
``limit``, ``of_limit``, ``error``, ``chosen`` (by the registry); ``failed`` in place of the times of one that did. Make
a cluster file of it: ``cinemesh calibrate --card kernels.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from cinemesh.errors import in_a_line
from cinemesh.files import atomic_file
from cinemesh.kernels.ops import OPS
from cinemesh.kernels.packages import missing
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.registry import function
from cinemesh.kernels.selection import Software, select
from cinemesh.kernels.tuning import device_key
from cinemesh.launch.commands.calls import DistinctCall, calls_of, tensors
from cinemesh.launch.commands.tune import TimingDevice, usable
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.calibration.card import SIDE, WRONG

REPETITIONS = 7
SLOW_S = 0.5  # a launch that takes longer is timed once
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
COPY_BYTES = 1 << 30
SCORES_BYTES = 8 << 30  # the plain attention holds its scores: above this it is left out
MINOR_BYTES = 1 << 24  # calls that move less are launches, not kernels: left out unless named
COMPILED = "torch.compile"

Row = dict[str, Any]
Kernel = Callable[..., object]


def card_here(place: str = "cuda") -> TimingDevice:
    """This GPU, L2 flushed before each timed launch; ``place``: ``cpu`` where CUDA is pretended."""
    major, minor = torch.cuda.get_device_capability()
    flush = torch.empty(FLUSH_BYTES if place == "cuda" else 1, dtype=torch.uint8, device=place)
    return TimingDevice(f"sm_{major}{minor}" if place == "cuda" else "cpu", place, partial(seconds_of, flush=flush))


def seconds_of(launch: Callable[[], Any], flush: Tensor) -> float:
    """Median time on the device, L2 flushed before each launch; the first launches compile and warm up."""
    launch()
    launch()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < REPETITIONS and sum(times) < SLOW_S:
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)


def copy_bytes_per_s(card: TimingDevice, size: int) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device=card.place) for _ in range(2))
    return 2 * source.numel() / card.time_s(lambda: target.copy_(source))


def matmul_flops_per_s(card: TimingDevice, side: int) -> float:
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16, device=card.place) for _ in range(3))
    return 2 * side**3 / card.time_s(lambda: torch.mm(a, b, out=out))


def limits_of(card: TimingDevice, copied: int = COPY_BYTES, side: int = SIDE) -> dict[str, float]:
    """What the card gives, as the JSON says it."""
    return {"copy_bytes_per_s": copy_bytes_per_s(card, copied), "matmul_flops_per_s": matmul_flops_per_s(card, side)}


def document(limits: dict[str, float], rows: list[Row]) -> dict[str, Any]:
    """The JSON, as ``calibrate --card`` reads it."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **limits,
        "kernels": rows,
    }


def write(values: dict[str, Any], path: Path) -> None:
    """Whole or not at all: who reads it while the run goes on finds all of the last call."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1))


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Over the floating outputs, relative to the largest value of each; NaN is infinite."""
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        if x.is_floating_point():
            error = (x.double() - y.double()).abs().max().item() / max(y.double().abs().max().item(), 1e-30)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def scores_bytes(call: DistinctCall) -> int:
    z = call.sizes
    return 4 * z["b"] * z["h"] * z["t"] * z["s"] if OPS[call.op].law == "attention" else 0


def contestants(call: DistinctCall, card: TimingDevice) -> dict[str, Kernel]:
    """Package -> kernel, of all that can run this call here, the plain reference first."""
    found = {entry.package: function(entry) for entry in usable(call, card.device)}
    if scores_bytes(call) > SCORES_BYTES:
        del found["reference"]
    return dict(sorted(found.items(), key=lambda item: item[0] != "reference"))


def is_tensor_bound(call: DistinctCall) -> bool:
    return OPS[call.op].is_product


def measure(
    call: DistinctCall, kernels: Mapping[str, Kernel], card: TimingDevice, limits: dict[str, float], until: float
) -> Iterator[Row]:
    """A row for each kernel that begins before ``until``; each is compared with the first one that ran."""
    chosen = select(
        call.op,
        card.device,
        Software(missing()),
        dtype=call.dtype,
        sizes=call.sizes,
        tuned=device_key(torch.cuda.get_device_name()),
    )
    tensor = is_tensor_bound(call)
    truth: list[Tensor] | None = None
    for package, kernel in kernels.items():
        if time.monotonic() > until:
            return
        row = {
            "op": call.op,
            "package": package,
            "dtype": call.dtype,
            "sizes": call.sizes,
            "calls": call.times,
            "flops": call.flops,
            "bytes": call.bytes,
            "limit": "tensor" if tensor else "memory",
            "chosen": package == chosen.entry.package,
        }
        try:
            inputs, outputs = tensors(call, card.place)
            kernel(inputs, outputs, **call.attrs)
            row["error"] = largest_error(outputs, truth) if truth is not None else 0.0
            truth = truth if truth is not None else [x.clone() for x in outputs]
            seconds = card.time_s(partial(kernel, inputs, outputs, **call.attrs))
        except Exception as error:  # noqa: BLE001  a package that fails is a row of the table, and the others still run
            yield row | {"failed": f"{type(error).__name__}: {in_a_line(error, lines=1, most=160)}"}
            continue
        reached = call.flops / limits["matmul_flops_per_s"] if tensor else call.bytes / limits["copy_bytes_per_s"]
        yield row | {"seconds": seconds, "of_limit": reached / seconds}


def of_a_step(call: DistinctCall, limits: dict[str, float]) -> float:
    """Seconds of a step that all such calls take, about: where products are, what they would at the product's rate."""
    each = max(call.bytes / limits["copy_bytes_per_s"], call.flops / limits["matmul_flops_per_s"])
    return call.times * each


def measure_all(
    calls: Sequence[DistinctCall], card: TimingDevice, limits: dict[str, float], until: float, *, compiled: bool
) -> Iterator[Row]:
    """Rows of all calls, what takes most of a step first; the reference ``compiled`` at the end, where it is asked."""
    ordered = sorted(calls, key=lambda call: -of_a_step(call, limits))
    for call in ordered:
        yield from measure(call, contestants(call, card), card, limits, until)
        torch.cuda.empty_cache()
    for call in ordered if compiled else ():
        if call.op != "matmul" and scores_bytes(call) <= SCORES_BYTES and time.monotonic() < until:
            both = {"reference": REFERENCE[call.op], COMPILED: torch.compile(REFERENCE[call.op], dynamic=False)}
            yield from (row for row in measure(call, both, card, limits, until) if row["package"] == COMPILED)


def timed_calls(model: str, plan: str, only: Sequence[str]) -> list[DistinctCall]:
    """Those of a step whose ops are named or, where none is, that are more than launches."""
    program = build_step(preset(model), Plan.parse(plan), BatchShape(1, USUAL_LATENTS[model]))
    calls = calls_of(prepare(program, backend="nccl"))
    return [call for call in calls if (call.op in only if only else call.bytes >= MINOR_BYTES)]


def shown(row: Row) -> str:
    sizes = " ".join(f"{label}={size}" for label, size in row["sizes"].items())
    name = f"{row['op']:<26}{sizes:<38.38}{row['package']:<15}"
    if "failed" in row:
        return f"{name}{row['failed']}"
    marks = ("  chosen" if row["chosen"] else "") + ("  WRONG" if row["error"] > WRONG else "")
    return (
        f"{name}{1e6 * row['seconds']:>10.0f} us {100 * row['of_limit']:>6.1f} % of {row['limit']:<7}"
        f" error {row['error']:.1e}{marks}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--model", default="movie-gen-30b")
    parser.add_argument("--plan", default="tp=4,cp=2,dp_shard=768")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=420.0)
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    card = card_here()
    limits = limits_of(card)
    copy, product = limits["copy_bytes_per_s"] / 1e12, limits["matmul_flops_per_s"] / 1e12
    print(f"{torch.cuda.get_device_name()}: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s")
    for package, reason in missing().items():
        print(f"{package}: {reason}")
    rows: list[Row] = []
    write(document(limits, rows), given.out)
    calls = timed_calls(given.model, given.plan, given.only)
    for row in measure_all(calls, card, limits, until, compiled=True):
        rows.append(row)
        print(shown(row), flush=True)
        write(document(limits, rows), given.out)
    if time.monotonic() > until:
        print(f"{given.seconds:.0f} s are over: not all was measured")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
