"""A checkpoint that one process writes, of any states, one shard after another: of a model of any size.

As a plan that splits it over dp_shard alone would have written it; any plan reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ....kernels.dtypes import TORCH_DTYPES
from ....model.config import ModelConfig, trained
from ....model.step import unit_layout
from ....parallel.ir.plan import Plan
from ...progress import progress
from ...storage.places import Location, check_room
from .assembling import assembled, described
from .layout import SHARDING, Coordinates, Layout
from .manifest import Manifest
from .publishing import publish, published_or_gone
from .writing import Written, write_part

SHARD_BYTES = 1 << 30  # of all states: what is in memory at once

Fill = Callable[[Layout, Coordinates, dict[str, Tensor]], None]


def write_alone(
    final: Location,
    config: ModelConfig,
    states: Mapping[str, str],
    fill: Fill,
    *,
    step: int,
    updates: int,
    note: Any,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> None:
    """Write the checkpoint ``final``, a folder that is not there yet.

    ``states``: dtype by state, float32 or float64. ``fill(layout, at, flats)`` puts what lies at coordinates ``at`` of
    the layout into a flat buffer a state, which holds zeros. ``step``, ``updates`` and ``note`` as in a manifest;
    ``check`` raises where what was written is not to be published. Raises CinemeshError when ``final`` is there or
    cannot be written; nothing is then left of it.
    """
    dtype = max(states.values(), key=lambda name: TORCH_DTYPES[name].itemsize)
    each = sum(TORCH_DTYPES[name].itemsize for name in states.values())
    elements = sum(row.elements for row in trained(config))
    plan = Plan(dp_shard=-(-elements * each // SHARD_BYTES), dtype=cast(Literal["float32", "float64"], dtype))
    layout = Layout.of(unit_layout(config, plan))
    about = described(config, plan, states, step=step, updates=updates, note=note)
    written: list[Written] = []
    with published_or_gone(final):
        check_room(final, "a checkpoint", elements, each)
        with progress("writing", plan.dp_shard) as begin:
            for shard in range(plan.dp_shard):
                begin(f"file {shard + 1}")
                at = dict.fromkeys(SHARDING, 0) | {"dp_shard": shard}
                flats = {
                    state: torch.zeros(layout.flat_elements, dtype=TORCH_DTYPES[name]) for state, name in states.items()
                }
                fill(layout, at, flats)
                written.append(write_part(final / f"{shard:05d}.safetensors", layout, at, 0, flats))
        manifest = assembled(about, layout, written)
        check(manifest)
        publish(manifest, final)
