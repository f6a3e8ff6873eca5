"""FSDP by hand: gathers of units, views of weights and of gradients, reductions (torch-free).

    master, m, v, ema   fp32 flat shards, one storage each, held by every rank for its part      [states]
    weights             compute-dtype copy of the master shard, made once a step
    frozen              what no step changes: a shard in the compute dtype, and nothing else                [state]
    gather              all-gather of one unit's shard -> the flat unit; parameters are views
    gradient            the flat gradient of one unit, Partial over everything that split the batch or the tokens
    reduce              reduce-scatter of the flat gradient over the unit's axes; the cp sum (and, in the replicated
                        unit, the tp sum) comes with it
    replicas        dp_replicate is summed once a step, after the last micro-batch: over the whole flat shard, or, where
                    ``plan.grad_units`` asks for reductions behind compute, unit by unit as they are reduced

Micro-batches add their reduced shards. The replicated unit is gathered once a step and reduced once, after the last.
"""

from __future__ import annotations

from typing import Any

from ..ir.builder import Builder
from ..ir.layout import BATCH, NONE, REPLICATED_AXES, Placement
from ..ir.records import Buffer, Holds
from ..ir.units import Unit, Units

FROZEN_STATE = "frozen"  # the state of what is not trained
SHARDED = Placement((REPLICATED_AXES, NONE))  # [ranks, elements]: every rank holds other elements
REPLICA_PARTIAL = Placement((REPLICATED_AXES, NONE), frozenset({"dp_replicate"}))
OPTIMIZER_STATES = {"master": Holds.MASTER, "exp_avg": Holds.MOMENT, "exp_avg_sq": Holds.MOMENT, "ema": Holds.EMA}


class ShardedUnits:
    """Emits the records of all units into one builder."""

    def __init__(self, b: Builder, units: Units, *, training: bool) -> None:
        self.b = b
        self.units = units
        stat = b.plan.stat_dtype
        shape = (units.ranks, units.flat_elements)
        self.states = {
            name: b.state(name, shape, stat, SHARDED, holds)
            for name, holds in OPTIMIZER_STATES.items()
            if training or holds is Holds.MASTER
        }
        self.frozen: Buffer | None = None
        if units.frozen:
            frozen = (units.ranks, units.frozen_elements)
            self.frozen = b.state(FROZEN_STATE, frozen, b.plan.compute_dtype, SHARDED, Holds.FROZEN)
        self.gradient = b.buffer("gradient", shape, stat, REPLICA_PARTIAL, holds=Holds.GRADIENT) if training else None
        self._reduced: dict[str, Buffer] = {}
        self._totals: list[Buffer] = []  # of units that were summed over replicas by themselves
        self._weights: Buffer | None = None

    def cast_weights(self) -> None:
        """The compute-dtype copy of the master shard, once a step."""
        self._weights = self.b.cast(self.states["master"], self.b.plan.compute_dtype, "weights", Holds.WEIGHTS)

    def _shape(self, unit: Unit) -> tuple[int, int]:
        return (self.units.plan.tp if unit.tp_sharded else 1, unit.elements)

    def _placement(self, unit: Unit, split: bool) -> Placement:
        return Placement((("tp",) if unit.tp_sharded else NONE, unit.axes if split else NONE))

    def gather(self, place: str) -> dict[str, Buffer]:
        """All-gather a unit, its frozen part and its trained one; returns its parameters by name.

        Call inside the scope of the unit's weights.
        """
        return {name: w for unit in self.units.at[place] for name, w in self._gather(unit).items()}

    def _gather(self, unit: Unit) -> dict[str, Buffer]:
        b, source = self.b, self._weights if unit.trained else self.frozen
        assert source is not None, "cast_weights comes first"
        mark = "trained_" if unit.trained and unit.name != unit.place else ""
        shard = b.view(source, f"{mark}shard", self._shape(unit), self._placement(unit, True), unit.flat_offset)
        flat = b.all_gather(shard, unit.axes, f"{mark}flat", dim=1, holds=Holds.GATHERED_UNIT, unit=unit.name)
        views = {
            slot.parameter.name: b.view(
                flat, slot.parameter.name, slot.parameter.shape, slot.parameter.placement, slot.offset
            )
            for slot in unit.slots
        }
        return {name: b.parameter(view) if unit.trained else view for name, view in views.items()}

    def _trained(self, place: str) -> Unit | None:
        return next((unit for unit in self.units.at[place] if unit.trained), None)

    def new_gradient(self, place: str) -> dict[str, Buffer]:
        """The flat gradient of a unit, gaps zeroed; returns the views into which weight gradients are written.

        Of what is trained: none of a frozen unit.
        """
        b, unit = self.b, self._trained(place)
        if unit is None:
            return {}
        partial = frozenset((*BATCH, "cp", *(() if unit.tp_sharded else ("tp",))))
        placement = Placement(self._placement(unit, False).dims, partial)
        shape, dtype = self._shape(unit), b.plan.stat_dtype
        flat = b.buffer("flat_gradient", shape, dtype, placement, holds=Holds.UNIT_GRADIENT, unit=unit.name)
        if unit.gaps:
            (flat,) = b.op("zero_gaps", [flat], "zeroed", signature="xn->xn", gaps=unit.gaps)
        return {
            slot.parameter.name: b.view(
                flat,
                f"d.{slot.parameter.name}",
                slot.parameter.shape,
                Placement(slot.parameter.placement.dims, partial),
                slot.offset,
                f"d.{slot.parameter.role}",
            )
            for slot in unit.slots
        }

    def flat_of(self, gradients: dict[str, Buffer]) -> Buffer:
        """The flat buffer behind the views that :meth:`new_gradient` returned."""
        base = next(iter(gradients.values())).base
        assert base is not None
        return self.b.buffers[base]

    def check(self, parameters: dict[str, Buffer], gradients: dict[str, Buffer]) -> None:
        """Every use of every trained parameter in this micro-batch has reached its gradient."""
        for name, gradient in gradients.items():
            self.b.demand_parameter_gradient(parameters[name], gradient)

    def reduce(self, name: str, flat: Buffer, *, last: bool) -> None:
        """Reduce-scatter a flat gradient into (or onto) the unit's part of the flat shard; ``last``: of the step."""
        b, unit = self.b, self._trained(name)
        assert self.gradient is not None and unit is not None
        if name not in self._reduced:
            placement = Placement(self._placement(unit, True).dims, REPLICA_PARTIAL.partial)
            shard = b.view(self.gradient, "gradient_shard", self._shape(unit), placement, unit.flat_offset)
            self._reduced[name] = b.reduce_scatter(flat, unit.axes, "reduced", dim=1, into=shard)
        else:
            part = b.reduce_scatter(flat, unit.axes, "reduced", dim=1)
            (self._reduced[name],) = b.op(
                "accumulate", [part], "accumulated", add_to=self._reduced[name], signature="xn->xn"
            )
        if last and b.plan.grad_units > 1:
            self._totals.append(b.all_reduce(self._reduced[name], ("dp_replicate",), "total"))

    def reduced_gradient(self) -> Buffer:
        """The whole flat gradient shard, summed over replicas. Call after the last unit was reduced."""
        assert self.gradient is not None and set(self._reduced) == {unit.place for unit in self.units.units}
        if self._totals:
            return self.b.join(self.gradient, self._totals, "gradient_total", SHARDED)
        return self.b.all_reduce(self.gradient, ("dp_replicate",), "gradient_total")


def decay_attributes(units: Units) -> dict[str, Any]:
    """For AdamW: how to find the element of a rank's flat shard before which everything decays."""
    last = units.units[-1]
    assert last.axes == REPLICATED_AXES and all(
        u.decayed == u.slots[-1].offset + u.slots[-1].elements for u in units.units[:-1]
    )
    return {
        "shard_axes": REPLICATED_AXES,
        "last_offset": last.flat_offset,
        "last_elements": last.shard_elements,
        "last_decayed": last.decayed,
    }
