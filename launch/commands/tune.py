"""``cinemesh kernels --tune``: measures the kernels' tiles on the GPU at hand and rewrites its tuning table.

Attention comes first, then what moves most bytes a step. Each kernel that asks the tuning table for its tile is timed
on its call, one tile constant at a time: a constant is halved or doubled as long as that is faster by more than the
noise, until no constant changes any more. Attention is then timed with every package that is installed: what it reached
becomes its rate class on this device, by which the registry chooses. The table is written after every kernel, and a
tile or a kernel that fails ends nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from ...errors import CinemeshError, in_a_line
from ...files import check_output_file
from ...kernels import tuning
from ...kernels.catalogue import Implementation, candidates, refusal
from ...kernels.ops import OPS
from ...kernels.packages import interpreter, missing
from ...kernels.rates import dense_bf16_flops
from ...kernels.registry import function
from ...parallel.ir.program import Program
from ..written import command, wrote
from .calls import DistinctCall, calls_of, tensors

NOISE = 0.02  # share of the time below which two timings are the same
REPETITIONS = 5
SMALLEST = {"num_warps": 1, "num_stages": 1, "HELD": 0}  # and 16 of any block: the least that tensor cores take
LARGEST = {"num_warps": 16, "num_stages": 6, "HELD": 1}
BY_ONE = ("num_stages", "HELD")  # the others by a factor of two
BLOCK, WIDER = 256, 4  # the largest of a block of rows; of a longer one, of a flat tensor, times what it asks for

KernelCall = Callable[[], object]


@dataclass(frozen=True)
class TimingDevice:
    """Where kernels are timed: the registry's name of it (``sm_90``), torch's, and how a launch is."""

    device: str
    place: str
    time_s: Callable[[KernelCall], float]

    @classmethod
    def here(cls) -> TimingDevice:
        major, minor = torch.cuda.get_device_capability()
        return cls(f"sm_{major}{minor}", "cuda", device_time_s)


def run(program: Program, out: Path | None, seconds: float | None) -> None:
    """Tune every Triton kernel of ``program`` for at most ``seconds`` and write the table to ``out``.

    None: until all is tuned; into the package's table of this GPU. Raises CinemeshError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise CinemeshError(
            "--tune measures on a GPU and there is none here", remedy="the shipped tuning tables hold without it"
        )
    until = math.inf if seconds is None else time.monotonic() + seconds
    name = torch.cuda.get_device_name()
    key = tuning.device_key(name)
    path = out or tuning.path_of(key)
    check_output_file(path, "--out" if out else "the tuning table")
    origin = f"measured on {name}, {date.today().isoformat()}"
    known = replace(tuning.table(key), device=name, origin=origin)
    for table, said in tables_found(calls_of(program), known, TimingDevice.here(), until):
        tuning.write(table, path)
        print(said, flush=True)
    wrote(path, command("kernels") if out is None else f"copy it to {tuning.path_of(key)}")


def tables_found(
    calls: Sequence[DistinctCall], known: tuning.Table, card: TimingDevice, until: float = math.inf
) -> Iterator[tuple[tuning.Table, str]]:
    """After every kernel: ``known`` with all that was found by then, and a line about that kernel.

    ``until``, a moment of ``time.monotonic``: no kernel and no tile begins later; what is left out is told.
    """
    for call in sorted(calls, key=_value, reverse=True):
        for entry in _worth(call, card.device):
            said = f"{call.op} {call.shape}, {entry.package}: "
            if time.monotonic() > until:
                yield known, f"{said}left out, the time is over"
                continue
            try:
                known, told = _measured(call, entry, known, card, until)
            except Exception as error:  # noqa: BLE001  CUDA's, MLIR's, cuDNN's: the other kernels are still measured
                told = f"failed, {type(error).__name__}: {in_a_line(error, lines=1)}"
            yield known, said + told


def _value(call: DistinctCall) -> tuple[bool, int]:
    """By which calls are sorted: attention by its FLOPs in a step, then all others by their bytes."""
    attention = OPS[call.op].law == "attention"
    return attention, call.times * (call.flops if attention else call.bytes)


def _worth(call: DistinctCall, device: str) -> list[Implementation]:
    """What is measured of a call: ours, whose tiles are searched, and then, of attention, every other package."""
    rated = OPS[call.op].law == "attention"
    found = [e for e in usable(call, device) if e.package == "triton" or (rated and e.package != "reference")]
    return sorted(found, key=lambda entry: entry.package != "triton")


def _measured(
    call: DistinctCall, entry: Implementation, known: tuning.Table, card: TimingDevice, until: float
) -> tuple[tuning.Table, str]:
    """``known`` with the tiles of one implementation, if it asks for any, and then its rate; and a line about both."""
    launch = launcher(entry, call, card.place)
    tiles = {kernel: dict(rows) for kernel, rows in known.tiles.items()}
    rates = {rate_class: dict(shares) for rate_class, shares in known.rates.items()}
    said: list[str] = []
    with ExitStack() as new_tiles:
        for (kernel, shape), best, best_s, first_s in search(launch, card.time_s, until):
            tiles.setdefault(kernel, {})[shape] = best
            new_tiles.enter_context(tuning.trial(kernel, shape, best))
            said.append(f"{kernel} {shape} {best}, {1e6 * best_s:.0f} us, was {1e6 * first_s:.0f} us")
        masked = entry.rate_class == "masked"
        # A class that serves both kinds of attention is rated by self-attention.
        if OPS[call.op].law == "attention" and call.op.startswith("cross_attention") == masked:
            seconds = card.time_s(launch)
            direction = "backward" if OPS[call.op].backward else "forward"
            reached = call.flops / seconds / dense_bf16_flops(card.device)
            rates.setdefault(entry.rate_class, {})[direction] = round(reached, 4)
            said.append(f"{call.flops / seconds / 1e12:.0f} TFLOP/s")
    return replace(known, tiles=tiles, rates=rates), "; ".join(said) or "nothing to choose"


def usable(call: DistinctCall, device: str) -> list[Implementation]:
    """Implementations that can run a call here."""
    given = {"dtype": call.dtype, "sizes": call.sizes, "missing": missing(), "interpreter": interpreter()}
    return [entry for entry in candidates(call.op) if refusal(entry, device, **given) is None]


def launcher(entry: Implementation, call: DistinctCall, place: str) -> KernelCall:
    """One call of an implementation on tensors of its own."""
    inputs, outputs = tensors(call, place)
    return partial(function(entry), inputs, outputs, **call.attrs)


def search(
    launch: KernelCall, time_s: Callable[[KernelCall], float], until: float = math.inf
) -> Iterator[tuple[tuple[str, str], dict[str, int], float, float]]:
    """For every tile that a launch asks for: (kernel, shape class), the best tile, its seconds, those of the first.

    Where the time is over, the best so far; of a kernel that was not begun, nothing.
    """
    with tuning.asked() as asked:
        launch()
    for (kernel, shape), tile in asked.items():
        if time.monotonic() > until:
            return
        first = best_s = time_s(launch)
        best = tile
        changed = True
        while changed:
            changed = False
            for candidate in _neighbours(best, tile):
                if time.monotonic() > until:
                    break
                with tuning.trial(kernel, shape, candidate):
                    seconds = _attempt_s(launch, time_s)
                if seconds < best_s * (1 - NOISE):
                    best, best_s, changed = candidate, seconds, True
        yield (kernel, shape), best, best_s, first


def _neighbours(tile: dict[str, int], first: dict[str, int]) -> Iterator[dict[str, int]]:
    for name, value in tile.items():
        most = LARGEST.get(name, BLOCK if first[name] <= BLOCK else WIDER * first[name])
        steps = (value - 1, value + 1) if name in BY_ONE else (value // 2, value * 2)
        for step in steps:
            if SMALLEST.get(name, 16) <= step <= most:
                yield {**tile, name: step}


def _attempt_s(launch: KernelCall, time_s: Callable[[KernelCall], float]) -> float:
    """Seconds, or infinity for a tile that does not fit on the device, or that Triton cannot compile."""
    try:
        return time_s(launch)
    except Exception:  # noqa: BLE001  Triton's own, MLIR's RuntimeError, ptxas's: such a tile is none
        return math.inf


def device_time_s(launch: KernelCall, repetitions: int = REPETITIONS) -> float:
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
