"""``kernels_gpu.py`` on a pretended card: within its time, written as it goes, ended by no kernel that fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from benchmarks import kernels_gpu
from benchmarks.pretended_cuda import pretended

from cinemesh.launch.commands.calls import DistinctCall, calls_of
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.calibration import card

CONFIG = ModelConfig("one-block", 1, 64, 1, 40, (Encoder("a", 24, 3),), channels=4)
CALLS = calls_of(prepare(build_step(CONFIG, Plan(), BatchShape(1, (1, 4, 6))), backend="nccl"))


@pytest.fixture
def place() -> Iterator[str]:
    with pretended() as where:
        yield where


LIMITS = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14}


def of(*ops: str) -> list[DistinctCall]:
    return [next(call for call in CALLS if call.op == op) for op in ops]


def test_rows_of_every_package_what_takes_most_first(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that raises is a row, and the others still run; torch.compile comes behind all."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(kernels_gpu, "function", broken("swiglu"))
    rows = list(
        kernels_gpu.measure_all(
            of("swiglu", "attention"), kernels_gpu.card_here(place), LIMITS, float("inf"), compiled=True
        )
    )
    told = [(row["op"], row["package"]) for row in rows]
    attention, swiglu = (["reference", "triton", "torch"], ["reference", "triton"])
    assert [package for op, package in told[:5] if op == "attention"] == attention
    assert [package for op, package in told[:5] if op == "swiglu"] == swiglu
    assert sorted(told[5:]) == [("attention", "torch.compile"), ("swiglu", "torch.compile")]
    failed = [row for row in rows if "failed" in row]
    assert [(row["op"], row["package"]) for row in failed] == [("swiglu", "triton")]
    assert failed[0]["failed"] == "RuntimeError: PassManager::run failed"
    assert all(row["error"] < card.WRONG for row in rows if "failed" not in row)
    assert kernels_gpu.shown(failed[0]).endswith("PassManager::run failed")


def broken(module: str) -> Any:
    def function(entry: Any) -> Any:
        if entry.package == "triton" and entry.module == module:

            def raises(*_: Any, **__: Any) -> None:
                raise RuntimeError("PassManager::run failed")

            return raises
        return kernels_gpu_function(entry)

    return function


kernels_gpu_function = kernels_gpu.function


def test_no_kernel_begins_late(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(kernels_gpu.time, "monotonic", lambda: float(next(clock)))
    here = kernels_gpu.card_here(place)
    rows = list(kernels_gpu.measure_all(of("swiglu", "attention"), here, LIMITS, 1.5, compiled=False))
    assert len(rows) == 2


def test_what_was_measured_is_written_when_the_run_is_broken_off(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is what ``calibrate --card`` reads."""
    rows = kernels_gpu.measure_all

    def broken_off(*given: Any, **options: Any) -> Iterator[kernels_gpu.Row]:
        for number, row in enumerate(rows(*given, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(kernels_gpu, "measure_all", broken_off)
    monkeypatch.setattr(kernels_gpu, "timed_calls", lambda *_: of("attention"))
    monkeypatch.setattr(kernels_gpu, "card_here", partial(kernels_gpu.card_here, place))
    monkeypatch.setattr(kernels_gpu, "limits_of", lambda _: LIMITS)
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", "--out", str(tmp_path / "x.json")])
    with pytest.raises(KeyboardInterrupt):
        kernels_gpu.main()
    written = json.loads((tmp_path / "x.json").read_text())
    assert [row["package"] for row in written["kernels"]] == ["reference", "triton"] and written["triton"]
    made = card.write(tmp_path / "x.json", "dgx-h100-ib400", tmp_path / "mine.yaml")
    assert made.stream.fraction * made.gpu.memory_bytes_per_s == pytest.approx(LIMITS["copy_bytes_per_s"])
