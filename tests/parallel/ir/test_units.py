"""Flat units: every element of every parameter has one place in every replica, on any plan."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinemesh.model import weights
from cinemesh.model.config import REPLICATED_UNIT, parameters, preset
from cinemesh.model.step import unit_layout
from cinemesh.parallel.ir.fields import AXES
from cinemesh.parallel.ir.layout import FSDP, REPLICATED_AXES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.units import ALIGN, Parameter, Units, lay_out
from cinemesh.parallel.runtime.mesh import coordinates, group_ranks, rank_at

plans = st.builds(
    Plan,
    tp=st.sampled_from([1, 2, 3, 6]),
    cp=st.integers(1, 3),
    dp_shard=st.integers(1, 5),
    dp_replicate=st.integers(1, 2),
    order=st.permutations(AXES).map(tuple),
)


def row(name: str, shape: tuple[int, ...], tp_dim: int | None, unit: str, *, decay: bool) -> Parameter:
    return Parameter(name, shape, tp_dim, unit, "normal", 1.0, decay, "part")


sizes = st.integers(1, 40)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Parameter]]:
    """Units of odd shapes; TP-sharded ones hold only decayed weights, as in the model."""
    table: dict[str, list[Parameter]] = {"once": []}
    for index in range(draw(st.integers(1, 4))):
        table["once"].append(row(f"once.{index}", (draw(sizes), draw(sizes)), None, "once", decay=draw(st.booleans())))
    for unit in range(draw(st.integers(1, 3))):
        rows = []
        for index in range(draw(st.integers(1, 3))):
            dim = draw(st.integers(0, 2))
            shape = [draw(sizes) for _ in range(3)]
            shape[dim] = 6 * draw(st.integers(1, 3))
            rows.append(row(f"unit{unit}.{index}", (shape[0], shape[1], shape[2]), dim, f"unit{unit}", decay=True))
        table[f"unit{unit}"] = rows
    return table


def ranks_of(plan: Plan) -> list[dict[str, int]]:
    return [coordinates(plan, rank) for rank in range(plan.world_size)]


@settings(max_examples=60, deadline=None)
@given(plans, tables())
def test_every_element_is_held_exactly_once_per_replica(plan: Plan, table: dict[str, list[Parameter]]) -> None:
    units = lay_out(table, plan)  # pyright: ignore[reportArgumentType]
    for replica in range(plan.dp_replicate):
        held: dict[str, list[np.ndarray]] = {}
        for position in (p for p in ranks_of(plan) if p["dp_replicate"] == replica):
            taken = np.zeros(units.flat_elements, dtype=np.int64)
            for slot, start, stop, at in weights.held_parts(units, position):
                elements = weights.global_elements(slot.parameter, plan.tp, position["tp"], torch.arange(start, stop))
                held.setdefault(slot.parameter.name, []).append(elements.numpy())
                taken[at : at + stop - start] += 1
            assert taken.max(initial=0) <= 1, "two parameters in one place"
        for parameter in (p for rows in table.values() for p in rows):
            elements = np.sort(np.concatenate(held[parameter.name]))
            assert np.array_equal(elements, np.arange(parameter.elements)), parameter.name


@settings(max_examples=60, deadline=None)
@given(plans, tables())
def test_everything_is_aligned_and_in_order(plan: Plan, table: dict[str, list[Parameter]]) -> None:
    units = lay_out(table, plan)  # pyright: ignore[reportArgumentType]
    assert units.units[-1].name == "once", "one index splits decayed elements only if the replicated unit is last"
    flat = 0
    for unit in units.units:
        assert unit.axes == (REPLICATED_AXES if unit.name == "once" else FSDP)
        assert unit.flat_offset == flat
        assert unit.elements == unit.shards * unit.shard_elements
        assert unit.shard_elements % ALIGN == 0
        flat += unit.shard_elements
        end = 0
        for slot in unit.slots:
            assert slot.offset % ALIGN == 0 and end <= slot.offset < end + ALIGN
            end = slot.offset + slot.elements
        assert [slot.parameter.decay for slot in unit.slots] == sorted(
            (slot.parameter.decay for slot in unit.slots), reverse=True
        )
        assert unit.elements - end < unit.shards * ALIGN + ALIGN
        used = sum(slot.elements for slot in unit.slots) + sum(stop - start for start, stop in unit.gaps)
        assert used == unit.elements, "gaps are what no parameter takes"
    assert units.flat_elements == flat


def by_block(whole: Tensor) -> Tensor:
    """Four elements a row, the last row filled up."""
    return F.pad(whole.view(-1), (0, -whole.numel() % 4)).view(-1, 4)


@settings(max_examples=20, deadline=None)
@given(plans, tables())
def test_filling_and_collecting_undo_each_other(plan: Plan, table: dict[str, list[Parameter]]) -> None:
    units = lay_out(table, plan)  # pyright: ignore[reportArgumentType]
    wanted = {
        p.name: torch.arange(p.elements, dtype=torch.float64).view(p.shape) + 1 for rows in table.values() for p in rows
    }
    shards = []
    for position in (p for p in ranks_of(plan) if not p["dp_replicate"]):
        flat = torch.full((units.flat_elements,), torch.nan, dtype=torch.float64)
        weights.fill_shard(flat, units, position, lambda p, block: by_block(wanted[p.name])[block])
        shards.append((position, flat))
    total = sum(int(flat.count_nonzero()) for _, flat in shards)
    tp_sharded = sum(p.elements for rows in table.values() for p in rows)
    assert total == tp_sharded, "padding is zero, and nothing is held twice"
    got = weights.collect(shards, units)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@given(plans)
def test_a_communicator_numbers_ranks_as_shards_are_numbered(plan: Plan) -> None:
    """An all-gather concatenates in rank order: shard i must be held by the i-th rank, whatever ``order`` is."""
    units = unit_layout(preset("tiny"), plan)
    for unit in (units.units[0], units.units[-1]):
        for rank in (0, plan.world_size - 1):
            members = group_ranks(plan, unit.axes, rank)
            indices = [units.shard_index(unit, coordinates(plan, member)) for member in members]
            assert indices == list(range(unit.shards))


@given(plans)
def test_ranks_and_coordinates_undo_each_other(plan: Plan) -> None:
    positions = ranks_of(plan)
    assert [rank_at(plan, position) for position in positions] == list(range(plan.world_size))
    inner = plan.order[0]
    assert [p[inner] for p in positions[: plan.size(inner)]] == list(range(plan.size(inner)))


def model_units(plan: Plan) -> Units:
    return unit_layout(preset("movie-gen-30b"), plan)


@pytest.mark.parametrize("plan", [Plan(tp=4, cp=2, dp_shard=768), Plan(tp=2, dp_shard=7), Plan()])
def test_a_shard_is_small_and_padding_negligible(plan: Plan) -> None:
    units = model_units(plan)
    elements = sum(p.elements for p in parameters(preset("movie-gen-30b")))
    wasted = units.flat_elements * units.ranks / elements - 1
    assert 0 <= wasted < 0.005  # 160 parameters of the replicated unit, at most 128 elements of padding each, a shard


def test_parameters_that_tp_replicates_share_one_unit() -> None:
    units = model_units(Plan(tp=4))
    counts = Counter(unit.axes for unit in units.units)
    assert counts == {FSDP: 49, REPLICATED_AXES: 1}  # 48 blocks and the conditioning
    assert units.units[-1].name == REPLICATED_UNIT
    once = sum(slot.parameter.elements for slot in units.units[-1].slots)
    assert 40e6 < once < 50e6  # about 43 million by the design


@pytest.mark.parametrize("dp_shard", [1, 3, 96])
def test_units_over_another_shard_group_are_those_laid_out_for_it(dp_shard: int) -> None:
    """Only here: units moved to another shard group that are not those laid out for it."""
    config, plan = preset("tiny"), Plan(tp=2, cp=2, dp_shard=2)
    wanted = plan.with_degrees(dp_shard=dp_shard)
    assert unit_layout(config, plan).over(wanted) == unit_layout(config, wanted)
