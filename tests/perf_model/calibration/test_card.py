"""A cluster file from a card's benchmark: what was measured is what is predicted afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.kernels import tuning
from cinemesh.kernels.rates import dense_bf16_flops
from cinemesh.kernels.selection import select
from cinemesh.launch.cli import app
from cinemesh.perf_model.calibration.card import DIRECTIONS, SIDE, write
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.compute import AttentionCall, Compute

BASE = "grand-teton-h100"
SLOWER = (("triton", "triton", 1.2), ("torch", "torch", 3.0), ("flash-attn-3", "fa3", 1.1))  # package, family, times
CALL = {"b": 1, "t": 36864, "s": 73728, "h": 12, "k": 128, "c": 2}  # as a program labels it


def benchmark(folder: Path, **changes: Any) -> Path:
    """What kernels_gpu.py writes, of a card whose products reach 700 TFLOP/s; attention is as SLOWER says."""
    compute = Compute(load(BASE), clock="isolated")
    shape: dict[str, Any] = {
        "batch": 1,
        "queries": CALL["t"],
        "keys": CALL["s"],
        "heads": CALL["h"],
        "head_dim": CALL["k"],
    }
    call = AttentionCall(direction="forward", dtype="bfloat16", **shape)
    rows = [
        {
            "op": op,
            "package": package,
            "sizes": CALL,
            "flops": 10**15,
            "seconds": slower * compute.attention_s(replace(call, direction=direction), family),
        }
        for op, direction in DIRECTIONS.items()
        for package, family, slower in SLOWER
    ]
    values = {
        "device": "a card",
        "date": "2026-11-23",
        "copy_bytes_per_s": 2.7e12,
        "matmul_flops_per_s": 700e12,
        "kernels": rows,
    } | changes
    path = folder / "kernels.json"
    path.write_text(json.dumps(values))
    return path


def test_what_was_measured_is_what_is_predicted(tmp_path: Path) -> None:
    made = write(benchmark(tmp_path), BASE, tmp_path / "mine.yaml")
    before, after = Compute(load(BASE), clock="isolated"), Compute(made, clock="isolated")
    # The law adds a prologue and a floor of microseconds that do not scale: a percent of milliseconds.
    assert 2.0 * SIDE**3 / after.matmul_s(SIDE, SIDE, SIDE, "bfloat16") == pytest.approx(700e12, rel=0.02)
    shape: dict[str, Any] = {"batch": 1, "queries": 36864, "keys": 73728, "heads": 12, "head_dim": 128}
    for direction in DIRECTIONS.values():
        call = AttentionCall(direction=direction, dtype="bfloat16", **shape)
        for _, family, slower in SLOWER:  # each kernel by its own time
            assert after.attention_s(call, family) == pytest.approx(slower * before.attention_s(call, family), rel=0.02)
        assert after.attention_s(call, "cudnn") == before.attention_s(call, "cudnn")  # not timed
    assert after.stream_s(1e12) == pytest.approx(1e12 / 2.7e12, rel=1e-3)
    assert made.topology == load(BASE).topology
    assert made.software.packages == ("flash-attn-3",)  # it was there
    assert after.kernel("attention").package == "flash-attn-3" != before.kernel("attention").package
    assert made.facts["stream.fraction"].origin == "measured"


def test_what_was_measured_is_what_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the card to the cluster file and the registry's table, and from there to what is run and what is priced.

    A card on which torch's attention is the fastest forward and ours backward; the shipped rates choose cuDNN. Rows of
    a shorter call and of a wrong kernel would say otherwise. Only this sees a table that nobody reads, or that says
    seconds where shares are meant.
    """
    flops, peak = 4 * CALL["t"] * CALL["s"] * CALL["h"] * CALL["k"], dense_bf16_flops("sm_90")
    tflops = {
        "attention": {"cudnn": 500, "torch": 650, "triton": 450},
        "attention_backward": {"cudnn": 300, "torch": 310, "triton": 420},
    }
    rows = [
        {"op": op, "package": package, "sizes": CALL, "flops": flops * times, "seconds": flops * times / (1e12 * rate)}
        for (op, rates), times in zip(tflops.items(), (1, 2.5), strict=True)
        for package, rate in rates.items()
    ]
    short = {"op": "attention", "package": "cudnn", "sizes": CALL | {"t": 5}, "flops": 1e9, "seconds": 1e-12}
    wrong = rows[2] | {"seconds": 1e-9, "error": 0.5}
    source = benchmark(tmp_path, device="NVIDIA H100 80GB HBM3", capability=[9, 0], kernels=[*rows, short, wrong])
    chosen = {op: select(op, "sm_90", dtype="bfloat16", sizes=CALL, tuned="h100").entry.package for op in tflops}
    assert chosen == dict.fromkeys(tflops, "cudnn")

    arguments = ["calibrate", "--card", str(source), "--base", BASE, "--out", str(tmp_path / "mine.yaml")]
    app([*arguments, "--table", str(tmp_path / "tuning" / "h100.yaml")], standalone_mode=False)
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tuning")
    tuning.table.cache_clear()
    table = tuning.table("h100")
    assert table.device == "NVIDIA H100 80GB HBM3" and table.origin == "measured on NVIDIA H100 80GB HBM3, 2026-11-23"
    assert table.rates["triton"] == {"forward": round(450e12 / peak, 4), "backward": round(420e12 / peak, 4)}
    chosen = {op: select(op, "sm_90", dtype="bfloat16", sizes=CALL, tuned="h100").entry.package for op in tflops}
    assert chosen == {"attention": "torch", "attention_backward": "triton"}
    priced = Compute(load(str(tmp_path / "mine.yaml")), clock="isolated")
    shape: dict[str, Any] = {"batch": 1, "queries": 36864, "keys": 73728, "heads": 12, "head_dim": 128}
    for (op, package), times in zip(chosen.items(), (1, 2.5), strict=True):
        assert priced.kernel(op, "bfloat16", 128).package == package, "priced is what is chosen"
        call = AttentionCall(direction=DIRECTIONS[op], dtype="bfloat16", **shape)
        wanted = flops * times / (1e12 * tflops[op][package])
        assert priced.attention_s(call, package) == pytest.approx(wanted, rel=0.02)
    tuning.table.cache_clear()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"capability": 9}, "capability is 9; write for example"),
        ({"capability": [9, "0"]}, "capability is '0'; it must be a whole number"),
        ({"copy_bytes_per_s": -1}, "copy_bytes_per_s is -1; it must be above 0"),
        ({"matmul_flops_per_s": "fast"}, "matmul_flops_per_s is 'fast'; it must be a number"),
        ({"matmul_flops_per_s": True}, "matmul_flops_per_s is True; it must be a number"),
        ({"kernels": {}}, "kernels is {}"),
        ({"kernels": [{"op": "attention", "seconds": 1.0}]}, "kernel 1 has no package, sizes, flops"),
        (
            {"kernels": [{"op": "attention", "package": ["torch"], "sizes": CALL, "flops": 1, "seconds": 1}]},
            "package is",
        ),
        ({"speed": 3}, "unknown key 'speed'"),
    ],
)
def test_numbers_that_no_card_has_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CinemeshError, match=says):
        write(benchmark(tmp_path, **changes), BASE, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_that_is_not_the_benchmarks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CinemeshError, match="has no device"):
        write(tmp_path / "other.json", BASE, tmp_path / "mine.yaml")
    with pytest.raises(CinemeshError, match="--table is made of --card"):
        app(["calibrate", "--table", str(tmp_path / "x.yaml")], standalone_mode=False)
    with pytest.raises(CinemeshError, match="no GPU cluster"):
        write(benchmark(tmp_path), "local-cpu", tmp_path / "mine.yaml")


@pytest.mark.parametrize("beside", [True, False], ids=["in the same folder", "in another"])
def test_a_file_of_ones_own_is_a_base(tmp_path: Path, beside: bool) -> None:
    """Only this sees a base named by its path: no file is found under that name, and nothing was written."""
    first = tmp_path / "first.yaml"
    write(benchmark(tmp_path, copy_bytes_per_s=2.5e12), BASE, first)
    second = tmp_path / ("" if beside else "there") / "second.yaml"
    second.parent.mkdir(exist_ok=True)
    made = write(benchmark(tmp_path, copy_bytes_per_s=2e12), str(first), second)
    first.unlink()
    again, shipped = load(str(second)), load(BASE)
    assert again == made and again.topology == shipped.topology and again.nccl == shipped.nccl
    assert again.stream.fraction == pytest.approx(2e12 / shipped.gpu.memory_bytes_per_s)
