"""The program of a few blocks, built and checked once for all degrees (torch-free)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ...model.config import REPLICATED_UNIT, ModelConfig, block_unit, parameters_by_unit
from ...model.inputs import BatchShape
from ...model.step import build_step, unit_layout
from ...parallel.ir.fields import AXES, Overlap
from ...parallel.ir.knobs import knobs
from ...parallel.ir.layout import BATCH, HEADS
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Buffer, Op, altered
from ...parallel.ir.units import Units, lay_out
from ...parallel.passes.pipeline import arranging, finishing, prepare, remaking
from ...parallel.passes.schedule import ScheduleWindows
from ..clusters.cluster import Cluster
from ..prices.models import PriceModels

BLOCKS = 3  # of each recompute mode, and one for each unit prefetched: lanes fill in the first, run dry in the last
MICRO_BATCHES = 4  # the first, one that still waits for it, one like all others, the last
PROVEN_BLOCKS = (2, 7)  # more, until two neighbours of either direction have equal records; where few do not do
PROVEN_MICRO_BATCHES = 1


def canonical(plan: Plan) -> Plan:
    """The plan of the few-block program that serves this one: two replicas, shard groups of one or of two ranks.

    A collective over one rank costs nothing, so more ranks than the plan has change no price; but a unit that is never
    gathered has other records than one that is. Micro-batches in the middle are alike.
    """
    alone = plan.dp_shard * plan.cp == 1
    plan = replace(plan, order=Plan().order, micro_batches=min(plan.micro_batches, MICRO_BATCHES))
    return plan.with_degrees(dp_shard=1 if alone else 2, dp_replicate=2)


def as_built(plan: Plan) -> Plan:
    """The plan without what the schedule pass alone asks: all the same to a builder."""
    return replace(plan, kv_first=False, defer_weight_gradients=False)


def blocks_of(plan: Plan, layers: int) -> tuple[int, int]:
    """Blocks that recompute as the plan says, and last ones that do as it says for these."""
    last = plan.last_blocks if plan.recompute_last is not None else 0
    return layers - last, last


@dataclass(frozen=True, eq=False)
class FewBlocks:
    """The program of a few blocks of a model, before its passes.

    Shapes are global and placements typed, so another tp or cp changes the local size of every buffer and the layout of
    the flat units, but no record; another order (``as_built``) changes nothing here. ``units``: of the few blocks,
    under ``plan``. ``own``: it serves this plan alone. ``first``: where it is not the plan that was ``built``, the few
    blocks whose records it has.
    """

    config: ModelConfig
    batch: BatchShape
    plan: Plan
    blocks: int
    built: Program
    units: Units
    own: bool = False
    first: FewBlocks | None = None
    _remade: dict[Plan, Program] = field(default_factory=dict, repr=False)
    _arranged: dict[object, tuple[_Sizes, Program, ScheduleWindows]] = field(default_factory=dict, repr=False)
    _units: dict[int, Units] = field(default_factory=dict, init=False, repr=False)  # by ranks of the shard group

    @classmethod
    def build(cls, config: ModelConfig, plan: Plan, batch: BatchShape) -> FewBlocks:
        """For plans of one recompute mode or two: as many blocks as both need; never more than the model."""
        plan = canonical(plan)
        each = BLOCKS + max(plan.prefetch, 1)
        return cls._of(config, plan, batch, each + (each if plan.recompute_last is not None else 0))

    @classmethod
    def proven(cls, config: ModelConfig, plan: Plan, batch: BatchShape, more: int = PROVEN_BLOCKS[0]) -> FewBlocks:
        """On a plan's own degrees, with ``more`` blocks for equal neighbours (``Stretches``)."""
        blocks, micro_batches = _proven_size(config, plan, more)
        return cls._of(config, replace(plan, micro_batches=micro_batches), batch, blocks, own=True)

    @classmethod
    def _of(cls, config: ModelConfig, plan: Plan, batch: BatchShape, blocks: int, *, own: bool = False) -> FewBlocks:
        blocks = min(config.layers, blocks)
        plain = replace(as_built(plan), recompute_last=None, last_blocks=0)  # a pass applies these, not the builder
        model = replace(config, layers=blocks)
        return cls(config, batch, plain, blocks, build_step(model, plain, batch), unit_layout(model, plain), own)

    @cached_property
    def program(self) -> Program:
        """Under ``plan``."""
        return self.built if self.first is None else self._sized(self.built, self.first._sizes)

    def under(self, plan: Plan) -> Plan:
        """A plan as this program runs it: with as few blocks of either recompute mode, and micro-batches."""
        plan = replace(plan, micro_batches=self.plan.micro_batches) if self.own else canonical(plan)
        if plan.recompute_last is None:
            return plan
        first, last = blocks_of(plan, self.config.layers)
        if self.more == 0:
            return plan
        if self.own:
            return replace(plan, last_blocks=max(self.blocks - first, min(last, self.blocks // 2)))
        return replace(plan, last_blocks=self.blocks // 2)

    def serves(self, plan: Plan) -> bool:
        """Whether a plan of the same overlap has these records, but for the zeroing of gaps: see ``zeroes``."""
        alone = [one.dp_shard * one.cp == 1 for one in (self.plan, self._alike(plan))]
        return alone[0] == alone[1]

    def zeroes(self, plan: Plan) -> bool:
        """Whether every unit that has gaps under a plan has some here: these are zeroed by a record of their own."""
        ours, theirs = self.units.units, self._laid_out(self._alike(plan)).units
        return all(unit.gaps or not there.gaps for unit, there in zip(ours, theirs, strict=True))

    def on(self, plan: Plan, samples: int = 0) -> FewBlocks:
        """The same program under other degrees, with the flat units laid out for them, and on as many samples, if any.

        Raises ValueError where it does not serve the plan.
        """
        if not self.serves(plan):
            raise ValueError(f"a program of {self.plan.to_text()} cannot serve {plan.to_text()}")
        plan, batch = self._alike(plan), replace(self.batch, samples=samples or self.batch.samples)
        if (plan, batch) == (self.plan, self.batch):
            return self
        return replace(self, plan=plan, batch=batch, units=self._laid_out(plan), first=self.first or self)

    def alone(self) -> FewBlocks:
        """The same, without what others made, and what others will make, for their plans."""
        return replace(self, _remade={}, _arranged={})

    @property
    def _sizes(self) -> _Sizes:
        return _Sizes(self.units, self.plan.tp, self.batch.samples * self.plan.data_ranks)

    def _alike(self, plan: Plan) -> Plan:
        """A plan as a program of this kind is built for it."""
        plan = as_built(plan)
        if not self.own:
            return canonical(plan)
        return replace(plan, micro_batches=self.plan.micro_batches, recompute_last=None, last_blocks=0)

    def _laid_out(self, plan: Plan) -> Units:
        return unit_layout(replace(self.config, layers=self.blocks), plan)

    def _sized(self, program: Program, other: _Sizes) -> Program:
        """A program of other sizes, with the flat units laid out as here, and as many samples."""
        if (sizes := self._sizes) == other:
            return program
        # By shape, and whether tp splits it: what is replicated may be as large as what is not, on one rank of tp.
        flats: dict[tuple[tuple[int, ...], bool], dict[str | None, _Moved]] = {}
        for ours, theirs in ((self.units, other.units), (self.units.of_frozen, other.units.of_frozen)):
            offsets = {
                there.flat_offset: unit.flat_offset for unit, there in zip(ours.units, theirs.units, strict=True)
            }
            flat = _Moved((ours.ranks, ours.flat_elements), offsets)
            flats.setdefault(((theirs.ranks, theirs.flat_elements), False), {None: flat})
        for unit, there in zip(self.units.all, other.units.all, strict=True):
            tp, its_tp = (sizes.tp, other.tp) if unit.tp_sharded else (1, 1)
            slots = zip(unit.slots, there.slots, strict=True)
            moved = _Moved((tp, unit.elements), {its.offset: slot.offset for slot, its in slots})
            flats.setdefault(((its_tp, there.elements), unit.tp_sharded), {})[unit.name] = moved

        def moved_of(buffer: Buffer) -> _Moved | None:
            if (alike := flats.get((buffer.shape, buffer.placement.dims[:1] == (HEADS,)))) is None:
                return None
            first = next(iter(alike.values()))  # units of one size there may be of different sizes here
            return alike.get(buffer.unit) or alike.get(buffer.place.unit) or first

        shapes = {shape for shape, _ in flats}
        flat_ones = ((name, buffer) for name, buffer in program.buffers.items() if buffer.shape in shapes)
        moved = {name: flat for name, buffer in flat_ones if (flat := moved_of(buffer))}
        buffers, samples, its_samples = dict(program.buffers), sizes.samples, other.samples
        for name, buffer in program.buffers.items():
            whole, base = moved.get(name), moved.get(buffer.base) if buffer.base else None
            shape = whole.shape if whole else buffer.shape
            offset = base.offsets.get(buffer.offset, buffer.offset) if base else buffer.offset
            if samples != its_samples and BATCH in buffer.placement.dims:
                batch = buffer.placement.dims.index(BATCH)
                shape = (*shape[:batch], shape[batch] * samples // its_samples, *shape[batch + 1 :])
            if shape != buffer.shape or offset != buffer.offset:
                buffers[name] = altered(buffer, shape=shape, offset=offset)
        gaps = {unit.place: unit.gaps for unit in self.units.units}
        ops: list[Op] = []
        for op in program.ops:
            if op.kind != "zero_gaps":
                ops.append(op)
            elif here := gaps[op.place.unit or ""]:
                ops.append(altered(op, attrs=op.attrs | {"gaps": here}))
        sized = program.resized(self.plan, buffers, ops)
        for name, buffer in program.buffers.items():
            if buffer.base and (buffer.offset or buffer.strides) and buffer.base not in moved:
                buffers[name] = _part(program, sized, buffers[name])
        return sized

    def prepared(self, plan: Plan, backend: str) -> Program:
        """What runs ``plan``: all passes applied, those that look at records alone once for all degrees."""
        plan = self.under(plan)
        zeroed = tuple([bool(unit.gaps) for unit in self.units.units])
        alike = plan.with_degrees(**{axis: min(plan.size(axis), 2) for axis in AXES}), zeroed
        if alike not in self._arranged:
            program = self._remade_for(plan).under(plan)
            for run in arranging(plan):
                program = run(program)
            self._arranged[alike] = self._sizes, program, ScheduleWindows(program)
        sizes, arranged, windows = self._arranged[alike]
        program = self._sized(arranged, sizes).under(plan)
        for run in finishing(plan, backend=backend, windows=windows):
            program = run(program)
        return program

    def _remade_for(self, plan: Plan) -> Program:
        """Behind the passes that no degree changes; run once for all of them."""
        origin = self.first or self
        plan = as_built(plan).with_degrees(**{axis: origin.plan.size(axis) for axis in AXES})
        if plan not in self._remade:
            program = origin.built.under(plan)
            for run in remaking():
                program = run(program)
            self._remade[plan] = program
        return self._remade[plan] if self.first is None else self._sized(self._remade[plan], self.first._sizes)

    @property
    def more(self) -> int:
        """Blocks of the model that the program leaves out."""
        return self.config.layers - self.blocks

    @cached_property
    def _deep_units(self) -> Units:
        """The few blocks' units, and the whole model's of what all blocks share."""
        rows = parameters_by_unit(replace(self.config, layers=self.blocks))
        shared = {REPLICATED_UNIT: parameters_by_unit(self.config)[REPLICATED_UNIT]}
        return lay_out(rows | shared, self.plan)

    def units_of(self, plan: Plan) -> Units:
        """The few blocks' units and the replicated one of the whole model, under another shard group."""
        if plan.dp_shard not in self._units:
            self._units[plan.dp_shard] = self._deep_units.over(plan)
        return self._units[plan.dp_shard]

    def flat_elements(self, plan: Plan, *, frozen: bool = False) -> int:
        """Elements of a rank's flat shard of the whole model: of what is trained, or of what is ``frozen``."""
        units = self.units_of(plan)
        held = units.of_frozen if frozen else units
        of_block = sum(unit.shard_elements for unit in held.units if unit.place == block_unit(0))
        return held.flat_elements + self.more * of_block


@dataclass(frozen=True)
class _Sizes:
    """What buffers measure by: the flat units, ranks of tp, and samples of one micro-batch on all data ranks."""

    units: Units
    tp: int
    samples: int


@dataclass(frozen=True)
class _Moved:
    """A flat buffer under other degrees: its shape, and where the views of it begin, by where they began."""

    shape: tuple[int, int]
    offsets: dict[int, int]


Build = Callable[[ModelConfig, Plan, BatchShape], FewBlocks]


def overlaps(plan: Plan) -> dict[str, Any]:
    """The fields of a plan that say how communication hides behind compute."""
    return {name: getattr(plan, name) for name in knobs(Overlap)}


def _proven_size(config: ModelConfig, plan: Plan, more: int) -> tuple[int, int]:
    """Blocks and micro-batches of a plan's own program."""
    both_ends = plan.recompute_last is None  # border on blocks of one mode: one more differs from its neighbours
    each = BLOCKS + more + plan.prefetch + plan.grad_units - 2 + both_ends
    blocks = sum(min(each, deep) for deep in blocks_of(plan, config.layers))
    return blocks, min(plan.micro_batches, MICRO_BATCHES + PROVEN_MICRO_BATCHES)


class Programs:
    """Programs of a few blocks, each built once for all plans that it serves, the last whole one, and their prices."""

    def __init__(self) -> None:
        self._models: list[PriceModels] = []
        self._built: dict[object, list[FewBlocks]] = {}
        self._whole: tuple[object, Program] | None = None

    def models(self, cluster: Cluster) -> PriceModels:
        """What prices them on a cluster: it remembers what it priced."""
        for models in self._models:
            if models.cluster is cluster:
                return models
        self._models.append(PriceModels.of(cluster))
        return self._models[-1]

    def shared(self, config: ModelConfig, plan: Plan, batch: BatchShape) -> FewBlocks:
        """Under a plan: what serves all of its overlap, and of as many recompute modes."""
        key = (plan.recompute_last is None, min(plan.micro_batches, MICRO_BATCHES))
        return self._serving(key, FewBlocks.build, config, plan, batch)

    def own(self, config: ModelConfig, plan: Plan, batch: BatchShape, more: int) -> FewBlocks:
        """A plan's own, with ``more`` blocks for equal neighbours."""
        key = (*_proven_size(config, plan, more), "own")
        return self._serving(key, partial(FewBlocks.proven, more=more), config, plan, batch)

    def whole(self, config: ModelConfig, plan: Plan, batch: BatchShape, backend: str) -> Program:
        """Every record of a plan's step, as it runs on a backend."""
        key = (config, plan, batch, backend)
        if self._whole is None or self._whole[0] != key:
            self._whole = key, prepare(build_step(config, plan, batch), backend=backend)
        return self._whole[1]

    def _serving(self, key: object, build: Build, config: ModelConfig, plan: Plan, batch: BatchShape) -> FewBlocks:
        overlap = overlaps(as_built(plan)).values()
        built = self._built.setdefault((key, config, batch.latent, plan.dtype, *overlap), [])
        for few in built:
            if few.serves(plan) and few.zeroes(plan):
                return few.on(plan, batch.samples)
        built.append(build(config, plan, batch))
        return built[-1]


def _part(program: Program, sized: Program, buffer: Buffer) -> Buffer:
    """A view that begins inside its base: as far along every dim of a base of other sizes."""
    assert buffer.base is not None
    before, after = program.local_shape(buffer.base), sized.local_shape(buffer.base)
    if before == after:
        return buffer
    strides, others = program.local_strides(buffer.base), sized.local_strides(buffer.base)
    rest, offset = buffer.offset, 0
    for i in sorted(range(len(before)), key=lambda i: -strides[i]):
        if before[i] > 1:
            start, rest = divmod(rest, strides[i])
            offset += start * after[i] // before[i] * others[i]
    return altered(buffer, offset=offset, strides=buffer.strides and others)  # what is strided is as its base
