"""Published rows: the committed constants reproduce the stated errors, and planted faults show."""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.perf_model.calibration import fit
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.compute import Compute
from cinemesh.perf_model.prices.network import Network
from cinemesh.perf_model.published import rows, validate
from cinemesh.perf_model.published.peer_memory import activation_bytes, kept
from cinemesh.perf_model.published.peer_step import Schedule, layer_s, step_s
from cinemesh.perf_model.published.peers import Run
from cinemesh.perf_model.published.rows import BLOCK, Unpredictable, case_of
from cinemesh.perf_model.search.planner import NEAR

MEAN, P95, SOURCE_MEAN = 0.045, 0.11, 0.038  # reached: 0.042, 0.105, 0.035
PUBLISHED = {row["id"]: row for row in rows.read(validate.ROWS)}


@pytest.fixture(scope="module")
def report() -> validate.ValidationReport:
    return validate.validate()


def changed_row(name: str, **parts: dict) -> dict:
    """A published row with some values of its parts replaced."""
    row = json.loads(json.dumps(PUBLISHED[name]))
    for part, values in parts.items():
        row[part].update(values)
    return row


def prices(cluster: Cluster) -> tuple[Compute, Network, Cluster]:
    return Compute(cluster), Network(cluster), cluster


# -- the errors that the project states -------------------------------------------------------------------------------


def test_headline_errors_are_those_reached(report: validate.ValidationReport) -> None:
    """Only this sees a constant, a price or a stack that drifts from what was fitted and reported."""
    summary = validate.summarise(report.headline)
    by_source, _ = validate.source_means(report.headline)
    assert summary.rows == 130
    assert summary.mean < MEAN
    assert summary.p95 < P95
    assert by_source < SOURCE_MEAN


def test_attention_with_context_parallelism(report: validate.ValidationReport) -> None:
    """Rings, gathers and all-to-alls of keys and values: priced wrongly, these rows move and steps hardly do."""
    alone = [p for p in report.times if p.kind == "attention_layer"]
    assert len(alone) >= 20
    assert validate.summarise(alone).mean < 0.055


def test_memory_and_out_of_memory(report: validate.ValidationReport) -> None:
    """Kept activations, states and logits against allocator readings; verdicts against runs that died."""
    assert validate.summarise(report.memory).mean < 0.055
    assert report.right_verdicts() >= 0.9


def test_runs_that_lived_are_predicted_to_fit() -> None:
    """A memory model that cries out at everything would pass the verdicts; this is its other side."""
    lived = dead = 0
    for row in PUBLISHED.values():
        if row["kind"] == "training_step":
            try:
                fits = validate.fits(rows.run_of(row), rows.cluster_of(row))
            except Unpredictable:
                continue
            lived, dead = lived + fits, dead + (not fits)
    assert lived / (lived + dead) > 0.94


def test_choosing_among_plans(report: validate.ValidationReport) -> None:
    """The order of plans of one job, which levels alone cannot show."""
    assert sum(c.spearman for c in report.choices) / len(report.choices) > 0.9
    assert sum(c.regret for c in report.choices) / len(report.choices) < 0.01


@pytest.mark.parametrize(
    ("costs", "spearman", "regret"),
    [
        ([(1.0, 5.0), (2.0, 6.0), (3.0, 9.0)], 1.0, 0.0),
        ([(1.0, 9.0), (2.0, 6.0), (3.0, 5.0)], -1.0, 2.0),
        ([(1.0, 5.0), (1.0, 6.0)], 0.0, 0.0),
        ([(2.0, 5.0), (3.0, 5.0)], 0.0, 0.0),
    ],
)
def test_the_order_of_a_group(costs: list[tuple[float, float]], spearman: float, regret: float) -> None:
    """A group whose plans all cost the same, by measurement or by prediction, has no order: no division by zero."""
    times = [validate.Prediction(str(i), "layer", "s", "a", "s", 1.0, 1.0, cost) for i, cost in enumerate(costs)]
    (found,) = validate.choices(times, [{"name": "g", "rows": [time.id for time in times]}])
    assert (found.plans, found.spearman, found.regret) == (len(costs), pytest.approx(spearman), pytest.approx(regret))


def one_nic(cluster: Cluster) -> Cluster:
    return cluster.with_(**{"topology.nics_per_server": 1})


def slow_attention(cluster: Cluster) -> Cluster:
    """As if attention had twice the FLOPs."""
    changes = {
        f"attention.{family}.{direction}.speed.{dim}": speed / 2
        for family, kernels in cluster.attention.items()
        for direction in ("forward", "backward")
        for dim, speed in getattr(kernels, direction).speed.items()
    }
    return cluster.with_(**changes)


def short_clock(cluster: Cluster) -> Cluster:
    return cluster.with_(**{"gpu.sustained.bfloat16": cluster.gpu.sustained["bfloat16"] * 0.9})


@pytest.mark.parametrize(("fault", "least"), [(one_nic, 0.03), (slow_attention, 0.05), (short_clock, 0.02)])
def test_planted_faults_show(report: validate.ValidationReport, fault: validate.RowChange, least: float) -> None:
    """The rows must be able to tell a wrong NIC count, attention work or clock from the right one."""
    faulty = validate.validate(change=fault)
    assert validate.summarise(faulty.headline).mean > validate.summarise(report.headline).mean + least


# -- single effects ---------------------------------------------------------------------------------------------------


def test_effects_of_korthikanti_table_4() -> None:
    """Sequence parallelism saves time, selective recompute costs a little, full recompute costs one forward."""
    times = {}
    for short in ("baseline-no-recompute", "sequence-parallelism", "selective-recompute", "full-layer-recompute"):
        case = case_of(PUBLISHED[f"korth22-t4-22b-{short}"])
        times[short] = layer_s(case.run, *prices(case.cluster))
    forward, backward = times["baseline-no-recompute"]
    assert sum(times["sequence-parallelism"]) < forward + backward
    assert 0.4e-3 < times["selective-recompute"][1] - backward < 2.5e-3
    assert times["full-layer-recompute"][1] - backward == pytest.approx(forward, rel=0.02)


def test_steady_blocks_give_the_whole_step() -> None:
    """The extrapolation from few blocks and micro-batches equals playing all of them."""
    row = changed_row("mosaic-h10080gb-7b-s2048-512g", model={"layers": 12}, plan={"gbs": 5 * 3072})
    case = case_of(row)
    compute, network, cluster = prices(case.cluster)
    assert case.run.micro_batches == 5
    whole = Schedule(case.run, compute, network, cluster, 12).play(5)
    assert step_s(case.run, compute, network, cluster) == pytest.approx(whole, rel=0.005)


def test_early_stop_leaves_the_last_product_out() -> None:
    """What a non-reentrant checkpoint skips: one product of the block, two thirds of the recompute in a GPT block."""
    case = case_of(PUBLISHED["mosaic-h10080gb-30b-s2048-512g"])
    assert "ffn_out" not in case.run.recomputed
    whole = replace(case.run, recomputed=frozenset(BLOCK))
    none = replace(case.run, recomputed=frozenset(), recomputed_share=0.0)
    early, full, plain = (layer_s(run, *prices(case.cluster))[1] for run in (case.run, whole, none))
    assert 0.6 < (early - plain) / (full - plain) < 0.75


def test_kept_activations_are_the_formula_of_the_paper() -> None:
    """Korthikanti et al. 2022, table 2: sbh (34 + 5 a s / h) / t with sp; sbh (10 + 24 / t + 5 a s / (h t)) without."""
    run: Run = case_of(PUBLISHED["korth22-t4-22b-sequence-parallelism"]).run
    m, tp = run.model, run.tp
    sbh = m.seq * run.samples * m.width
    scores = 5 * m.heads * m.seq / m.width
    assert sum(kept(run).values()) == pytest.approx(sbh * (34 + scores) / tp)
    plain = replace(run, sp=False)
    assert sum(kept(plain).values()) == pytest.approx(sbh * (10 + 24 / tp + scores / tp))
    full = replace(run, recomputed=frozenset(BLOCK), recomputed_share=1.0)
    assert activation_bytes(full) == pytest.approx(m.layers * 2 * sbh / tp)


def test_a_contiguous_causal_ring_waits_for_its_last_rank() -> None:
    """Without zigzag the last rank computes whole blocks at every step: nearly twice the time."""
    plain = case_of(PUBLISHED["ringflash-h800-batch-ring_p2p"])
    striped = case_of(PUBLISHED["ringflash-h800-batch-stripe_ring_p2p"])
    predictor = validate.Predictor()
    assert 1.5 < predictor.seconds(plain) / predictor.seconds(striped) < 2.0


@pytest.mark.parametrize(
    ("text", "nics", "gigabits"),
    [
        ("8x400Gb/s IB per node (DGX H100 reference)", 8, 400.0),
        ("4x200 Gb/s HDR IB per node (800 Gb/s per node)", 4, 200.0),
        ("400 Gb/s per node", 2, 200.0),
        ("1600 Gb/s RoCE per node", 8, 200.0),
        ("400Gb/s RDMA per GPU (Meta Grand Teton)", 8, 400.0),
        ("200 Gb/s HDR IB (count per node from memory: 8 NICs)", 8, 200.0),
        ("2 Tb/s RoCE per node", 10, 200.0),
        ("not stated", 0, 0.0),
    ],
)
def test_network_of_a_row(text: str, nics: int, gigabits: float) -> None:
    """NICs a server: the one number that separated the best of the older models from the rest."""
    assert rows.network_of({"inter": text, "gpus_per_node": 8, "gpu": "A100"}) == (nics, gigabits)


# -- fitting ----------------------------------------------------------------------------------------------------------


def test_fit_finds_planted_constants() -> None:
    """Rows measured on an imagined slower clock give that clock back."""
    names = ("titan2412-8b-8g-compile", "titan2412-8b-128g-fp8", "torchao-8b-8g-bf16")
    constants = fit.KINDS["H100 500 W"]
    planted = {fit.BF16.name: 0.60, fit.FP8.name: 0.66}
    cases = [case_of(PUBLISHED[name]) for name in names]
    slow = [
        replace(case, measured=p.predicted)
        for case, p in zip(cases, fit.PricedRows(constants).of(cases, planted), strict=True)
    ]
    found, least = fit.fit(slow, fit.PricedRows(constants), fit.standing(cases[0].cluster, constants))
    assert found == pytest.approx(planted, abs=0.01)
    assert least < 0.01


def cut_short(cluster: Cluster, constants: Sequence[fit.Constant]) -> set[tuple[str, str]]:
    """Kind and name of what stands at a bound of the search's own."""
    values = fit.standing(cluster, constants)
    return {(fit.kind_of(cluster), c.name) for c in constants if c.cut_short(values[c.name])}


def test_no_fitted_constant_stands_at_a_bound_of_the_search() -> None:
    """There it would be an error of the model under another name."""
    found: set[tuple[str, str]] = set()
    for name in ("dgx-a100-hdr200", "dgx-h100-ib400", "grand-teton-h100", "h100-hbm2e-500w"):
        cluster = load(name)
        found |= cut_short(cluster, fit.KINDS[fit.kind_of(cluster)])
    assert found == set()


def test_a_fit_that_ends_at_a_bound_is_refused() -> None:
    """Rows of a clock below the range: the least loss within it lies at its end, and would pass for the clock."""
    constants = fit.KINDS["H100 500 W"]
    cases = [case_of(PUBLISHED[name]) for name in ("titan2412-8b-8g-compile", "torchao-8b-8g-bf16")]
    planted = {fit.BF16.name: 0.5, fit.FP8.name: 0.66}
    slow = [
        replace(case, measured=p.predicted)
        for case, p in zip(cases, fit.PricedRows(constants).of(cases, planted), strict=True)
    ]
    with pytest.raises(CinemeshError, match=r"sustained clock, bf16 is 0\.55, an end of its range 0\.55 to 1"):
        fit.refit(slow)
    fit.refuse_cut_short("H100 500 W", constants, {fit.BF16.name: 1.0, fit.FP8.name: 0.66})  # a bound of the chip's own


@pytest.mark.parametrize("constant", {c.name: c for kind in fit.KINDS.values() for c in kind}.values())
def test_a_constant_at_its_bound_is_seen(constant: fit.Constant) -> None:
    """At either bound and beyond it, unless the bound is physical; within them never."""
    cluster = load("dgx-h100-ib400")
    for value, physical in ((constant.low, constant.physical_low), (constant.high, constant.physical_high)):
        moved = cluster.with_(**dict.fromkeys(constant.paths, value))
        assert bool(cut_short(moved, [constant])) == (not physical)
    inside = 0.5 * (constant.low + constant.high)
    assert not cut_short(cluster.with_(**dict.fromkeys(constant.paths, inside)), [constant])


# -- rows that cannot be predicted, files that hold nonsense ----------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"plan": {"pp": 4}}, "pipeline"),
        ({"plan": {"mbs": None}}, "micro-batch is not stated"),
        ({"plan": {"recompute": None}}, "recomputed is not stated"),
        ({"hardware": {"gpu": "B200"}}, "no cluster file for B200"),
        ({"model": {"hidden": None}}, "dimensions"),
        ({"plan": {"cp": 2, "cp_method": None}}, "context parallelism"),
    ],
)
def test_a_row_that_says_too_little_is_left_out_with_the_reason(parts: dict, why: str) -> None:
    with pytest.raises(Unpredictable, match=why):
        case_of(changed_row("titan2412-8b-8g-compile", **parts))


GOOD = PUBLISHED["titan2412-8b-8g-compile"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("just words", "no list of rows"),
        ("- {id: a, kind: step}", "kind is 'step'; choose one of training_step"),
        ("[1, 2]", "row 1 holds no mapping but 1; give it id, kind"),
        ("{", "is not valid YAML"),
        (yaml.safe_dump([GOOD, GOOD]), "an id of its own"),
        (
            yaml.safe_dump([{**GOOD, "hardware": {**GOOD["hardware"], "gpus": -8}}]),
            "hardware.gpus is -8; it must be 1 to",
        ),
        (yaml.safe_dump([{**GOOD, "measured": {"iter_time_s": 0}}]), "iter_time_s is 0; it must be above 0"),
        (yaml.safe_dump([{k: v for k, v in GOOD.items() if k != "plan"}]), "has no plan; add it"),
        (yaml.safe_dump([{**GOOD, "plan": {**GOOD["plan"], "ttp": 2}}]), "unknown key 'ttp'; did you mean 'tp'"),
        (yaml.safe_dump([{**GOOD, "notees": "x"}]), "unknown key 'notees'; did you mean 'notes'"),
        (
            yaml.safe_dump([{**GOOD, "model": {**GOOD["model"], "causal": "on"}}]),
            "model.causal is 'on'; it must be true",
        ),
        ("- {id: a, id: b, kind: layer}", "key 'id' is given twice"),
        (
            yaml.safe_dump([{**GOOD, "source": {**GOOD["source"], "date": "2024-02-30"}}]),
            "source.date is '2024-02-30'; it must be a day, as 2024-06-13",
        ),
    ],
)
def test_nonsense_is_refused_in_one_message(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(content)
    with pytest.raises(CinemeshError, match=told) as error:
        validate.validate([path])
    assert "\n" not in str(error.value)


def test_command_prints_json(tmp_path: Path) -> None:
    """The keys that a script reads, for a file of somebody else's rows."""
    unknown = {**GOOD, "id": "other", "source": {"title": "A blog", "date": GOOD["source"]["date"]}}
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump([GOOD, unknown]))
    shown = CliRunner().invoke(app, ["validate", str(path), "--json"])
    values = json.loads(shown.stdout)
    assert [(row["id"], row["assumed"]) for row in values["rows"]] == [(GOOD["id"], False), ("other", True)]
    assert values["mean_abs_error"] == pytest.approx(abs(values["rows"][0]["error"]))
    assert set(values["rows"][0]) >= {"id", "measured", "predicted", "error"}
    # What is not described is predicted as what is described would be with that left out, and has a bar.
    assert values["software_left_out"]["bias"] == values["rows"][1]["error"] != values["rows"][0]["error"]
    assert values["rows"][0]["error_bar"] is None
    assert values["rows"][1]["error_bar"]["low"] < 0 < values["rows"][1]["error_bar"]["high"]
    assert values["source_and_software_left_out"]["mean"] > values["source_left_out"]["mean"]


def test_command_prints_tables() -> None:
    shown = CliRunner().invoke(app, ["validate", "--rows"])
    assert shown.exit_code == 0
    headline = "trust A, averaged a source first: mean"
    for text in (
        "error bars made without a source hold",
        "its software too",
        "korth22-t4-22b-baseline-no-recompute",
        "not predicted",
        "Spearman",
        headline,
    ):
        assert text in shown.stdout


def test_what_the_planner_calls_a_near_tie_is_what_published_plans_show() -> None:
    """Pairs of plans of one job: further apart than ``NEAR`` by prediction, they ran in that order; closer, less so."""
    report, groups = validate.validate(), yaml.safe_load(validate.GROUPS.read_text())
    costs = {p.id: p.gpu_s_per_sample for p in report.times}
    apart: list[bool] = []
    close: list[bool] = []
    for group in groups:
        known = [costs[name] for name in group["rows"] if name in costs]
        for (measured, predicted), (other_measured, other_predicted) in itertools.combinations(known, 2):
            difference = abs(predicted / other_predicted - 1.0)
            right = (predicted < other_predicted) == (measured < other_measured)
            (apart if difference > NEAR else close).append(right)
    assert len(apart) > 100
    assert statistics.mean(apart) >= 0.95
    assert statistics.mean(close) < statistics.mean(apart)
