"""Some steps of a recipe's run, for a profile: on its data, as training would take them."""

from __future__ import annotations

import sys
from itertools import cycle

from ...data.batches import BatchHistory
from ...errors import CinemeshError
from ...model.config import latent_text
from ...model.inputs import BatchShape
from ...model.runner import StepRunner
from ...model.weights import initial_values
from ..cluster.processes import Joined
from ..models import parse_latent
from ..proof.traced import TakenSteps, taken_steps
from ..training.captions import place_encoders
from ..training.feed import Feed
from ..training.latent_cache import open_history
from ..training.setting import Setting


def batch_of(setting: Setting, latent: str | None) -> BatchShape:
    """The bucket of a latent, or the one with most tokens. Raises CinemeshError for a latent that has none."""
    known = {batch.latent: batch for batch in setting.batches}
    if latent is None:
        return max(setting.batches, key=lambda batch: batch.samples * setting.model.tokens(batch.latent))
    asked = parse_latent(latent)
    if asked not in known:
        raise CinemeshError(
            f"--latent {latent} is no bucket of the recipe", remedy=f"it has {', '.join(map(latent_text, known))}"
        )
    return known[asked]


def take_steps(setting: Setting, place: Joined, batch: BatchShape, steps: int) -> tuple[StepRunner, TakenSteps]:
    """Steps of the run of this bucket, from its first, again from there where it has fewer. Collective.

    Raises CinemeshError for samples that cannot be read.
    """
    config = setting.config
    runner = setting.runners(place, [batch]).first
    batches = BatchHistory.always(setting.global_batches)
    place_encoders(config, setting.encoding, place, runner.comm)
    rank = place.mesh.data_rank if place.mesh else 0
    feed = Feed(config, open_history(setting, place), rank, batches, setting.encoding)
    own = [step for step, bucket in enumerate(feed.bucket) if setting.latents[bucket] == batch.latent]
    if not own:
        raise CinemeshError(
            f"a run of {len(feed.bucket)} steps has none of {latent_text(batch.latent)}", remedy="raise schedule.steps"
        )
    turn = cycle(own)
    runner.initialise(initial_values(config.seed))
    if (failure := runner.capture(config.capture)) is not None and place.rank == 0:
        print(f"steps are not captured: {failure}", file=sys.stderr)

    def begin() -> float:
        step = next(turn)
        feed.encode(step)
        feed.load(step, runner)
        return config.schedule.lr(config.optimizer.lr, step)

    return runner, taken_steps(runner, steps, begin)
