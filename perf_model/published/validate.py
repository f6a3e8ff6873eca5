"""Predictions beside published measurements: errors by row and source, choices within groups (torch-free).

Headline errors are those of steps and layers whose rows say all that a prediction needs (trust A, or no trust stated),
first with their source left out of the fit and nothing known of its software but its day, which is what a plan for a
cluster of one's own must expect (``evidence.py`` holds them), then by what their software did. What else can be
predicted stands beside them: attention alone, rows with a gap (trust B, C) or of software that is not described,
memory, out of memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...documents import read_yaml
from ..clusters.cluster import Cluster
from ..prices.compute import Compute
from ..prices.network import Network
from .evidence import ErrorBar, Way, covered, published_residuals, undescribed_bar
from .own_rows import OwnPrediction, predict_own
from .peer_memory import activation_bytes, fits, peak_bytes, state_bytes
from .peer_step import attention_s, layer_s, step_s
from .row_schema import OWN_STEP
from .rows import BLOCK, FOLDER, TIMED, TRUSTED, RowCase, Unpredictable, case_of, cluster_of, read, run_of

ROWS = FOLDER / "rows.yaml"
GROUPS = FOLDER / "groups.yaml"
GIB = 2.0**30
RowChange = Callable[[Cluster], Cluster]
Clock = Literal["sustained", "isolated"]


@dataclass(frozen=True)
class Prediction:
    """``error`` = predicted / measured - 1. ``unit``: s, GiB or %.

    ``assumed``: by the default stack of its day; then it has an error bar, and ``attention`` names its kernel.
    """

    id: str
    kind: str
    source: str
    trust: str
    unit: str
    measured: float
    predicted: float
    gpu_s_per_sample: tuple[float, float] = (0.0, 0.0)  # measured, predicted: what plans of a group are compared by
    assumed: bool = False
    attention: str = ""
    bar: ErrorBar | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a run was out of memory, and whether it is predicted to be."""

    id: str
    measured: bool
    predicted: bool


@dataclass(frozen=True)
class GroupChoice:
    """A group of plans: rank correlation of predicted and measured cost, and what the chosen plan loses to the best."""

    name: str
    plans: int
    spearman: float
    regret: float


@dataclass
class ValidationReport:
    """``undescribed``: the headline's rows by the default stack. ``own``: of this trainer's own runs."""

    times: list[Prediction] = field(default_factory=list)
    memory: list[Prediction] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    choices: list[GroupChoice] = field(default_factory=list)
    undescribed: list[Prediction] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # id, why
    own: list[OwnPrediction] = field(default_factory=list)

    @property
    def headline(self) -> list[Prediction]:
        return [p for p in self.times if _is_headline(p)]

    def right_verdicts(self) -> float:
        """Of the rows that ran out of memory, the part that is predicted to."""
        out = [v for v in self.verdicts if v.measured]
        return sum(v.predicted for v in out) / len(out) if out else 1.0


def _is_headline(p: Prediction) -> bool:
    return p.trust in TRUSTED and p.kind != "attention_layer" and not p.assumed


# -- prices -----------------------------------------------------------------------------------------------------------


class CachedCompute(Compute):
    """Remembers matmul prices: the blocks of a step are alike, and so are the rows of a source."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        super().__init__(cluster, clock=clock)
        self._matmuls: dict[tuple[object, ...], float] = {}

    def matmul_s(self, m: int, n: int, k: int, dtype: str, **options: Any) -> float:
        key = (m, n, k, dtype, *options.values())
        if key not in self._matmuls:
            self._matmuls[key] = super().matmul_s(m, n, k, dtype, **options)
        return self._matmuls[key]


class Predictor:
    """Prices of clusters, kept by identity; ``change`` is applied to each cluster first."""

    def __init__(self, change: RowChange | None = None) -> None:
        self._change = change
        self._known: dict[tuple[int, Clock], tuple[Cluster, Cluster, Compute, Network]] = {}

    def prices(self, cluster: Cluster, clock: Clock) -> tuple[Cluster, Compute, Network]:
        key = (id(cluster), clock)
        if key not in self._known:
            used = self._change(cluster) if self._change else cluster
            self._known[key] = (cluster, used, CachedCompute(used, clock), Network(used))
        return self._known[key][1:]

    def seconds(self, case: RowCase) -> float:
        """Of a step, a layer or the attention core. A benchmark of one kernel runs at the clock of one."""
        clock: Clock = "isolated" if case.kind == "attention_layer" else "sustained"
        cluster, compute, network = self.prices(case.cluster, clock)
        if case.kind == "training_step":
            return step_s(case.run, compute, network, cluster) * cluster.spread.factor(case.gpus)
        times = layer_s if case.kind == "layer" else attention_s
        return sum(times(case.run, compute, network, cluster))


# -- rows -------------------------------------------------------------------------------------------------------------


def validate(
    paths: Sequence[Path] = (), change: RowChange | None = None, cluster: str | None = None
) -> ValidationReport:
    """Predict the rows of files (the published ones by default); those of own runs on another ``cluster``, if given."""
    report, predictor = ValidationReport(), Predictor(change)
    for path in paths or (ROWS,):
        for row in read(path):
            if row["kind"] == OWN_STEP:
                report.own.append(predict_own(f"the rows file {path}: row {row['id']}", row, cluster))
                continue
            try:
                _predict(row, report, predictor)
            except Unpredictable as reason:
                report.skipped.append((row["id"], str(reason)))
    report.choices = choices(report.times, read_yaml(GROUPS, "the groups of rows", "restore the file"))
    return report


def _predict(row: dict[str, Any], report: ValidationReport, predictor: Predictor) -> None:
    kind = row["kind"]
    if kind in TIMED:
        case = case_of(row)
        found = timed(case, predictor.seconds(case))
        if found.assumed:
            way = Way.UNDESCRIBED if case.trust in TRUSTED else Way.GAP
            found = replace(found, bar=undescribed_bar(case.cluster, way, without=case.source))
        report.times.append(found)
        if _is_headline(report.times[-1]):
            plain = case_of(row, described=False)
            report.undescribed.append(timed(plain, predictor.seconds(plain)))
        if "peak_mem_gib" in row["measured"]:
            report.memory.append(_memory(row, "peak", row["measured"]["peak_mem_gib"], peak_bytes(case.run) / GIB))
    elif kind == "memory":
        report.memory += _korthikanti(row)
    elif kind == "oom_check":
        report.verdicts.append(
            Verdict(row["id"], bool(row["measured"].get("oom")), not fits(run_of(row), cluster_of(row)))
        )
    else:
        raise Unpredictable("a microbenchmark is no training step; the laws of a cluster file are fitted to such")


def timed(case: RowCase, predicted_s: float) -> Prediction:
    run, measured_s = case.run, case.measured
    assert measured_s is not None
    share = case.gpus / (run.samples * run.micro_batches * run.replicas * run.shard / run.cp)
    cost = (measured_s * share, predicted_s * share)
    said = (case.id, case.kind, case.source, case.trust, "s", measured_s, predicted_s, cost)
    return Prediction(*said, run.stack.assumed, run.stack.attention)


def _memory(row: dict[str, Any], what: str, measured: float, predicted: float, unit: str = "GiB") -> Prediction:
    name = row["id"] if what == "peak" else f"{row['id']}:{what}"
    return Prediction(
        name, "memory", str(row["source"].get("title")), row.get("trust") or "", unit, measured, predicted
    )


def _korthikanti(row: dict[str, Any]) -> list[Prediction]:
    """Figures 1 and 7: states, and activations under four ways of keeping them.

    With a pipeline, what a stage has in flight depends on its interleaving, which the rows leave out: then only states
    and proportions are predicted.
    """
    measured, stages = row["measured"], row["plan"].get("pp") or 1
    plan = {**row["plan"], "pp": 1, "recompute": "none", "sp": False}
    one = {**row, "kind": "layer", "plan": plan, "hardware": {**row["hardware"], "gpus": plan.get("tp") or 1}}
    plain = run_of(one)

    def kept(sp: bool, recomputed: Sequence[str]) -> float:
        return activation_bytes(replace(plain, sp=sp, recomputed=frozenset(recomputed), recomputed_share=1.0))

    found: list[Prediction] = []
    if "params_and_optimizer_gib" in measured:  # of the blocks alone, as the figure counts
        blocks = replace(plain, model=replace(plain.model, vocab=0))
        states = state_bytes(blocks) / stages / GIB
        found.append(_memory(row, "states", measured["params_and_optimizer_gib"], states))
    if stages == 1:
        for name, sp, recomputed in (
            ("activations_no_recompute_no_sp_gib", False, ()),
            ("activations_selective_sp_gib", True, ("core",)),
        ):
            if name in measured:
                found.append(_memory(row, name, measured[name], kept(sp, recomputed) / GIB))
    for name, percent in (measured.get("act_pct_of_tp_baseline") or {}).items():
        sp, recomputed = {
            "sp": (True, ()),
            "selective": (False, ("core",)),
            "sp_and_selective": (True, ("core",)),
            "full_recompute": (False, BLOCK),
        }[name]
        found.append(_memory(row, name, percent, 100.0 * kept(sp, recomputed) / kept(False, ()), "%"))
    if not found:
        raise Unpredictable("it measures no memory that is known here")
    return found


# -- choosing ---------------------------------------------------------------------------------------------------------


def choices(times: Sequence[Prediction], groups: Sequence[Mapping[str, Any]]) -> list[GroupChoice]:
    """For every group with at least two predicted plans. Plans are compared by GPU seconds a sample."""
    by_id = {p.id: p.gpu_s_per_sample for p in times}
    found: list[GroupChoice] = []
    for group in groups:
        costs = [by_id[name] for name in group["rows"] if name in by_id]
        if len(costs) > 1:
            best, chosen = min(m for m, _ in costs), min(costs, key=lambda cost: cost[1])[0]
            found.append(GroupChoice(group["name"], len(costs), _spearman(costs), chosen / best - 1.0))
    return found


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """0 where one side has the same cost for all: it tells no plan from another."""
    ranks = [[sorted(values).index(value) for value in values] for values in zip(*pairs, strict=True)]
    return statistics.correlation(*ranks) if all(any(side) for side in ranks) else 0.0


# -- summaries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Of absolute errors, as fractions; ``bias`` is the mean of the signed ones."""

    rows: int
    mean: float
    median: float
    p95: float
    worst: float
    bias: float


def summarise(predictions: Sequence[Prediction]) -> Summary:
    return summary_of([p.error for p in predictions])


def summary_of(signed: Sequence[float]) -> Summary:
    errors = sorted(map(abs, signed))
    at = 0.95 * (len(errors) - 1)
    low = int(at)
    p95 = errors[low] + (at - low) * (errors[min(low + 1, len(errors) - 1)] - errors[low])
    mean, median = statistics.mean(errors), statistics.median(errors)
    return Summary(len(errors), mean, median, p95, errors[-1], statistics.mean(signed))


def left_out(way: Way) -> Summary:
    """Of the published rows, with their source left out of the fit, as it was fitted when error bars were made."""
    return summary_of([residual.error for residual in published_residuals() if residual.way is way])


def by_source(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        found.setdefault(prediction.source, []).append(prediction)
    return found


def source_means(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """Mean absolute error and 95th percentile, each averaged over the sources."""
    summaries = [summarise(of) for of in by_source(predictions).values()]
    return statistics.mean(s.mean for s in summaries), statistics.mean(s.p95 for s in summaries)


def to_json(report: ValidationReport) -> dict[str, Any]:
    """What ``cinemesh validate --json`` prints."""
    shown = report.headline or report.times

    def row(p: Prediction) -> dict[str, Any]:
        keys = ("id", "kind", "trust", "assumed", "attention", "unit", "measured", "predicted")
        bar = {"low": p.bar.low, "high": p.bar.high} if p.bar else None
        return {**{key: getattr(p, key) for key in keys}, "error": p.error, "error_bar": bar}

    overall = summarise(shown) if shown else None
    return {
        "source_and_software_left_out": left_out(Way.UNDESCRIBED).__dict__,
        "source_left_out": left_out(Way.HELD_OUT).__dict__,
        "software_left_out": summarise(report.undescribed).__dict__ if report.undescribed else None,
        "held_by_bars_without_their_source": {
            way.value: covered(way) for way in (Way.UNDESCRIBED, Way.GAP, Way.HELD_OUT)
        },
        "mean_abs_error": overall and overall.mean,
        "p95_abs_error": overall and overall.p95,
        "predicted": len(shown),
        "mean_abs_error_by_source": source_means(shown)[0] if shown else None,
        "p95_abs_error_by_source": source_means(shown)[1] if shown else None,
        "sources": {name: summarise(of).__dict__ for name, of in by_source(report.times).items()},
        "rows": [row(p) for p in report.times],
        "memory": [row(p) for p in report.memory],
        "out_of_memory": [v.__dict__ for v in report.verdicts],
        "groups": [c.__dict__ for c in report.choices],
        "skipped": [{"id": name, "why": why} for name, why in report.skipped],
        "own": [_own(p) for p in report.own],
    }


def _own(p: OwnPrediction) -> dict[str, Any]:
    times, hardware, (low_s, high_s) = p.row.measured, p.row.hardware, p.span
    return {
        "id": p.row.id,
        "plan": p.plan.to_dict(),
        "latent": p.row.shape.latent,
        "global_batch": p.row.shape.global_batch,
        "gpu": hardware.gpu,
        "gpus": hardware.gpus,
        "cluster": p.cluster,
        "steps": times.steps,
        "measured_s": times.iter_time_s,
        "measured_s_low": times.iter_time_low_s,
        "measured_s_high": times.iter_time_high_s,
        "predicted_s": p.predicted_s,
        "predicted_s_low": low_s,
        "predicted_s_high": high_s,
        "ratio": p.ratio,
        "within": p.within,
        "error_bar": p.bar.__dict__,
    }
