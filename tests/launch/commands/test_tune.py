"""``kernels --tune`` on Triton's interpreter: written as it goes, within its time, and ended by no fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from cinemesh.errors import CinemeshError
from cinemesh.kernels import swiglu, tuning
from cinemesh.kernels.rates import dense_bf16_flops
from cinemesh.launch.commands import tune
from cinemesh.launch.commands.calls import calls_of
from cinemesh.launch.commands.tune import KernelCall, TimingDevice, tables_found
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

CONFIG = ModelConfig("one-block", 1, 64, 1, 40, (Encoder("a", 24, 3),), channels=4)
KNOWN = tuning.Table("a card", "measured on it")
OPS = ("attention", "swiglu", "swiglu_backward")  # what is tuned here of a step
PROGRAM = prepare(build_step(CONFIG, Plan(), BatchShape(1, (1, 4, 6))), backend="nccl")
CALLS = [call for call in calls_of(PROGRAM) if call.op in OPS]


def timed(launch: KernelCall) -> float:
    """A launch is run; small blocks of SwiGLU are fast here, of 1024 MLIR gives up, all else takes 1 s."""
    with tuning.asked() as asked:
        launch()
    block = next((tile["BLOCK"] for (kernel, _), tile in asked.items() if kernel.startswith("swiglu")), 0)
    if block == 1024:
        raise RuntimeError("PassManager::run failed")
    return 0.5 if block == 2048 else 1.0


CARD = TimingDevice("cpu", "cpu", timed)


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("CUDA error: misaligned address\nand more")


def test_what_is_found_grows_and_a_fault_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "swiglu", fails)
    tables, said = zip(*tables_found(CALLS, KNOWN, CARD), strict=True)
    assert [text.split(" ")[0] for text in said] == ["attention", "attention", "swiglu", "swiglu_backward"]
    assert said[2].endswith("triton: failed, RuntimeError: CUDA error: misaligned address")
    assert [len(table.tiles) for table in tables] == [1, 1, 1, 2] and KNOWN.tiles == {}
    (attention,) = tables[0].tiles["attention.forward"].values()
    assert attention["BLOCK_QUERIES"] == 128 and attention["num_warps"] == 8, "nothing was faster"
    (best,) = tables[-1].tiles["swiglu.backward"].values()
    assert best["BLOCK"] == 2048, "half of what it asks for; and what MLIR cannot compile is no tile"
    flops = next(call.flops for call in CALLS if call.op == "attention")
    reached = round(flops / dense_bf16_flops("cpu"), 4)
    assert tables[-1].rates == {name: {"forward": reached} for name in ("triton", "sdpa")}, "ours and torch's, of 1 s"


@pytest.mark.parametrize("held", [0, 1])
def test_a_switch_is_tried_the_other_way_only(held: int) -> None:
    """Halved or doubled it would never be on, or be a 2."""
    tile = {"BLOCK_KEYS": 64, "HELD": held, "num_warps": 8, "num_stages": 3}
    assert [t for t in tune._neighbours(tile, tile) if t["HELD"] != held] == [{**tile, "HELD": 1 - held}]


def test_no_tile_and_no_kernel_begins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by a second a look: the first kernel is cut off, the best so far stays; the rest is told."""
    clock = iter(range(1000))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(clock)))
    ran: list[int] = []

    def counted(launch: KernelCall) -> float:
        ran.append(1)
        return timed(launch)

    swiglu_calls = [call for call in CALLS if call.op == "swiglu"] * 3
    found = list(tables_found(swiglu_calls, KNOWN, TimingDevice("cpu", "cpu", counted), until=3.5))
    assert len(ran) == 3, "the first tile and two others: looks 0 and 1 were before the kernel and its tile"
    assert (
        found[0][0].tiles["swiglu.forward"]
        and [said.endswith("the time is over") for _, said in found[1:]] == [True] * 2
    )


def test_what_was_found_is_written_when_the_run_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing into the package's own table where another place was asked for."""

    def broken_off(launch: KernelCall) -> float:
        with tuning.asked() as asked:
            launch()
        if any(kernel.startswith("swiglu") for kernel, _ in asked):
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H900")
    monkeypatch.setattr(TimingDevice, "here", lambda: TimingDevice("cpu", "cpu", broken_off))
    monkeypatch.setattr(tune, "calls_of", lambda _: CALLS)
    with pytest.raises(KeyboardInterrupt):
        tune.run(PROGRAM, tmp_path / "mine.yaml", 100.0)
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    written = tuning.table("mine")
    assert "attention.forward" in written.tiles and "triton" in written.rates and written.device == "NVIDIA H900"
    assert "swiglu.forward" not in written.tiles and not tuning.path_of("h900").exists()
    assert "TFLOP/s" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(CinemeshError, match=r"^--out .*is a file, where a folder is wanted"):
        tune.run(PROGRAM, tmp_path / "file" / "x.yaml", None)
