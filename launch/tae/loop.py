"""``cinemesh tae train``: from a recipe to a trained autoencoder, resumed exactly where it stopped.

Batches, crops, noise and learning rate are functions of the step: a run that was killed and goes on ends with the
weights, bit by bit, of one that was not (with as many ranks and threads). When it is done, the running average of the
weights is written with the statistics of its latents, as a codec (``model/tae/files.py``).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

import torch

from ...data.cache.samples import Cache
from ...errors import CinemeshError
from ...parallel.ir.plan import Plan
from ...parallel.runtime import comm
from ..cluster.environment import processes_here, say_device, world_size
from ..cluster.lease import leased
from ..cluster.processes import Joined, Stopped, StopSignal, joined, launch, rank_main
from ..training.checkpoint.choosing import FOLDER
from ..training.differences import RECIPE, differences, recipe_facts, recorded
from ..training.goodput import LossCause
from ..training.telemetry import Telemetry
from .checkpoints import resume_networks, save_networks
from .feed import PixelBatch, PixelFeed, open_pixels
from .networks import Networks
from .recipe import TAERecipe
from .step import Taken, TrainStep
from .trained import reconstructed, write_trained
from .warm_start import warm_start

SKIPPED_LIMIT = 5  # updates in a row that were skipped for a gradient that is not finite, before a run gives up


def run(*, recipe: TAERecipe, nproc: int | None) -> None:
    """Train on ``nproc`` processes of this machine, or on those that torchrun started. Exits with the ranks' code."""
    world = world_size(nproc)
    plan_of(recipe, world)
    say_device(recipe.device, processes_here(world))
    local, rank = nproc or 1, int(os.environ.get("RANK", "0"))
    with leased(recipe.logging.directory) if rank == 0 else nullcontext():
        code = launch(local, train_autoencoder, recipe) if local > 1 else rank_main(lambda: train_autoencoder(recipe))
    if code:
        sys.exit(code)


def plan_of(recipe: TAERecipe, world: int) -> Plan:
    """Data parallel alone. Raises CinemeshError where the ranks do not divide a bucket's batch."""
    for bucket, size in zip(recipe.data.shapes, recipe.data.global_batches, strict=True):
        if size % world:
            raise CinemeshError(
                f"global_batch({size}) of bucket {bucket} % processes({world}) = {size % world}",
                remedy="every process needs as many samples, at least one: change the batch, or how many there are",
            )
    return Plan(dp_replicate=world, dtype=recipe.state_dtype)


def train_autoencoder(recipe: TAERecipe) -> None:
    """The work of one rank. Raises Stopped when a signal asked for it and the state is saved."""
    stop, plan = StopSignal(), plan_of(recipe, world_size(None))
    with joined(plan, recipe.device, recipe_facts(recipe)) as place:
        cache = open_pixels(recipe, place)
        with stop:
            loop = TAELoop(recipe, place, plan, cache)
            try:
                loop.run(stop)
            finally:
                loop.close()
        done = loop.networks.steps >= recipe.schedule.steps
        if done and place.rank == 0:
            write_trained(loop.networks, recipe, cache)
        if place.mesh is not None:
            comm.barrier()  # nobody leaves while rank 0 still measures
    if not done and stop.signum is not None:
        raise Stopped(stop.signum, f"stopped after step {loop.networks.steps}; the same command goes on from there")


class TAELoop:
    """Steps, with what is reported, reconstructed and saved between them."""

    def __init__(self, recipe: TAERecipe, place: Joined, plan: Plan, cache: Cache) -> None:
        self.recipe, self.place, self.plan, self.cache = recipe, place, plan, cache
        since = time.time()
        self.networks = Networks(recipe, place.device)
        self.checkpoints = recipe.logging.directory / FOLDER
        resumed = resume_networks(self.networks, place, self.checkpoints)
        self.begun_as = warm_start(self.networks, recipe) if resumed is None else []
        self.feed = PixelFeed(recipe, cache, place.rank, plan.world_size)
        self.step = TrainStep(self.networks, place.mesh)
        self.saved = self.networks.steps if resumed else -1
        self.telemetry = None
        if place.rank:
            return
        self.telemetry = Telemetry(recipe.logging.directory, recipe.schedule.steps, self.networks.steps, since)
        config = self.networks.autoencoder.config
        said = f"autoencoder {config.name}, {self.networks.generated:,} parameters: {plan.world_size} processes on "
        self.say(f"{said}{place.device}")
        self.say(f"resumed from {resumed[0]}" if resumed else "from step 0")
        for line in self.begun_as:
            self.say(line)
        for windows in cache.buckets:
            self.say(
                f"bucket {windows.bucket}: {len(windows.train)} training, {len(windows.validation)} validation windows"
            )
        if resumed:
            _, manifest, damaged = resumed
            for change in differences(manifest.note, recipe):
                self.say(f"not as in the run so far: {change}")
            for error in damaged:
                self.say(f"WARNING: {error.problem}; it was passed over")
        self.telemetry.account.lose(LossCause.START, time.time() - since)

    def say(self, text: str) -> None:
        if self.telemetry:
            self.telemetry.say(text)

    def run(self, stop: StopSignal) -> None:
        """Up to the last step, or until ``stop``; what was reached is saved."""
        log, schedule, skipped = self.recipe.logging, self.recipe.schedule, 0
        taken: list[tuple[Taken, float]] = []
        if self.begun_as:  # random weights show nothing
            self._validate(0)
        while (step := self.networks.steps) < schedule.steps:
            began = time.perf_counter()
            batch = self._load(step, stop)
            if batch is None:
                break
            loaded = time.perf_counter()
            lr = schedule.lr(self.recipe.optimizer.lr, step)
            done = self.step.take(batch, lr)
            seconds = time.perf_counter() - loaded
            if self.telemetry:
                self.telemetry.account.lose(LossCause.LOADING, loaded - began)
                self.telemetry.account.add_step(seconds, counts=done.finite)
                self.telemetry.advance()
            skipped = 0 if done.finite else skipped + 1
            if skipped:
                self._skipped(step + 1, skipped, done, batch)
            else:
                taken.append((done, seconds))
            step += 1
            if taken and (step % log.every == 0 or step == schedule.steps):
                self._report(step, lr, taken)
                taken = []
            if log.validate_every and (step % log.validate_every == 0 or step == schedule.steps):
                self._validate(step)
            if log.checkpoint_every and step % log.checkpoint_every == 0:
                self._save()
        if self.saved != self.networks.steps:
            self._save()

    def close(self) -> None:
        if self.telemetry:
            self.telemetry.close()

    def _load(self, step: int, stop: StopSignal) -> PixelBatch | None:
        """This rank's samples, or None to stop here: one vote of all ranks.

        Raises CinemeshError, on every rank, where one cannot read its samples.
        """
        failure: CinemeshError | None = None
        batch: PixelBatch | None = None
        try:
            batch = self.feed.take(step)
        except CinemeshError as error:
            failure = error
        stopped, failed = int(stop.signum is not None), int(failure is not None)
        if self.place.mesh is not None:
            stopped, failed = comm.sum_over_ranks(torch.tensor([stopped, failed])).tolist()
            failure = comm.first_of(failure) if failed else None
        if failure is not None:
            raise failure
        return None if stopped else batch

    def _report(self, step: int, lr: float, taken: Sequence[tuple[Taken, float]]) -> None:
        if self.telemetry is None:
            return
        names = dict.fromkeys(name for done, _ in taken for name in done.terms)
        values = {"loss": _mean([done.loss for done, _ in taken]), "lr": lr}
        values["gradient_norm"] = _mean([done.norm for done, _ in taken])
        values["step_s"] = _mean([seconds for _, seconds in taken])
        values |= {name: _mean([done.terms[name] for done, _ in taken if name in done.terms]) for name in names}
        self.telemetry.interval(step, values, [seconds for _, seconds in taken])
        said = ", ".join(f"{name} {values[name]:.4g}" for name in ("loss", *names, "gradient_norm", "step_s"))
        self.telemetry.say_step(f"step {step}: {said}")

    def _skipped(self, step: int, times: int, done: Taken, batch: PixelBatch) -> None:
        what = f"step {step}: loss {done.loss}, gradient norm {done.norm}, and the update was skipped"
        if times >= SKIPPED_LIMIT:
            raise CinemeshError(
                f"{what}. That was update {times} in a row, of samples {batch.ids.tolist()}",
                remedy=f"lower optimizer.lr({self.recipe.optimizer.lr}); started again, the run goes on from its last "
                "checkpoint",
            )
        self.say(what)

    def _validate(self, step: int) -> None:
        """Rank 0 measures; the others wait for it at their next vote."""
        if self.telemetry is None or not self.recipe.logging.validate_every:
            return
        with self.telemetry.account.losing(LossCause.VALIDATION):
            found = reconstructed(self.networks, self.recipe, self.cache)
        if found is None:
            return
        measured = {f"held_out/{name}": float(value) for name, value in asdict(found).items() if value is not None}
        self.telemetry.scalars(step, measured)
        said = f"video {found.video_psnr_db:.2f} dB, SSIM {found.video_ssim:.3f}; image {found.image_psnr_db:.2f} dB"
        self.say(f"step {step}: held out: {said}, SSIM {found.image_ssim:.3f}")

    def _save(self) -> None:
        note = {RECIPE: recorded(self.recipe)}
        began = time.monotonic()
        path = save_networks(self.networks, self.place, self.checkpoints, self.plan, note)
        self.saved = self.networks.steps
        if self.telemetry:
            self.telemetry.account.lose(LossCause.CHECKPOINT, time.monotonic() - began)
        self.say(f"saved {path}")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
