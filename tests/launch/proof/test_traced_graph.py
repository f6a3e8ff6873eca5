"""Kernels of a replay and their records, from events as torch's profiler writes them. No GPU is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.traced_graph import RanKernel, launched_by, named, spans_of


def launched(kernels: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """(record, kernel, when it ran), launched in this order: the ranges, the launches, the kernels."""
    events: list[dict[str, Any]] = []
    for i, (record, kernel, ran) in enumerate(kernels):
        at = 10.0 * i
        events += [
            {"cat": "user_annotation", "name": record, "ts": at, "dur": 8.0},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at + 2.0, "dur": 1.0, "args": {"correlation": i}},
            {"cat": "kernel", "name": kernel, "ts": ran, "dur": 5.0, "args": {"correlation": i}},
            {"cat": "cpu_op", "name": "aten::mm", "ts": at + 1.0, "dur": 3.0},
        ]
    return events


def replayed(kernels: list[tuple[str, float, float]]) -> list[dict[str, Any]]:
    return [{"cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": {"correlation": 1}}
            for name, start, end in kernels]  # fmt: skip


STEP = [("a", "gemm", 100.0), ("g", "ncclAllGather", 101.0), ("b", "gemm", 110.0), ("b", "add", 116.0),
        ("h", "ncclAllGather", 120.0), ("c", "add", 130.0)]  # fmt: skip


def test_a_replay_s_kernels_get_the_names_of_the_records_that_launch_them() -> None:
    """Kernels of one name in the order of the launched step, whatever runs beside them."""
    known = launched_by(launched(STEP), {record for record, _, _ in STEP})
    assert known == {"gemm": ["a", "b"], "ncclAllGather": ["g", "h"], "add": ["b", "c"]}
    events = replayed([("add", 9.0, 10.0), ("gemm", 0.0, 4.0), ("ncclAllGather", 4.0, 11.0), ("gemm", 4.0, 9.0),
                       ("add", 14.0, 15.0), ("ncclAllGather", 11.0, 14.0)])  # fmt: skip
    ran = named(events, known)
    assert [(one.record, round(1e6 * one.start_s)) for one in ran] == [
        ("a", 0), ("g", 4), ("b", 4), ("b", 9), ("h", 11), ("c", 14)
    ]  # fmt: skip


def test_what_cannot_be_named_is_refused() -> None:
    known = launched_by(launched(STEP), {record for record, _, _ in STEP})
    with pytest.raises(CinemeshError, match=r"gemm 1 times, the launched step 2 times.*capture=off"):
        named(replayed([("gemm", 0.0, 1.0), ("add", 1.0, 2.0), ("add", 2.0, 3.0), ("ncclAllGather", 0.0, 1.0),
                        ("ncclAllGather", 1.0, 2.0)]), known)  # fmt: skip
    with pytest.raises(CinemeshError, match="launched by 0 records"):
        launched_by(launched(STEP), {"a", "g", "h", "c"})


def op(name: str, kind: str, axes: tuple[str, ...] = (), waits_for: str = "") -> Any:
    return SimpleNamespace(name=name, kind=kind, axes=axes, is_wait=bool(waits_for), waits_for=waits_for, to=None,
                           lane="", label=name, place=None, clone=False)  # fmt: skip


def test_spans_of_a_replay_by_hand() -> None:
    """Compute from its first kernel to its last; what it stood for is the wait's. Without a kernel there is no span."""
    ops = [op("a", "silu"), op("g", "all_gather", ("tp",)), op("view", "silu"), op("b", "silu"),
           op("g.wait", "wait", (), "g"), op("c", "silu"), op("h", "all_gather", ("cp",)),
           op("h.wait", "wait", (), "h")]  # fmt: skip
    kernels = [RanKernel("a", 0.0, 4.0), RanKernel("g", 4.5, 11.0), RanKernel("b", 4.0, 7.0), RanKernel("b", 7.5, 9.0),
               RanKernel("c", 12.0, 15.0), RanKernel("h", 15.0, 18.0)]  # fmt: skip
    told = [(s.name, s.lane, s.issued_s, s.start_s, s.end_s, s.waited_s) for s in spans_of(ops, kernels)]
    assert told == [
        ("a", "compute", 0.0, 0.0, 4.0, 0.0),
        ("g", "tp", 4.0, 4.5, 11.0, 2.0),
        ("b", "compute", 4.0, 4.0, 9.0, 0.0),
        ("g.wait", "compute", 9.0, 9.0, 11.0, 0.0),
        ("c", "compute", 12.0, 12.0, 15.0, 0.0),
        ("h", "cp", 15.0, 15.0, 18.0, 3.0),
        ("h.wait", "compute", 15.0, 15.0, 18.0, 0.0),
    ]
