"""``cinemesh kernels --tune``: measures the kernels' tiles on the GPU at hand and rewrites its tuning table.

Each kernel that asks the tuning table for its tile is timed on the calls of a step, one tile constant at a time: a
constant is halved or doubled as long as that is faster by more than the noise, until no constant changes any more.
Attention is then timed with every package that is installed: what it reached becomes its rate class on this device,
by which the registry chooses.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

import torch

from ...errors import CinemeshError
from ...files import check_output_file
from ...kernels import tuning
from ...kernels.catalogue import Implementation, candidates, refusal
from ...kernels.ops import OPS
from ...kernels.packages import missing
from ...kernels.rates import dense_bf16_flops
from ...kernels.registry import function
from ...parallel.ir.program import Program
from ..written import command, wrote
from .calls import DistinctCall, calls_of, tensors

NOISE = 0.02  # share of the time below which two timings are the same
REPETITIONS = 5
SMALLEST = {"num_warps": 1, "num_stages": 1}  # and 16 of any block: the least that tensor cores take
LARGEST = {"num_warps": 16, "num_stages": 6}  # and 256 of any block


def run(program: Program) -> None:
    """Tune every Triton kernel of ``program`` and write the table. Raises CinemeshError without a CUDA device."""
    if not torch.cuda.is_available():
        raise CinemeshError(
            "--tune measures on a GPU and there is none here", remedy="the shipped tuning tables hold without it"
        )
    name = torch.cuda.get_device_name()
    key = tuning.device_key(name)
    check_output_file(tuning.path_of(key), "the tuning table")
    before = tuning.table(key)
    tiles = {kernel: dict(rows) for kernel, rows in before.tiles.items()}
    major, minor = torch.cuda.get_device_capability()
    device = f"sm_{major}{minor}"
    calls = calls_of(program)
    for call in calls:
        for entry in usable(call, device):
            if entry.package != "triton":
                continue
            for (kernel, shape), best, seconds, first in search(launcher(entry, call), device_time_s):
                tiles.setdefault(kernel, {})[shape] = best
                print(f"{kernel} {shape}: {best}  {1e6 * seconds:.0f} us, was {1e6 * first:.0f} us", flush=True)
    origin = f"measured on {name}, {date.today().isoformat()}"
    path = tuning.write(tuning.Table(name, origin, tiles, before.rates), key)
    rates = {rate_class: dict(shares) for rate_class, shares in before.rates.items()}
    for call in calls:  # with the new tiles
        direction = "backward" if call.op.endswith("backward") else "forward"
        for entry in usable(call, device):
            masked = entry.rate_class == "masked"
            if call.op.startswith("cross_attention") != masked or entry.package == "reference":
                continue  # a class that serves both kinds of attention is rated by self-attention
            if OPS[call.op].law == "attention":
                seconds = device_time_s(launcher(entry, call))
                reached = call.flops / seconds / dense_bf16_flops(device)
                rates.setdefault(entry.rate_class, {})[direction] = round(reached, 4)
                print(f"{call.op} {entry.package}: {call.flops / seconds / 1e12:.0f} TFLOP/s", flush=True)
    tuning.write(tuning.Table(name, origin, tiles, rates), key)
    wrote(path, command("kernels"))


def usable(call: DistinctCall, device: str) -> list[Implementation]:
    """Implementations that can run a call here."""
    given = {"dtype": call.dtype, "sizes": call.sizes, "missing": missing()}
    return [entry for entry in candidates(call.op) if refusal(entry, device, **given) is None]


def launcher(entry: Implementation, call: DistinctCall, device: str = "cuda") -> Callable[[], None]:
    """One call of an implementation on tensors of its own."""
    inputs, outputs = tensors(call, device)
    return partial(function(entry), inputs, outputs, **call.attrs)


def search(
    launch: Callable[[], None], time_s: Callable[[Callable[[], None]], float]
) -> Iterator[tuple[tuple[str, str], dict[str, int], float, float]]:
    """For every tile that a launch asks for: (kernel, shape class), the best tile, its seconds, those of the first."""
    with tuning.asked() as asked:
        launch()
    for (kernel, shape), tile in asked.items():
        first = best_s = time_s(launch)
        best = tile
        changed = True
        while changed:
            changed = False
            for candidate in _neighbours(best):
                with tuning.trial(kernel, shape, candidate):
                    seconds = _attempt_s(launch, time_s)
                if seconds < best_s * (1 - NOISE):
                    best, best_s, changed = candidate, seconds, True
        yield (kernel, shape), best, best_s, first


def _neighbours(tile: dict[str, int]) -> Iterator[dict[str, int]]:
    for name, value in tile.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if SMALLEST.get(name, 16) <= step <= LARGEST.get(name, 256):
                yield {**tile, name: step}


def _attempt_s(launch: Callable[[], None], time_s: Callable[[Callable[[], None]], float]) -> float:
    """Seconds, or infinity for a tile that does not fit on the device."""
    from triton.errors import TritonError

    try:
        return time_s(launch)
    except TritonError:
        return float("inf")


def device_time_s(launch: Callable[[], None], repetitions: int = REPETITIONS) -> float:
    """Median seconds on the device of one launch, after one that compiles. L2 is as the launch before left it."""
    launch()
    times: list[float] = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)
