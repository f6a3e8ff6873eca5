"""What other ways to exchange tokens over cp would have cost a plan: its own records, altered and played (torch-free).

This project gathers K and V. Two others are common; neither runs here:

    Ulysses   (Jacobs et al. 2023, arXiv 2309.14509): all-to-alls take q, K and V from tokens to heads and o back, and
              their gradients. Attention has all tokens of 1 / cp of a rank's heads: cp must divide them.
    ring      (Liu et al. 2023, arXiv 2310.01889): K and V go round in cp - 1 steps, in backward once more, and their
              gradients in cp steps, home again. Attention has the keys of one rank after the other.

Ulysses is the plan's step with an exchange behind what makes q, o, do and dq, before what reads it, and with attention
priced on its local shapes there. What is recomputed is exchanged again; what is kept is kept where attention reads it.
The ring is the step of the same plan with ``kv_chunks`` = cp: chunks are as large as a rank's keys, and are sent on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...errors import CinemeshError
from ...model.config import ModelConfig
from ...model.step import check
from ...parallel.ir.layout import TOKENS_GATHERED, Placement
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ..clusters.cluster import Cluster
from ..prices.models import PriceModels
from ..prices.network import FREE, group_of
from ..prices.played import PlayedStep, play_step
from ..prices.timeline import COMPUTE, ISSUE, WAIT, Record, compute_record, cost_of, play

CP = TOKENS_GATHERED
LONGEST_RING = 16
ATTENTION, BACKWARD = "attention", "attention_backward"


@dataclass(frozen=True)
class Exchange:
    """A way to exchange tokens, and the step of a plan with it.

    ``runs``: whether it runs here. ``sent_bytes``: by one rank in a step. ``alone_s``: seconds of its collectives with
    nothing beside them, ``exposed_s``: those in which compute waits for them. ``gain``: samples/s more than the plan
    has, relative. ``problem``: why it cannot be; then the numbers are 0.
    """

    name: str
    runs: bool
    sent_bytes: float = 0.0
    alone_s: float = 0.0
    exposed_s: float = 0.0
    step_s: float = 0.0
    gain: float = 0.0
    problem: str = ""


def exchanges(whole: PlayedStep, config: ModelConfig, cluster: Cluster) -> list[Exchange]:
    """The plan's own gather of K and V, and the two others; none where cp is 1."""
    if whole.plan.cp == 1:
        return []
    models = PriceModels.of(cluster)
    own = _Altered(whole, models)
    for i, op in own.collectives():
        own.travels(i, op.kind, whole.program.payload_bytes(op))
    found = [own.told("K/V gather", whole)]
    for name, alter in ("Ulysses all-to-all", _ulysses), ("ring", _ring):
        try:
            found.append(replace(alter(whole, config, models).told(name, whole), runs=False))
        except CinemeshError as error:
            found.append(Exchange(name, runs=False, problem=error.problem))
    return found


class _Altered:
    """A played step whose records change, with others put between them; new ones have keys below 0."""

    def __init__(self, step: PlayedStep, models: PriceModels) -> None:
        self.step, self.models = step, models
        self.records = dict(enumerate(step.tape.records))
        self.order = [[i] for i in self.records]
        self.sent: list[int] = []
        self.sent_bytes = 0.0
        self.link = self.records[next(i for i, _ in self.collectives())]
        self.group = group_of(models.cluster, step.plan, CP)

    def collectives(self) -> Iterator[tuple[int, Op]]:
        """Those of K and V: nothing else goes over cp alone."""
        return ((i, op) for i, op in enumerate(self.step.program.ops) if op.is_issue and op.axes == CP)

    def travels(self, index: int, kind: str, size: int) -> None:
        """A collective is of another kind, and of ``size`` bytes; of none where nothing needs to travel."""
        ranks, ctas = self.step.plan.cp, self.step.plan.ctas(CP)
        cost = cost_of(self.models.network, kind, size, self.group, ctas) if size else FREE
        self.records[index] = replace(self.records[index], cost=cost)
        self.sent.append(index)
        self.sent_bytes += size if kind == "send_recv" else size * (ranks - 1) / ranks

    def put(self, at: int, record: Record) -> int:
        """Put a record before the one ``at`` an index; its key."""
        key = -1 - sum(key < 0 for key in self.records)
        self.records[key] = record
        self.order[at].insert(-1, key)
        return key

    def put_exchange(self, size: int, issued: int, awaited: int) -> None:
        """An all-to-all of ``size`` bytes, issued and awaited before two records."""
        key = self.put(issued, Record(ISSUE, key=self.link.key, late=self.link.late))
        self.travels(key, "all_to_all", size)
        self.put(awaited, Record(WAIT, key=key))

    def told(self, name: str, whole: PlayedStep) -> Exchange:
        """The altered step played, beside the plan's own."""
        keys = [key for slot in self.order for key in slot]
        at = {key: i for i, key in enumerate(keys)}
        records = [self.records[key] for key in keys]
        records = [replace(r, key=at[r.key]) if r.kind == WAIT else r for r in records]
        timeline = play(replace(self.step.tape, records=records))
        step_s = whole.played_as(timeline, self.models.cluster)
        return Exchange(
            name,
            runs=True,
            sent_bytes=self.sent_bytes,
            alone_s=sum(self.records[key].cost.seconds for key in self.sent),
            exposed_s=sum(timeline.exposed_s.get(at[key], 0.0) for key in self.sent),
            step_s=step_s,
            gain=whole.step_s / step_s - 1.0,
        )


def _played(whole: PlayedStep, plan: Plan, config: ModelConfig, models: PriceModels) -> PlayedStep:
    """Another plan on the same batch. Raises CinemeshError where a shape forbids it."""
    if plan == whole.plan:
        return whole
    check(config, plan, whole.batch)
    return play_step(config, plan, whole.batch, models)


# -- Ulysses ----------------------------------------------------------------------------------------------------------


def _ulysses(whole: PlayedStep, config: ModelConfig, models: PriceModels) -> _Altered:
    """All heads at once, or in the plan's slices where cp divides the heads of one."""
    plan = whole.plan
    slices = plan.kv_slices if config.heads % (plan.tp * plan.kv_slices * plan.cp) == 0 else 1
    if left := config.heads % (plan.tp * slices * plan.cp):
        what = f"heads({config.heads}) % (tp({plan.tp}) * cp({plan.cp})) = {left}, it must be 0"
        raise CinemeshError(what, remedy="choose degrees whose product divides the heads")
    altered = _Altered(_played(whole, replace(plan, kv_slices=slices, kv_chunks=1), config, models), models)
    program = altered.step.program
    by_heads = _by_heads(program)
    made, read = _uses(program)
    at = {op.name: i for i, op in enumerate(program.ops)}
    issue_of = {op.outputs[0]: at[op.waits_for] for op in program.ops if op.is_wait and op.axes == CP}
    there: set[str] = set()  # values that were taken to their heads

    def last(values: dict[str, list[int]], name: str, before: int) -> int:
        return max(i for i in values[program.root(name)[0]] if i < before)

    def home(name: str, behind: int) -> None:
        """Back to the tokens, before the first that reads it there."""
        readers = [i for i in read.get(program.root(name)[0], ()) if i > behind]
        if readers:
            altered.put_exchange(program.bytes(name), behind + 1, min(readers))

    for i, op in enumerate(program.ops):
        if op.kind not in (ATTENTION, BACKWARD):
            continue
        altered.records[i] = compute_record(by_heads, op, models.compute)
        do, q, kv = (op.inputs[0] if op.kind == BACKWARD else None), *op.inputs[op.kind == BACKWARD :][:2]
        gather = issue_of.get(kv)
        early = 0
        if q not in there:
            there.add(q)
            produced = last(made, q, i)
            if gather is not None and produced < gather:  # with K and V
                early = program.bytes(q)
            else:
                altered.put_exchange(program.bytes(q), produced + 1, i)
        if gather is not None and gather not in altered.sent:
            local = program.ops[gather].inputs[0]
            altered.travels(gather, "all_to_all", early + (0 if local in there else program.bytes(local)))
            there.add(local)
        if do is None:
            home(op.outputs[0], i)
        else:
            altered.put_exchange(program.bytes(do), last(made, do, i) + 1, i)
            home(op.outputs[0], i)
    for i, op in altered.collectives():
        if op.kind == "reduce_scatter":
            altered.travels(i, "all_to_all", program.bytes(op.outputs[0]))
    return altered


def _by_heads(program: Program) -> Program:
    """The same with self-attention's operands split over cp by heads instead of tokens."""
    moved = {}
    for op in program.ops:
        if op.kind not in (ATTENTION, BACKWARD):
            continue
        signature = program.label_signature(op)
        for labels, name in zip((*signature.inputs, *signature.outputs), (*op.inputs, *op.outputs), strict=False):
            buffer = program.buffers[name]
            dims = (
                (*axes, *CP) if label == "h" else tuple(axis for axis in axes if axis not in CP)
                for label, axes in zip(labels, buffer.placement.dims, strict=True)
            )
            moved[name] = replace(buffer, placement=Placement(tuple(dims)))
    return program.with_ops(program.ops, moved)


def _uses(program: Program) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Records that write to a storage, and those that read from it outside of self-attention."""
    made: dict[str, list[int]] = {}
    read: dict[str, list[int]] = {}
    for i, op in enumerate(program.ops):
        for name in op.outputs:
            made.setdefault(program.root(name)[0], []).append(i)
        for name in op.inputs if op.kind not in (ATTENTION, BACKWARD) else ():
            read.setdefault(program.root(name)[0], []).append(i)
    return made, read


# -- ring -------------------------------------------------------------------------------------------------------------


def _ring(whole: PlayedStep, config: ModelConfig, models: PriceModels) -> _Altered:
    """Chunks of the keys are sent on instead of gathered, the first is a rank's own; gradients add up on their way."""
    if whole.plan.cp > LONGEST_RING:
        raise CinemeshError(
            f"cp({whole.plan.cp}) > {LONGEST_RING}, the longest that is priced: its program has cp attention "
            "records where the plan has one",
            remedy=f"lower cp to {LONGEST_RING}",
        )
    plan = replace(whole.plan, kv_slices=1, kv_chunks=whole.plan.cp)
    try:
        altered = _Altered(_played(whole, plan, config, models), models)
    except CinemeshError as error:
        raise CinemeshError(f"it is priced as kv_chunks = cp, and {error.problem}", remedy=error.remedy) from None
    program, before = altered.step.program, None
    for i, op in altered.collectives():
        assert op.slice is not None
        size = program.payload_bytes(op)
        if op.kind == "all_gather":
            altered.travels(i, "send_recv", size if op.slice.index else 0)
            continue
        if op.slice.index and before is not None:  # what came from the rank before
            altered.put(i, Record(WAIT, key=before))
            altered.put(i, Record(COMPUTE, models.compute.stream_s(3 * size), busy=False))
        altered.travels(i, "send_recv", size)
        before = i
    return altered
