"""What ``calibrate`` measures on GPUs: groups that lie as they say, and times from which the planted links come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from benchmarks.pretended_cuda import Graph, pretended
from harness import Pool
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.commands import calibrate, measure_links
from cinemesh.launch.commands.measure_links import REPEATED, link_groups
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.layout import Axes
from cinemesh.parallel.runtime.comm import BoundCollective, Communicator
from cinemesh.parallel.runtime.mesh import group_ranks
from cinemesh.perf_model.calibration import links
from cinemesh.perf_model.calibration.links import LinkTest
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.network import Network

BASE = load("dgx-h100-ib400")
TRUTH = links.scaled(links.scaled(BASE, True, 0.8, 1.2), False, 0.5, 1.5)
LOCAL, WORLD = 2, 4
SIZES = (2**12, 2**18, 2**21)


@pytest.mark.parametrize(("world", "local"), [(2, 2), (8, 8), (16, 8), (64, 8), (12, 4), (6, 3), (4, 1)])
def test_groups_lie_as_they_say(world: int, local: int) -> None:
    """Counted rank by rank: a group that crosses servers where it should not would be taken for a slow NVLink."""
    found = list(link_groups(world, local))
    for group in found:
        assert group.plan.world_size == world
        for rank in range(world):
            members = group_ranks(group.plan, group.axes, rank)
            servers = [member // local for member in members]
            assert rank in members and len(members) == group.ranks and len({*servers}) == group.servers
            assert {servers.count(server) for server in servers} == {group.ranks // group.servers}
    assert (found[-1].ranks, found[-1].servers) == (world, world // local)
    assert len({(group.ranks, group.servers) for group in found}) == len(found)
    if world > local > 1 and (world // local) % 2 == 0:
        assert any(group.ranks == group.servers == 2 for group in found)


def measured() -> list[dict[str, Any]]:
    """Runs in a worker, on a clock that shows the prices of ``TRUTH``; all ranks but one are twice as fast."""
    rank, bind = torch.distributed.get_rank(), Communicator.bind
    bound: list[tuple[str, int, int, int]] = []

    def noting(
        self: Communicator, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None
    ) -> BoundCollective:
        members = group_ranks(self.mesh.plan, axes, rank)
        size = max(x.numel() * x.element_size() for x in (source, output))
        bound.append((kind, size, len(members), len({member // LOCAL for member in members})))
        return bind(self, kind, axes, source, output, staging)

    def planted(work: Callable[[], object], device: str) -> float:
        work()
        kind, size, ranks, servers = bound[-1]
        group = links.group_on(LinkTest("planted", kind, ranks, servers, {}), TRUTH)
        return REPEATED * Network(TRUTH).collective(kind, size, group).seconds * (1.0 if rank == 2 else 0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Communicator, "bind", noting)
        patch.setattr(measure_links, "_timed", planted)
        return [asdict(test) for test in measure_links.measure_links(WORLD, LOCAL, "cpu", "planted", SIZES)]


def test_the_links_that_made_the_times_are_found(pool: Pool) -> None:
    """Only here: a size, a group or a repetition that is taken for another is a rate that no plan will ever see."""
    by_rank = pool.run(WORLD, measured)
    assert all(tests == by_rank[0] for tests in by_rank)
    tests = [LinkTest(**test) for test in by_rank[0]]
    assert [(test.kind, test.ranks, test.servers) for test in tests] == [
        (kind, ranks, servers) for ranks, servers in ((2, 1), (2, 2), (4, 2)) for kind in COLLECTIVES
    ]
    found = links.fit(BASE, tests)
    assert links.log_error(found, tests) < 0.02
    for name in ("nvlink_bytes_per_s", "nic_bytes_per_s"):
        assert getattr(found.topology, name) == pytest.approx(getattr(TRUTH.topology, name), rel=0.05), name


def test_what_cannot_be_measured_is_refused_before_it_begins(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    with pytest.raises(CinemeshError, match="links between GPUs, and this job has one; start it with torchrun on all"):
        calibrate._fit_links(Joined(0, "cuda:0", None), "dgx-h100-ib400", out)
    with pytest.raises(CinemeshError, match="local-cpu is no GPU cluster"):
        calibrate._fit_links(Joined(0, "cuda:0", None), "local-cpu", out)
    with pytest.raises(CinemeshError, match="this job: 3 ranks on each of 2 servers"):
        links.group_on(LinkTest("this job", "all_gather", 6, 2, {}), BASE)
    assert not out.exists()


class Held(Graph):
    """Notes what becomes of it."""

    made: ClassVar[list[Held]] = []
    holds: bool = False

    def __init__(self, keep_graph: bool = False) -> None:
        self.made.append(self)
        self.holds = True

    def replay(self) -> None: ...

    def reset(self) -> None:
        self.holds = False


def captured() -> tuple[list[str], list[bool], int]:
    """Runs in a worker, with CUDA pretended: what was timed, graphs that hold work, collectives issued in captures."""
    timed: list[str] = []
    inside: list[int] = []
    bind = Communicator.bind

    @contextmanager
    def capture(graph: Graph, **given: Any) -> Iterator[None]:
        assert given == {"capture_error_mode": "thread_local"}
        inside.append(0)
        yield
        inside.append(-1)

    def noting(self: Communicator, *of: Any) -> BoundCollective:
        bound = bind(self, *of)

        def issue() -> Any:
            if inside and inside[-1] >= 0:
                inside[-1] += 1
            return bound.issue()

        return bound._replace(issue=issue)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with pretended():
            patch.setattr(torch.cuda, "graph", capture)
            patch.setattr(torch.cuda, "CUDAGraph", Held)
            patch.setattr(Communicator, "bind", noting)
            patch.setattr(measure_links, "_timed", lambda work, device: timed.append(work.__name__) or 1e-3)
            (group,) = link_groups(2, 1)
            tests = measure_links.measure_group(group, "cpu", "planted", (2**12,), captured=True)
    assert [test.seconds for test in tests] == [{2**12: 1e-3 / REPEATED}] * len(COLLECTIVES)
    return timed, [graph.holds for graph in Held.made], sum(count for count in inside if count > 0)


def test_what_is_timed_in_a_graph_is_its_replay(pool: Pool) -> None:
    """Only here: the loop itself, timed again, would pass for a graph that costs as much. Graphs go before groups."""
    for timed, hold, inside in pool.run(2, captured):
        assert timed == ["replay"] * measure_links.LOOPS * len(COLLECTIVES)
        assert hold == [False] * len(COLLECTIVES) and inside == REPEATED * len(COLLECTIVES)


@pytest.mark.gpu
def test_time_is_the_devices() -> None:
    """A copy of 1 GiB: what the host takes to launch it would say a thousand times as much."""
    source = torch.zeros(2**28, device="cuda")
    output = torch.empty_like(source)
    measure_links._timed(lambda: output.copy_(source), "cuda")
    seconds = measure_links._timed(lambda: output.copy_(source), "cuda")
    assert 2e11 < 2 * source.numel() * source.element_size() / seconds < 2e13  # bytes a second
