"""``cinemesh train``: from a recipe to a trained model, resumed exactly where it stopped.

    torchrun ... -m cinemesh.launch.train CONFIG [--set KEY=VALUE ...]

Every batch, random number and learning rate is a function of the step, so a run that was stopped and resumed ends with
the weights, bit by bit, of one that was not. It is resumed from the newest complete checkpoint in its directory.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CinemeshError
from ..kernels.registry import kernels_for
from ..model.codec import BlockDCTCodec, LatentCodec
from ..model.config import ModelConfig
from ..model.runner import StepRunner
from ..model.step import Batch, check
from ..model.weights import initial_values
from ..parallel import comm
from . import checkpoint
from .config import Config, SampleSection, read_config
from .data import CACHE_FILE, Cache, balanced, build_cache, collate, order
from .processes import Place, Stopped, StopSignal, joined, launch, rank_main, world_size
from .sample import sample_clips
from .showcase import CONTACT_SHEET, captions_of, show
from .telemetry import Telemetry
from .text import TextEncoder, build_encoders
from .validation import Validation

SKIPPED_LIMIT = 5  # updates in a row that were skipped for a gradient that is not finite, before a run gives up


@dataclass(frozen=True)
class Setting:
    """What a recipe stands for: codec, encoders, model and batch. Nothing is read but the encoders' own settings."""

    config: Config
    codec: LatentCodec
    encoders: list[TextEncoder]
    model: ModelConfig
    batch: Batch

    @classmethod
    def of(cls, config: Config) -> Setting:
        """Raises CinemeshError when the plan does not divide the model or the batch."""
        codec = BlockDCTCodec()
        encoders = build_encoders(config.data.encoders)
        model = config.model.build(codec, encoders)
        samples = config.plan.local_batch(config.data.global_batch)
        batch = Batch(samples, config.data.latent(codec))
        check(model, config.plan, batch)
        if config.sample is not None:
            captions_of(config.sample, config.data)
        return cls(config, codec, encoders, model, batch)


def run(*, config: Path, nproc: int | None, overrides: Sequence[str]) -> None:
    """Train, on ``nproc`` processes of this machine or on those that torchrun started. Exits with the ranks' code."""
    recipe = read_config(config, overrides)
    recipe.plan.check_world_size(world_size(nproc))
    Setting.of(recipe)
    local = nproc or 1
    code = launch(local, train, recipe) if local > 1 else rank_main(lambda: train(recipe))
    if code:
        sys.exit(code)


def train(config: Config) -> None:
    """The work of one rank. Raises Stopped when a signal asked for it and the state is saved."""
    with joined(config.plan) as place:
        setting, stop = Setting.of(config), StopSignal()
        cache = open_cache(setting, place)
        with stop:
            runner = train_steps(setting, place, cache, stop)
        done = runner.steps_done >= config.schedule.steps
        if done and config.sample is not None:
            _show_samples(setting, config.sample, place, cache, runner)
    if not done and stop.signum is not None:
        raise Stopped(stop.signum, f"stopped after step {runner.steps_done}; the same command goes on from there")


def train_steps(setting: Setting, place: Place, cache: Cache, stop: StopSignal) -> StepRunner:
    """From the newest checkpoint, if there is one, to the last step or until ``stop``; what was reached is saved."""
    config, first = setting.config, place.rank == 0
    runner = StepRunner(
        setting.model,
        config.plan,
        setting.batch,
        config.optimizer,
        place.mesh,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        device=place.device,
        kernels=kernels_for(place.device, config.kernels),
    )
    checkpoints = config.logging.directory / checkpoint.FOLDER
    newest = checkpoint.latest(checkpoints)
    if newest is None:
        runner.initialise(initial_values(config.seed))
    else:
        checkpoint.load(newest, runner)
    telemetry = Telemetry(config.logging.directory, config.schedule.steps, runner.steps_done) if first else None
    if telemetry:
        telemetry.say(f"{setting.model.name}: {config.plan.equation()} processes on {place.device}; {len(cache.train)} "
                      f"training and {len(cache.validation)} validation windows; "
                      + (f"resumed from {newest}" if newest else "from step 0"))  # fmt: skip
    failure = runner.capture(config.capture)
    if telemetry:
        if failure is not None:
            telemetry.say(f"steps are NOT captured, on any rank: {failure}; they run from the executor")
        telemetry.say(runner.replay_report())
    try:
        _Loop(setting, runner, cache, checkpoints, telemetry).run(stop)
    finally:
        if telemetry:
            telemetry.close()
    return runner


def _show_samples(setting: Setting, section: SampleSection, place: Place, cache: Cache, runner: StepRunner) -> None:
    """Sample clips with the EMA weights, write them and print how near they come to what was trained on."""
    config, codec = setting.config, setting.codec
    captions = captions_of(section, config.data)
    clips = sample_clips(
        setting.model,
        config.plan,
        place.mesh,
        runner.buffers["ema"],
        codec,
        setting.encoders,
        list(captions.values()),
        setting.batch.latent,
        section.steps,
        section.guidance,
        section.seed,
        samples=setting.batch.samples,
        device=place.device,
    )
    if place.rank:
        return
    folder = config.logging.directory / "samples"
    shown = {scene: clip[: config.data.frames] for scene, clip in zip(captions, clips, strict=True)}
    for score in show(folder, shown, cache.train, codec):
        print(score)
    print(
        f"clips and {CONTACT_SHEET} are in {folder}; tensorboard --logdir {config.logging.directory} shows the curves"
    )


def open_cache(setting: Setting, place: Place) -> Cache:
    """The latent cache: rank 0 builds it where it is missing or of other data, the others wait."""
    data = setting.config.data
    if place.rank == 0:
        build_cache(data, setting.codec, setting.encoders, data.cache)
    if place.mesh is not None:
        comm.barrier()
    cache = Cache.open(data.cache / CACHE_FILE)
    assert cache.latent_shape[1:] == setting.batch.latent, (cache.latent_shape, setting.batch)
    return cache


class _Loop:
    """Steps, with what is reported, validated and saved between them."""

    def __init__(
        self, setting: Setting, runner: StepRunner, cache: Cache, checkpoints: Path, telemetry: Telemetry | None
    ) -> None:
        self.setting, self.config, self.runner = setting, setting.config, runner
        self.cache, self.checkpoints, self.telemetry = cache, checkpoints, telemetry
        log = self.config.logging
        validates = bool(log.validate_every and len(cache.validation))
        self.epoch = balanced(cache.train.scenes, self.config.data.balance)
        self.validation = Validation(runner, cache.validation, log.validation_draws) if validates else None

    def run(self, stop: StopSignal) -> None:
        """Up to the last step, or until ``stop``; what was reached is saved."""
        runner, log, steps = self.runner, self.config.logging, self.config.schedule.steps
        step = saved = runner.steps_done
        if step == 0:
            self._validate(0)
        losses: list[float] = []
        norms: list[float] = []
        skipped, since = 0, time.perf_counter()  # skipped: updates in a row
        while step < steps and self._all_go_on(stop):
            ids = self._load(step)
            lr = self.config.schedule.lr(self.config.optimizer.lr, step)
            runner.step(lr)
            loss, norm = runner.loss.item(), runner.gradient_norm.item()  # between steps: the step itself reads nothing
            step += 1
            if math.isfinite(loss) and math.isfinite(norm):
                skipped = 0
                losses.append(loss)
                norms.append(norm)
            else:
                skipped += 1
                self._skipped(step, skipped, loss, norm, ids)
            if self.telemetry:
                self.telemetry.advance()
            if step % log.every == 0:
                self._report(step, losses, norms, lr, (time.perf_counter() - since) / log.every)
            if log.validate_every and (step % log.validate_every == 0 or step == steps):
                self._validate(step)
            if log.checkpoint_every and step % log.checkpoint_every == 0:
                self._save()
                saved = step
            if step % log.every == 0:
                losses, norms, since = [], [], time.perf_counter()
        if saved != step:
            self._save()

    def _all_go_on(self, stop: StopSignal) -> bool:
        """A signal reaches the ranks at different moments; all stop after the same step."""
        go_on = stop.signum is None
        return go_on if self.runner.mesh is None else comm.all_agree(go_on)

    def _load(self, step: int) -> list[int]:
        """Load this rank's share of every micro-batch; the ids of the whole global batch."""
        plan, data = self.config.plan, self.config.data
        rank = self.runner.mesh.data_rank if self.runner.mesh else 0
        ids: list[int] = []
        for micro_batch in range(plan.micro_batches):
            share = data.global_batch // plan.micro_batches
            places = order(self.config.seed, step, micro_batch, plan.micro_batches, share, len(self.epoch))
            indices = [self.epoch[place] for place in places]
            batch = collate(self.cache.train.select(indices), rank, plan.data_ranks)
            self.runner.load(micro_batch, batch.latents, batch.ids, batch.text, batch.mask)
            ids += indices  # a training sample's id is its index
        return ids

    def _skipped(self, step: int, times: int, loss: float, norm: float, ids: list[int]) -> None:
        what = f"step {step}: loss {loss}, gradient norm {norm}; the update was skipped; samples {ids}"
        if times >= SKIPPED_LIMIT:
            raise CinemeshError(
                f"{what}. That was update {times} in a row: lower optimizer.lr({self.config.optimizer.lr}), or look at "
                "these samples; the run goes on from its last checkpoint"
            )
        if self.telemetry:
            self.telemetry.say(what)

    def _report(self, step: int, losses: list[float], norms: list[float], lr: float, step_s: float) -> None:
        """Means over the updates since the last report; those that were skipped have none."""
        if self.telemetry is None:
            return
        tokens = self.runner.config.tokens(self.setting.batch.latent) * self.config.data.global_batch
        values = {"lr": lr, "step_s": step_s, "tokens_per_s": tokens / step_s}
        if losses:
            values |= {"loss": sum(losses) / len(losses), "gradient_norm": sum(norms) / len(norms)}
        self.telemetry.scalars(step, values)

    def _validate(self, step: int) -> None:
        if self.validation is None:
            return
        loss = self.validation.loss()
        if self.telemetry:
            self.telemetry.scalars(step, {"validation_loss": loss})
            self.telemetry.say(f"step {step}: validation loss {loss:.4f}")

    def _save(self) -> None:
        path = checkpoint.save(
            self.checkpoints, self.runner, keep=self.config.logging.keep, note={"seed": self.config.seed}
        )
        if self.telemetry:
            self.telemetry.say(f"saved {path}")


def main() -> None:
    """Under torchrun: the same as ``cinemesh train CONFIG``."""
    parser = argparse.ArgumentParser(prog="cinemesh.launch.train", description="Train a model, or resume its training.")
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    sys.exit(rank_main(lambda: run(config=given.config, nproc=None, overrides=given.overrides)))


if __name__ == "__main__":
    main()
