"""What a step shows when it runs on this process alone, on a case small enough.

Under a dispatch mode: no host read, no allocation above what an op declares, no write outside its outputs, no
collective that the program does not have. From two frozen steps with other samples, learning rate and step number: call
for call the same, so nothing that changes between steps is baked in.
"""

from __future__ import annotations

import torch

from ...kernels.ops import OPS
from ...kernels.reference import Kernel
from ...model.runner import StepRunner
from ...model.weights import probe_values
from ...parallel.ir.check import Finding
from ...parallel.ir.collectives import FUSED
from ...parallel.passes.liveness import lifetimes
from ...parallel.runtime.alone import Alone
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.guard import Guard
from ...parallel.runtime.ledger import difference, expected
from ...parallel.runtime.tape import same
from .parity import OPTIMIZER, Case, load_batch


def lint_step(case: Case, kernels: dict[str, Kernel] | None = None, comm: Alone | None = None) -> list[Finding]:
    """What a step shows when it runs. Doors for tests: ``kernels`` and ``comm`` with a fault in them."""
    comm = comm or Alone(case.plan)
    slot = torch.zeros(1, dtype=torch.int64)  # as a captured step has marks
    options = {"seed": case.seed, "kernels": kernels, "comm": comm, "slot": slot}
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, **options)
    runner.initialise(probe_values(case.seed))
    return _guarded(case, runner, comm) + _two_frozen_steps(case, runner)


def _guarded(case: Case, runner: StepRunner, comm: Alone) -> list[Finding]:
    load_batch(case, runner, 0)
    runner.buffers["lr"].fill_(1e-2)
    runner.executor.host.record = True
    found: list[Finding] = []
    with torch.no_grad():
        for record, workspace in zip(runner.executor.records, lifetimes(runner.program).workspace_bytes, strict=True):
            with Guard(record, workspace) as guard:
                record.run()
            if record.op.kind in OPS or record.op.kind in FUSED:
                found += guard.findings
    ran = [*comm.ledger, *runner.executor.host.ledger]
    if (wrong := difference(ran, expected(runner.program))) is not None:
        found.append(Finding("order", "the step", wrong))
    return found


def _two_frozen_steps(case: Case, runner: StepRunner) -> list[Finding]:
    """Other samples, learning rate and step number: the calls may not know."""
    taken: list[Frozen] = []
    for step in (1, 2):
        load_batch(case, runner, step)
        runner.buffers["lr"].fill_(1e-2 / step)
        taken.append(Frozen(runner.executor))
        taken[-1].record()
    found: list[Finding] = []
    for part, first, second in zip(taken[0].parts, taken[0].segments, taken[1].segments, strict=True):
        if first is None or second is None:
            continue
        name = f"{part.op.name} ({part.op.kind})"
        if len(first.calls) != len(second.calls):
            found.append(
                Finding("baked in", name, f"{len(first.calls)} calls in one step, {len(second.calls)} in the next")
            )
            continue
        for a, b in zip(first.calls, second.calls, strict=True):
            if not same(a, b):
                found.append(Finding("baked in", name, f"{a.op} is not the same call in the next step"))
    return found
