"""``cinemesh train``: from a recipe to a trained model, resumed exactly where it stopped.

Every batch, random number and learning rate is a function of the step, so a run that was stopped and resumed ends with
the weights, bit by bit, of one that was not (on GPUs: where the recipe asks for deterministic kernels). It is resumed
from the newest whole checkpoint in its directory; checkpoints are written behind training.
All samples of a step are of one bucket; the steps of all buckets are captured when the run starts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.batches import Batches, BatchHistory, batches_told
from ...data.cache.history import History
from ...model.blueprint import BuildSteps, build_here
from ...model.buckets import BucketRunner
from ...model.config import latent_text
from ...model.runner import StepRunner
from ...model.weights import initial_values
from ..cluster.alike import program_digest
from ..cluster.builders import builders
from ..cluster.environment import cores_each, processes_here, world_size
from ..cluster.meeting import agree
from ..cluster.processes import Joined, Stopped, StopSignal, joined, launch, rank_main
from ..cluster.verdict import stages_of
from ..storage.places import Location
from .base import BEGUN_WITH
from .captions import contents, place_encoders, told_losses
from .checkpoint.choosing import Keep, kept_in
from .checkpoint.loading import resume
from .checkpoint.saving import Saver
from .differences import recipe_facts
from .feed import Feed
from .goodput import LossCause
from .in_memory.recovery import CopiesInMemory
from .latent_cache import open_history
from .needs import check_training_memory
from .plateau import VALIDATIONS
from .recipe import Config, read_run
from .resume import allowed_changes, check_may_change
from .setting import Setting
from .showcase import show_samples
from .shown_clips import ShownClips
from .spikes import LOSSES, SPIKES, RolledBack, roll_back
from .start import Begun, begin, check_start, put_under
from .steps import StepLoop
from .stragglers import Stragglers
from .telemetry import Telemetry

CARRIED = (BEGUN_WITH, VALIDATIONS, SPIKES, LOSSES)  # of a checkpoint's note: every later one holds it too


def run(*, config: Path, nproc: int | None, overrides: Sequence[str]) -> None:
    """Train, on ``nproc`` processes of this machine or on those that torchrun started. Exits with the ranks' code."""
    recipe, batches = read_run(config, overrides)
    recipe.plan.check_world_size(world_size(nproc))
    check_may_change(recipe)
    setting = Setting.of(recipe, batches)
    setting.check_training()
    check_start(recipe, setting.model, setting.encoding.codec)
    check_training_memory(setting)
    local = nproc or 1
    code = launch(local, train, recipe, batches) if local > 1 else rank_main(lambda: train(recipe, batches))
    if code:
        sys.exit(code)


def train(config: Config, batches: Batches | None = None) -> None:
    """The work of one rank. ``batches``: samples of a step, where they are not the recipe's.

    Raises Stopped when a signal asked for it and the state is saved.
    """
    alike = recipe_facts(config) | {"samples of a step": str(batches or config.data.global_batches)}
    setting, stop = Setting.of(config, batches), StopSignal()
    with (
        builders(setting.blueprints(), cores_each(processes_here(1))) as build,
        joined(config.plan, config.device, alike, config.logging.directory) as place,
    ):
        history = open_history(setting, place)
        cache = history.at(config.schedule.steps)
        setting.sampled_captions(cache)  # refused before training, not after
        with stop:
            runner = train_steps(setting, place, history, stop, build)
        done = runner.steps_done >= config.schedule.steps
        if done and config.sample is not None:
            show_samples(setting, place, cache, runner)
    if not done and stop.signum is not None:
        raise Stopped(stop.signum, f"stopped after step {runner.steps_done}; the same command goes on from there")


def train_steps(
    setting: Setting, place: Joined, history: History, stop: StopSignal, build: BuildSteps = build_here
) -> StepRunner:
    """From the newest checkpoint, if there is one, to the last step or until ``stop``; what was reached is saved.

    ``build``: who builds the steps. The answer holds the states.
    """
    buckets = setting.runners(place, build=build)
    place_encoders(setting.config, setting.encoding, place, buckets.first.comm)
    if place.meeting is not None:
        programs = {f"program of {latent_text(at)}": program_digest(one.program) for at, one in buckets.runners.items()}
        told = contents(setting.config, setting.encoding, history)
        agree(place.meeting, "code and latent cache", programs | {"latent cache": told})
    rolled, copies = None, _copies(setting.config, place, buckets.first)
    while (rolled := _until_spike(setting, place, history, stop, buckets, rolled, copies)) is not None:
        pass
    if copies is not None:
        copies.close()
    return buckets.first


def _copies(config: Config, place: Joined, runner: StepRunner) -> CopiesInMemory | None:
    """Of the states, in the servers' memory, where the recipe asks for them."""
    if not config.logging.memory_every:
        return None
    store = place.meeting.store if place.meeting is not None else None
    return CopiesInMemory(config.logging.memory_folder, kept_in(config), runner, store)


def _until_spike(
    setting: Setting,
    place: Joined,
    history: History,
    stop: StopSignal,
    buckets: BucketRunner,
    rolled: RolledBack | None,
    copies: CopiesInMemory | None,
) -> RolledBack | None:
    """As :func:`train_steps`, to the end or to a spike, which the run goes back from: to its newest checkpoint."""
    config, speaks, since = setting.config, place.rank == 0, time.time()
    runner, checkpoints = buckets.first, kept_in(config)
    found, told = _gone_on_from(checkpoints, runner, copies, anew=rolled is not None)
    changed = []
    if found is not None:
        changed = allowed_changes(found, config, contents(config, setting.encoding, history, runner.steps_done))
    history.check_withdrawn(runner.steps_done, config.schedule.steps)
    begun = _at_step_0(setting, runner, found)
    written = found or {}
    carried: dict[str, Any] = {key: written[key] for key in CARRIED if key in written}
    if begun:
        carried[BEGUN_WITH] = begun.note
    asked = tuple(config.data.global_batches)
    before = BatchHistory.of(written, setting.global_batches)
    if rolled is not None:
        before = rolled.going_on(runner.steps_done, [draws.step for draws in history.draws])
        carried[SPIKES] = rolled.spikes
    batches = before.going_on(runner.steps_done, setting.global_batches)
    telemetry = Telemetry(config.logging.directory, config.schedule.steps, runner.steps_done, since) if speaks else None
    if telemetry:
        telemetry.say(f"{setting.model.name}: {config.plan.equation()} processes on {place.device}; "
                      + told[0])  # fmt: skip
        for line in begun.lines if begun else ():
            telemetry.say(line)
        for change in changed:
            telemetry.say(f"not as in the run so far: {change}")
        for passed_over in told[1:]:
            telemetry.say(f"WARNING: {passed_over}; it was passed over")
        if rolled is not None:
            telemetry.say(rolled.line(runner.steps_done))
        if batches != before or setting.global_batches != asked:
            telemetry.say(
                f"from step {runner.steps_done + 1} on a step takes {batches_told(setting.global_batches, asked)}"
            )
        telemetry.say(f"latent cache {config.data.cache}, version {history.text()}")
        for line in told_losses(config, setting.encoding, history, runner.steps_done):
            telemetry.say(line)
        for windows in history.at(runner.steps_done).buckets:
            telemetry.say(f"bucket {windows.bucket}: {len(windows.train)} training and {len(windows.validation)} "
                          "validation windows")  # fmt: skip
    failure = buckets.capture(config.capture) if rolled is None else None
    if telemetry:
        if failure is not None:
            telemetry.say(f"steps are NOT captured, on any rank: {failure}; they run from the executor")
        if rolled is None:
            telemetry.say(buckets.report())
        telemetry.account.lose(LossCause.START, time.time() - since)
    try:
        log = config.logging
        saver = Saver(checkpoints, runner, Keep(log.keep, log.keep_every, log.keep_best), log.checkpoint_files)
        feed = Feed(config, history, runner.mesh.data_rank if runner.mesh else 0, batches, setting.encoding)
        loop = StepLoop(setting, buckets, feed, saver, telemetry, carried, place.marks, Stragglers.of(place))
        loop.copies = copies
        if config.sample is not None and config.sample.every:
            loop.shown = ShownClips(setting, place, history.at(runner.steps_done), runner, telemetry)
        if place.watched is not None:
            place.watched.tell(config.plan, [stages_of(program) for program in loop.runs.programs])
        try:
            spike = loop.run(stop)
        finally:
            loop.feed.close()
        saver.close()
        if spike is None or config.spikes is None:
            return None
        spikes = roll_back(spike, config.spikes, checkpoints, copies, carried.get(SPIKES, []), runner.mesh)
        if telemetry:
            telemetry.say(f"WARNING: step {spike.step}: {spike}; the run goes back, and passes over the samples since")
        return RolledBack(spikes, loop.feed.batches, loop.feed.bucket[: spike.step])
    finally:
        if telemetry:
            telemetry.close()


def _gone_on_from(
    checkpoints: Location, runner: StepRunner, copies: CopiesInMemory | None, *, anew: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Load what is newest, in the servers' memory or in storage: there, where a run goes back (``anew``). Collective.

    The note of the run so far, None at step 0; where that was found, and what was passed over.
    """
    recovered, passed_over = copies.recover() if copies is not None and not anew else (None, [])
    if recovered is not None:
        return recovered.note, [f"resumed from the servers' memory, step {recovered.step}", *passed_over]
    resumed = resume(checkpoints, runner)
    if resumed is None:
        return None, ["from step 0", *passed_over]
    if copies is not None:
        copies.since = resumed.manifest.step
    passed_over += [error.problem for error in resumed.damaged]
    return resumed.manifest.note, [f"resumed from {resumed.path}", *passed_over]


def _at_step_0(setting: Setting, runner: StepRunner, resumed: dict[str, Any] | None) -> Begun | None:
    """States of a run that was not resumed: random, or what a checkpoint begins it with, which is told. Collective.

    ``resumed``: the note of one that was.
    """
    config = setting.config
    if config.start_from is None:
        if resumed is None:
            runner.initialise(initial_values(config.seed))
        return None
    put_under(config.start_from, runner, resumed)
    if resumed is not None:
        return None
    return begin(config.start_from, runner, config.seed, setting.encoding.codec)
