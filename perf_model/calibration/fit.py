"""Fitting of the few constants that isolated kernels cannot give: clocks under power, overlap, spread (torch-free).

One set for all rows of a hardware kind: no constant a row, a source or a model. Each is physical, has a range, and
stands in the kind's cluster file. The search is a pattern search: one constant at a time, up and down, the step halved
when nothing improves. ``refit`` also leaves every source out in turn and predicts its rows with what the others give.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import CinemeshError
from ..clusters.cluster import Cluster
from ..published.rows import RowCase, case_of
from ..published.validate import Prediction, Predictor, timed

FIRST_STEP, LEAST_STEP = 0.08, 0.008  # of a constant's range
HELD_OUT_STEP = 0.04


@dataclass(frozen=True)
class Constant:
    """``paths``: dotted names in the cluster file that take the value.

    ``fp8``: of fp8 products alone. ``physical_low``, ``physical_high``: why nothing can lie beyond that bound, so that
    a value may stand at it. At a bound without such a reason the search was cut short, and the constant carries an
    error of the model.
    """

    name: str
    paths: tuple[str, ...]
    low: float
    high: float
    fp8: bool = False
    physical_low: str = ""
    physical_high: str = ""

    def cut_short(self, value: float) -> bool:
        """Whether a value lies at, or beyond, a bound that is only the search's own."""
        return (value <= self.low and not self.physical_low) or (value >= self.high and not self.physical_high)


_CLOCK = "a long step runs no faster than a short isolated kernel"
BF16 = Constant(
    "sustained clock, bf16", ("gpu.sustained.bfloat16", "gpu.sustained.float16"), 0.55, 1.0, physical_high=_CLOCK
)
FP8 = Constant("sustained clock, fp8", ("gpu.sustained.float8",), 0.50, 1.0, fp8=True, physical_high=_CLOCK)
STREAM = Constant("memory fraction", ("stream.fraction",), 0.70, 0.92)
SLOWDOWN = Constant("compute beside collectives", ("overlap.compute_slowdown",), 0.5, 1.6)
COMMUNICATION = Constant(
    "collectives beside compute",
    ("overlap.communication_slowdown",),
    1.0,
    1.6,
    physical_low="compute beside it cannot speed a collective up",
)
SPREAD = Constant(
    "spread of ranks", ("spread.step_fraction",), 0.0, 0.04, physical_low="a spread is not less than nothing"
)
KINDS: Mapping[str, tuple[Constant, ...]] = {
    "A100": (BF16, STREAM, SLOWDOWN, COMMUNICATION),
    "H100 700 W": (BF16, FP8, SLOWDOWN, COMMUNICATION, SPREAD),
    "H100 500 W": (BF16, FP8),
}


@dataclass
class Fit:
    """Of one hardware kind. ``held_out``: rows of each source, predicted with constants fitted to the others.

    ``undescribed``: the same by the default stack, as if nothing were known of the source's software either.
    """

    kind: str
    constants: tuple[Constant, ...]
    before: dict[str, float]
    after: dict[str, float]
    loss_before: float
    loss_after: float
    held_out: list[Prediction] = field(default_factory=list)
    undescribed: list[Prediction] = field(default_factory=list)


def kind_of(cluster: Cluster) -> str:
    """The hardware kind whose constants a cluster shares."""
    if cluster.gpu.name.startswith("A100"):
        return "A100"
    return "H100 700 W" if cluster.gpu.power_w > 600 else "H100 500 W"


def standing(cluster: Cluster, constants: Sequence[Constant]) -> dict[str, float]:
    """The values that a cluster has now."""
    values: dict[str, float] = {}
    for constant in constants:
        owner: object = cluster
        for part in constant.paths[0].split("."):
            owner = owner[part] if isinstance(owner, Mapping) else getattr(owner, part)
        assert isinstance(owner, int | float)
        values[constant.name] = float(owner)
    return values


def changed(cluster: Cluster, constants: Sequence[Constant], values: Mapping[str, float]) -> Cluster:
    return cluster.with_(**{path: values[c.name] for c in constants for path in c.paths})


class PricedRows:
    """Predictions of rows by values of ``constants``. What was priced is kept: fits of nearly the same rows ask it."""

    def __init__(self, constants: Sequence[Constant]) -> None:
        self.constants = constants
        self._seconds: dict[tuple[object, ...], float] = {}

    def of(self, cases: Sequence[RowCase], values: Mapping[str, float]) -> list[Prediction]:
        predictor = Predictor(lambda cluster: changed(cluster, self.constants, values))
        return [timed(case, self._priced(case, values, predictor)) for case in cases]

    def _priced(self, case: RowCase, values: Mapping[str, float], predictor: Predictor) -> float:
        matter = (values[c.name] for c in self.constants if case.run.fp8 or not c.fp8)
        key = (case.id, case.run, *matter)
        if key not in self._seconds:
            self._seconds[key] = predictor.seconds(case)
        return self._seconds[key]


def loss(found: Sequence[Prediction]) -> float:
    """Half the mean absolute error over rows, half that averaged by source, and a tenth of the 95th percentile."""
    errors = sorted(abs(p.error) for p in found)
    by_source: dict[str, list[float]] = {}
    for prediction in found:
        by_source.setdefault(prediction.source, []).append(abs(prediction.error))
    tail = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
    return 0.5 * statistics.mean(errors) + 0.5 * statistics.mean(map(statistics.mean, by_source.values())) + 0.1 * tail


def fit(
    cases: Sequence[RowCase], predicted: PricedRows, values: Mapping[str, float], step: float = FIRST_STEP
) -> tuple[dict[str, float], float]:
    """The constants with the least loss over ``cases``, searched from ``values`` on."""
    constants = predicted.constants
    best = {c.name: min(max(values[c.name], c.low), c.high) for c in constants}
    least = loss(predicted.of(cases, best))
    while step >= LEAST_STEP:
        improved = False
        for constant in constants:
            for sign in (1.0, -1.0):
                moved = best[constant.name] + sign * step * (constant.high - constant.low)
                trial = {**best, constant.name: min(max(moved, constant.low), constant.high)}
                if trial != best and (score := loss(predicted.of(cases, trial))) < least - 1e-6:
                    best, least, improved = trial, score, True
                    break
        if not improved:
            step /= 2
    return best, least


def refuse_cut_short(kind: str, constants: Sequence[Constant], values: Mapping[str, float]) -> None:
    """Raise CinemeshError where a constant stands at a bound of the search's own: it carries an error of the model."""
    for constant in constants:
        if constant.cut_short(value := values[constant.name]):
            raise CinemeshError(
                f"the fit of {kind}: {constant.name} is {value:g}, an end of its range {constant.low:g} to "
                f"{constant.high:g}",
                remedy="widen the range, or say in KINDS why nothing can lie beyond it",
            )


def fit_count(cases: Sequence[RowCase]) -> int:
    """How many fits ``refit`` makes, and says that it begins."""
    kinds = {kind_of(case.cluster) for case in cases}
    return len(kinds) + len({(kind_of(case.cluster), case.source) for case in cases})


def refit(cases: Sequence[RowCase], tick: Callable[[str], object] = lambda _: None) -> list[Fit]:
    """Every hardware kind fitted to its rows, then with each source left out. Minutes for the project's rows.

    ``tick`` is told what begins. Raises CinemeshError as ``refuse_cut_short``.
    """
    kinds: dict[str, list[RowCase]] = {}
    for case in cases:
        kinds.setdefault(kind_of(case.cluster), []).append(case)
    found: list[Fit] = []
    for kind, of_kind in kinds.items():
        constants = KINDS[kind]
        predicted = PricedRows(constants)
        tick(kind)
        before = standing(of_kind[0].cluster, constants)
        after, least = fit(of_kind, predicted, before)
        refuse_cut_short(kind, constants, after)
        result = Fit(kind, constants, before, after, loss(predicted.of(of_kind, before)), least)
        for source in dict.fromkeys(case.source for case in of_kind):
            tick(f"{kind} without {source}")
            others = [case for case in of_kind if case.source != source]
            if others:
                values, _ = fit(others, predicted, after, HELD_OUT_STEP)
                left = [case for case in of_kind if case.source == source]
                result.held_out += predicted.of(left, values)
                plain = [case_of(case.row, described=False) for case in left]
                result.undescribed += predicted.of(plain, values)
        found.append(result)
    return found
