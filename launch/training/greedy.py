"""Held-out losses of averages of checkpoints, and which members a greedy one keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...errors import CinemeshError
from ...model.runner import StepRunner
from ...parallel.runtime.executor import Executor
from ..cluster.processes import joined
from .checkpoint.layout import Layout
from .checkpoint.same_model import check_model
from .latent_cache import open_history
from .members import Member, mean_of, read_shares
from .recipe import Config
from .setting import Setting
from .validation import HeldOutLoss, HeldOutWindows


@dataclass(frozen=True)
class HeldOutMeans:
    """Held-out losses of averages: of a recipe's ``weights``, on its ``windows``."""

    runner: StepRunner
    windows: HeldOutWindows
    weights: str

    def loss(self, members: Sequence[Member], shares: Sequence[float]) -> HeldOutLoss:
        """Of an average, with the recipe's weights."""
        runner = self.runner
        flats = {self.weights: runner.buffers[self.weights]}
        mean_of(members, shares)(Layout.of(runner.units), runner.coordinates, flats)
        return self.windows.measure()[0]

    def all(self, members: Sequence[Member], shares: Sequence[float]) -> None:
        """Say the loss of each, and of the average."""
        for member in members:
            _say(str(member.path), self.loss([member], [1.0]))
        _say("the average", self.loss(members, shares))

    def greedy(self, members: Sequence[Member]) -> list[Member]:
        """Those that are kept: the best, then each next one that does not raise the loss of the equal average."""
        alone = [(self.loss([member], [1.0]), member) for member in members]
        alone.sort(key=lambda pair: pair[0].loss)
        (best, first), *others = alone
        _say(f"{first.path}, the best alone,", best)
        kept = [first]
        for by_itself, member in others:
            together = [*kept, member]
            loss = self.loss(together, read_shares(None, len(together)))
            stays = loss.loss <= best.loss
            _say(f"with {member.path} (alone {by_itself.loss:.6f}), {'kept' if stays else 'left out'},", loss)
            if stays:
                kept, best = together, loss
        return kept


@contextmanager
def measuring(config: Config, members: Sequence[Member]) -> Iterator[HeldOutMeans]:
    """On one process, whatever the recipe's plan."""
    plan = config.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1)
    setting = Setting.of(replace(config, plan=plan))
    for member in members:
        check_model(member.path, member.found, setting.model)
    with joined(plan, config.device) as place:
        cache = open_history(setting, place).at(config.schedule.steps)
        runners = setting.runners(place)
        windows = HeldOutWindows(runners, setting.latents, cache, config, Executor.run)
        if not windows:
            raise CinemeshError(
                "no scene of the recipe is long enough for held-out windows",
                remedy="raise data.validation_share, or average without --config",
            )
        yield HeldOutMeans(runners.first, windows, config.weights)


def _say(what: str, held: HeldOutLoss) -> None:
    print(f"{what} has held-out loss {held.loss:.6f} ± {held.error:.6f}", file=sys.stderr)
