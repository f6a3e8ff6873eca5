"""What runs before a capture: every kernel and every communicator of a step once, no step, and no state changes.

Seen from outside of the executor: by a TorchDispatchMode, which hears every call of torch, and by the ledger.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Pool
from torch.utils._python_dispatch import TorchDispatchMode

from cinemesh.kernels.ops import OPS
from cinemesh.launch.proof.parity import OPTIMIZER, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime import rehearsal
from cinemesh.parallel.runtime.executor import Executor
from cinemesh.parallel.runtime.mesh import Mesh, coordinates
from cinemesh.parallel.runtime.rehearsal import Rehearsal

STATES = ("master", "exp_avg", "exp_avg_sq", "ema")


class Heard(TorchDispatchMode):
    """Every call of torch that computes, by its name and the forms of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[object]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        flat = [one for value in given for one in (value if isinstance(value, (list, tuple)) else [value])]
        forms = tuple((t.dtype, tuple(t.shape), t.stride()) for t in flat if isinstance(t, torch.Tensor))
        if not str(func).startswith("c10d"):
            self.calls[str(func), forms] += 1
        return func(*args, **(kwargs or {}))


def runner_of(text: str, mesh: Mesh | None) -> StepRunner:
    case = small_case(Plan.parse(text))
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(weights.probe_values(case.seed))
    load_batch(case, runner, 0)
    runner.buffers["lr"].fill_(1e-2)
    return runner


def rehearsed(text: str) -> dict[str, Any]:
    """One rank: what ran before a capture, and in a step."""
    mesh = Mesh(Plan.parse(text))
    runner = runner_of(text, mesh)
    assert runner.comm is not None
    runner.comm.record = True
    before = {name: runner.buffers[name].clone() for name in STATES}
    with Heard() as early:
        ran = Rehearsal().run(runner.executor)
    entries = list(runner.comm.ledger)
    runner.comm.ledger.clear()
    same = all(torch.equal(runner.buffers[name], value) for name, value in before.items())
    updates = runner.updates_done
    load_batch(small_case(Plan.parse(text)), runner, 0)
    with Heard() as step:
        runner.executor.run()
    kinds = {op.name: op.kind for op in runner.program.ops}
    found = {
        "same": same,
        "updates": updates,
        "ran": ran,
        "kinds": sorted({kinds[name] for name in ran} - {*COLLECTIVES}),
        "of_step": sorted({op.kind for op in runner.program.ops if op.kind in OPS}),
        "missing": [str(call) for call in step.calls if call not in early.calls],
        "calls": (early.calls.total(), step.calls.total()),
        "collectives": [(entry.communicator, entry.kind) for entry in entries],
        "in_step": [(entry.communicator, entry.kind) for entry in runner.comm.ledger],
        "records": len(runner.program.ops),
        "norm": runner.gradient_norm.item(),
    }
    mesh.close()
    return found


@pytest.mark.parametrize("text", ["tp=2,cp=2,dtype=float32", "tp=2,dp_shard=2,micro_batches=2,dtype=float32"])
def test_a_rehearsal_makes_every_call_of_a_step_once_and_changes_no_state(text: str, pool: Pool) -> None:
    """A tenth of the calls or fewer would do for 48 blocks; here are two, and micro-batches."""
    ranks = pool.run(4, rehearsed, text)
    for found in ranks:
        assert found["same"] and found["updates"] == 0, "no state may change"
        assert found["kinds"] == found["of_step"] and len(found["kinds"]) > 15
        assert found["missing"] == [], "a call that a step makes first inside its capture"
        assert len(found["ran"]) < found["records"] / 2 and found["calls"][0] < found["calls"][1]
        assert found["norm"] > 0
    early, step = Counter(ranks[0]["collectives"]), Counter(ranks[0]["in_step"])
    assert early.keys() == step.keys() and max(early.values()) <= 2 < max(step.values()), "smallest and largest"
    assert all(found["ran"] == ranks[0]["ran"] for found in ranks), "every rank, the same in the same order"


def test_more_layers_are_rehearsed_by_no_more_records() -> None:
    """What is paid at a start does not grow with the depth of the model, nor twice for what two programs share."""
    case = small_case(Plan.parse("dtype=float32"))

    def executor(layers: int) -> Executor:
        config = replace(case.config, layers=layers)
        program = prepare(build_step(config, case.plan, case.batch, OPTIMIZER), backend="gloo")
        return Executor(program, coordinates(case.plan, 0), None)

    few, many = executor(3), executor(9)
    first = len(Rehearsal().run(few))
    both = Rehearsal()
    assert len(both.run(many)) <= first + 10 < len(few.records) / 2
    assert both.run(many) == []


def test_a_kernel_that_is_left_out_would_be_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness finds what a rehearsal that looks at kinds alone, and not at shapes, does not run."""
    monkeypatch.setattr(rehearsal, "_form", lambda tensor: ())
    runner = runner_of("dtype=float32", None)
    with Heard() as early:
        Rehearsal().run(runner.executor)
    with Heard() as step:
        runner.executor.run()
    assert [call for call in step.calls if call not in early.calls]
