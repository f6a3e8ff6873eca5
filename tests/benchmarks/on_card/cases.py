"""The steps that stages 4 to 7 run: parts of the 30B on a card, and stand-ins of a few tokens for a smoke run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from cinemesh.launch.commands.calls import DistinctCall, calls_of
from cinemesh.model.config import USUAL_LATENTS, Encoder, ModelConfig, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.pipeline import prepare

MODEL = "movie-gen-30b"
SMALL = ModelConfig("smoke", 1, 128, 2, 64, (Encoder("text", 32, 4),), channels=4, position_lengths=(8, 8, 8))
MINOR_BYTES = 1 << 24  # a call that moves less is a launch


@dataclass(frozen=True)
class Step:
    """One rank's part of a training step."""

    config: ModelConfig
    plan: Plan
    batch: BatchShape

    def program(self) -> Program:
        return prepare(build_step(self.config, self.plan, self.batch), backend="nccl")


def one_rank(smoke: bool) -> Step:
    """A rank of TP4 CP2 at 73,728 tokens, full recompute, 12 of the 48 blocks; about 4 GiB."""
    if smoke:
        return Step(SMALL, Plan(tp=2, cp=2, dp_shard=2, recompute="full"), BatchShape(1, (1, 4, 8)))
    plan = Plan(tp=4, cp=2, dp_shard=768, recompute="full")
    return Step(replace(preset(MODEL), layers=12), plan, BatchShape(1, USUAL_LATENTS[MODEL]))


def trained(smoke: bool) -> Step:
    """Two blocks of the 30B's width on one GPU, 4,608 tokens."""
    if smoke:
        return Step(SMALL, Plan(), BatchShape(2, (1, 4, 8)))
    return Step(replace(preset(MODEL), layers=2), Plan(), BatchShape(1, (8, 48, 48)))


@lru_cache(maxsize=2)
def calls(smoke: bool) -> tuple[DistinctCall, ...]:
    """Distinct calls of :func:`one_rank`, those of any size."""
    return tuple(call for call in calls_of(one_rank(smoke).program()) if smoke or call.bytes >= MINOR_BYTES)


def samples(runner: StepRunner) -> Iterator[tuple[str, Tensor]]:
    """Name and buffer of every input that a micro-batch brings."""
    for given in runner.program.inputs:
        if given.micro_batch is not None:
            yield given.name, runner.executor.buffers[given.buffer]
