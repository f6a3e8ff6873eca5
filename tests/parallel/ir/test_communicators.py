"""A rank holds a communicator for every collective that it runs, and none that it does not, set up as the plan says."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool

from cinemesh.launch.proof.parity import OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.communicators import BRANCHES, GROUPS, communicator, communicators, host_groups
from cinemesh.parallel.ir.fields import STREAMS
from cinemesh.parallel.ir.layout import WORLD
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.mesh import Mesh, options, start_job


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("tp=1", 0),
        ("tp=2", 3),
        ("cp=2,kv_slices=3", 5),
        ("dp_replicate=2", 2),
        ("tp=2,cp=2,dp_shard=2,dp_replicate=2", 7),
    ],
)
def test_communicators_are_those_that_the_step_uses(text: str, count: int) -> None:
    case = small_case(Plan.parse(text, dtype="float32"), max_procs=16)
    program = prepare(build_step(case.config, case.plan, case.batch), backend="nccl")
    used = {communicator(op): case.plan.size(op.axes) for op in program.ops if op.comm is not None and not op.is_wait}
    named = communicators(case.plan)
    assert {one.name: one.ranks for one in named} == used
    assert len(named) == count


def test_communicators_of_the_paper_plan_at_6144_ranks() -> None:
    ranks = {one.name: one.ranks for one in communicators(Plan(tp=4, cp=2, dp_shard=768))}
    assert ranks == {
        "tp": 4,
        "cp": 2,
        "dp_shard*cp:all_gather": 1536,
        "dp_shard*cp:reduce_scatter": 1536,
        "dp_shard*cp*tp": 6144,
        "dp_replicate*dp_shard*cp*tp": 6144,
    }


@pytest.mark.parametrize("ranks", [1, 2, 5, 6, 8, 16, 61, 6144])
def test_the_tree_of_hosts_joins_all_ranks_in_their_order(ranks: int) -> None:
    """A rank that a group waits for and that does not come is a hang; one left out or met twice a wrong result."""
    groups = {rank: host_groups(ranks, rank) for rank in range(ranks)}
    members: Counter[tuple[int, ...]] = Counter()
    for at in (0, 1):  # the rounds in which they are made
        made = Counter(tuple(own[at]) for own in groups.values())
        assert all(len(group) == seen for group, seen in made.items()), "a group waits for a rank that makes another"
        members.update(made)
    assert max(map(len, members)) <= BRANCHES + 1
    below = {group[0]: group[1:] for group in members if len(group) > 1}
    hops = 0

    def behind(rank: int, depth: int) -> list[int]:
        nonlocal hops
        hops = max(hops, depth)
        return [rank, *(one for child in below.get(rank, ()) for one in behind(child, depth + 1))]

    assert behind(0, 0) == list(range(ranks))
    assert hops <= math.ceil(math.log(max(ranks, 2) * (BRANCHES - 1) + 1, BRANCHES)) - 1  # of a full tree


# -- how they are made ------------------------------------------------------------------------------------------------

SET = Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2, tp_ctas=6, unit_ctas=4, normal_priority=("cp", "unit"))


def nccl_options() -> Any:
    """What ``dist.ProcessGroupNCCL.Options`` makes, which a CPU build of torch lacks: names and defaults of 2.13."""
    config = SimpleNamespace(blocking=1, cga_cluster_size=4, min_ctas=-1, max_ctas=-1)
    return SimpleNamespace(config=config, is_high_priority_stream=False, _timeout=None)


def test_every_group_is_made_as_the_plan_says() -> None:
    made = {one.name: options(one, timedelta(seconds=7), nccl_options) for one in communicators(SET)}
    assert {name: (o.config.min_ctas, o.config.max_ctas) for name, o in made.items()} == {
        "tp": (6, 6),
        "cp": (-1, -1),
        "dp_shard*cp:all_gather": (4, 4),
        "dp_shard*cp:reduce_scatter": (4, 4),
        "dp_shard*cp*tp": (-1, -1),
        "dp_replicate": (-1, -1),
        "dp_replicate*dp_shard*cp*tp": (-1, -1),
    }
    late = {name for name, o in made.items() if not o.is_high_priority_stream}
    assert late == {"cp", "dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter"}
    assert all(o._timeout == timedelta(seconds=7) for o in made.values())


def test_torch_names_them_so() -> None:
    """The stand-in's names, in torch's own stubs: a CPU build has no more of NCCL than these."""
    stubs = (Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text()
    nccl = stubs.partition("class ProcessGroupNCCL(Backend):")[2].partition("\nclass ")[0]
    for name in (
        "min_ctas: int",
        "max_ctas: int",
        "config: ProcessGroupNCCL.NCCLConfig",
        "is_high_priority_stream: bool",
    ):
        assert name in nccl, name
    assert "def _timeout(self, val: timedelta)" in stubs


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this build of torch has no NCCL")
def test_nccl_takes_them() -> None:
    made = options(communicators(SET)[0], timedelta(seconds=7), dist.ProcessGroupNCCL.Options)
    assert (made.config.min_ctas, made.config.max_ctas, made.is_high_priority_stream) == (6, 6, True)


def test_the_job_s_group_is_the_one_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs of NCCL alone, and made as the plan says: no group is made again for what the job's own can carry."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: asked.update(rest, backend=backend))
    nccl = SimpleNamespace(Options=nccl_options)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    store: Any = None  # nobody asks it
    start_job(SET, "cuda:1", store, 5, 7.0)
    assert (asked["backend"], asked["rank"], asked["world_size"]) == ("nccl", 5, 16)
    assert asked["pg_options"].is_high_priority_stream and asked["pg_options"]._timeout == asked["timeout"]
    start_job(SET, "cpu", store, 5, 7.0)
    assert asked["backend"] == "gloo" and asked["pg_options"] is None


def groups_of(text: str) -> tuple[int, bool]:
    """Process groups that a mesh makes, and whether that over all ranks is the job's."""
    plan, made = Plan.parse(text), dist.new_group
    with mock.patch.object(dist, "new_group", side_effect=made) as new_group:
        mesh = Mesh(plan)
    shared = mesh.group(WORLD, "all_reduce") is dist.group.WORLD
    mesh.close()
    dist.all_reduce(torch.zeros(1))  # the job's is still there
    return new_group.call_count, shared


def test_a_mesh_makes_every_group_but_the_job_s(pool: Pool) -> None:
    assert pool.run(4, groups_of, "tp=2,cp=2") == [(len(communicators(Plan(tp=2, cp=2))) - 1, True)] * 4


def test_every_stream_goes_before_compute_unless_the_plan_says_otherwise() -> None:
    """Torch's default is the opposite, and the price assumes that a collective starts at once."""
    plan = Plan(tp=2, cp=2, dp_shard=2)
    assert all(options(one, timedelta(1), nccl_options).is_high_priority_stream for one in communicators(plan))


def test_what_a_plan_can_set_are_communicators() -> None:
    assert set(STREAMS.values()) <= {axes for axes, _ in GROUPS}


def test_a_plan_says_what_its_communicators_have() -> None:
    found = {one.name: (one.ctas, one.high_priority) for one in communicators(SET)}
    assert found["tp"] == (6, True) and found["cp"] == (0, False)
    assert found["dp_shard*cp:all_gather"] == found["dp_shard*cp:reduce_scatter"] == (4, False)
    assert found["dp_replicate"] == (0, True)


def said_and_lost(text: str) -> tuple[str, float]:
    """What a rank says when its groups are made, and the loss of a step on them."""
    case: Case = small_case(Plan.parse(text, dtype="float32"))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        mesh = Mesh(case.plan)
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(weights.probe_values(case.seed))
    load_batch(case, runner, 0)
    runner.step(1e-2)
    mesh.close()
    return said.getvalue(), float(runner.loss)


def losses_of_one_job() -> set[float]:
    """The losses of one step, on meshes that were made one after the other."""
    return {said_and_lost(text)[1] for text in ("tp=2,cp=2", "tp=2,dp_shard=2", "tp=2,cp=2")}


def test_a_job_may_make_one_mesh_after_another(pool: Pool) -> None:
    """Torch gives groups of the same ranks the names of those that were destroyed, whose addresses lie in the store."""
    for losses in pool.run(4, losses_of_one_job):
        assert min(losses) > 0.0 and len(losses) == 2  # two global batches


def test_gloo_says_what_is_without_effect_once_and_computes_the_same(pool: Pool) -> None:
    asked = "tp=2,tp_ctas=4,sm_margin=8,normal_priority=tp"
    (first, loss), (second, same) = pool.run(2, said_and_lost, asked)
    plan, sets, _ = first.partition(": without effect on gloo")
    assert sets and plan == "plan: tp_ctas=4, sm_margin=8, normal_priority=tp" and first.count("\n") == 1
    assert second == "" and loss == same
    assert pool.run(2, said_and_lost, "tp=2") == [("", loss)] * 2
