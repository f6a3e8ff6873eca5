"""Spans of a GPU, from events on streams that are played: what runs where, and when, is known exactly.

No GPU is asked. Streams keep a clock each; what is launched on one runs when that clock and what it waits for allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.pretended_cuda import ANSWERS, pretended
from harness import Pool

from cinemesh.launch.proof import traced, traced_gpu
from cinemesh.launch.proof.parity import OPTIMIZER, load_batch
from cinemesh.launch.proof.traced_gpu import traced_on_gpu
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Op, Space
from cinemesh.parallel.passes.liveness import persistent
from cinemesh.parallel.runtime.mesh import Mesh


class Streams:
    """Clocks in ms. The host launches at once."""

    def __init__(self) -> None:
        self.clock = {"current": 0.0}
        self.now = "current"

    def run(self, ms: float, stream: str | None = None) -> float:
        """On a stream, from where it is; when that ends."""
        self.clock[stream or self.now] += ms
        return self.clock[stream or self.now]

    def wait(self, moment: float) -> None:
        """Of the stream that is the current one."""
        self.clock[self.now] = max(self.clock[self.now], moment)

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def new(self, device: object = None) -> str:
        self.clock[name := f"stream {len(self.clock)}"] = 0.0
        return name

    def event(self, enable_timing: bool = False) -> Any:
        assert enable_timing
        streams = self

        class Event:
            def record(self, stream: str | None = None) -> None:
                self.at = streams.clock[stream or streams.now]

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event()


class Work(dist.Work):
    """A collective that ends at a moment: whoever waits, waits on the stream that is current then."""

    def __init__(self, streams: Streams, end: float) -> None:
        super().__init__()
        self.streams, self.end = streams, end

    def wait(self, timeout: object = None) -> bool:
        self.streams.wait(self.end)
        return True


@dataclass
class Play:
    """Records as an executor has them, with what each does to the streams."""

    streams: Streams
    records: list[Any] = field(default_factory=list)
    free: dict[str, float] = field(default_factory=dict)  # of NCCL's streams, one a communicator
    issued: dict[str, Work] = field(default_factory=dict)

    def add(self, op: Any, run: Callable[[], object]) -> None:
        self.records.append(SimpleNamespace(op=op, run=run))

    def compute(self, name: str, ms: float, kind: str = "silu") -> None:
        self.add(op(name, kind), lambda: self.streams.run(ms) and None)

    def issue(self, name: str, lane: str, ms: float) -> None:
        def run() -> Work:
            start = max(self.streams.clock["current"], self.free.get(lane, 0.0))
            self.free[lane] = start + ms
            self.issued[name] = Work(self.streams, start + ms)
            return self.issued[name]

        self.add(op(name, "all_gather", axes=(lane,)), run)

    def wait(self, name: str) -> None:
        self.add(op(f"{name}.wait", "wait", waits_for=name), lambda: self.issued[name].wait() and None)


def op(name: str, kind: str, axes: tuple[str, ...] = (), waits_for: str = "", to: Space | None = None) -> Op:
    made: Any = SimpleNamespace(
        name=name, kind=kind, axes=axes, is_wait=bool(waits_for), waits_for=waits_for, to=to, lane="to_host",
        label=name, place=None, clone=False,
    )  # fmt: skip
    return made


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    streams = Streams()
    for name, stand_in in {
        "Event": streams.event,
        "Stream": streams.new,
        "stream": streams.on,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: streams.run(1000.0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(traced_gpu.time, "perf_counter", lambda: 7.0)
    return Play(streams)


def test_spans_are_those_that_were_played(play: Play) -> None:
    """By hand, in ms behind the kernel that waits: two lanes beside compute, one of them with a queue."""
    play.compute("a", 10)  #       0 to 10
    play.issue("g", "tp", 8)  #    10 to 18
    play.issue("h", "cp", 30)  #   10 to 40
    play.issue("i", "tp", 4)  #    issued at 10, behind g: 18 to 22
    play.compute("b", 5)  #        10 to 15
    play.wait("g")  #              waits 15 to 18
    play.compute("c", 6)  #        18 to 24
    play.wait("i")  #              over already
    play.wait("h")  #              waits 24 to 40
    play.compute("d", 1)  #        40 to 41
    executor: Any = SimpleNamespace(records=play.records, device="cuda")
    spans = {span.name: span for span in traced_on_gpu(executor)}
    assert [*spans] == ["a", "g", "h", "i", "b", "c", "d"]

    def told(name: str) -> tuple[Any, ...]:
        span = spans[name]
        moments = (span.issued_s, span.start_s, span.end_s)
        return (
            span.lane,
            *(round(1e3 * (moment - 7.0) - 1000.0, 6) for moment in moments),
            round(1e3 * span.waited_s, 6),
        )

    assert [told(name) for name in spans] == [
        ("compute", 0, 0, 10, 0),
        ("tp", 10, 10, 18, 3),
        ("cp", 10, 10, 40, 16),
        ("tp", 10, 18, 22, 0),
        ("compute", 10, 10, 15, 0),
        ("compute", 18, 18, 24, 0),
        ("compute", 40, 40, 41, 0),
    ]
    assert spans["h"].exposed_s == pytest.approx(0.016) and spans["h"].ran_s == pytest.approx(0.03)


def test_a_copy_to_the_host_has_a_lane(play: Play) -> None:
    """It runs on a stream that the executor has, not on NCCL's."""
    host = play.streams.new()

    def copy() -> None:
        play.streams.clock[host] = max(play.streams.clock[host], play.streams.clock["current"])
        play.streams.run(9, host)

    play.compute("a", 2)
    play.add(op("copy", "copy", to=Space.HOST), copy)
    play.compute("b", 4)
    play.add(
        op("copy.wait", "wait", waits_for="copy", to=Space.HOST), lambda: play.streams.wait(play.streams.clock[host])
    )
    executor: Any = SimpleNamespace(
        records=play.records, device="cuda", host=SimpleNamespace(streams={Space.HOST: host})
    )
    (span,) = [span for span in traced_on_gpu(executor) if span.lane != "compute"]
    assert (span.name, span.lane, round(span.ran_s, 6), round(span.exposed_s, 6)) == ("copy", "to_host", 0.009, 0.005)


def real_steps(text: str) -> tuple[list[tuple[str, str, float, float, float]], list[str], list[str]]:
    """Spans of a pretended GPU over gloo, the records of the program, and states that a plain step left otherwise."""
    case = small_case(Plan.parse(text, dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with pretended():
            mesh = Mesh(case.plan)
            runners = [StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=1) for _ in range(2)]
            for runner in runners:
                runner.initialise(probe_values(1))
                load_batch(case, runner, 0)
            spans = traced.taken_steps(runners[0], 1).spans
            for _ in range(traced.WARM_UP_STEPS + 2):
                runners[1].step(traced.LR)
            tensors = [runner.executor.buffers for runner in runners]
            differ = [n for n in persistent(runners[0].program) if not torch.equal(tensors[0][n], tensors[1][n])]
            mesh.close()
    told = [(span.name, span.lane, span.issued_s, span.start_s, span.end_s) for span in spans]
    return told, [op.name for op in runners[0].program.ops if not op.is_wait], differ


def test_a_real_step_is_traced_as_on_a_gpu(pool: Pool) -> None:
    """Records, communicators and waits as a real program has them; what torch.cuda is asked it would take."""
    assert "_sleep" in ANSWERS
    for told, names, differ in pool.run(2, real_steps, "dp_shard=2,prefetch=1"):
        assert differ == [], "a trace changes nothing"
        assert [name for name, *_ in told] == names
        assert {lane for _, lane, *_ in told} >= {"compute", "dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter"}
        assert all(issued <= start <= end for *_, issued, start, end in told)
