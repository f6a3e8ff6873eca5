"""``cinemesh replay``: a step of a run once more, from the checkpoint before it, with every value measured.

Samples, draws and learning rate are functions of the step, so it is that step again, under any plan and in any dtype;
in float64 what only rounding made is not there. Nothing of the run is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...data.batches import BatchHistory
from ...data.cache.history import History
from ...errors import CinemeshError
from ...model.buckets import BucketRunner
from ...model.runner import StepRunner
from ...model.weights import initial_values
from ...parallel.layers.sharded import FROZEN_STATE
from ...parallel.runtime.comm import first_of
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.processes import joined, launch, rank_main
from ..progress import progress
from ..storage.places import Location
from ..tables import new_console, plain_table
from .base import check_base, read_base
from .captions import contents, place_encoders
from .checkpoint.choosing import kept_in, published
from .checkpoint.layout import Layout
from .checkpoint.loading import newest_whole, read_states
from .checkpoint.manifest import COUNTERS, SAVED_STATES, Manifest, read_manifest, step_of
from .checkpoint.same_model import check_model
from .checkpoint.together import together
from .differences import recipe_facts
from .feed import Feed
from .latent_cache import open_history
from .needs import check_training_memory
from .numerics import Numerics, StepNumbers, gathered
from .plateau import VALIDATIONS
from .recipe import Config, read_config
from .resume import allowed_changes
from .setting import Setting

BLOCK_COLUMNS = ("block", "residual max", "rms", "logits at most")


@dataclass(frozen=True)
class ReplayOrder:
    """Step ``step``, counted from 1, of a recipe's run."""

    config: Config
    step: int
    as_json: bool


def run(*, config: Path, step: int, nproc: int | None, overrides: Sequence[str], exact: bool, as_json: bool) -> int:
    """Replay a step and print its numbers. 1 when something of it is not finite."""
    recipe = read_config(config, overrides)
    processes = world_size(nproc)
    if processes == 1:
        recipe = replace(recipe, plan=recipe.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1))
    recipe = replace(recipe, may_change=(*recipe.may_change, "plan.dtype"))  # states are cast
    if exact:
        recipe = replace(recipe, plan=replace(recipe.plan, dtype="float64"))
    recipe.plan.check_world_size(processes)
    if not 1 <= step <= recipe.schedule.steps:
        raise CinemeshError(f"--step {step}: the run has steps 1 to {recipe.schedule.steps}", remedy="name one of them")
    if not recipe.logging.directory.is_dir():
        raise CinemeshError(
            f"no run in {recipe.logging.directory}", remedy="train with this recipe first, or set logging.directory"
        )
    say_device(recipe.device, processes_here(processes))
    history = BatchHistory.of(_newest_note(recipe), tuple(recipe.data.global_batches))
    setting = Setting.of(recipe, history.at(step - 1))
    setting.check_training()
    check_training_memory(setting)
    order = ReplayOrder(recipe, step, as_json)
    return launch(nproc, replay, order) if nproc and nproc > 1 else rank_main(lambda: replay(order))


def replay(order: ReplayOrder) -> int:
    """The work of one rank; rank 0 prints."""
    config = order.config
    with joined(config.plan, config.device, recipe_facts(config) | {"step": str(order.step)}) as place:
        note = _newest_note(config)
        batches = BatchHistory.of(note, tuple(config.data.global_batches))
        setting = Setting.of(config, batches.at(order.step - 1))
        history = open_history(setting, place)
        runner = setting.runners(place)
        begun = _begin(order, setting, history, runner)
        validations = note.get(VALIDATIONS, [])
        place_encoders(config, setting.encoding, place, runner.first.comm)
        feed = Feed(config, history, place.mesh.data_rank if place.mesh else 0, batches, setting.encoding)
        if batches.at(runner.first.steps_done) != setting.global_batches:
            raise CinemeshError(
                f"steps got another number of samples between step {runner.first.steps_done}, whose checkpoint is the "
                f"newest before it, and step {order.step}",
                remedy="name a step for which a checkpoint later than that is there",
            )
        first, numerics = runner.first.steps_done, None
        with progress("replaying", order.step - first, silent=place.rank > 0) as begin:
            for step in range(first, order.step):
                begin(f"step {step + 1}")
                feed.encode(step)
                feed.load(step, runner)
                if step + 1 == order.step:
                    numerics = Numerics(runner.current)
                known = [one for one in validations if one[0] <= step]
                lr = config.schedule.lr(config.optimizer.lr, step, known)
                runner.step(lr, numerics.watch if numerics else None)
        feed.close()
        assert numerics is not None
        numbers = gathered(numerics.measured(), runner.current)
        if numbers is not None:
            ids = feed.ids(order.step - 1)
            _show(order, begun, [runner.first.loss.item(), runner.first.gradient_norm.item()], numbers, ids)
        return int(bool(first_of(numbers.bad if numbers else None) if place.mesh else numbers and numbers.bad))


def _begin(order: ReplayOrder, setting: Setting, history: History, runner: BucketRunner) -> str:
    """Bring states to where a checkpoint before the step has them, cast to this plan's dtype; what was taken."""
    folder = kept_in(order.config)
    states = runner.first
    paths = [path for path in published(folder) if (step_of(path) or 0) < order.step]

    def read(path: Location) -> Manifest:
        return together(states.mesh, lambda: _read(path, order, setting, history, states))

    found, damaged = newest_whole(paths, states.mesh, read)
    if found is not None:
        return str(found[0])
    if order.config.start_from is not None or damaged:
        raise CinemeshError(
            f"no whole checkpoint before step {order.step} in {folder}", remedy="name a later step, or restore one"
        )
    states.initialise(initial_values(order.config.seed))
    return "random weights"


def _newest_note(config: Config) -> dict[str, Any]:
    """Of the run's newest checkpoint that can be read: what it knows of the run, validations and batches."""
    for path in published(kept_in(config)):
        with suppress(CinemeshError):
            return read_manifest(path).note
    return {}


def _read(path: Location, order: ReplayOrder, setting: Setting, history: History, states: StepRunner) -> Manifest:
    found = read_manifest(path)
    check_model(path, found, setting.model)
    allowed_changes(found.note, order.config, contents(order.config, setting.encoding, history, found.step))
    targets = {state: states.buffers[state].view(-1) for state in SAVED_STATES}
    read_states(path, found, Layout.of(states.units), states.coordinates, targets)
    states.buffers[COUNTERS].copy_(torch.tensor([found.step, found.updates]))
    if order.config.start_from is not None and setting.model.lora is not None:
        check_base(order.config.start_from, setting.model, found.note)
        read_base(order.config.start_from, states.buffers[FROZEN_STATE], states.units, states.coordinates)
    return found


def _show(order: ReplayOrder, begun: str, ends: Sequence[float], numbers: StepNumbers, ids: Sequence[int]) -> None:
    loss, norm = ends
    if order.as_json:
        about = {
            "step": order.step,
            "from": begun,
            "dtype": order.config.plan.dtype,
            "loss": loss,
            "gradient_norm": norm,
        }
        print(json.dumps(about | numbers.values(), indent=1))
        return
    console = new_console()
    console.print(
        f"step {order.step} in {order.config.plan.dtype}, from {begun}: loss {loss:.6g}, gradient norm {norm:.6g}"
    )
    blocks = plain_table(*BLOCK_COLUMNS, right=BLOCK_COLUMNS)
    for block, (residual, logits) in enumerate(zip(numbers.residual, numbers.logits, strict=True)):
        blocks.add_row(str(block), f"{residual.amax:.4g}", f"{residual.rms:.4g}", f"{logits:.4g}")
    units = plain_table("gradient of", "max", "rms", right=("max", "rms"))
    for unit, gradient in numbers.gradient.items():
        units.add_row(unit, f"{gradient.amax:.4g}", f"{gradient.rms:.4g}")
    console.print(blocks)
    console.print(units)
    if numbers.bad is not None:
        console.print(numbers.bad.line(order.config.plan, ids))
