"""What a step is given: the inputs of one micro-batch, by name (torch-free).

``Program.inputs`` lists them as they were declared here; whoever fills them (runner, parity, validation, sampler, data)
goes by that list. A variant's own input is one more row, and the place that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import BATCH, HEADS, NONE, Placement
from ..parallel.ir.plan import Plan
from ..parallel.ir.records import Buffer
from .config import ModelConfig

IDS = "ids"
PLACES = "places"
LATENTS = "latents"
MASK = "mask"
BY_SAMPLE = Placement((BATCH, NONE, NONE, NONE, NONE))  # of latents [B, C, T, H, W]


@dataclass(frozen=True)
class BatchShape:
    """Shape of one micro-batch: ``samples`` on one data rank, ``latent`` (T, H, W)."""

    samples: int
    latent: tuple[int, int, int]


@dataclass(frozen=True)
class InputSpec:
    """One input: its global shape, its dtype, and how ranks share it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement


def text_input(encoder: str) -> str:
    """The name of an encoder's embeddings."""
    return f"text.{encoder}"


def condition_inputs(c: ModelConfig, plan: Plan, shape: BatchShape) -> list[InputSpec]:
    """What the velocity depends on besides x_t and t: text [L, B, W] an encoder, mask [B, L], latents [B, C, ...]."""
    samples = shape.samples * plan.data_ranks
    return [
        InputSpec(MASK, (samples, c.text_tokens), "bool", Placement((BATCH, NONE))),
        *(
            InputSpec(
                text_input(e.name), (e.tokens, samples, e.width), plan.compute_dtype, Placement((NONE, BATCH, HEADS))
            )
            for e in c.encoders
        ),
        *(
            InputSpec(condition.input, (samples, condition.channels, *shape.latent), plan.compute_dtype, BY_SAMPLE)
            for condition in c.latent_conditions
        ),
    ]


def training_inputs(c: ModelConfig, plan: Plan, shape: BatchShape) -> list[InputSpec]:
    """Those, and what is noised: sample ids [B], latents [B, C, T, H, W].

    ``places`` [B]: indices in the step's global batch, by which a sample that occurs twice in it is drawn for twice.
    """
    samples = shape.samples * plan.data_ranks
    return [
        *(InputSpec(name, (samples,), "int64", Placement((BATCH,))) for name in (IDS, PLACES)),
        *condition_inputs(c, plan, shape),
        InputSpec(LATENTS, (samples, c.channels, *shape.latent), plan.stat_dtype, BY_SAMPLE),
    ]


def declare(b: Builder, inputs: Iterable[InputSpec], micro_batch: int | None = None) -> dict[str, Buffer]:
    """The inputs' buffers, by name."""
    return {i.name: b.input(i.name, i.shape, i.dtype, i.placement, micro_batch) for i in inputs}
