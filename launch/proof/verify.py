"""``cinemesh verify``: prove on small shapes that a plan computes what the plain autograd model computes.

Runs the plan's program for a few steps and compares loss, every parameter's gradient, the gradient norm and every
weight update with ``model/reference.py`` in float64 on a CPU; the collectives that ran with the program's; the bytes
that were alive with those predicted. Zero-initialised parameters are filled with noise first: behind zero gates no
gradient could be wrong. On a CPU it starts gloo processes, on GPUs one each; under torchrun it is one of the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ...errors import CinemeshError
from ...model.inputs import BatchShape
from ...model.runner import StepRunner
from ...model.step import build_step, check
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Space
from ...parallel.passes.arena import place
from ...parallel.passes.liveness import lifetimes
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.comm import gather_at_first, gather_objects
from ...parallel.runtime.mesh import Mesh, backend_of
from ..cluster.environment import device_here, launched, processes_here, say_device, visible_gpus, world_size
from ..cluster.processes import forked, joined, launch, rank_main
from ..models import read_model
from ..options import Device
from ..plans import read_plan
from ..progress import progress
from ..tables import new_console, plain_table
from .bounds import QUANTITIES, bounds_of, unseen, worst_of
from .parity import OPTIMIZER, Case, RankRun, run_rank

MAX_PROCS = 8  # on a CPU, unless told
HEAD_DIM = {"cpu": 8, "cuda": 128}  # unless told: the smallest step; one that a GPU's attention kernels take
DTYPE = {"cpu": "float64", "cuda": "float32"}  # unless told: the most exact that the device's own kernels take


@dataclass
class Report:
    """``worst``: the largest max|a - b| / max|b| of loss, gradients and weight updates; ``where``: whose it is.

    ``live_bytes_equal``: after every record of the last step exactly the persistent buffers and the arenas, that of
    the host with that of the device, were alive.
    ``peak_bytes_predicted`` are those; ``workspace_bytes`` the most that one record may add. ``replicas_equal``: ranks
    that differ on dp_replicate alone hold bitwise the same weights. ``device``: of rank 0, as torch names it.
    """

    ok: bool
    worst: dict[str, float]
    bounds: dict[str, float]
    where: dict[str, str]
    ledger_equal: bool
    ledger_difference: str | None
    peak_bytes_predicted: int
    workspace_bytes: int
    peak_bytes_ran: int
    live_bytes_equal: bool
    replicas_equal: bool
    plan: str
    dtype: str
    processes: int
    device: str
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def small_case(
    plan: Plan, model: str = "tiny", *, max_procs: int = MAX_PROCS, steps: int = 3, head_dim: int = HEAD_DIM["cpu"]
) -> Case:
    """The model that is asked for, shrunk until it runs here. tp and cp stay; dp_shard, then dp_replicate, shrink.

    Raises CinemeshError when the plan does not divide the model, or tp * cp alone is more than ``max_procs``.
    """
    remarks: list[str] = []
    if plan.tp * plan.cp > max_procs:
        raise CinemeshError(
            f"tp({plan.tp}) * cp({plan.cp}) = {plan.tp * plan.cp} > --max-procs {max_procs}, and tp and cp are never "
            "shrunk",
            remedy=f"allow {plan.tp * plan.cp} processes, or choose smaller degrees",
        )
    shrunk = plan
    for name in ("dp_shard", "dp_replicate", "dp_replicate", "dp_shard"):
        degree = plan.size(name)
        if shrunk.world_size > max_procs and shrunk.size(name) > 1:
            smaller = 2 if shrunk.size(name) > 2 else 1
            shrunk = shrunk.with_degrees(**{name: smaller})
            remarks.append(f"{name} {degree} -> {smaller}: more than {max_procs} processes")
    named, tiny = read_model(model), read_model("tiny").config
    full = named.config
    if full != tiny:  # tiny grows until the plan divides it; a model that is asked for is what it is
        check(full, plan, BatchShape(1, named.latent()))
    layers = min(full.layers, tiny.layers)
    if full != tiny and plan.last_blocks > full.layers:
        raise CinemeshError(
            f"plan: last_blocks({plan.last_blocks}) > layers({full.layers}) of {model}", remedy="give at most that"
        )
    shrunk = replace(shrunk, last_blocks=_last_blocks(plan.last_blocks, full.layers, layers))
    if shrunk.last_blocks != plan.last_blocks:
        remarks.append(f"last_blocks {plan.last_blocks} -> {shrunk.last_blocks}: of {layers} layers")
    by = math.lcm(*shrunk.divisors("heads"))
    few = 6 if head_dim <= HEAD_DIM["cpu"] else 2
    heads = few if few % by == 0 else by
    text_width = math.lcm(24, *shrunk.divisors("text"))
    counts = [3] + [2] * (len(full.encoders) - 1)
    encoders = tuple(replace(e, width=text_width, tokens=n) for e, n in zip(full.encoders, counts, strict=True))
    columns = math.lcm(6, *shrunk.divisors("tokens"))
    grid = (min(3, full.position_lengths[0]), 2, columns)
    config = replace(
        full,  # whatever else it has, a variant's own fields too, stays
        name=f"{model} (shrunk)",
        layers=layers,
        width=head_dim * heads,
        heads=heads,
        ffn=2 * head_dim * heads,
        encoders=encoders,
        channels=min(full.channels, tiny.channels),
        position_lengths=tuple(2 * length for length in grid),
        latent_conditions=tuple(replace(c, channels=min(c.channels, 3)) for c in full.latent_conditions),
        lora=full.lora and replace(full.lora, rank=min(full.lora.rank, 4)),
    )
    if full != tiny:
        remarks.append(f"{model}: {full.layers} layers of {full.width} -> {config.layers} layers of {config.width}")
    latent = tuple(length * size for length, size in zip(grid, full.patch, strict=True))
    return Case(shrunk, config, samples=2, latent=(latent[0], latent[1], latent[2]), steps=steps, remarks=remarks)


def _last_blocks(blocks: int, of: int, layers: int) -> int:
    """``blocks`` of a model of ``of`` layers, in one of ``layers``: none, some or all of its blocks, as they were."""
    return layers if blocks == of else min(blocks, max(1, layers - 1))


def compare(case: Case, runs: list[RankRun], program: Program) -> Report:
    """Errors against their bounds, and what the ranks witnessed."""
    worst, reference = worst_of(case, runs)
    bounds = bounds_of(case, reference)
    blind = unseen(reference, bounds["gradient"])
    remarks = list(case.remarks)
    if blind:
        remarks.append(f"the check is blind: zeros would pass for the gradients of {', '.join(blind)}")
    lives = lifetimes(program)
    arenas = (place(program, lives).total_bytes, place(program, lifetimes(program, Space.HOST)).total_bytes)
    predicted = lives.persistent_bytes + sum(arenas)
    workspace = max(run.workspace_bytes for run in runs)  # of the kernels that ran
    ran = max(run.peak_bytes for run in runs)
    difference = next((run.ledger_difference for run in runs if run.ledger_difference), None)
    live_equal = all(run.live_bytes_equal for run in runs)
    first = {_without_replica(run): run.weights[-1] for run in reversed(runs)}
    replicas_equal = all(torch.equal(run.weights[-1], first[_without_replica(run)]) for run in runs)
    within = all(worst.error[what] <= bounds[what] for what in QUANTITIES)  # not for a NaN
    return Report(
        within and difference is None and live_equal and replicas_equal and ran <= predicted + workspace and not blind,
        worst.error,
        bounds,
        worst.where,
        difference is None,
        difference,
        predicted,
        workspace,
        ran,
        live_equal,
        replicas_equal,
        case.plan.equation(),
        case.plan.dtype,
        case.plan.world_size,
        runs[0].device,
        remarks,
    )


def _without_replica(run: RankRun) -> tuple[int, ...]:
    return tuple(position for axis, position in sorted(run.coordinates.items()) if axis != "dp_replicate")


def verify_on_rank(
    case: Case,
    make_runner: Callable[[Mesh], StepRunner] | None = None,
    planned: Program | None = None,
    *,
    silent: bool = True,
) -> Report | None:
    """Run inside an initialised process group of a CPU; as :func:`verify_in`, with doors as in :func:`run_rank`."""
    mesh = Mesh(case.plan)
    try:
        return verify_in(case, mesh, make_runner and make_runner(mesh), planned, silent=silent)
    finally:
        mesh.close()


def verify_in(
    case: Case,
    mesh: Mesh | None,
    runner: StepRunner | None = None,
    planned: Program | None = None,
    *,
    device: str = "cpu",
    silent: bool = True,
) -> Report | None:
    """The report on rank 0 of the mesh, None elsewhere. Rank 0 says what it does, unless it is to be ``silent``."""
    runner = runner or StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, device=device)
    rank = mesh.rank if mesh else 0
    with progress("verifying", case.steps + 1, silent=silent or rank > 0) as begin:
        mine = run_rank(case, mesh, runner, planned=planned, begin=begin)
        runs = gather_at_first(mine) if mesh else [mine]
        if runs is None:
            return None
        begin("comparing with plain autograd")
        return compare(case, [run for run in runs if isinstance(run, RankRun)], planned or runner.program)


# -- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProofOrder:
    """What to verify, and where. None: left out."""

    plan: str
    model: str
    dtype: str | None
    max_procs: int | None
    steps: int
    head_dim: int | None
    device: Device
    as_json: bool

    def case(self) -> tuple[Case, Literal["cpu", "cuda"]]:
        """What runs, checked, and on what. Raises CinemeshError for an illegal plan, and for too few GPUs."""
        kind = "cpu" if device_here(self.device, processes_here(1)) == "cpu" else "cuda"
        plan = read_plan(self.plan, dtype=self.dtype or DTYPE[kind])
        device_here(self.device, local := processes_here(plan.tp * plan.cp))
        most = self.max_procs or MAX_PROCS
        if launched():
            if self.max_procs is not None:
                raise CinemeshError(
                    f"--max-procs {most} in a job whose processes are started already", remedy="leave it out"
                )
            most = world_size(None)
        elif kind == "cuda":
            most = min(most, visible_gpus())
        head_dim = self.head_dim or HEAD_DIM[kind]
        case = small_case(plan, self.model, max_procs=most, steps=self.steps, head_dim=head_dim)
        case.plan.check_world_size(most if launched() else case.plan.world_size)
        # Refused, or found broken by a pass, here rather than on every rank.
        prepare(build_step(case.config, case.plan, case.batch), backend=backend_of(kind), checked=True)
        say_device(self.device, local)
        return case, kind


def run(order: ProofOrder) -> int:
    """Verify and print what came out; the exit code: 0, or 1 when a bound does not hold.

    Raises CinemeshError for an illegal plan, and for GPUs that are too few.
    """
    if launched():
        return rank_main(lambda: _as_rank(order))
    case, kind = order.case()
    ranks = case.plan.world_size
    if kind == "cpu":
        return _told(forked(ranks, lambda: verify_on_rank(case, silent=order.as_json))[0], order)
    return launch(ranks, _as_rank, order) if ranks > 1 else rank_main(lambda: _as_rank(order))


def _as_rank(order: ProofOrder) -> int:
    """The work of one rank that was started as such; the exit code is that of all."""
    case, _ = order.case()
    with joined(case.plan, order.device) as place:
        report = verify_in(case, place.mesh, device=place.device, silent=order.as_json)
        code = None if report is None else _told(report, order)
        codes = gather_objects(code) if place.mesh else [code]
    return int(codes[0] == 1)


def _told(report: Report | None, order: ProofOrder) -> int:
    assert report is not None
    if order.as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)
    return 0 if report.ok else 1


def _show(report: Report) -> None:
    console = new_console()
    console.print(f"plan {report.plan}, on {report.processes} processes ({report.device}, {report.dtype})")
    for remark in report.remarks:
        console.print(f"  {remark}")
    table = plain_table("relative error of", "worst", "bound", "where", breaks=("where",))
    for what in QUANTITIES:
        ok = report.worst[what] <= report.bounds[what]
        style = "" if ok else "bold red"
        worst, bound = f"{report.worst[what]:.1e}", f"{report.bounds[what]:.1e}"
        table.add_row(what, worst, bound, report.where[what], style=style)
    console.print(table)
    console.print(f"collectives   {report.ledger_difference or 'equal to the program, on every rank'}")
    equal = (
        "persistent buffers and one arena a space, at every record"
        if report.live_bytes_equal
        else "NOT those of the program"
    )
    console.print(f"live bytes    {equal}")
    console.print(
        f"peak          {report.peak_bytes_ran:,} B ran; {report.peak_bytes_predicted:,} B predicted "
        f"+ {report.workspace_bytes:,} B workspace"
    )
    console.print(f"replicas      {'bitwise equal' if report.replicas_equal else 'NOT bitwise equal'}")
    console.print("ok" if report.ok else "NOT ok", style="bold green" if report.ok else "bold red")
