"""Whose word it is where a step stands: the host's, or that of marks in the program, as a recipe and a device say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from checkpoints import TINY

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.marks import CAPTURED_PROGRAM, NO_PROGRAM, Doing, Marks
from cinemesh.launch.proof.parity import OPTIMIZER, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.launch.training.marked import MarkedRuns, slot_of
from cinemesh.launch.training.numerics import Numerics
from cinemesh.launch.training.setting import Setting
from cinemesh.model.blueprint import Blueprint
from cinemesh.model.buckets import BucketRunner
from cinemesh.model.config import CAPTION_DROPOUT
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.nccl_stack import Capture
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime import host
from cinemesh.parallel.runtime.graph import Graph

CASE = small_case(Plan.parse("dtype=float32"))


@pytest.mark.parametrize(
    ("marks", "device", "capture", "marked"),
    [
        ("auto", "cuda:1", "auto", True),
        ("auto", "cuda:1", "required", True),
        ("auto", "cuda:1", "off", False),  # the host launches each record, and tells
        ("auto", "cpu", "auto", False),  # a replay is the host's own calls
        ("on", "cpu", "off", True),
        ("off", "cuda", "required", False),
    ],
)
def test_marks_are_in_the_program_where_no_host_tells(marks: str, device: str, capture: str, marked: bool) -> None:
    config: Any = SimpleNamespace(marks=marks, capture=capture)
    assert Setting(config, cast(Any, None), TINY, (1,)).marked(device) is marked


def runs_of(marks: Marks, *, marked: bool, mode: Capture = "required") -> MarkedRuns:
    slot = slot_of(marks, "cpu") if marked else None
    facts = (OPTIMIZER, 0, CAPTION_DROPOUT, "gloo", marked)
    runners = BucketRunner([Blueprint(CASE.config, CASE.plan, CASE.batch, *facts)], None, slot=slot)
    runners.first.initialise(probe_values(CASE.seed))
    runners.capture(mode)
    load_batch(CASE, runners.first, 0)
    return MarkedRuns(runners, marks)


@pytest.mark.parametrize("mode", ["required", "off"])
def test_the_marks_of_a_program_write_where_the_watchdog_looks(mode: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else does: the host is not asked to tell a record."""
    marks = Marks()
    runs = runs_of(marks, marked=True, mode=mode)
    ops = runs.runners.first.program.ops
    monkeypatch.setattr(marks, "record_done", None)
    assert marks.place.program == NO_PROGRAM
    runs.step(0, 1e-3)
    assert marks.place == marks.place._replace(phase=Doing.STEP, program=0, record=len(ops))


def test_a_measured_step_is_told_by_its_marks_as_well() -> None:
    marks, seen = Marks(), list[int]()
    runs = runs_of(marks, marked=True)
    numerics, ops = Numerics(runs.runners.first), runs.runners.first.program.ops
    watch = numerics.watch

    def watched(record: int) -> None:
        watch(record)
        seen.append(marks.place.record)

    numerics.watch = watched  # type: ignore[method-assign]
    runs.step(0, 1e-3, numerics)
    at = [i for i, op in enumerate(ops) if op.kind == "mark"]
    assert seen == [max(i for i in at if i <= record) + 1 for record in range(len(ops))]
    assert numerics.measured().bad is None


def test_a_captured_step_without_marks_says_that_it_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks()
    runs = runs_of(marks, marked=False)
    monkeypatch.setattr(runs.runners.first, "replay", Graph(cast(Any, SimpleNamespace(replay=lambda: None)), 0))
    monkeypatch.setattr(runs.runners.first, "_expect_end", lambda: None)
    runs.step(0, 1e-3)
    assert (marks.place.program, marks.place.first) == (CAPTURED_PROGRAM, False)
    marked = Marks()
    runs = runs_of(marked, marked=True)
    monkeypatch.setattr(runs.runners.first, "replay", Graph(cast(Any, SimpleNamespace(replay=lambda: None)), 0))
    monkeypatch.setattr(runs.runners.first, "_expect_end", lambda: None)
    runs.step(0, 1e-3)
    assert (marked.place.program, marked.place.record) == (0, 0), "launched, and no mark written yet"


def test_memory_that_a_gpu_cannot_write_is_refused_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = list[tuple[int, int, int]]()
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda *given: pinned.append(given) or 0,
        cudaHostUnregister=lambda address: pinned.clear(),
    )
    monkeypatch.setattr(host, "cudart", lambda: runtime)
    marks = Marks()
    slot = slot_of(marks, "cuda:0")
    assert pinned == [(slot.data_ptr(), 8, 0)]
    slot.fill_(41)
    assert marks.place.record == 42
    del slot
    assert pinned == [], "unpinned with what holds it"
    runtime.cudaHostRegister = lambda *given: 1
    with pytest.raises(CinemeshError, match=r"marks: 8 B of host memory cannot be pinned: 1; set marks to off"):
        slot_of(marks, "cuda:0")


def test_a_slot_outlives_nothing_that_writes_to_it() -> None:
    """The page is the watchdog's; the tensor, as long as a step that writes to it."""
    marks = Marks()
    runs = runs_of(marks, marked=True)
    held = runs.runners.first.executor.buffers["marks.slot"]
    assert held.data_ptr() == torch.frombuffer(marks.slot, dtype=torch.int64).data_ptr()
