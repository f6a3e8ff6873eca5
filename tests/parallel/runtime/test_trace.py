"""A trace says what a step really did: sums by hand, and the order that any run must show."""

from __future__ import annotations

from itertools import pairwise

import pytest
from harness import Pool

from cinemesh.kernels.ops import OPS
from cinemesh.launch.proof.parity import OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.traced import records_of
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Phase, Place
from cinemesh.parallel.ir.span import Span, role
from cinemesh.parallel.passes.liveness import persistent
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.parallel.runtime.trace import traced_step


def test_time_is_split_by_hand() -> None:
    """Of a collective's run, what compute waited for and what it hid; a wait that woke up late is no more than it."""
    hidden, exposed = (Span("g", "all_gather", "tp", 0.0, 0.0, 4.0, waited) for waited in (1.0, 4.5))
    assert (hidden.ran_s, hidden.exposed_s) == (4.0, 1.0)
    assert (exposed.ran_s, exposed.exposed_s) == (4.0, 4.0)


def test_records_of_all_blocks_are_summed_under_one_role() -> None:
    one, other = (
        Span(
            "of any name",
            "all_gather",
            "tp",
            0.0,
            0.0,
            1.0,
            0.0,
            "g",
            Place(Phase.FORWARD, block, block, f"blocks.{block}"),
        )
        for block in (0, 11)
    )
    assert role(one) == role(other) == "blocks.*.forward/g"
    once = Span("x", "all_gather", "tp", 0.0, 0.0, 1.0, 0.0, "flat", Place(Phase.WEIGHTS, title="replicated.weights"))
    assert role(once) == "replicated.weights/flat"


def traced(text: str) -> tuple[list[Span], list[str]]:
    """Spans of a step, and the states that it left otherwise than a step without a trace."""
    case: Case = small_case(Plan.parse(text, dtype="float32"))
    mesh = Mesh(case.plan)
    runners = [StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed) for _ in range(2)]
    for runner in runners:
        runner.initialise(weights.probe_values(case.seed))
        load_batch(case, runner, 0)
        runner.buffers["lr"].fill_(1e-2)
    spans = traced_step(records_of(runners[0].executor, None))
    runners[1].executor.run()
    tensors = [runner.executor.buffers for runner in runners]
    differ = [name for name in persistent(runners[0].program) if not tensors[0][name].equal(tensors[1][name])]
    mesh.close()
    return spans, differ


@pytest.mark.parametrize("text", ["tp=2", "dp_shard=2,prefetch=1", "tp=2,fused_tp=true"])
def test_every_record_is_in_the_trace_of_a_real_step(pool: Pool, text: str) -> None:
    case = small_case(Plan.parse(text, dtype="float32"))
    program = prepare(build_step(case.config, case.plan, case.batch, OPTIMIZER, seed=case.seed), backend="gloo")
    ops = [part for op in program.ops for part in op.parts]  # on gloo, fused records run as their parts
    for spans, differ in pool.run(2, traced, text):
        assert differ == [], "a trace changes nothing"
        assert [span.name for span in spans] == [op.name for op in ops]
        compute = [span for span in spans if span.lane == "compute"]
        assert all(a.end_s <= b.start_s for a, b in pairwise(compute)), "one thread computes"
        waits = {op.waits_for: s for op, s in zip(ops, spans, strict=True) if op.is_wait}
        for span in spans:
            assert span.issued_s <= span.start_s <= span.end_s and span.waited_s >= 0
            if span.kind not in OPS and span.kind != "wait":
                wait = waits[span.name]
                assert span.issued_s <= wait.start_s and span.end_s <= wait.end_s
                assert 0 <= span.exposed_s <= span.ran_s
