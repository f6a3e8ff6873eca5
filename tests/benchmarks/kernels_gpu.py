"""Every kernel and adapter on one GPU, on the calls of a training step, against the limits of that card.

    python tests/benchmarks/kernels_gpu.py [--json kernels.json] [--model movie-gen-30b] [--plan tp=4,cp=2,dp_shard=768]
        [--only attention swiglu] [--seconds 420]

Measures first what the card gives: a copy of 2 GiB (bytes read and written) and a bf16 product of 8192^3. Then, for
each distinct call of the step: the plain reference (torch eager), the reference under torch.compile, torch's own
kernels, ours in Triton, and flash-attn and apex where they are installed. L2 is flushed before each timed launch.
``of limit`` is

    memory-bound    least bytes of the call / time / measured copy bandwidth
    tensor          model FLOPs of the call / time / measured matmul rate

What disagrees with the reference by more than 2 % of its largest value is marked wrong. A kind of call is left out when
``--seconds`` are over, and said to be.

The JSON: ``device``, ``capability``, ``date``, ``torch``, ``triton``, ``copy_bytes_per_s``, ``matmul_flops_per_s``, and
``kernels``, a list of ``op``, ``package``, ``dtype``, ``sizes``, ``calls`` (a step), ``seconds``, ``flops``, ``bytes``,
``limit``, ``of_limit``, ``error``, ``chosen`` (by the registry).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinemesh.kernels.catalogue import candidates, refusal
from cinemesh.kernels.packages import missing
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.registry import function
from cinemesh.kernels.selection import Software, select
from cinemesh.kernels.tuning import device_key
from cinemesh.launch.commands.calls import DistinctCall, calls_of, tensors
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.calibration.card import WRONG

REPETITIONS = 7
SLOW_S = 0.5  # a launch that takes longer is timed once
SCORES_BYTES = 8 << 30  # the plain attention holds its scores: above this it is left out
MINOR_BYTES = 1 << 24  # calls that move less are launches, not kernels: left out unless named
SEARCHED = ("attention", "attention_backward", "cross_attention", "cross_attention_backward")


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


def copy_bytes_per_s(flush: Tensor) -> float:
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), flush)


def matmul_flops_per_s(flush: Tensor, size: int = 8192) -> float:
    a, b, out = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), flush)


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
    return 4 * z["b"] * z["h"] * z["t"] * z["s"] if call.op in SEARCHED else 0


def contestants(call: DistinctCall, device: str) -> dict[str, Callable[..., None]]:
    """Package -> kernel, of all that can run this call here; the plain reference also as torch compiles it."""
    found: dict[str, Callable[..., None]] = {}
    for entry in candidates(call.op):
        if refusal(entry, device, dtype=call.dtype, sizes=call.sizes, missing=missing()) is None:
            found[entry.package] = function(entry)
    if scores_bytes(call) > SCORES_BYTES:
        del found["reference"]
    elif call.op != "matmul":
        found["torch.compile"] = torch.compile(REFERENCE[call.op], dynamic=False)
    return found


def measure(call: DistinctCall, device: str, limits: dict[str, float], flush: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    chosen = select(
        call.op,
        device,
        Software(missing()),
        dtype=call.dtype,
        sizes=call.sizes,
        tuned=device_key(torch.cuda.get_device_name()),
    )
    limit = "tensor" if call.flops and (call.op == "matmul" or call.op in SEARCHED) else "memory"
    truth: list[Tensor] | None = None
    # The reference runs first where it can: the others are compared with it, else with the first of them.
    for package, kernel in sorted(contestants(call, device).items(), key=lambda item: item[0] != "reference"):
        row = {
            "op": call.op,
            "package": package,
            "dtype": call.dtype,
            "sizes": call.sizes,
            "calls": call.times,
            "flops": call.flops,
            "bytes": call.bytes,
            "limit": limit,
            "chosen": package == chosen.entry.package,
        }
        try:
            inputs, outputs = tensors(call, "cuda")
            kernel(inputs, outputs, **call.attrs)
            row["error"] = largest_error(outputs, truth) if truth is not None else 0.0
            truth = truth if truth is not None else [x.clone() for x in outputs]
            seconds = seconds_of(partial(kernel, inputs, outputs, **call.attrs), flush)
        except Exception as error:  # noqa: BLE001  a package that fails is a row of the table, and the others still run
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            rows.append(row)
            continue
        work = call.flops if limit == "tensor" else call.bytes
        rows.append(row | {"seconds": seconds, "of_limit": work / seconds / limits[limit]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sizes = " ".join(f"{label}={size}" for label, size in row["sizes"].items())
        name = f"{row['op']:<26}{sizes:<38.38}{row['package']:<15}"
        if "failed" in row:
            print(f"{name}{row['failed']}", flush=True)
            continue
        marks = ("  chosen" if row["chosen"] else "") + ("  WRONG" if row["error"] > WRONG else "")
        print(
            f"{name}{1e6 * row['seconds']:>10.0f} us {100 * row['of_limit']:>6.1f} % of {row['limit']:<7}"
            f" error {row['error']:.1e}{marks}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("kernels.json"), dest="path")
    parser.add_argument("--model", default="movie-gen-30b")
    parser.add_argument("--plan", default="tp=4,cp=2,dp_shard=768")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=420.0)
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # five times the L2 of an H100
    limits = {"memory": copy_bytes_per_s(flush), "tensor": matmul_flops_per_s(flush)}
    print(f"{name}: copy {limits['memory'] / 1e12:.2f} TB/s, bf16 product {limits['tensor'] / 1e12:.0f} TFLOP/s")
    for package, reason in missing().items():
        print(f"{package}: {reason}")

    config = preset(given.model)
    program = build_step(config, Plan.parse(given.plan), BatchShape(1, USUAL_LATENTS[given.model]))
    calls = calls_of(prepare(program, backend="nccl"))
    if given.only:
        calls = [call for call in calls if call.op in given.only]
    else:
        calls = [call for call in calls if call.bytes >= MINOR_BYTES]
    calls.sort(key=lambda call: -call.bytes * call.times)  # what moves most of a step first, if time runs out
    rows: list[dict[str, Any]] = []
    for call in calls:
        if time.monotonic() > deadline:
            print(f"{call.op} {call.shape}: left out, {given.seconds:.0f} s are over")
            continue
        measured = measure(call, f"sm_{major}{minor}", limits, flush)
        show(measured)
        rows += measured
        torch.cuda.empty_cache()
    given.path.write_text(
        json.dumps(
            {
                "device": name,
                "capability": [major, minor],
                "date": date.today().isoformat(),
                "torch": torch.__version__,
                "copy_bytes_per_s": limits["memory"],
                "matmul_flops_per_s": limits["tensor"],
                "kernels": rows,
            },
            indent=1,
        )
    )
    print(f"wrote {given.path}")


if __name__ == "__main__":
    main()
