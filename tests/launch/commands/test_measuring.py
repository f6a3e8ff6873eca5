"""What ``calibrate`` measures, on a machine whose clock is simulated: it must find what the machine was made of.

On a real one any number may come out, so that a time added in place of taken off, or a group left out, would show in
no test; only in the plans that are then chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cinemesh.launch import progress
from cinemesh.launch.commands import calibrate, measure_links
from cinemesh.launch.progress import Begin
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.calibration.calibrate import TimedSamples

CORES = len(os.sched_getaffinity(0))


@dataclass
class SimulatedMachine:
    """``compute_s``: one piece of compute. ``busy``: share of a collective's time that copies.

    Beside a collective, compute lasts 1 / (1 - ``share``) times as long, and the collective ``slower`` times.
    """

    compute_s: float
    share: float = 0.0
    slower: float = 1.0
    busy: float = 0.0
    now_s: float = 0.0
    others_s: float = 0.0  # CPU time of gloo's threads
    flying: list[Any] = field(default_factory=list)

    def compute(self) -> None:
        lasts_s = self.compute_s / (1 - self.share) if self.flying else self.compute_s
        self.now_s += lasts_s
        for collective in self.flying:
            collective.left_s -= lasts_s / self.slower

    def collective(self, seconds: float) -> Any:
        def issue() -> None:
            bound.left_s = seconds
            self.flying.append(bound)

        def wait() -> None:
            self.now_s += max(0.0, bound.left_s)
            self.others_s += self.busy * seconds
            self.flying.remove(bound)

        bound = SimpleNamespace(issue=issue, wait=wait, left_s=0.0)
        return bound

    def takes(self, seconds: float) -> Callable[[], None]:
        def spend() -> None:
            self.now_s += seconds

        return spend

    def clock(self) -> Any:
        thread_s = 17.0  # cancels out
        return SimpleNamespace(
            perf_counter=lambda: self.now_s,
            process_time=lambda: self.others_s + thread_s,
            thread_time=lambda: thread_s,
        )


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimulatedMachine], SimulatedMachine]:
    """One rank of two, both alike, whose time is the machine's."""

    def run(machine: SimulatedMachine) -> SimulatedMachine:
        monkeypatch.setattr(calibrate, "time", machine.clock())
        monkeypatch.setattr(calibrate, "barrier", lambda: None)
        for module in (calibrate, measure_links):
            monkeypatch.setattr(module, "gather_objects", lambda value: [value, value])
        return machine

    return run


@pytest.mark.parametrize(("seconds", "times"), [(0.004, 8), (0.049, 4), (1.0, 1)])
def test_what_a_collective_adds(seconds: float, times: int, on: Callable[..., SimulatedMachine]) -> None:
    machine = on(SimulatedMachine(compute_s=0.001, busy=0.25))
    added = calibrate._added(machine.compute, machine.collective(seconds))
    found = (added.seconds, added.own_s, added.compute_s)
    # Compute of 1 ms runs before the collective, not beside it: the collective starts when it is issued.
    assert found == pytest.approx((seconds, 0.25 * seconds, 0.001)) and added.times == times


@pytest.mark.parametrize("slower", [1.0, 1.6, 3.0])
@pytest.mark.parametrize("busy", [0.0, 0.2])
def test_how_much_slower_it_is_beside_compute(busy: float, slower: float, on: Callable[..., SimulatedMachine]) -> None:
    """Half of a core for each process, so that copying takes twice its share of a core from compute."""
    machine = on(SimulatedMachine(compute_s=0.001, share=2.0 * busy, slower=slower, busy=busy))
    collective = machine.collective(0.02)
    added = calibrate._added(machine.compute, collective)
    assert calibrate._slowdown(machine.compute, collective, added, 2.0) == pytest.approx(slower)


def test_one_that_nothing_hides_has_the_largest_slowdown(on: Callable[..., SimulatedMachine]) -> None:
    machine = on(SimulatedMachine(compute_s=0.001, slower=1e9))
    collective = machine.collective(0.02)
    added = calibrate._added(machine.compute, collective)
    assert calibrate._slowdown(machine.compute, collective, added, 1.0) == calibrate.MOST_SLOWDOWN


@pytest.mark.parametrize("servers", [1, 2])
def test_every_collective_of_every_group_is_measured(
    servers: int, on: Callable[..., SimulatedMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slowdown only across servers, and only of what lasts longer than four times the compute before it."""
    machine = on(SimulatedMachine(compute_s=0.01, slower=2.0, busy=0.2))
    seconds = {"all_gather": 1.0, "reduce_scatter": 2.0, "all_reduce": 3.0}  # of 64 kB

    def bind(kind: str, axes: object, source: torch.Tensor, output: torch.Tensor, staging: object) -> Any:
        ends = {"all_gather": (8192, 16384), "reduce_scatter": (16384, 8192), "all_reduce": (16384, 16384)}
        small = max(source.numel(), output.numel()) == 1024
        assert (source.numel(), output.numel()) == tuple(n // 16 if small else n for n in ends[kind])
        assert (staging is not None) == (kind == "reduce_scatter") and axes == calibrate.REPLICAS
        return machine.collective(seconds[kind] / (100.0 if small else 1.0))

    monkeypatch.setattr(calibrate, "_some_compute", lambda: machine.compute)
    monkeypatch.setattr(calibrate, "Communicator", lambda mesh: SimpleNamespace(bind=bind))
    monkeypatch.setattr(calibrate, "summing", lambda *_: machine.takes(0.5))
    group: Any = None, calibrate.REPLICAS, 2, servers
    begun = list[str]()
    samples = calibrate.measure_collectives([group], begun.append, (4096, 65536))
    assert begun == [f"{kind} of 2 ranks" for kind in seconds] * calibrate.PASSES
    crowd = 2 / CORES
    for kind, whole_s in seconds.items():
        for size, lasts_s in ((4096, whole_s / 100), (65536, whole_s)):
            key, sum_s = (size, 2, servers), 0.5 if kind == "reduce_scatter" else 0.0
            assert samples.collectives[kind][key] == pytest.approx([lasts_s] * calibrate.PASSES)
            assert samples.copying[kind][key] == pytest.approx([(0.2 * lasts_s + sum_s) * crowd] * calibrate.PASSES)
            slowed = samples.slowdown.get(kind, {}).get(key)
            assert (slowed is not None) == (servers > 1 and size == 65536)


@pytest.mark.parametrize(
    ("world", "local", "wanted"),
    [
        (2, 2, [("dp_replicate=2", "dp_replicate", 2, 1)]),
        (4, 4, [("dp_replicate=4", "dp_replicate", 4, 1), ("tp=2,dp_replicate=2", "tp", 2, 1)]),
        (2, 1, [("dp_replicate=2", "dp_replicate", 2, 2), ("dp_replicate=2", "dp_replicate", 2, 2)]),
        (
            8,
            4,
            [
                ("dp_replicate=8", "dp_replicate", 8, 2),
                ("tp=4,dp_replicate=2", "dp_replicate", 2, 2),
                ("tp=4,dp_replicate=2", "tp", 4, 1),
            ],
        ),
    ],
)
def test_the_groups_are_all_ranks_those_across_servers_and_those_within(
    world: int, local: int, wanted: list[tuple[str, str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "Mesh", lambda plan: plan)
    found = [(plan, *axes, ranks, servers) for plan, axes, ranks, servers in calibrate._groups(world, local)]
    assert found == [(Plan.parse(text), *rest) for text, *rest in wanted]


def test_times_are_those_of_the_least_disturbed_quarter_of_the_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five cases' levels, 1 to 5, the first quartile is 1.5; another rank measured half as much."""
    cases = [1.0, 5.0, 3.0, 2.0, 4.0]

    def measured(level: float) -> tuple[TimedSamples, float]:
        samples = TimedSamples()
        samples.add("stream", "swiglu", (100,), level)
        return samples, level

    together = TimedSamples()
    together.add("collectives", "all_reduce", (64, 2, 1), 7.0)
    monkeypatch.setattr(calibrate, "CASES", cases)
    monkeypatch.setattr(calibrate, "measure_compute", measured)

    def measured_together(groups: list[Any], begin: Begin) -> TimedSamples:
        for _ in range(calibrate.PASSES * len(groups) * len(COLLECTIVES)):
            begin("all_reduce of 2 ranks")
        return together

    monkeypatch.setattr(calibrate, "measure_collectives", measured_together)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(calibrate, "_groups", lambda world, local: iter([(world, local)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(calibrate, "gather_objects", lambda mine: [mine, mine])
    monkeypatch.setattr(calibrate.torch.distributed, "get_rank", lambda: 0)
    found = calibrate.measure()
    assert found is not None
    assert found.stream["swiglu"][(100,)] == pytest.approx([1.5 * level for level in cases] * 2)
    assert found.collectives["all_reduce"][(64, 2, 1)] == [7.0, 7.0]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "calibrating: a small step's compute (1 of 11)" and len(said) == 11
    assert said[-1] == "calibrating: all_reduce of 2 ranks (11 of 11)"
