"""What runs programs in a training run, and says at every record where it is: to the watchdog, and to who measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.buckets import BucketRunner
from ...parallel.ir.marks import is_marked
from ...parallel.ir.program import Program
from ...parallel.runtime.executor import Executor
from ...parallel.runtime.graph import Graph
from ...parallel.runtime.host import pin
from ..cluster.marks import CAPTURED_PROGRAM, NO_PROGRAM, Doing, Marks
from .checkpoint.manifest import COUNTERS
from .numerics import Numerics


def slot_of(marks: Marks, device: str) -> Tensor:
    """Where the records of a program tell a watchdog how far it is; a GPU writes it over the bus.

    Raises CinemeshError where it cannot.
    """
    slot = torch.frombuffer(marks.slot, dtype=torch.int64)
    if torch.device(device).type == "cuda":
        pin(slot, "marks", "set marks to off")
    return slot


class MarkedRuns:
    """``programs``: all that may run, as the watchdog counts them."""

    def __init__(self, runners: BucketRunner, marks: Marks) -> None:
        self.runners, self.marks = runners, marks
        self.programs: Sequence[Program] = [runner.program for runner in runners.runners.values()]

    @property
    def waited_s(self) -> float:
        """By this host, for other ranks, in all that ran."""
        comm = self.runners.first.comm
        return comm.waited_s if comm else 0.0

    def step(self, step: int, lr: float, numerics: Numerics | None = None) -> None:
        """One update on what was loaded last; measured, it runs from the executor."""
        replays, runner = numerics is None, self.runners.current
        marked = is_marked(runner.program)  # its records tell, at the pace of the device
        captured = replays and isinstance(runner.replay, Graph)
        self.marks.at(step, Doing.STEP)
        self._begin(None if captured and not marked else runner.program)
        tell = None if marked else self.marks.record_done

        def both(record: int) -> None:
            assert numerics is not None
            numerics.watch(record)
            if tell is not None:
                tell(record)

        self.runners.step(lr, both if numerics else tell, replays=replays)

    def again(self, step: int, lr: float) -> Numerics:
        """Run a step whose update was skipped once more, and measure it: the same draws on the same weights."""
        self.runners.buffers[COUNTERS][0] -= 1
        numerics = Numerics(self.runners.current)
        self.step(step, lr, numerics)
        return numerics

    def run(self, executor: Executor) -> None:
        """A program that is no step."""
        self._begin(executor.program)
        executor.run(self.marks.record_done)

    def _begin(self, program: Program | None) -> None:
        """None: a captured step that does not tell its records."""
        number = next((n for n, known in enumerate(self.programs) if known is program), NO_PROGRAM)
        number = CAPTURED_PROGRAM if program is None else number
        self.marks.run(number, 0 if program is None else len(program.ops))
