"""The stages, what there is to know first first, and how their time is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...perf_model.acceptance import LINKS, PREDICTIONS
from . import basics, lanes, links, parity, predictions, replay, resume
from .here import Here


@dataclass(frozen=True)
class StageJob:
    """What every rank runs in a process of its own. ``dies``: one of them kills itself, and is to be found dead."""

    work: Callable[[Here], None]
    dies: bool = False


@dataclass(frozen=True)
class AcceptanceStage:
    """``share``: its part of the whole time, of 1800. ``about``: for the help. ``jobs``: one after the other."""

    name: str
    share: float
    about: str
    jobs: tuple[StageJob, ...]


# Shares: a job costs some 10 s on GPUs before it works (a context, NCCL); links and wide steps take what there is.
STAGES = (
    AcceptanceStage(
        "basics", 40, "versions, devices, driver, NCCL, memory, clocks: alike on every rank?", (StageJob(basics.run),)
    ),
    AcceptanceStage(
        "parity",
        320,
        "small steps of TP, CP, FSDP, replicas and all of them in float64; ledger",
        (StageJob(parity.run),),
    ),
    AcceptanceStage(
        "replay", 240, "the same steps captured and replayed, beside the eager ones", (StageJob(replay.run),)
    ),
    AcceptanceStage(
        LINKS, 420, "collectives one by one and in a CUDA Graph, for cinemesh calibrate", (StageJob(links.run),)
    ),
    AcceptanceStage(
        "lanes", 240, "what compute hides of every lane, from a trace, beside the prediction", (StageJob(lanes.run),)
    ),
    AcceptanceStage(
        PREDICTIONS, 300, "steps of every plan beside their prices, for cinemesh validate", (StageJob(predictions.run),)
    ),
    AcceptanceStage(
        "resume",
        240,
        "a run with a checkpoint, one rank killed, started again: bitwise the same end",
        (StageJob(resume.unbroken), StageJob(resume.broken, dies=True), StageJob(resume.again)),
    ),
)
