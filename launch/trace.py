"""``cinemesh trace``: run a small plan on gloo processes and show when every op and collective ran.

Writes a Perfetto trace of all ranks and prints, for every collective, how much of it compute hid and how much it
waited for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import start_processes

from ..errors import CinemeshError
from ..model.config import LATENTS, preset
from ..model.runner import StepRunner
from ..model.step import check
from ..model.weights import probe_values
from ..parallel.comm import gather_objects
from ..parallel.mesh import Mesh
from ..parallel.plan import Plan
from ..parallel.trace import Span, perfetto, summary, traced_step
from .clips import atomic_file
from .parity import LR, OPTIMIZER, Case, load_batch

WARM_UP_STEPS = 2


def trace(case: Case) -> list[list[Span]]:
    """The spans of ``case.steps`` steps, by rank, after two that are not looked at. Runs local processes."""
    ranks = case.plan.world_size
    if ranks == 1:
        return [_spans(case, None)]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_worker, (str(Path(folder) / "store"), case, folder), ranks, start_method="fork")
        return torch.load(Path(folder) / "spans.pt", weights_only=False)


def _worker(rank: int, store: str, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    ranks = case.plan.world_size
    meeting = dist.FileStore(store, ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
    mesh = Mesh(case.plan)
    spans = gather_objects(_spans(case, mesh))
    if rank == 0:
        torch.save(spans, Path(folder) / "spans.pt")
    mesh.close()
    dist.destroy_process_group()


def _spans(case: Case, mesh: Mesh | None) -> list[Span]:
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(probe_values(case.seed))
    load_batch(case, runner, 0)
    for _ in range(WARM_UP_STEPS):
        runner.step(LR)
    return [span for _ in range(case.steps) for span in traced_step(runner.executor)]


def run(*, plan: str, model: str, out: Path, steps: int, max_procs: int, as_json: bool) -> None:
    """Trace, write ``out`` and print the table. Raises CinemeshError when the plan does not suit model or machine."""
    chosen = Plan.parse(plan, dtype="float32")
    if chosen.world_size > max_procs:
        raise CinemeshError(
            f"{chosen.equation()} processes > --max-procs {max_procs}; trace a smaller plan, or allow as many"
        )
    case = Case(chosen, preset(model), 1, LATENTS[model], steps)
    check(case.config, chosen, case.batch)
    by_rank = trace(case)
    with atomic_file(out) as part:
        part.write_text(json.dumps(perfetto(by_rank)))
    rows = summary(by_rank[0])
    if as_json:
        spans = [[asdict(span) for span in spans] for spans in by_rank]
        print(json.dumps({"collectives": [asdict(row) for row in rows], "spans": spans}))
        return
    _show(chosen, by_rank[0], steps)
    print(f"{out}: {sum(map(len, by_rank))} spans of {len(by_rank)} ranks; open it at https://ui.perfetto.dev")


def _show(plan: Plan, spans: list[Span], steps: int) -> None:
    """Means of one step, on rank 0."""
    console = Console(highlight=False)
    total_s = (max(s.end_s for s in spans) - spans[0].issued_s) / steps
    console.print(f"plan {plan.equation()}, rank 0: a step took {total_s * 1e3:.1f} ms (mean of {steps}, measured)")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("collective", overflow="fold", min_width=24)
    for head in ("lane", "a step", "ran ms", "overlapped ms", "exposed ms"):
        table.add_column(head, overflow="fold")
    rows = summary(spans)
    for row in rows:
        numbers = (f"{seconds / steps * 1e3:.2f}" for seconds in (row.ran_s, row.overlapped_s, row.exposed_s))
        table.add_row(row.role, row.lane, str(row.count // steps), *numbers)
    console.print(table)
    ran, exposed = sum(row.ran_s for row in rows), sum(row.exposed_s for row in rows)
    if ran:
        console.print(
            f"communication ran {ran / steps * 1e3:.1f} ms, of which compute hid {1 - exposed / ran:.0%}; exposed: "
            f"{exposed / steps / total_s:.1%} of the step"
        )
