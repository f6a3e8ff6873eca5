"""All that the program of a step follows from, and that program as it is bound: placed in memory (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..memory import uncollected
from ..parallel.ir.plan import Plan
from ..parallel.ir.program import Program
from ..parallel.ir.records import Space
from ..parallel.passes.arena import Arena, place_all
from ..parallel.passes.pipeline import prepare
from .config import ModelConfig
from .inputs import BatchShape
from .step import Optimizer, build_step


@dataclass(frozen=True)
class PlacedStep:
    """A step after all passes. ``arenas``: where its temporaries lie, by space."""

    program: Program
    arenas: Mapping[Space, Arena]


@dataclass(frozen=True)
class Blueprint:
    """What a step is built from; equal ones give equal records, in any process. ``marked``: it tells where it is."""

    config: ModelConfig
    plan: Plan
    batch: BatchShape
    optimizer: Optimizer
    seed: int
    caption_dropout: float
    backend: str
    marked: bool

    @uncollected()
    def build(self) -> PlacedStep:
        """Built, arranged, ordered and placed. Raises CinemeshError when the plan cannot run the model on the batch."""
        built = build_step(
            self.config,
            self.plan,
            self.batch,
            self.optimizer,
            seed=self.seed,
            caption_dropout=self.caption_dropout,
        )
        program = prepare(built, backend=self.backend, marked=self.marked)
        return PlacedStep(program, place_all(program))


BuildSteps = Callable[[Sequence[Blueprint]], list[PlacedStep]]  # of all shapes of a run


def build_here(blueprints: Sequence[Blueprint]) -> list[PlacedStep]:
    """One after the other, in this process."""
    return [blueprint.build() for blueprint in blueprints]
