"""Frozen execution: a bound program as a flat list of prepared calls, for replay.

The first step is the recording: it runs as the executor runs, and what every kernel asked of torch is taken down
(``tape.py``). Later steps make the same calls on the same tensors: no shape work, no look-up, and nothing allocated but
what a kernel without an ``out`` variant returns. On CUDA nothing is taken down: the calls are the kernels themselves,
and the CUDA Graph (``graph.py``) is the recording.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.ops import OPS
from .executor import BoundRecord, Executor
from .tape import CallRecorder, Segment, compile_calls, ready, storage_key


class Frozen:
    """``record`` runs one step; ``run`` replays it. ``hazards`` name the op and what it did that no replay can do."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.hazards: list[str] = []
        self.parts: list[BoundRecord] = []  # the executor's records, fused ones taken apart
        self.segments: list[Segment | None] = []  # one a part; None: a collective or a wait
        self.workspace = torch.empty(0, dtype=torch.uint8)
        self.constant_bytes = 0
        self.calls: list[Callable[[], Any]] = []  # of one step, collectives and waits included
        self._ends: list[int] = []  # of every record's calls

    @torch.no_grad()
    def record(self, watch: Callable[[int], None] | None = None) -> None:
        """One step, run and taken down. What may not be captured is in ``hazards``; the step ends all the same."""
        executor = self.executor
        known = {storage_key(t) for t in (executor.arena, *executor.buffers.values())}
        self.parts, self.segments, self.hazards = [], [], []
        counts: list[int] = []  # of every record's parts
        for i, whole in enumerate(executor.records):
            parts = whole.parts or (whole,)
            for record in parts:
                if record.op.kind in OPS:
                    with CallRecorder() as recorder:
                        record.run()
                    self.hazards += [f"{record.op.name} ({record.op.kind}): {found}" for found in recorder.hazards]
                    self.segments.append(compile_calls(recorder.calls, known))
                else:
                    record.run()
                    self.segments.append(None)
            self.parts += parts
            counts.append(len(parts))
            if watch is not None:
                watch(i)
        taken = [segment for segment in self.segments if segment is not None]
        self.constant_bytes = sum(segment.constant_bytes for segment in taken)
        needed = max((segment.workspace_bytes for segment in taken), default=0)
        if self.workspace.numel() < needed:
            self.workspace = torch.empty(needed, dtype=torch.uint8)
        self.calls = []
        ends = [0]  # of every part's calls
        for record, segment in zip(self.parts, self.segments, strict=True):
            if segment is not None:
                self.calls += [ready(call, self.workspace) for call in segment.calls]
            else:
                self.calls.append(record.run)
            ends.append(len(self.calls))
        self._ends = [ends[last] for last in itertools.accumulate(counts)]

    @torch.inference_mode()  # the cheapest dispatch; tensors made before it are written as ever
    def run(self, watch: Callable[[int], None] | None = None) -> None:
        """One step. ``watch`` is called after every record (tests)."""
        if watch is None:
            for call in self.calls:
                call()
            return
        start = 0
        for i, end in enumerate(self._ends):
            for call in self.calls[start:end]:
                call()
            watch(i)
            start = end
