"""A job's machines looked at together: what differs, and who is slow, is named with its host."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Pool

from cinemesh.launch.cluster.processes import launch
from cinemesh.launch.commands.doctor import DoctorOrder, run
from cinemesh.launch.health import ranks as module
from cinemesh.launch.health.checks import Check
from cinemesh.launch.health.ranks import TakenTimes, link_plans, look_together, one_software, one_time, slow
from cinemesh.parallel.runtime.mesh import group_ranks

HOSTS = ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]


def test_software_that_differs_is_named_with_its_ranks() -> None:
    """A package that one node lacks differs too."""
    same = {"torch": "2.13.0", "code": "abc"}
    assert one_software([same] * 4).verdict == "ok"
    found = one_software([same, same, {"torch": "2.12.0", "code": "abc"}, {**same, "apex": "1"}])
    assert found.verdict == "fault"
    assert found.said == "torch 2.13.0 on ranks 0-1, 3, 2.12.0 on ranks 2; apex none on ranks 0-2, 1 on ranks 3"


def test_a_clock_that_is_off_is_named_and_a_late_rank_is_not() -> None:
    """A rank that once left its barrier late looks ahead in that round alone."""
    rounds = [[100.0, 100.0, 103.0, 100.1], [200.0, 207.0, 203.0, 200.1], [300.0, 300.0, 303.0, 300.1]]
    found = one_time(rounds, ["n1", "n2", "n3", "n4"])
    assert found.verdict == "fault" and "n3 +" in found.said and "n2" not in found.said
    assert one_time([[a, b, a, d] for a, b, _, d in rounds], ["n1", "n2", "n3", "n4"]).verdict == "ok"


@pytest.mark.parametrize(
    ("kind", "factor", "verdict"), [("cpu", 1.4, "ok"), ("cpu", 1.6, "fault"), ("cuda", 1.2, "fault")]
)
def test_a_slow_rank_is_named_with_its_host(kind: str, factor: float, verdict: str) -> None:
    seconds = {(rank,): 0.010 for rank in range(8)} | {(5,): 0.010 * factor}
    found = slow(TakenTimes("product", "cool it", seconds), kind, HOSTS)
    assert found.verdict == verdict
    if verdict == "fault":
        assert f"rank 5 on n3: {10 * factor:.3g} ms, where 10 ms are usual" in found.said


def test_all_of_them_slow_shows_against_the_cluster_file_alone() -> None:
    seconds = {(rank,): 0.010 for rank in range(8)}
    assert slow(TakenTimes("product", "", seconds, price_s=0.009), "cuda", HOSTS).verdict == "ok"
    found = slow(TakenTimes("product", "", seconds, price_s=0.004), "cuda", HOSTS)
    assert found.verdict == "warning" and found.said == "10 ms, the cluster file says 4 ms"


def test_of_two_the_slower_is_named() -> None:
    """The mean of two as the usual time would hide any that is less than three times as slow."""
    found = slow(TakenTimes("product", "", {(0,): 0.010, (1,): 0.018}), "cpu", HOSTS)
    assert found.verdict == "fault" and "rank 1" in found.said and "rank 0" not in found.said


def test_a_slow_server_is_in_a_slow_pair_twice_and_no_other_is() -> None:
    """Which of the two of a pair it is, the other pairing tells; every link within a server is tried too."""
    world, local = 16, 2
    pairs: dict[str, set[frozenset[int]]] = {}
    for what, plan, axes in link_plans(world, local):
        assert plan.world_size == world
        groups = {frozenset(rank // local for rank in group_ranks(plan, axes, rank)) for rank in range(world)}
        assert {server for group in groups for server in group} == set(range(8))
        pairs[what] = groups
    assert all(len(group) == 1 for group in pairs["links within a server"])
    near, far = pairs["links between servers"], pairs["links between far servers"]
    for server in range(8):
        (one,), (other,) = ([group for group in of if server in group] for of in (near, far))
        assert one & other == {server}
    assert [what for what, _, _ in link_plans(6, 2)] == ["links within a server", "links between servers"]
    assert [what for what, _, _ in link_plans(2, 1)] == ["links between servers"]


def _job(late: int) -> list[Check]:
    import torch.distributed as dist

    if dist.get_rank() == late:
        multiply = module.torch.mm

        def slowly(*given: Any, **options: Any) -> Any:
            time.sleep(0.02)
            return multiply(*given, **options)

        module.torch.mm = slowly
        try:
            return look_together("cpu", None, 4, 2)
        finally:
            module.torch.mm = multiply
    return look_together("cpu", None, 4, 2)


@pytest.mark.slow
def test_a_planted_slow_rank_is_found_by_all(pool: Pool) -> None:
    """Every rank must say the same: they end with one exit code."""
    everyones = pool.run(4, _job, 2)
    assert all(said == everyones[0] for said in everyones)
    names = [one.name for one in everyones[0]]
    assert names == ["one time", "product", "links within a server", "links between servers"]
    product = everyones[0][1]
    assert product.verdict == "fault" and "rank 2 on " in product.said and everyones[0][0].verdict == "ok"


def _doctor(directory: str, out: str) -> int:
    import contextlib
    import os

    with open(f"{out}.{os.environ['RANK']}", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        return run(DoctorOrder(None, "cpu", None, Path(directory), as_json=True))


def test_the_ranks_of_a_job_end_alike_and_the_first_speaks(tmp_path: Path) -> None:
    """The folder is missing on this machine: a fault of the machine ends the other ranks with its code too."""
    assert launch(2, _doctor, str(tmp_path / "gone"), str(tmp_path / "said")) == 1
    told = json.loads((tmp_path / "said.0").read_text())
    (machine,) = told["machines"]
    assert [one["name"] for one in machine["checks"] if one["verdict"] == "fault"] == ["disk"]
    assert told["checks"][0] == {"name": "one software", "verdict": "ok", "said": "the same on 2 ranks", "remedy": ""}
    assert not told["fit"] and (tmp_path / "said.1").read_text() == ""


def test_who_was_slow_for_a_moment_is_no_fault() -> None:
    """Rank 2 is slow in the first two looks of five and then is not; rank 5 always is. Nobody is looked at in vain."""
    looks: list[TakenTimes] = []

    def measure(always: dict[int, float]) -> TakenTimes:
        late = {(2,): 0.030} if len(looks) < 2 else {}
        seconds = {(rank,): 0.010 for rank in range(8)} | late | {(rank,): s for rank, s in always.items()}
        looks.append(TakenTimes("product", "", seconds))
        return looks[-1]

    found = module._slow_each_time(lambda: measure({}), "cpu", HOSTS)
    assert found.verdict == "ok" and len(looks) == 3
    looks.clear()
    found = module._slow_each_time(lambda: measure({5: 0.025}), "cpu", HOSTS)
    assert found.verdict == "fault" and "rank 5 on n3: 25 ms" in found.said and "rank 2" not in found.said
    assert len(looks) == 1 + module.LOOKS_AGAIN
