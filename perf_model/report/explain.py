"""Why this plan: what binds it, what is exposed, what is done twice, and what would change it (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.communicators import communicator
from ...parallel.ir.fields import AXES, Overlap
from ...parallel.ir.flops import model_flops
from ...parallel.ir.knobs import knobs, written
from ...parallel.ir.plan import Plan
from ...parallel.ir.records import Op, Phase
from ..clusters.cluster import Cluster
from ..prices.models import PriceModels
from ..prices.played import PlayedStep
from ..published.evidence import ErrorBar, error_bar
from ..search.evaluator import Evaluator
from ..search.planner import Search, survey
from ..search.request import PricedPlan, Request

Tick = Callable[[str], object]  # told what begins
CHANGES = 5  # sensitivities of a search
SPELT_OUT = 4  # activations kept from which on only their number is shown
SEARCHED_WITH = "grad_units=2"  # what the search gives every plan that can have it: not worth a word each time


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def sample_flops(config: ModelConfig, latent: tuple[int, int, int]) -> int:
    """Model FLOPs of one sample: blocks are alike, so programs of one and of two tell those of all."""
    one, two = (
        model_flops(build_step(replace(config, layers=layers), Plan(dtype="bf16"), BatchShape(1, latent)))
        for layers in (1, 2)
    )
    return one + (config.layers - 1) * (two - one)


def mean_sample_flops(request: Request) -> float:
    """Model FLOPs of a sample, averaged over those of the buckets' steps."""
    parts = [(b.weight * b.times, sample_flops(request.config, b.latent)) for b in request.buckets]
    return sum(part * flops for part, flops in parts) / sum(part for part, _ in parts)


def mfu_of(request: Request, choice: PricedPlan, flops: float) -> float:
    """MFU of a plan of the table; ``flops``: those of a sample."""
    peak = request.cluster.gpu.peak_flops[choice.plan.compute_dtype]
    return flops * choice.samples_per_s / (request.gpus * peak)


def hfu_of(request: Request, choice: PricedPlan) -> float:
    """HFU of a plan of the table."""
    peak = request.cluster.gpu.peak_flops[choice.plan.compute_dtype]
    return choice.hardware_flops / (choice.step_s * peak)


def mfu(whole: PlayedStep, cluster: Cluster) -> float:
    """Model FLOPs over what the GPUs could do in the step."""
    return model_flops(whole.program) / (
        whole.step_s * whole.plan.world_size * cluster.gpu.peak_flops[whole.plan.compute_dtype]
    )


def hfu(whole: PlayedStep, cluster: Cluster) -> float:
    return whole.hardware_flops / (whole.step_s * cluster.gpu.peak_flops[whole.plan.compute_dtype])


def error_bar_of(request: Request) -> ErrorBar:
    """How wrong the step times that answer a request may be."""
    dtype = Plan(dtype=request.dtype).compute_dtype
    kernel = PriceModels.of(request.cluster).compute.kernel("attention", dtype, request.config.head_dim)
    return error_bar(request.cluster, kernel.rate_class)


# -- exposed communication --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exposure:
    """All collectives of one name (one a block), in one step."""

    name: str
    kind: str
    lane: str
    count: int
    payload_bytes: int
    alone_s: float
    exposed_s: float

    @property
    def hidden(self) -> float:
        """Share of the time alone in which compute went on."""
        return 1.0 - self.exposed_s / self.alone_s if self.alone_s else 0.0


def alike(op: Op) -> str:
    """What a record is called in all blocks and micro-batches."""
    return f"{op.place.phase}/{op.label}"


def exposures(whole: PlayedStep) -> list[Exposure]:
    """Exposed communication by collective, the most exposed first."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for i, op in enumerate(whole.program.ops):
        if op.kind in OPS or op.is_wait:
            continue
        row = rows.setdefault((alike(op), op.kind, op.lane), [0, 0.0, 0.0, 0.0])
        row[0] += 1
        row[1] += whole.program.payload_bytes(op)
        row[2] += whole.tape.records[i].cost.seconds
        row[3] += whole.timeline.exposed_s.get(i, 0.0)
    made = [
        Exposure(name, kind, lane, int(count), int(payload), alone, exposed)
        for (name, kind, lane), (count, payload, alone, exposed) in rows.items()
    ]
    return sorted(made, key=lambda e: -e.exposed_s)


def exposed_by_lane(whole: PlayedStep) -> dict[str, float]:
    """Seconds in which compute waits, by the lane that it waits for."""
    lanes: dict[str, float] = {}
    for i, seconds in whole.timeline.exposed_s.items():
        lane = whole.program.ops[i].lane
        lanes[lane] = lanes.get(lane, 0.0) + seconds
    return lanes


def terms(whole: PlayedStep) -> dict[str, float]:
    """The step's seconds, split: compute alone, compute slowed by communication, exposed time by lane, stragglers."""
    lanes = {f"exposed {lane}": seconds for lane, seconds in exposed_by_lane(whole).items()}
    slowed = whole.timeline.compute_busy_s - whole.tape.compute_s
    parts = {"compute": whole.tape.compute_s, "compute slowed by communication": slowed, **lanes}
    parts["stragglers and the rest"] = whole.step_s - sum(parts.values())
    return parts


def utilisation(whole: PlayedStep) -> dict[str, float]:
    """Share of the step in which compute, and every communicator, is busy."""
    busy: dict[str, float] = {"compute": whole.timeline.compute_busy_s}
    for i, op in enumerate(whole.program.ops):
        if op.comm is not None and not op.is_wait:
            name = communicator(op)
            busy[name] = busy.get(name, 0.0) + whole.timeline.end[i] - whole.timeline.start[i]
    return {name: seconds / whole.timeline.step_s for name, seconds in busy.items()}


# -- declared duplicates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicate:
    """Work that every rank of an axis does identically, or an activation that every rank of it holds."""

    name: str
    axis: str
    ranks: int
    count: int
    flops: int
    bytes: int
    saved_s: float


def duplicates(whole: PlayedStep) -> list[Duplicate]:
    """Compute records on which an axis splits nothing, found by their placements; the dearest first.

    ``bytes`` is what one rank writes in them, ``saved_s`` what splitting them over the axis would save at most.
    """
    program = whole.program
    found: dict[tuple[str, str], list[float]] = {}
    for i, op in enumerate(program.ops):
        if op.kind not in OPS or op.place.phase is Phase.UPDATE:
            continue
        placements = [program.buffers[name].placement for name in (*op.inputs, *op.outputs)]
        for axis in ("tp", "cp"):
            if program.plan.size(axis) == 1:
                continue
            if any(axis in axes for p in placements for axes in (*p.dims, tuple(p.partial))):
                continue
            seconds = whole.tape.records[i].seconds
            row = found.setdefault((alike(op), axis), [0, 0, 0, 0.0])
            row[0] += 1
            row[1] += program.flops(op)
            row[2] += sum(program.bytes(name) for name in op.outputs)
            row[3] += seconds * (1 - 1 / program.plan.size(axis))
    made = [
        Duplicate(name, axis, program.plan.size(axis), int(count), int(flops), int(bytes_), saved)
        for (name, axis), (count, flops, bytes_, saved) in found.items()
    ]
    return sorted(made, key=lambda d: -d.saved_s)


# -- sensitivities ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What the best plan would be if one thing were different."""

    change: str
    plan: Plan | None
    samples_per_s: float
    gain: float
    note: str = ""


def sensitivities(request: Request, found: Search, tick: Tick = lambda _: None) -> Iterator[Sensitivity]:
    """The search again with one thing different, ``CHANGES`` times. No plan is tuned, on either side.

    More of something need not be used: where its best plan is slower, the gain is none.
    """
    cluster, best = request.cluster, found.untuned or found.best
    gpus = request.gpus + cluster.gpus_per_server
    room = cluster if gpus <= cluster.gpus else cluster.with_(**{"topology.servers": cluster.topology.servers + 1})
    more: list[tuple[str, Request]] = [
        ("NIC twice as fast", replace(request, cluster=cluster.with_(nic_scale=2.0))),
        ("16 GB more memory", replace(request, cluster=cluster.with_(memory_bytes=cluster.gpu.memory_bytes + 16e9))),
        ("NVLink twice as fast", replace(request, cluster=cluster.with_(nvlink_scale=2.0))),
        (f"one more server ({gpus} GPUs)", replace(request, cluster=room, gpus=gpus)),
    ]
    less = f"half the GPUs ({request.gpus // 2})", replace(request, gpus=max(request.gpus // 2, 1))
    assert len(more) + 1 == CHANGES
    for text, changed in (*more, less):
        tick(text)
        beyond = "" if changed.gpus <= cluster.gpus else f", {changed.gpus - cluster.gpus} more than {cluster.name} has"
        try:
            outcome = survey(replace(changed, shown=1))
        except CinemeshError as error:
            yield Sensitivity(text, None, 0.0, -1.0, error.problem)
            continue
        then = outcome.best if outcome.choices else None
        if (text, changed) != less and (then is None or then.samples_per_s < best.samples_per_s):
            yield Sensitivity(text, best.plan, best.samples_per_s, 0.0, f"no plan makes use of it{beyond}")
        elif then is None:
            yield Sensitivity(text, None, 0.0, -1.0, outcome.nothing)
        else:
            same = (then.plan.tp, then.plan.cp) == (best.plan.tp, best.plan.cp)
            note = ("same degrees" if same else f"then {describe(then.plan)}") + beyond
            yield Sensitivity(text, then.plan, then.samples_per_s, then.samples_per_s / best.samples_per_s - 1.0, note)


def on_faster(request: Request, step: PlayedStep) -> Iterator[Sensitivity]:
    """The same plan with one thing twice as fast."""
    now = step.samples / step.step_s
    for text, scale in (("NIC", "nic_scale"), ("NVLink", "nvlink_scale"), ("GPU memory", "memory_scale")):
        faster = Evaluator(replace(request, cluster=request.cluster.with_(**{scale: 2.0})))
        again = faster.play_held(step.plan, step.batch.samples)[0]
        then = again.samples / again.step_s
        yield Sensitivity(f"{text} twice as fast", step.plan, then, then / now - 1.0, "the same plan")


# -- words ------------------------------------------------------------------------------------------------------------


def digits(value: float, decimals: int) -> str:
    """A number with so many decimals, and never less than three digits of it: ``0.00392``."""
    return f"{value:,.{decimals}f}" if abs(value) >= 10.0 ** (2 - decimals) or not value else f"{value:#.3g}"


def describe(plan: Plan) -> str:
    """A plan in one line: degrees above one, recompute, and every other field that is not as the search has it."""
    parts = [f"{axis}={plan.size(axis)}" for axis in AXES if plan.size(axis) > 1]
    if plan.micro_batches > 1:
        parts.append(f"micro_batches={plan.micro_batches}")
    keep = _keep(plan.recompute)
    if plan.recompute_last is not None:
        keep += f" (last {plan.last_blocks} blocks {_keep(plan.recompute_last)})"
    parts.append(f"recompute={keep}")
    if plan.offload:
        parts.append(f"offload={':'.join(plan.offload)}")
    parts += [text for text in written(plan, knobs(Overlap)) if text != SEARCHED_WITH]
    parts += plan.streams
    split = [axis for axis in plan.order if plan.size(axis) > 1]
    if split != [axis for axis in AXES if plan.size(axis) > 1]:
        parts.append("order=" + ":".join(plan.order))
    return " ".join(parts)


def _keep(recompute: str | tuple[str, ...]) -> str:
    if isinstance(recompute, str):
        return recompute
    return f"keep {':'.join(recompute)}" if len(recompute) < SPELT_OUT else f"keep {len(recompute)} activations"


def binds(whole: PlayedStep) -> list[str]:
    """What keeps the plan from being faster, in sentences with their numbers, the largest first."""
    parts = sorted(terms(whole).items(), key=lambda item: -item[1])
    total = whole.step_s
    lines = [f"{name}: {seconds:.3f} s, {seconds / total:.1%} of the step" for name, seconds in parts if seconds > 0]
    peak, limit = whole.footprint.peak_bytes, whole.footprint.limit_bytes
    lines.append(
        f"memory: {peak / 1e9:.1f} of {limit / 1e9:.1f} GB at {whole.footprint.peak_op}"
        + (f"; recompute is {whole.plan.recompute}" if whole.plan.recompute != "none" else "; nothing is recomputed")
        + (f"; {whole.footprint.host_bytes / 1e9:.1f} GB in host memory" if whole.footprint.host_bytes else "")
    )
    return lines


def why_lost(winner: PlayedStep, loser: PlayedStep) -> list[str]:
    """Term by term, per sample: where the loser spends more, the largest difference first."""
    ours, theirs = terms(winner), terms(loser)
    per = {
        name: theirs.get(name, 0.0) / loser.samples - ours.get(name, 0.0) / winner.samples for name in {*ours, *theirs}
    }
    total = loser.step_s / loser.samples - winner.step_s / winner.samples
    rows = sorted(per.items(), key=lambda item: -abs(item[1]))
    return [
        f"{name}: {difference * winner.samples:+.4f} s at the winner's batch ({difference / total:+.0%} of the gap)"
        for name, difference in rows
        if abs(difference) > 1e-3 * abs(total)
    ]
