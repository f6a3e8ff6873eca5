"""The steps of a run in their order: what is loaded, reported, validated, compared and saved between them."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...errors import CinemeshError
from ...model.buckets import BucketRunner
from ...parallel.runtime import comm
from ..cluster.marks import Doing, Marks
from ..cluster.processes import StopSignal
from .average import remark
from .base import BEGUN_WITH
from .captions import contents, encoded_in_loop
from .checkpoint.choosing import VALIDATION_LOSS
from .checkpoint.manifest import step_of
from .checkpoint.saving import Saver
from .checkpoint.together import together
from .codec_switch import LATENTS_OF, latents_noted, losses_told
from .differences import RECIPE, recorded
from .feed import Feed
from .goodput import LossCause
from .in_memory.recovery import CopiesInMemory
from .marked import MarkedRuns
from .measured_rows import MeasuredRows
from .numerics import Numerics, gathered
from .plateau import VALIDATIONS, Validated
from .replicas import compare_replicas
from .reports import Done, Reports
from .resume import CONTENTS
from .sample import FRAME_RATE
from .seen import SEEN, DrawnFrom
from .setting import Setting
from .shown_clips import ShownClips
from .spikes import LossWatch, Spike
from .stragglers import UNITS_PER_S, Stragglers
from .telemetry import Telemetry
from .validation import HeldOutWindows

SKIPPED_LIMIT = 5  # updates in a row that were skipped for a gradient that is not finite, before a run gives up
FAILED_SAVES_LIMIT = 3  # in a row, before a run gives up: what it would lose by going on is then not small any more
SAMPLES = "samples"  # of a checkpoint's note: how many of each bucket's stream were taken


class StepLoop:
    """Steps, with what is reported, validated and saved between them."""

    def __init__(
        self,
        setting: Setting,
        runners: BucketRunner,
        feed: Feed,
        saver: Saver,
        telemetry: Telemetry | None,
        carried: dict[str, Any],
        marks: Marks,
        stragglers: Stragglers | None = None,
    ) -> None:
        self.stragglers, self.computed_s = stragglers or Stragglers(), 0.0  # of this rank, in the step before
        self.config, self.runners, self.runner = setting.config, runners, runners.first
        self.encoding = setting.encoding
        self.feed, self.saver, self.telemetry, self.marks = feed, saver, telemetry, marks
        self.history = feed.drawn.history
        self.carried = carried  # of a checkpoint's note, from one to the next
        self.failed_saves = 0  # in a row
        self.watch = LossWatch(self.config.spikes, len(setting.batches), carried)
        self.compared = self.runner.steps_done  # when replicas were last the same
        self.validated: tuple[int, float] | None = None  # step and loss, of the last one
        self.latents = [batch.latent for batch in setting.batches]
        log = self.config.logging
        self.rows = MeasuredRows(self.config, runners, self.latents) if telemetry else None
        self.on_gpu = torch.device(self.runner.executor.device).type != "cpu"
        self.runs = MarkedRuns(runners, marks)
        self.shown: ShownClips | None = None
        self.copies: CopiesInMemory | None = None
        self.copied = True  # by all ranks, what was to be copied before
        self.held_out = None
        if log.validate_every:
            cache = self.history.at(self.compared)
            encode = self.encoding.captions if encoded_in_loop(self.config) else None
            self.held_out = HeldOutWindows(runners, self.latents, cache, self.config, self.runs.run, encode)
            self.runs.programs = [*self.runs.programs, *self.held_out.programs]
        if self.config.schedule.decay == "plateau" and not self.held_out:
            raise CinemeshError(
                "schedule.decay is plateau, and no scene is long enough for held-out windows",
                remedy="raise data.validation_share, take longer scenes, or another decay",
            )

    def run(self, stop: StopSignal) -> Spike | None:
        """Up to the last step, or until ``stop``: what was reached is saved. Or up to a spike: nothing more is."""
        runner, log, steps = self.runner, self.config.logging, self.config.schedule.steps
        step = saved = runner.steps_done
        if step == 0:
            with self._losing(LossCause.VALIDATION):
                self._validate(0)
            if self.shown is not None:
                self.shown.show_held_out()
        reports = Reports.of(self.config, self.runners, self.latents, step, self.telemetry, self.stragglers)
        skipped = 0  # updates in a row
        due = step > 0  # a copy in memory: what is loaded has one holder less, or none
        together(runner.mesh, lambda: self.feed.text.read(step))
        self._encode(step)
        while step < steps:
            begun = time.perf_counter()
            self.marks.at(step, Doing.LOADING)
            if not self._load(step, stop):
                break
            if due and self.copied and self.copies is not None:
                with self._losing(LossCause.CHECKPOINT):
                    self._copy(step, self.copies)
                due = False
            loaded = time.perf_counter()
            waited_s = self.runs.waited_s
            lr = self.config.schedule.lr(self.config.optimizer.lr, step, self.validations)
            measures = log.numerics_every and (step + 1) % log.numerics_every == 0
            numerics = Numerics(self.runners.current) if measures else None
            self.runs.step(step, lr, numerics)
            self._encode(step)
            loss, norm = runner.loss.item(), runner.gradient_norm.item()  # between steps: the step itself reads nothing
            if not self.on_gpu:  # else it was behind nothing but its launches
                self.computed_s = time.perf_counter() - loaded - (self.runs.waited_s - waited_s)
            self.marks.at(step, Doing.REPORTING)
            ended = time.perf_counter()
            done = Done(self.feed.bucket[step], lr, ended - begun, loss, norm, loaded - begun)
            reports.add(done)
            if self.rows:
                self.rows.add(done.bucket, ended - loaded, loaded - begun)
            step += 1
            if (spike := self.watch.add(step, done.bucket, loss if done.finite else math.inf)) is not None:
                reports.report(step)
                self._publish()
                return spike
            if done.finite:
                skipped = 0
            else:
                skipped += 1
                if numerics is None and skipped == 1:
                    numerics = self.runs.again(step - 1, lr)
                self._skipped(step, skipped, loss, norm)
            if numerics is not None:
                self._measured(step, numerics)
            if self.telemetry:
                self.telemetry.advance()
            if step % log.every == 0 or step == steps:
                reports.report(step)
            if log.validate_every and (step % log.validate_every == 0 or step == steps):
                with self._losing(LossCause.VALIDATION):
                    self._validate(step)
            if self.shown is not None and step % self.shown.every == 0:
                with self._losing(LossCause.SAMPLING):
                    self.shown.show(step)
            due = due or bool(log.memory_every and step % log.memory_every == 0)
            if log.checkpoint_every and step % log.checkpoint_every == 0:
                with self._losing(LossCause.CHECKPOINT):
                    self._save(step)
                saved = step
        reports.report(step)
        self.marks.at(step - 1, Doing.SAVING)
        self._publish()
        if saved != step or self.failed_saves:
            self._compare(step)
            self._begin_save(step)
        self._publish(last=True)
        return None

    def _losing(self, cause: LossCause) -> AbstractContextManager[None]:
        """What runs inside is, on the rank that speaks, lost to this cause."""
        return self.telemetry.account.losing(cause) if self.telemetry else nullcontext()

    def _load(self, step: int, stop: StopSignal) -> bool:
        """Load this rank's share of every micro-batch; False: stop here.

        One vote of all ranks: a signal reaches them at different moments, and a step that one of them cannot take, or
        takes in another shape, would never end. Raises CinemeshError, on every rank, when one of them cannot load its
        samples, and when they loaded more than one bucket.
        """
        failure: CinemeshError | None = None
        written = self.saver.written
        try:
            self._fill(step)
        except CinemeshError as error:
            failure = error
        loaded = self.latents.index(self.runners.current.batch.latent)
        if self.runner.mesh is None:
            if failure is not None:
                raise failure
            if written:
                self._publish()
            self.copied = self._has_copied
            return stop.signum is None
        every = 4 + len(self.latents)  # from there on, what each rank says
        votes = torch.zeros(every + self.config.plan.world_size, dtype=torch.int64)
        votes[every + self.runner.mesh.rank] = round(self.computed_s * UNITS_PER_S)
        votes[:4] = torch.tensor([stop.signum is not None, failure is not None, written, self._has_copied])
        votes[4 + loaded] = 1
        votes = comm.sum_over_ranks(votes)
        stopped, failed, written, copied, *taken = votes[:every].tolist()
        self.copied = copied == self.config.plan.world_size
        self.stragglers.add(votes[every:].tolist() if self.telemetry else ())
        if failed:
            first = comm.first_of(failure)
            assert first is not None
            raise first
        if sum(map(bool, taken)) > 1:
            shares = ", ".join(
                f"{n} of bucket {w.bucket}" for n, w in zip(taken, self.history.at(step).buckets, strict=True) if n
            )
            raise CinemeshError(
                f"step {step + 1}: the ranks loaded batches of several buckets ({shares}), and a step has one: give "
                "every rank the same recipe, software and latent cache"
            )
        if written == self.config.plan.world_size:
            self.marks.at(step, Doing.PUBLISHING)
            self._publish()
        return not stopped

    @property
    def _has_copied(self) -> bool:
        return self.copies is None or self.copies.written

    def _fill(self, step: int) -> None:
        self.feed.load(step, self.runners)
        self.feed.text.read(step + 1)

    def _encode(self, step: int) -> None:
        """Captions that were read: between two steps, behind the one that was launched last. Collective."""
        self.marks.at(step, Doing.ENCODING)
        self.feed.text.encode()

    def _skipped(self, step: int, times: int, loss: float, norm: float) -> None:
        ids = self.feed.ids(step - 1)
        what = f"step {step}: loss {loss}, gradient norm {norm}; the update was skipped; samples {ids}"
        if times >= SKIPPED_LIMIT:
            self._publish()
            raise CinemeshError(
                f"{what}. That was update {times} in a row: lower optimizer.lr({self.config.optimizer.lr}), or look at "
                "these samples",
                remedy="started again, the run goes on from its last checkpoint, or from step 0 if it has none",
            )
        if self.telemetry:
            self.telemetry.say(what)

    @property
    def validations(self) -> list[Validated]:
        """Of the whole run."""
        return self.carried.get(VALIDATIONS, [])

    def _measured(self, step: int, numerics: Numerics) -> None:
        numbers = gathered(numerics.measured(), self.runners.current)
        if self.telemetry and numbers:
            numbers.tell(self.telemetry, step, self.config.plan, self.feed.ids(step - 1))

    def _validate(self, step: int) -> None:
        if not self.held_out:
            return
        self.marks.at(step - 1, Doing.VALIDATING)
        self.held_out.look_at(self.history.at(step))
        held, values = self.held_out.measure()
        if math.isfinite(held.loss):  # a file of JSON has no other numbers
            self.validated = step, held.loss
            self.carried[VALIDATIONS] = [*self.validations, (step, held.loss, held.error)]
        if self.telemetry:
            self.telemetry.scalars(step, values)
            self.telemetry.say(f"step {step}: validation loss {held.loss:.4f} ± {held.error:.4f}")
            if (said := losses_told(self.carried.get(BEGUN_WITH, {}), step, held.loss)) is not None:
                self.telemetry.say(said)
            if step and (said := remark(self.config, self.runner.updates_done)):
                self.telemetry.say(said)

    def _save(self, step: int) -> None:
        """Begin a checkpoint, behind training. One that fails is told; several in a row end the run."""
        self.marks.at(step - 1, Doing.SAVING)
        self._publish()
        self._compare(step)
        try:
            self._begin_save(step)
        except CinemeshError as error:
            self._not_saved(error)

    def _compare(self, step: int) -> None:
        """Before what differs is saved."""
        compare_replicas(self.runner, self.compared)
        self.compared = step

    def _copy(self, step: int, copies: CopiesInMemory) -> None:
        """Into the server's memory, after ``step`` steps; no rank waits for another."""
        self.marks.at(step, Doing.SAVING)
        copies.take(self._noted(step))
        self.marks.at(step, Doing.LOADING)

    def _begin_save(self, step: int) -> None:
        note = self._noted(step)
        if self.validated is not None and self.validated[0] == step:
            note[VALIDATION_LOSS] = self.validated[1]
        self.saver.begin(note)
        if self.rows:
            self.rows.write()

    def _noted(self, step: int) -> dict[str, Any]:
        """Of the run, what goes on from ``step`` must know."""
        return (
            self.carried
            | self.feed.batches.noted()
            | self.watch.noted()
            | {
                RECIPE: recorded(self.config),
                LATENTS_OF: latents_noted(self.encoding.codec),
                CONTENTS: contents(self.config, self.encoding, self.history, step),
                FRAME_RATE: str(self.history.at(step).frame_rate),
                SEEN: DrawnFrom.of(self.history, self.feed.drawn.order).told(),
                SAMPLES: self.feed.taken(step),
            }
        )

    def _publish(self, *, last: bool = False) -> None:
        """The checkpoint on its way, if there is one, once all ranks have written it. Collective.

        Raises CinemeshError, on every rank, when the ``last`` one cannot be written.
        """
        if self.saver.begun is None:
            return
        try:
            path = self.saver.end()
        except CinemeshError as error:
            if last:
                raise
            self._not_saved(error)
            return
        self.failed_saves = 0
        if self.copies is not None:
            self.copies.since = step_of(path) or 0
        if self.telemetry:
            self.telemetry.say(f"saved {path}")

    def _not_saved(self, error: CinemeshError) -> None:
        self.failed_saves += 1
        if self.failed_saves >= FAILED_SAVES_LIMIT:
            raise CinemeshError(
                f"{error.problem}. That was checkpoint {self.failed_saves} in a row", remedy=error.remedy
            ) from error
        if self.telemetry:
            self.telemetry.say(f"WARNING: {error}. The run goes on, from the checkpoints before if it must")
