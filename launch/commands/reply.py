"""What commands that predict print with ``--json``: every key, its type and its meaning (torch-free).

``plan``, ``explain``, ``compare`` and ``train --dry-run``.
A reply is made of these records and printed by ``text``, so that no key is forgotten, added or moved without a change
here. ``docs/json.md`` shows them; ``tests/launch/commands/test_reply.py`` writes that page and holds replies to them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from ...perf_model.prices.lifetime import Lifetime
from ...perf_model.prices.marks import MarksCost
from ...perf_model.prices.startup import HostsStart, StartUp
from ...perf_model.published.evidence import ErrorBar
from ...perf_model.report.exchanges import Exchange
from ...perf_model.report.explain import Duplicate, Exposure
from ...perf_model.report.float8 import Float8
from ...perf_model.report.software import OtherSoftware, PricedKernel
from ...perf_model.report.waterfall import Loss
from ...perf_model.search.samples import TriedSamples

VERSION = 2  # one more where a key goes, or changes its meaning, type or place; a new one may come behind the others
KERNELS = "what each attention op is priced on: what would run it where the stated packages are installed"
TAKEN = "what a recipe gave, by name, in words; empty without one"
ORDER = "what the cluster's NCCL and driver take from overlap or capture, and how that is priced; empty: nothing"
OTHERS = (
    "the step with packages that would make it faster, with deterministic kernels, and where `order` says something "
    "with another NCCL and driver"
)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a reply follows."""

    name: Annotated[str, "`plan`, `plan --sample`, `paper`, `explain`, `compare` or `train --dry-run`"]
    version: Annotated[int, "changes where a key goes or changes its meaning, type or place"] = VERSION


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What every reply begins with."""

    schema: Schema
    model: Annotated[str, "as it was asked for: a preset or a file"]
    cluster: str
    predicted: Annotated[bool, "true: no time here was measured"] = True


@dataclass(frozen=True, kw_only=True)
class PricedStep:
    """A plan and its step; bytes are of one rank. Over several latents: the first one's samples, the mean of times."""

    plan: Annotated[dict[str, Any], "every field of the plan, as its YAML file has them"]
    gpus: int
    samples: Annotated[int, "of one micro-batch on one data rank"]
    global_batch: Annotated[int, "samples of a step"]
    step_s: Annotated[float, "seconds of a step"]
    step_s_low: Annotated[float, "lower end of the error bar"]
    step_s_high: Annotated[float, "upper end of the error bar"]
    samples_per_s: float
    mfu: Annotated[float, "model FLOPs over what the GPUs' peak would do in the step; recompute does not count"]
    hfu: Annotated[float, "FLOPs that run, recompute and duplicates too, over the same"]
    compute_s: Annotated[float, "seconds of the step's kernels alone"]
    exposed_s: Annotated[float, "seconds in which compute waits for collectives"]
    exposed_fraction: Annotated[float, "`exposed_s` over `step_s`"]
    peak_bytes: Annotated[int, "most that is held at once"]
    limit_bytes: Annotated[float, "what there is"]


@dataclass(frozen=True, kw_only=True)
class LatentStep:
    """A step of one latent."""

    latent: Annotated[str, "`TxHxW`"]
    tokens: Annotated[int, "of a sample"]
    share: Annotated[float, "of the steps"]
    samples: Annotated[int, "of one micro-batch on one data rank"]
    global_batch: Annotated[int, "samples of a step"]
    step_s: float
    samples_per_s: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class RankedPlan(PricedStep):
    """A plan of the table."""

    step_s_from: Annotated[
        str, "`steady`: blocks that are shown to repeat, until nothing changes; `played`: every record"
    ]
    bound_s: Annotated[float, "seconds that the search took for a lower bound of the step"]
    sharded_encoders: Annotated[list[str], "frozen encoders that are sharded, not replicated"]
    encoders_s: Annotated[float, "of `step_s`: frozen encoders in the loop, between two steps, exposed as a whole"]
    latents: Annotated[list[LatentStep], "a step of each latent"]


@dataclass(frozen=True, kw_only=True)
class PlayedPlan(PricedStep):
    """A plan whose every record was played."""

    fits: Annotated[bool, "whether `peak_bytes` are within `limit_bytes`"]
    gpu_s_per_sample: Annotated[float, "GPU seconds of one sample: what plans of any batch compare by"]
    terms: Annotated[dict[str, float], "seconds that add up to `step_s`"]
    host_bytes: Annotated[int, "most that lies in host memory at once, for what the plan offloads"]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A family of plans that is not in the table."""

    tp: int
    cp: int
    samples: int
    micro_batches: int
    kind: Annotated[
        str,
        "`divides`, `placement`, `micro_batches` (too many), `memory`, `host`, or `slower`: it fits, but behind",
    ]
    reason: Annotated[str, "a sentence with the numbers"]
    needs_bytes: Annotated[float, "of one rank at least; 0 unless `memory`"]
    free_bytes: Annotated[float, "what there is of them; 0 unless `memory`"]


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """Fields of a plan that change together."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Relaunch:
    """From the best plan of one stage to that of the next: the job is saved, stopped, and started with the new plan.

    A checkpoint is read under any plan: every rank reads its own new part of every state.
    """

    changes: list[PlanChange]
    state_bytes: Annotated[int, "of the checkpoint: weights, moments and averaged weights, of all ranks together"]
    rank_bytes: Annotated[int, "what a rank reads of them"]
    start_up_s: Annotated[float, "seconds until the new communicators and the tree of hosts are made"]


@dataclass(frozen=True, kw_only=True)
class PaperStage:
    """A row of the paper's Table 3: its plan, and the best for as many GPUs and samples of a step."""

    stage: str
    tokens: Annotated[int, "of the stage's longest sample"]
    gpus: int
    global_batch: int
    lr: float
    steps: Annotated[int, "optimizer updates"]
    paper: Annotated[RankedPlan, "the paper's degrees; what it does not say is searched"]
    best: RankedPlan
    best_over_paper: Annotated[float, "samples/s of the best over those of the paper's plan"]
    paper_gpu_hours: Annotated[float, "of all steps, every sample as long as `tokens`"]
    best_gpu_hours: Annotated[float, "the same with the best plan"]
    relaunch: Annotated[Relaunch | None, "from the best plan of the stage before; null where the plan stays"]


@dataclass(frozen=True, kw_only=True)
class Neutral:
    """Of one sample shape and number of GPUs: plans of about equal throughput over different global batches."""

    stage: str
    tokens: int
    gpus: int
    groups: Annotated[list[list[RankedPlan]], "each of two batches or more, within `near`; one plan a batch"]


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The paper's Table 3."""

    stages: list[PaperStage]
    paper_gpu_hours: Annotated[float, "of all stages"]
    best_gpu_hours: Annotated[float, "of all stages"]
    near: Annotated[float, "the relative difference below which throughputs are called equal"]
    neutral: list[Neutral]


@dataclass(frozen=True, kw_only=True)
class NearbyPlan:
    """The best plan of a batch close by, or of fewer GPUs, where it is better by more than the planner can be wrong."""

    gpus: int
    gain: Annotated[float, "samples/s more than the best of what was asked for, relative"]
    best: RankedPlan


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What would be if one thing were different."""

    change: str
    plan: Annotated[dict[str, Any] | None, "the plan that then is best, null where none fits"]
    samples_per_s: float
    gain: Annotated[float, "samples/s more, relative"]
    note: str


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why a plan takes as long as it does."""

    whole_step_s: Annotated[float, "seconds of the step, every record played"]
    searched_step_s: Annotated[float | None, "as the table has it, null where there was no search for it"]
    hfu: float
    utilisation: Annotated[dict[str, float], "share of the step in which compute, and each communicator, is busy"]
    binds: list[str]
    exposed: list[Exposure]
    duplicates: list[Duplicate]
    runner_up: Annotated[list[str], "term by term, where the slower of plan and rival spends more"]
    sensitivities: list[Changed]
    waterfall: Annotated[list[Loss], "from the chip's peak down; their shares and the MFU add up to one"]
    exchanges: Annotated[list[Exchange], "ways to exchange tokens over cp, the plan's own first; none where cp is 1"]
    float8: Annotated[list[Float8], "what fp8 linear layers would give, by how they are scaled"]
    marks: Annotated[
        MarksCost | None, "by which a hang inside a captured step is told; not in `step_s`; null where none is captured"
    ]


@dataclass(frozen=True, kw_only=True)
class StartUpCost:
    """The communicators that a rank makes before its first step, in all and each, and the tree of hosts."""

    communicators: int
    bytes: int
    seconds: float
    each: list[StartUp]
    hosts: Annotated[HostsStart | None, "null for one process"]


@dataclass(frozen=True, kw_only=True)
class BucketStep:
    """A step of one bucket of a recipe."""

    latent: Annotated[str, "`TxHxW`"]
    tokens: Annotated[int, "of a sample"]
    share: Annotated[float, "of the run's steps"]
    samples: Annotated[int, "of one micro-batch on one data rank"]
    micro_batches: int
    step_s: Annotated[float, "seconds of a step, every record played"]
    tokens_per_s: Annotated[float, "of all ranks together"]
    mfu: Annotated[float, "model FLOPs over what the devices' peak would do in the step"]
    peak_bytes: Annotated[int, "most that one rank holds at once"]
    global_batch: Annotated[int, "samples of a step"]


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A run of a recipe under one plan. Bytes are of one rank."""

    ranks: int
    plan: Annotated[dict[str, Any], "every field of the plan, as its YAML file has them"]
    global_batch: Annotated[int, "samples of a step; of the first bucket, where each has its own"]
    buckets: list[BucketStep]
    step_s: Annotated[float, "mean seconds of a step, buckets by their shares"]
    encoders_s: Annotated[float, "of `step_s`: text encoders in the loop, between two steps, exposed as a whole"]
    peak_bytes: Annotated[int, "in the bucket that needs most"]
    limit_bytes: Annotated[float, "what there is"]
    bytes: Annotated[dict[str, int], "what `peak_bytes` are, by class"]
    steps: Annotated[int, "of the run"]
    hours: Annotated[float, "of the run: its steps alone"]
    device_hours: float


@dataclass(frozen=True, kw_only=True)
class AfterLoss:
    """A run that goes on with the ranks that are left of `full_ranks`, by the planner's predictions for both."""

    full_ranks: int
    batches: Annotated[str, "samples of a step, in words"]
    samples_per_s: float
    full_samples_per_s: Annotated[float, "of all ranks"]
    of_proportional: Annotated[float, "`samples_per_s` over the share of `full_samples_per_s` that the ranks left are"]


@dataclass(frozen=True, kw_only=True)
class BucketReading:
    """What a run reads of one bucket of its latent cache."""

    bucket: Annotated[str, "its name"]
    sample_bytes: Annotated[int, "latent and text embeddings"]
    bytes_per_s: Annotated[float, "of all data ranks, in its steps"]
    samples: Annotated[int, "that the run takes"]
    rows: Annotated[int | None, "to train on; null where the cache is not built, or not here"]
    epochs: Annotated[float | None, "samples over rows"]


@dataclass(frozen=True, kw_only=True)
class DryRunReply(RecipeRun, Heading):
    """`cinemesh train CONFIG --dry-run --json`."""

    readings: list[BucketReading]

    order: Annotated[str, ORDER] = ""
    start_up: StartUpCost
    lifetime: Annotated[Lifetime | None, "with failures, simulated; null for a cluster that says nothing of them"]
    after_loss: Annotated[AfterLoss | None, "with `--lost`: all else is of the ranks that are left"] = None
    days: Annotated[float, "of the run; with failures, where these are simulated"]
    verdict: Annotated[str, "all of it in a line"]


@dataclass(frozen=True, kw_only=True)
class PlanReply(Heading):
    """`cinemesh plan --json`."""

    gpus: Annotated[int, "that were asked for"]
    plans: Annotated[list[RankedPlan], "the best first, by samples/s"]
    refused: list[Refused]
    near_ties: Annotated[list[int], "places in `plans` (0 is the best) that cannot be told from the best one"]
    near: Annotated[float, "the relative difference below which plans are near-ties"]
    played: Annotated[int, "plans priced"]
    bounded: Annotated[int, "plans for which a lower bound was enough"]
    start_up: Annotated[StartUpCost, "of the best plan"]
    paper: Annotated[PaperTable | None, "with `--paper`"] = None
    why: Annotated[Why | None, "of the best plan, with `--explain`"] = None
    kernels: Annotated[list[PricedKernel], KERNELS]
    other_software: Annotated[list[OtherSoftware], OTHERS + ", of the best plan"]
    error_bar: ErrorBar
    samples_tried: Annotated[list[TriedSamples], "where neither samples nor a batch was given"] = field(
        default_factory=list
    )
    nearby: Annotated[list[NearbyPlan], "what would be better close by, the best first"] = field(default_factory=list)
    taken: Annotated[dict[str, str], TAKEN] = field(default_factory=dict)
    run: Annotated[RecipeRun | None, "of a recipe under the best plan"] = None
    order: Annotated[str, ORDER] = ""
    lifetime: Annotated[Lifetime | None, "of the best plan with failures, simulated; with `--goodput`"] = None
    by_samples_per_day: Annotated[
        list[int], "places in `plans` of the best and its near-ties, by samples a day with failures; with `--goodput`"
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PaperReply(PaperTable, Heading):
    """`cinemesh plan --paper --json`, without `--gpus`."""

    kernels: Annotated[list[PricedKernel], KERNELS]
    error_bar: ErrorBar


@dataclass(frozen=True, kw_only=True)
class ExplainReply(PlayedPlan, Heading):
    """`cinemesh explain --json`: one plan, whole."""

    rival: Annotated[PlayedPlan | None, "the plan that lost to it, or that it loses to"]
    why: Why
    start_up: StartUpCost
    kernels: Annotated[list[PricedKernel], KERNELS]
    other_software: Annotated[list[OtherSoftware], OTHERS]
    error_bar: ErrorBar
    taken: Annotated[dict[str, str], TAKEN] = field(default_factory=dict)
    order: Annotated[str, ORDER] = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing in which a plan differs from the first, and what that alone would cost there."""

    name: str
    before: str
    after: str
    gain: Annotated[float | None, "GPU seconds of a sample more, relative; null where it cannot be changed alone"]
    problem: Annotated[str, "why it cannot"] = ""


@dataclass(frozen=True, kw_only=True)
class Against:
    """A plan against the first one."""

    gain: Annotated[float, "GPU seconds of a sample more, relative"]
    differences: list[Difference]
    together: Annotated[float, "what of `gain` the differences one by one do not explain"]


@dataclass(frozen=True, kw_only=True)
class CompareReply(Heading):
    """`cinemesh compare --json`."""

    plans: Annotated[list[PlayedPlan], "as they were named"]
    against_the_first: Annotated[list[Against], "of every other plan"]
    kernels: Annotated[list[PricedKernel], KERNELS]
    error_bar: ErrorBar
    taken: Annotated[dict[str, str], TAKEN] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """A way to share one guided clip."""

    plan: Annotated[dict[str, Any], "every field of the plan, as its YAML file has them"]
    guidance: Annotated[str, "`batch`: halves in one batch on all ranks; `groups`: each on a group of ranks"]
    clip_s: Annotated[float, "seconds of all steps"]
    velocity_s: Annotated[float, "seconds of one guided velocity"]
    exposed_s: Annotated[float, "seconds of it in which compute waits for collectives"]
    peak_bytes: Annotated[int, "most that one rank holds at once"]
    fits: Annotated[bool, "whether a GPU has them"]


@dataclass(frozen=True, kw_only=True)
class ClipPrices:
    """Of one latent and number of GPUs."""

    gpus: int
    latent: Annotated[str, "`TxHxW`"]
    tokens: Annotated[int, "of a sample"]
    steps: Annotated[int, "of the sampler, one guided velocity each"]
    plans: Annotated[list[ClipPlan], "the fastest that fits first, those that do not fit last"]


@dataclass(frozen=True, kw_only=True)
class SampleReply(Heading):
    """`cinemesh plan --sample --json`."""

    clips: list[ClipPrices]
    taken: Annotated[dict[str, str], TAKEN] = field(default_factory=dict)


REPLIES = (PlanReply, PaperReply, SampleReply, ExplainReply, CompareReply, DryRunReply)


def text(reply: Heading) -> str:
    """A reply as JSON."""
    return json.dumps(asdict(reply), indent=1)
