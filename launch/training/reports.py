"""What a run says of its steps: means over one interval, beside what was predicted, as numbers and as a line.

Nothing here asks the cost model: what it predicts comes from the file that was written before the run had a mesh.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from ...model.buckets import BucketRunner, Latent
from ...model.config import latent_text
from ...parallel.ir.flops import model_flops
from .drift import Drift
from .goodput import LossCause
from .predicted import Predicted
from .recipe import Config
from .stragglers import Stragglers
from .telemetry import Telemetry

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage's ru_maxrss


@dataclass(frozen=True)
class Done:
    """One step that is over: the place of its bucket, its learning rate, and what was measured."""

    bucket: int
    lr: float
    seconds: float
    loss: float
    gradient_norm: float
    loading_s: float = 0.0  # of its seconds, what it waited for its samples

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class StepOf:
    """What every step of one bucket is, on all ranks together."""

    name: str
    samples: int
    tokens: int
    model_flops: int
    predicted_s: float | None
    compute_s: float | None = None  # of predicted_s, a rank's own


class Reports:
    """Gathers the steps of a start of a run, from step ``first`` of ``steps``, and reports them interval by interval.

    Every step is in exactly one report. Without ``telemetry``, on ranks that do not speak, none is given.
    ``stragglers``: of its ranks, with the job's GPUs, where it has any.
    """

    def __init__(
        self,
        buckets: Sequence[StepOf],
        predicted: Predicted | None,
        config: Config,
        device: str,
        first: int,
        telemetry: Telemetry | None,
        stragglers: Stragglers | None = None,
    ) -> None:
        self.drift, self.stragglers = Drift(), stragglers or Stragglers()
        self.cards = self.stragglers.cards
        self.buckets, self.predicted, self.device, self.telemetry = buckets, predicted, device, telemetry
        self.first, self.steps, self.world_size = first, config.schedule.steps, config.plan.world_size
        self._begun_s, self._done = time.monotonic(), list[Done]()

    @classmethod
    def of(
        cls,
        config: Config,
        runners: BucketRunner,
        latents: Sequence[Latent],
        first: int,
        telemetry: Telemetry | None,
        stragglers: Stragglers | None = None,
    ) -> Reports:
        """Those of a run, whose buckets have these latents; with what was predicted of its plan on its device."""
        device = runners.first.executor.device
        predicted = Predicted.read(config.logging.directory) if config.cluster and telemetry else None
        no_mfu = (
            "no cluster is named, of whose peak it is a share" if config.cluster is None else "nothing is predicted"
        )
        if predicted and (predicted.plan != config.plan or not device.startswith(predicted.device)):
            no_mfu = f"what is predicted of {predicted.cluster} is not of this run on {device}: left out"
            predicted = None
        elif predicted:
            known = predicted.peak_flops_per_s is not None
            no_mfu = "" if known else f"the peak of {predicted.cluster} is a placeholder"
        if telemetry and no_mfu:
            telemetry.say(f"MFU is not shown: {no_mfu}")
        buckets = [
            StepOf(
                str(bucket),
                (samples := runners.runners[latent].samples),
                runners.first.config.tokens(latent) * samples,
                model_flops(runners.runners[latent].program),
                predicted.step_s[latent_text(latent)] if predicted else None,
                predicted.compute_s.get(latent_text(latent)) if predicted else None,
            )
            for bucket, latent in zip(config.data.shapes, latents, strict=True)
        ]
        return cls(buckets, predicted, config, device, first, telemetry, stragglers)

    def add(self, done: Done) -> None:
        """One more step of this interval."""
        self._done.append(done)
        if self.telemetry:
            self.telemetry.account.lose(LossCause.LOADING, done.loading_s)
            self.telemetry.account.add_step(done.seconds - done.loading_s, counts=done.finite)

    def report(self, step: int) -> None:
        """The interval that ends with ``step``, if it holds any; the next one begins."""
        done, self._done = self._done, []
        if self.telemetry and done:
            values = self.values(done)
            if (ratio := values.get("predicted_over_measured")) is not None:
                said = self.drift.look(ratio)
                values["drifted"] = float(self.drift.drifted)
                if said:
                    self.telemetry.say(f"step {step}: {said}")
            if found := self.stragglers.interval():
                values |= {"slowest_rank": float(found[0].rank), "slowest_over_median": found[0].times}
            if news := self.stragglers.news(found, values.get("predicted_compute_s")):
                self.telemetry.say(f"step {step}: {news}")
            if self.cards is not None:
                cards = self.cards.read()
                values |= self.cards.values(cards)
                if news := self.cards.news(cards):
                    self.telemetry.say(f"step {step}: {news}")
            self.telemetry.interval(step, values, [one.seconds for one in done])
            self.telemetry.say_step(self.line(step, values))
        if self.cards is not None and done:
            self.cards.tell()

    def values(self, done: Sequence[Done]) -> dict[str, float]:
        """Means over these steps; of loss and norm, over those whose update was not skipped. The last learning rate."""
        seconds = sum(one.seconds for one in done)
        of = [self.buckets[one.bucket] for one in done]
        values = {
            "lr": done[-1].lr,
            "step_s": seconds / len(done),
            "samples_per_step": _mean(step.samples for step in of),
            "tokens_per_step": _mean(step.tokens for step in of),
            "tokens_per_s": sum(step.tokens for step in of) / seconds,
            "memory_bytes": float(memory_bytes(self.device)),
        }
        if finite := [one for one in done if one.finite]:
            values["loss"] = _mean(one.loss for one in finite)
            values["gradient_norm"] = _mean(one.gradient_norm for one in finite)
        if self.predicted is not None:
            values["predicted_step_s"] = _mean(step.predicted_s for step in of if step.predicted_s is not None)
            if all(step.compute_s is not None for step in of):
                values["predicted_compute_s"] = _mean(step.compute_s or 0.0 for step in of)
            values["predicted_over_measured"] = values["predicted_step_s"] / values["step_s"]
            values["predicted_memory_bytes"] = float(self.predicted.peak_bytes)
            if self.predicted.peak_flops_per_s is not None:
                could = self.predicted.peak_flops_per_s * self.world_size * seconds
                values["mfu"] = sum(step.model_flops for step in of) / could
        if len(self.buckets) > 1:
            for bucket in sorted({one.bucket for one in done}):
                times = (one.seconds for one in done if one.bucket == bucket)
                values[f"step_s/{self.buckets[bucket].name}"] = _mean(times)
        return values

    def line(self, step: int, values: dict[str, float]) -> str:
        """The same in a line, with the time that is left at the pace of this start of the run, validation included."""

        def beside(name: str, unit: float = 1.0) -> str:
            return f" (predicted {values[name] / unit:.3g})" if name in values else ""

        learnt = "loss not finite"
        if "loss" in values:
            learnt = f"loss {values['loss']:.4f}, gradient norm {values['gradient_norm']:.3g}"
        parts = [
            learnt,
            f"lr {values['lr']:.2e}",
            f"{values['step_s']:.3g} s a step{beside('predicted_step_s')}",
            f"{values['tokens_per_s']:,.0f} tokens/s",
            f"{values['memory_bytes'] / 1e9:.3g} GB{beside('predicted_memory_bytes', 1e9)}",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        left_s = (time.monotonic() - self._begun_s) / (step - self.first) * (self.steps - step)
        parts.append(f"{timedelta(seconds=round(left_s))} left")
        return f"step {step}/{self.steps}: {', '.join(parts)}"


def memory_bytes(device: str) -> int:
    """What a rank holds. Of a GPU: all in use, CUDA context and NCCL included. Of a CPU: the most that was resident."""
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
