"""Rows of this trainer's own runs: read, and predicted by the program that ran (torch-free).

``cinemesh train`` writes them (``launch/training/measured_rows.py``): the parts of every row, and the ``software`` and
the ``shape`` of the step. A row is of one latent in one start of a run; its time is the median of the steps behind the
warm-up. Its plan is built, scheduled and played on the cluster file that it names, as the planner plays one: no peer's
step stands between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...errors import CinemeshError
from ...kernels.selection import PLAIN_INSTALL, Software, packages_of
from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...parallel.ir.fields import MOST_RANKS
from ...parallel.ir.plan import Plan
from ...ranges import BATCH_RANGE, MOST_STEPS, integers, reals
from ...reading import read_record
from ..clusters.cluster import load
from ..prices.compute import Compute
from ..prices.models import PriceModels
from ..prices.network import Network
from ..prices.played import play_step
from .evidence import ErrorBar, error_bar

RunGpus = Annotated[int, integers(1, MOST_RANKS, "no cluster has more", "GPUs")]
StepSeconds = Annotated[float, reals(0.0, 1e6, "no step takes longer", "s", above=True)]


@dataclass(frozen=True, kw_only=True)
class OwnSource:
    """``title``: the folder of the run. ``date``: of the last step that is counted."""

    title: str
    date: str


@dataclass(frozen=True, kw_only=True)
class OwnHardware:
    """``cluster``: name or file of the one to predict on. ``clock_mhz``: of the SMs, as the driver told of the last."""

    gpu: str
    gpus: RunGpus
    gpus_per_node: RunGpus
    cluster: str | None = None
    clock_mhz: Annotated[int | None, integers(1, 10_000, "no chip is faster", "MHz")] = None


@dataclass(frozen=True, kw_only=True)
class OwnSoftware:
    """``packages``: optional ones with kernels. ``kernels``: overrides by op. ``captured``: whether steps replayed."""

    versions: dict[str, str]
    packages: tuple[str, ...] = ()
    kernels: dict[str, str]
    deterministic: bool
    captured: bool

    @property
    def chosen_from(self) -> Software:
        """What the registry chose kernels of. Raises CinemeshError for a package that there is not."""
        missing = PLAIN_INSTALL.beside(packages_of(self.packages)).missing
        return Software(missing, self.kernels, self.deterministic)


@dataclass(frozen=True, kw_only=True)
class OwnShape:
    """``latent``: (T, H, W). ``samples``: of one micro-batch on one data rank; ``global_batch``: of the step."""

    latent: tuple[int, int, int]
    samples: Annotated[int, BATCH_RANGE]
    global_batch: Annotated[int, BATCH_RANGE]


@dataclass(frozen=True, kw_only=True)
class OwnTimes:
    """Seconds of a step without its loading: the median of ``steps`` behind ``warm_up_steps``.

    Nine of ten lie between ``iter_time_low_s`` and ``iter_time_high_s``. ``loading_s``: the median of what one waited
    for its samples.
    """

    iter_time_s: StepSeconds
    iter_time_low_s: StepSeconds
    iter_time_high_s: StepSeconds
    loading_s: Annotated[float, reals(0.0, 1e6, "no step waits longer", "s")]
    steps: Annotated[int, integers(1, MOST_STEPS, "no run has more", "steps")]
    warm_up_steps: Annotated[int, integers(0, MOST_STEPS, "no run has more", "steps")]


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A row as its file has it. ``plan``: every field of it. ``model``: as a file for --model has it."""

    id: str
    kind: str
    source: OwnSource
    hardware: OwnHardware
    software: OwnSoftware
    model: ModelConfig
    shape: OwnShape
    plan: dict[str, Any]
    measured: OwnTimes
    notes: str | None = None


@dataclass(frozen=True)
class OwnPrediction:
    """A step of this trainer beside its prediction. ``ratio`` = predicted / measured; ``bar``: of the prediction."""

    row: OwnRow
    plan: Plan
    cluster: str
    predicted_s: float
    bar: ErrorBar

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.row.measured.iter_time_s

    @property
    def span(self) -> tuple[float, float]:
        """Seconds that the bar allows the step to take."""
        return self.predicted_s * (1.0 + self.bar.low), self.predicted_s * (1.0 + self.bar.high)

    @property
    def within(self) -> bool:
        """Whether the measured median is within the bar."""
        low, high = self.span
        return low <= self.row.measured.iter_time_s <= high


def predict_own(where: str, values: Any, cluster: str | None = None) -> OwnPrediction:
    """A row beside what the planner says of its plan; ``where`` it stands; on another ``cluster`` than its own.

    Raises CinemeshError for a row that is wrong or contradicts itself, and for a plan that cannot run its step.
    """
    row = read_record(OwnRow, values, where)
    try:
        return _predicted(row, cluster or row.hardware.cluster)
    except CinemeshError as error:
        raise CinemeshError(f"{where}: {error.problem}", remedy=error.remedy) from None


def _predicted(row: OwnRow, cluster: str | None) -> OwnPrediction:
    plan = Plan.from_dict(row.plan)
    _check(row, plan)
    if cluster is None:
        raise CinemeshError("hardware.cluster is null", remedy="name a cluster there, or give --cluster")
    on = load(cluster).running(row.software.chosen_from)
    models = PriceModels(on, Compute(on, mode="graph" if row.software.captured else "eager"), Network(on))
    step = play_step(row.model, plan, BatchShape(row.shape.samples, row.shape.latent), models)
    kernel = models.compute.kernel("attention", plan.compute_dtype, row.model.head_dim)
    return OwnPrediction(row, plan, on.name, step.step_s, error_bar(on, kernel.rate_class))


def _check(row: OwnRow, plan: Plan) -> None:
    """Raise CinemeshError where a row's numbers do not agree."""
    times, shape = row.measured, row.shape
    if plan.world_size != row.hardware.gpus:
        raise CinemeshError(
            f"{plan.equation()} != hardware.gpus({row.hardware.gpus})", remedy="write the plan and the GPUs of one run"
        )
    batch = shape.samples * plan.data_ranks * plan.micro_batches
    if batch != shape.global_batch:
        raise CinemeshError(
            f"shape.samples({shape.samples}) * data ranks({plan.data_ranks}) * micro_batches({plan.micro_batches}) = "
            f"{batch} != shape.global_batch({shape.global_batch})",
            remedy="samples are of one micro-batch on one data rank",
        )
    low, middle, high = times.iter_time_low_s, times.iter_time_s, times.iter_time_high_s
    if not low <= middle <= high:
        raise CinemeshError(
            f"measured.iter_time_s({middle:g}) is not from iter_time_low_s({low:g}) to iter_time_high_s({high:g})",
            remedy="write the median, and what nine of ten steps lie between",
        )
