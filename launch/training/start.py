"""A run that begins where another ended: weights of a checkpoint, written under any plan, become those of step 0.

Position tables may be longer than the checkpoint's. Row j of m is then read off the n rows at (j + 0.5) n / m - 0.5,
linearly between two of them and constant beyond the outer ones: the patch centres of both grids are aligned. The mean
of two new rows is so the old one inside of a doubled table, and its row 0 stays as it was: an image, which has one
frame, does not change when the temporal table grows, and a table of one row becomes one of equal rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...data.codec import LatentCodec
from ...errors import CinemeshError
from ...model.config import ModelConfig, parameters
from ...model.runner import StepRunner
from ...model.weights import initial_values
from ...parallel.ir.plan import Plan
from ...parallel.layers.sharded import FROZEN_STATE
from .base import DIGEST, check_base, read_base
from .checkpoint.choosing import VALIDATION_LOSS, check_files, kept_in, published
from .checkpoint.layout import SHARDING, FlatParameter, FlatUnit, Layout
from .checkpoint.loading import read_states
from .checkpoint.manifest import COUNTERS, Manifest, read_manifest
from .checkpoint.same_model import check_model, shown
from .checkpoint.together import together
from .codec_switch import MAKES, READS, SWITCHED, check_switch, switch_told, switched
from .recipe import Config, StartFrom

MOMENTS = ("exp_avg", "exp_avg_sq")
SQUARES = "exp_avg_sq"  # moment of squares: a row that is a sum of rows has the sum with squared shares


@dataclass(frozen=True)
class Begun:
    """How a run began: what its checkpoints keep of it, and what it says."""

    note: dict[str, Any]
    lines: list[str]


def check_start(config: Config, model: ModelConfig, codec: LatentCodec) -> None:
    """Raises CinemeshError when a run that is to begin from a checkpoint cannot.

    One that goes on needs none, unless it trains low-rank factors: what they are added to is there alone.
    """
    if config.start_from is not None and model.lora is not None:
        check_base(config.start_from, model)
    elif config.start_from is not None and not published(kept_in(config)):
        found = _checked(config.start_from, model, codec)
        check_files(config.start_from.checkpoint, found)


def put_under(section: StartFrom, runner: StepRunner, note: Mapping[str, Any] | None) -> None:
    """The frozen weights under low-rank factors; nothing where all weights are trained. Collective.

    ``note``: of the checkpoint of factors that was loaded, if any. Raises CinemeshError as :func:`check_base`.
    """
    if runner.config.lora is not None:
        together(runner.mesh, lambda: check_base(section, runner.config, note))
        flat = runner.buffers[FROZEN_STATE].view(-1)
        together(runner.mesh, lambda: read_base(section, flat, runner.units, runner.coordinates))


def begin(section: StartFrom, runner: StepRunner, seed: int, codec: LatentCodec | None = None) -> Begun:
    """Fill the states of ``runner`` from a checkpoint; steps count from 0, the EMA is equal to the weights. Collective.

    ``codec``: of the latents, where the checkpoint's may have been others. Low-rank factors, and what begins anew with
    a codec, begin as ``seed`` says, the factors over what :func:`put_under` has read.
    Raises CinemeshError, on all ranks, for a checkpoint that is damaged, or from which this model cannot begin.
    """
    if runner.config.lora is not None:
        runner.initialise(initial_values(seed), frozen=False)
        return _told(section, check_base(section, runner.config), {})
    path, here = section.checkpoint, Layout.of(runner.units)
    found = together(runner.mesh, lambda: _checked(section, runner.config, codec))
    other = (READS, MAKES) if codec is not None and section.latents != "same" else ()
    kept = {name: shape for name, shape in here.shapes.items() if name in found.layout.shapes and name not in other}
    grown = {name: shape for name, shape in kept.items() if found.layout.shapes[name] != shape}
    same = [name for name in kept if name not in grown]
    targets = {section.weights: runner.buffers["master"].view(-1)}
    if section.moments == "keep":
        targets |= {moment: runner.buffers[moment].view(-1) for moment in MOMENTS}
    for state in ("master", *MOMENTS):
        runner.buffers[state].zero_()  # parameters that the checkpoint lacks begin as zeros

    def read() -> None:
        old, new = found.layout.of_parameters(same), here.of_parameters(same)
        read_states(path, replace(found, layout=old), new, runner.coordinates, targets)
        for name, shape in grown.items():
            for state, target in targets.items():
                table = expanded(_table(section, found, state, name), shape[0], squared=state == SQUARES)
                _fill(target, runner, here, name, table)
        for row in parameters(runner.config):
            if codec is not None and row.name in other:
                held = _table(section, found, section.weights, row.name)
                made = switched(section, found.note, row, held, codec, seed)
                _fill(targets[section.weights], runner, here, row.name, made)

    together(runner.mesh, read)
    runner.buffers["ema"].copy_(runner.buffers["master"])
    updates = found.updates if section.moments == "keep" else 0
    runner.buffers[COUNTERS].copy_(torch.tensor([0, updates]))  # AdamW's bias correction counts updates
    begun = _told(section, found, grown)
    if other and codec is not None:
        begun.lines.append(switch_told(section, found.note, codec))
        begun.note[SWITCHED] = codec.fingerprint
    return begun


def expanded(table: Tensor, length: int, *, squared: bool = False) -> Tensor:
    """[length, D] of a position table [n, D], in float64; with ``squared``, what its moment of squares becomes."""
    n = len(table)
    at = ((torch.arange(length, dtype=torch.float64) + 0.5) * n / length - 0.5).clamp(0, n - 1)
    low = at.floor().long().clamp(max=max(n - 2, 0))
    share = (at - low)[:, None]
    before, after = (1 - share, share) if not squared else ((1 - share).square(), share.square())
    wide = table.double()
    return before * wide[low] + after * wide[(low + 1).clamp(max=n - 1)]


def _table(section: StartFrom, found: Manifest, state: str, name: str) -> Tensor:
    """All of a parameter of a checkpoint that tp does not split, float64."""
    shape = found.layout.shapes[name]
    unit = FlatUnit(name, math.prod(shape), SHARDING, 0, (FlatParameter(name, shape, None, 0),))
    whole = Layout(dict.fromkeys(SHARDING, 1), (unit,))
    table = torch.empty(shape, dtype=torch.float64)
    there = replace(found, layout=found.layout.of_parameters([name]))
    read_states(section.checkpoint, there, whole, dict.fromkeys(SHARDING, 0), {state: table.view(-1)})
    return table


def _fill(target: Tensor, runner: StepRunner, here: Layout, name: str, table: Tensor) -> None:
    """What this rank holds of a table, which tp does not split."""
    for run in here.of_parameters([name]).runs(runner.coordinates):
        target[run.position : run.position + run.stop - run.start].copy_(table.view(-1)[run.start : run.stop])


def _checked(section: StartFrom, model: ModelConfig, codec: LatentCodec | None) -> Manifest:
    """The manifest of a checkpoint from which ``model`` can begin as ``section`` says. Raises CinemeshError."""
    path, found = section.checkpoint, read_manifest(section.checkpoint)
    before = _before(section, found, model)
    if codec is not None:
        check_switch(section, found.note, model, codec)
    check_model(path, found, before)
    wanted = [section.weights, *(MOMENTS if section.moments == "keep" else ())]
    if missing := [state for state in wanted if state not in found.states]:
        raise CinemeshError(
            f"start_from: checkpoint {path} holds {', '.join(found.states)} and no {', '.join(missing)}",
            remedy="take others with start_from.weights, drop the moments, or name another checkpoint",
        )
    if section.moments == "keep" and before.latent_conditions != model.latent_conditions:
        new = [condition.name for condition in model.latent_conditions]
        raise CinemeshError(
            f"start_from: moments: keep, but checkpoint {path} has no parameters of the latent conditions "
            f"{', '.join(new)}: its list of parameters is another one",
            remedy="drop the moments",
        )
    return found


def _before(section: StartFrom, found: Manifest, model: ModelConfig) -> ModelConfig:
    """The model as it has to be in the checkpoint: tables may be shorter there, latent conditions absent."""
    path, here = section.checkpoint, model.position_lengths
    there = found.model.get("position_lengths", here)
    if not _lengths(there) or len(there) != len(here):
        return model  # no list of lengths: what differs is told by whoever compares models
    if shrunk := [f"{axis}: {b} < {a}" for axis, a, b in zip("thw", there, here, strict=True) if b < a]:
        raise CinemeshError(
            f"start_from: position tables of checkpoint {path} would shrink ({', '.join(shrunk)}), and rows that were "
            "learnt would be lost",
            remedy=f"give model.position_lengths of at least {shown(there)}",
        )
    if tuple(there) != here and section.positions != "expand":
        raise CinemeshError(
            f"start_from: position tables have {shown(there)} rows in checkpoint {path} and {shown(here)} here",
            remedy="say positions: expand, or give the model the lengths of the checkpoint",
        )
    conditions = model.latent_conditions if found.model.get("latent_conditions") else ()
    before = replace(model, position_lengths=tuple(there), latent_conditions=conditions)
    channels = found.model.get("channels")
    return replace(before, channels=channels) if section.latents == "anew" and type(channels) is int else before


def _lengths(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(length) is int and length > 0 for length in value)


def _told(section: StartFrom, found: Manifest, grown: Mapping[str, tuple[int, ...]]) -> Begun:
    path, plan = section.checkpoint, Plan.from_dict(found.plan)
    tables = {name: [found.layout.shapes[name][0], shape[0]] for name, shape in grown.items()}
    loss = found.note.get(VALIDATION_LOSS)
    there = "" if loss is None else f", validation loss {float(loss):.4f} there"
    moments = f"kept, of {found.updates} updates" if section.moments == "keep" else "zero"
    lines = [f"begins with the {section.weights} weights of {path}, step {found.step} of {plan.equation()} processes"
             f"{there}; moments are {moments}"]  # fmt: skip
    lines += [f"{name} grows from {a} to {b} rows" for name, (a, b) in tables.items()]
    note: dict[str, Any] = {
        "checkpoint": str(path),
        "step": found.step,
        "updates": found.updates,
        "weights": section.weights,
        "moments": section.moments,
        DIGEST: found.digests[section.weights],
        "tables": tables,
        VALIDATION_LOSS: loss,
    }
    return Begun(note, lines)
