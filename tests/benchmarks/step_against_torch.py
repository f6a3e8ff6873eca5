"""Step time and peak memory against torch's own FSDP2 + DTensor TP/SP + gathered K and V: interleaved pairs.

    python tests/benchmarks/step_against_torch.py [--pairs 20] [--shape small]
        [--plans tp4 cp4 dp4 tp2cp2] [--json results.json]

Four gloo processes. Both sides hold the same model, batch and dtype (float32) in the same processes and take steps
in turn, so that the machine's noise falls on both. Prints the median of the paired time ratios with the interval that
holds its median with 95 % confidence, and the ratio of peak live bytes. ``stock`` is the same step with gloo's own
reduce-scatter. What the sides differ in: cinemesh also keeps an EMA; the baseline keeps every activation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import start_processes

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.live_bytes import LiveBytes
from benchmarks.torch_baseline import TorchBaseline

from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input, training_inputs
from cinemesh.model.runner import StepRunner, data_share
from cinemesh.model.step import Optimizer, build_step
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.comm import Communicator, gather_objects
from cinemesh.parallel.runtime.mesh import Mesh

PLANS = {"tp4": {"tp": 4}, "cp4": {"cp": 4}, "dp4": {"dp_shard": 4}, "tp2cp2": {"tp": 2, "cp": 2}}


@dataclass(frozen=True)
class Shape:
    """A model, the latent and the samples of the global batch."""

    config: ModelConfig
    latent: tuple[int, int, int]
    samples: int


def _shape(name: str, width: int, ffn: int, latent: tuple[int, int, int], samples: int) -> Shape:
    config = ModelConfig(name, 4, width, 8, ffn, (Encoder("text", 64, 32),), position_lengths=(4, 16, 16))
    return Shape(config, latent, samples)


SHAPES = {
    "small": _shape("small", 192, 512, (2, 16, 16), 8),  # the quick start's: 128 tokens a sample
    "larger": _shape("larger", 256, 704, (2, 32, 32), 4),  # 512 tokens: products take most of both sides' time
}


class Ours:
    """cinemesh's step on fixed inputs."""

    def __init__(self, shape: Shape, plan: Plan, mesh: Mesh, *, stock: bool) -> None:
        config, samples = shape.config, shape.samples
        batch = BatchShape(samples // plan.data_ranks, shape.latent)
        program = prepare(build_step(config, plan, batch), backend="nccl" if stock else "gloo")
        self.runner = StepRunner(config, plan, batch, Optimizer(), mesh, program=program, comm=Communicator(mesh))
        self.runner.initialise(probe_values(0))
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(samples, config.channels, *shape.latent, generator=generator)
        text = {
            text_input(e.name): torch.randn(e.tokens, samples, e.width, generator=generator) for e in config.encoders
        }
        mask = torch.ones(samples, config.text_tokens, dtype=torch.bool)
        mask[:, -1] = False
        whole = {LATENTS: latents, **dict.fromkeys((IDS, PLACES), torch.arange(samples)), MASK: mask, **text}
        share = data_share(whole, training_inputs(config, plan, batch), plan, self.runner.coordinates)
        self.runner.load(0, share)

    def step(self) -> None:
        self.runner.step(1e-4)


def peak_bytes(step: Any) -> int:
    """Most storage alive in a step, everything that lives between steps included."""
    with LiveBytes() as live:
        step()
        live.restart()
        step()
    return live.peak_bytes


def work(rank: int, world_size: int, store: str, name: str, arguments: argparse.Namespace, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, world_size), rank=rank, world_size=world_size)
    sizes, shape = PLANS[name], SHAPES[arguments.shape]
    plan = Plan.from_dict(
        {**sizes, "dtype": "float32", "recompute": arguments.recompute, "prefetch": arguments.prefetch}
    )
    mesh = Mesh(plan)
    steps = {
        "ours": Ours(shape, plan, mesh, stock=False).step,
        "stock": Ours(shape, plan, mesh, stock=True).step,
        "torch": TorchBaseline(shape.config, sizes, shape.latent, shape.samples).step,
    }
    times: dict[str, list[float]] = {side: [] for side in steps}
    for round_ in range(arguments.pairs + 2):
        for side, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            if round_ >= 2:
                times[side].append(time.perf_counter() - start)
    peaks = {side: gather_objects(peak_bytes(step)) for side, step in steps.items()}
    if rank == 0:
        Path(results).write_text(json.dumps({"times": times, "peaks": {s: max(p) for s, p in peaks.items()}}))  # type: ignore
    dist.destroy_process_group()


def interval(ratios: list[float]) -> tuple[float, float]:
    """Order statistics around the median that hold it with about 95 % confidence (normal approximation)."""
    ordered, n = sorted(ratios), len(ratios)
    half = 0.98 * n**0.5
    return ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, int(n / 2 + half))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--recompute", default="selective")
    parser.add_argument("--prefetch", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    heads = ("plan", "torch s", "ours s", "ratio", "95 % interval", "stock RS", "peak MB", "ratio")
    print("".join(f"{head:>16}" for head in heads))
    for name in arguments.plans:
        with tempfile.TemporaryDirectory() as folder:
            results = os.path.join(folder, "results.json")
            start_processes(work, (4, os.path.join(folder, "store"), name, arguments, results), 4, start_method="fork")
            measured = json.loads(Path(results).read_text())
        times, peaks = measured["times"], measured["peaks"]
        ratio = [a / b for a, b in zip(times["ours"], times["torch"], strict=True)]
        stock = [a / b for a, b in zip(times["stock"], times["torch"], strict=True)]
        low, high = interval(ratio)
        row = {
            "plan": name, "torch_s": statistics.median(times["torch"]), "ours_s": statistics.median(times["ours"]),
            "ratio": statistics.median(ratio), "low": low, "high": high, "stock_ratio": statistics.median(stock),
            "peak_bytes": peaks["ours"], "peak_ratio": peaks["ours"] / peaks["torch"], "pairs": len(ratio),
        }  # fmt: skip
        rows.append(row)
        cells = (name, f"{row['torch_s']:.3f}", f"{row['ours_s']:.3f}", f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}",
                 f"{row['stock_ratio']:.3f}", f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.3f}")  # fmt: skip
        print("".join(f"{cell:>16}" for cell in cells), flush=True)
    if arguments.json:
        facts = {
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "shape": arguments.shape,
            "recompute": arguments.recompute,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
