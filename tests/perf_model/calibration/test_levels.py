"""Levels of a profile's laws: a machine that is so much slower than a cluster file says is found to be it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.commands.profile_samples import samples_of
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.calibration import levels
from cinemesh.perf_model.calibration.levels import MachineProfile, ProfileSample, leveled, read_profile, write_leveled
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.played import play_program, play_step
from cinemesh.perf_model.report.trace import predicted

SLOWER = {"matmul": 3.0, "attention": 0.5, "stream": 7.0, "collectives": 2.0}
BATCH = BatchShape(2, (2, 16, 16))


def profile_on(cluster: Cluster, plan: str, slower: dict[str, float]) -> MachineProfile:
    """What would be measured on a machine whose parts are so many times as slow as the cluster's prices."""
    program = prepare(build_step(preset("tiny-video"), Plan.parse(plan), BATCH), backend=cluster.backend)
    spans = predicted(play_program(program, BATCH, cluster))
    shapes = samples_of(program, [[spans]], local=2)
    blank = MachineProfile(about="a test", date="2026-11-30", device=cluster.device, cluster=cluster.name,
                           dtype=Plan.parse(plan).compute_dtype, samples=tuple(shapes))  # fmt: skip
    on = levels._prepared(cluster)
    priced = [replace(sample, seconds=said * slower[sample.part]) for sample, said in levels._priced(on, blank)]
    others = [sample for sample in shapes if sample.part not in {one.part for one in priced}]
    return replace(blank, samples=(*priced, *others))


@pytest.fixture(scope="module")
def measured() -> MachineProfile:
    return profile_on(load("local-cpu"), "dp_shard=2,dtype=float32", SLOWER)


def test_every_law_takes_its_factor(measured: MachineProfile) -> None:
    """One factor that went to another law, or was turned over, would leave an error."""
    made = leveled(load("local-cpu"), measured)
    assert {part for part, _ in levels.factors(made, measured)} == {*SLOWER}
    assert all(factor == pytest.approx(1.0) for factor in levels.factors(made, measured).values())
    base = load("local-cpu")
    assert made.matmul.floor_s == pytest.approx(3.0 * base.matmul.floor_s)
    assert made.attention["sdpa"].forward.speed["64"] == pytest.approx(2.0 * base.attention["sdpa"].forward.speed["64"])


def test_the_file_says_the_same_and_where_it_is_from(measured: MachineProfile, tmp_path: Path) -> None:
    """As read back; what no record shows keeps its value and its origin. A base that is a file serves as well."""
    measured.write(tmp_path / "profile.json")
    made, errors = write_leveled(tmp_path / "profile.json", None, tmp_path / "here.yaml")
    assert all(after < 1e-3 < before for before, after in errors.values()) and {*errors} == {*SLOWER}
    assert (
        made.facts["matmul.floor_s"].origin == "fitted" and "profile on a test" in made.facts["matmul.floor_s"].source
    )
    assert made.facts["topology.servers"].origin == "placeholder" and made.name == "here"
    assert made.matmul.efficiency["float64"] == load("local-cpu").matmul.efficiency["float64"]
    again, none = write_leveled(tmp_path / "profile.json", str(tmp_path / "here.yaml"), tmp_path / "again.yaml")
    assert all(after <= before + 1e-3 < 2e-3 for before, after in none.values())
    assert again.measured is not None and made.measured is not None
    assert again.measured.floor_s == pytest.approx(dict(made.measured.floor_s), rel=1e-3)


def test_another_plan_is_then_predicted_as_it_would_run(measured: MachineProfile) -> None:
    """Of the machine of which dp_shard=2 was profiled, tp=2 with recompute: other shapes of the same laws."""
    base, made = load("local-cpu"), leveled(load("local-cpu"), measured)
    other = profile_on(base, "tp=2,recompute=full,dtype=float32", SLOWER)
    before, after = (
        levels._errors(levels._prepared(base), other),
        levels._errors(made, other),
    )
    assert all(after[part] < 0.4 * before[part] for part in ("matmul", "attention", "stream")), (before, after)
    plan = Plan.parse("tp=2,recompute=full,dtype=float32")
    steps = [play_step(preset("tiny-video"), plan, BATCH, cluster).step_s for cluster in (base, made)]
    assert steps[1] > 1.5 * steps[0]


def test_on_gpus_products_attention_and_links_follow(tmp_path: Path) -> None:
    """Fused and plain kernels of the other ops move other bytes: these stay. Links by the law of timed collectives."""
    base = load("grand-teton-h100")
    found = profile_on(base, "tp=2,cp=2,dp_shard=4,dtype=bf16", dict.fromkeys(SLOWER, 1.25))
    assert {sample.part for sample in found.samples} == {*SLOWER} and found.dtype == "bfloat16"
    made = leveled(base, found)
    factors = levels.factors(made, found)
    assert {part for part, _ in factors} == {"matmul", "attention"}
    assert all(factor == pytest.approx(1.0, abs=0.02) for factor in factors.values())
    assert made.stream == base.stream and made.topology != base.topology
    found.write(tmp_path / "gpus.json")
    write_leveled(tmp_path / "gpus.json", "grand-teton-h100", tmp_path / "ours.yaml")
    with pytest.raises(CinemeshError, match="is of cuda, and local-cpu of cpu"):
        write_leveled(tmp_path / "gpus.json", "local-cpu", tmp_path / "not.yaml")
    assert not (tmp_path / "not.yaml").exists()


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("part", "matmuls", "part is 'matmuls'"),
        ("key", [1, 2], "5 sizes are a matmul's"),
        ("seconds", -1.0, "seconds"),
        ("count", 0, "count"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(
    field: str, value: Any, match: str, measured: MachineProfile, tmp_path: Path
) -> None:
    """A key too short for its law would fail in its price, far from the file."""
    path = tmp_path / "profile.json"
    matmul = next(sample for sample in measured.samples if sample.part == "matmul")
    replace(measured, samples=(matmul,)).write(path)
    assert read_profile(path).samples == (matmul,)
    values = json.loads(path.read_text())
    values["samples"][0][field] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CinemeshError, match=match):
        read_profile(path)
    path.write_text(json.dumps(values | {"samples": []}))
    with pytest.raises(CinemeshError, match="no samples"):
        read_profile(path)


@pytest.mark.parametrize(
    ("part", "name", "key", "said"),
    [
        ("attention", "sideways", (1, 1, 1, 1, 1), "forward, backward"),
        ("stream", "layer_norms", (64,), "did you mean 'layer_norm'"),
        ("collectives", "gather", (64, 2, 1), "all_gather"),
    ],
)
def test_a_name_that_no_law_has_is_refused(part: str, name: str, key: tuple[int, ...], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        ProfileSample(part=part, name=name, key=key, seconds=1.0, count=1)


def test_a_file_that_could_not_be_read_back_is_not_written(measured: MachineProfile, tmp_path: Path) -> None:
    """A source without a date: the text is whole, and every command would refuse it."""
    replace(measured, date="").write(tmp_path / "profile.json")
    with pytest.raises(CinemeshError, match="source"):
        write_leveled(tmp_path / "profile.json", None, tmp_path / "here.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
