"""Calibration: a machine that follows the laws is found again from its times, and its file says what was measured."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands.measure_compute import CASES, measure_compute
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.calibration.calibrate import (
    PARTS,
    Machine,
    TimedSamples,
    fit,
    line,
    price_of,
    residuals,
    write,
)
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.clusters.schema import Measured
from cinemesh.perf_model.prices.compute import Compute

MACHINE = Machine("found", "2 processes on 1 core", "2026-01-02", 2, 2, 1 << 30)
TRUTH = load("local-cpu").with_(
    **{
        "gpu.peak_flops": {"float32": 50e9},
        "gpu.sustained": {"float32": 1.0},
        "matmul.efficiency": {"float32": 0.9},
        "matmul.floor_s": 4e-6,
        "attention.sdpa.forward.speed": {"32": 12e9, "64": 20e9},
        "attention.sdpa.backward.speed": {"32": 7e9, "64": 9e9},
        "topology.gpus_per_server": 2,
        "topology.servers": 2,
        "topology.nic_bytes_per_s": 40e6,
        "topology.nic_latency_s": 300e-6,
        "measured": Measured(floor_s={"copy": 2e-6, "swiglu": 9e-6}, bytes_per_s={"copy": 8e9, "swiglu": 2e9}),
    }
)


def times_of(cluster: Cluster) -> TimedSamples:
    """What would be measured on a machine that the cluster's prices hold for."""
    samples, price = TimedSamples(), price_of(cluster)
    shapes = {
        "matmul": {"float32": [(1, m, n, 256, 0) for m, n in itertools.product((2, 64, 512), repeat=2)]},
        "attention": {
            direction: [(b, t, s, 4, k) for b, t, s, k in itertools.product((1, 4), (64, 512), (32, 512), (32, 64))]
            for direction in ("forward", "backward")
        },
        "stream": {kind: [(size,) for size in (10**3, 10**5, 10**7)] for kind in ("copy", "swiglu")},
        "collectives": {
            kind: [(1 << power, *group) for power in (12, 16, 20, 22) for group in ((2, 1), (2, 2), (4, 2))]
            for kind in ("all_gather", "reduce_scatter", "all_reduce")
        },
    }
    for part, kinds in shapes.items():
        for name, keys in kinds.items():
            for key in keys:
                samples.add(part, name, key, price(part, name, key))
                if part == "collectives":
                    samples.add("copying", name, key, price(part, name, key) * 0.4)
    return samples


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Fitted, written and read back."""
    return write(fit(times_of(TRUTH), MACHINE), MACHINE, tmp_path_factory.mktemp("cluster") / "found.yaml")


def test_a_machine_that_follows_the_laws_is_found_again(found: Cluster) -> None:
    left = residuals(times_of(TRUTH), found)
    assert set(left) == {
        *("matmul float32", "attention forward", "attention backward", "stream"),
        *("collectives all_gather", "collectives reduce_scatter", "collectives all_reduce"),
    }
    assert max(left.values()) < 0.06, left
    assert found.topology.nic_bytes_per_s == pytest.approx(40e6, rel=0.05)
    assert found.gloo is not None and found.gloo.core_fraction == pytest.approx(0.4)


def test_a_shape_that_was_not_measured_is_priced_too(found: Cluster) -> None:
    """Sizes between and beyond the samples: only the law can know them."""
    for part, name, key in (
        ("matmul", "float32", (1, 200, 300, 500, 0)),
        ("attention", "backward", (2, 256, 256, 8, 64)),
        ("stream", "swiglu", (3 * 10**7,)),
        ("collectives", "all_gather", (1 << 24, 4, 2)),
    ):
        assert price_of(found)(part, name, key) == pytest.approx(price_of(TRUTH)(part, name, key), rel=0.1), name


def test_the_file_says_what_was_measured_and_what_was_not(found: Cluster) -> None:
    facts = found.facts
    assert facts["topology.nic_bytes_per_s"].origin == "measured"
    assert facts["gloo.message_s"].origin == facts["matmul.efficiency"].origin == "fitted"
    assert facts["matmul.efficiency"].date == MACHINE.date and MACHINE.about in facts["matmul.efficiency"].source
    assert facts["spread.step_fraction"].origin == "placeholder"


def test_a_machine_twice_as_slow_gets_prices_twice_as_high() -> None:
    """Also catches a constant that the fit starts from and never moves."""
    slow = times_of(TRUTH).scaled(2.0)
    left = residuals(slow, fit(slow, MACHINE))
    assert max(left.values()) < 0.06, left


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(10.0, 3.0), (30.0, 5.0)], (2.0, 0.1)),
        ([(10.0, 1.0), (20.0, 2.1)], (0.0, 0.1024)),  # the least errors would start below zero
        ([(10.0, 3.0), (20.0, 3.0)], (3.0, 0.0)),
        ([(10.0, 4.0), (20.0, 2.0)], (2.4, 0.0)),  # a falling line
        ([(10.0, 4.0)], (4.0, 0.0)),
    ],
)
def test_line(points: list[tuple[float, float]], expected: tuple[float, float]) -> None:
    assert line(points) == pytest.approx(expected, rel=1e-3)


def test_a_step_yields_a_time_for_every_op() -> None:
    samples, level = measure_compute(CASES[0], repetitions=1)
    assert level > 0
    assert {"adamw", "swiglu", "modulate_norm_backward", "draw_noise"} <= set(samples.stream)
    assert set(samples.attention) == {"forward", "backward"}
    heads = CASES[0].config.heads
    assert {key[3] for key in samples.attention["forward"]} == {heads}
    assert all(seconds > 0 for part in PARTS for _, _, seconds in samples.rows(part))


def test_a_file_that_no_command_would_read_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"a cluster file ends in \.yaml"):
        app(["calibrate", "--out", str(tmp_path / "local.json")], standalone_mode=False)


def test_a_measured_op_is_priced_by_its_own_time() -> None:
    """And only it."""
    program = build_step(preset("tiny"), Plan(tp=2, dtype="float32"), BatchShape(1, (4, 8, 8)))
    measured, plain = Compute(TRUTH), Compute(replace(TRUTH, measured=None))
    for op in program.ops:
        if op.kind in ("swiglu", "modulate_norm"):
            seconds = 9e-6 + program.bytes_moved(op) / 2e9 if op.kind == "swiglu" else plain.op_s(program, op)
            assert measured.op_s(program, op) == pytest.approx(seconds)
    assert {"swiglu", "modulate_norm"} <= {op.kind for op in program.ops}
