"""Parity: what a plan's program computed against what the plain autograd model computes.

[Note: step by step] Both start from the same weights. Then the reference starts every step from the weights that the
plan holds, and applies AdamW, with moments of its own, to the plan's gradient. AdamW divides an element by its own
size: one rounded element near zero moves a weight by twice the learning rate (float32), or by as many digits fewer as
the element is small (float64, 1e-10 once in some hundred runs), and every later number with it. Step by step nothing is
left out: a step that is right from where it started, whatever the step, is a run that is right. What is left to bound
is the rounding of one step (``bounds.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...model import weights as weights_by_name
from ...model.config import ModelConfig, parameters, trained
from ...model.inputs import PLACES, BatchShape, training_inputs
from ...model.reference import Reference, training_loss
from ...model.runner import StepRunner, data_share
from ...model.step import Optimizer, unit_layout
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Space
from ...parallel.passes.liveness import lifetimes, persistent
from ...parallel.runtime import ledger
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.mesh import Mesh
from ...parallel.runtime.witness import Witness
from ..progress import Begin, each

LR = 1e-2
# Clipping is active on these shapes, and the EMA moves visibly: by its warm-up (2/11) first, then by its decay.
OPTIMIZER = Optimizer(clip_norm=0.5, ema_decay=0.2)
SEED = 11

Named = dict[str, Tensor]


@dataclass
class Case:
    """What is verified: a small model and batch that the plan divides. ``samples``: of one data rank."""

    plan: Plan
    config: ModelConfig
    samples: int
    latent: tuple[int, int, int]
    steps: int = 3
    seed: int = SEED
    remarks: list[str] = field(default_factory=list)

    @property
    def batch(self) -> BatchShape:
        return BatchShape(self.samples, self.latent)

    def on_one_rank(self) -> Case:
        """The same model, batch and dtype without any parallelism."""
        plan = self.plan.with_degrees(tp=1, cp=1, dp_shard=1, dp_replicate=1)
        return replace(self, plan=plan, samples=self.samples * self.plan.data_ranks)


def global_batch(case: Case, step: int, micro_batch: int) -> Named:
    """Every input of the whole micro-batch, by name: the same on every rank. Every sample id comes twice in it."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    batch: Named = {}
    for given in training_inputs(case.config, case.plan, case.batch):
        if given.name == PLACES:
            batch[PLACES] = torch.arange(given.shape[0]) + given.shape[0] * micro_batch
        elif given.dtype == "int64":
            first = given.shape[0] * (step * case.plan.micro_batches + micro_batch)
            batch[given.name] = torch.arange(given.shape[0]) // 2 + first
        elif given.dtype == "bool":  # keys that count, at least one a sample
            batch[given.name] = torch.rand(given.shape, generator=generator) > 0.3
            batch[given.name][:, 0] = True
        else:
            batch[given.name] = torch.randn(given.shape, generator=generator, dtype=torch.float64)
    return batch


# -- what ran ---------------------------------------------------------------------------------------------------------


@dataclass
class RankRun:
    """What one rank of the plan computed on ``device``, as flat float64 shards on the CPU, and what was seen of it.

    ``workspace_bytes``: the most that a kernel of the device may take besides its outputs. ``gradients`` one a step,
    before clipping; ``weights`` at the start and after every step; ``ema`` likewise.
    """

    coordinates: dict[str, int]
    device: str = "cpu"
    workspace_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    ema: list[Tensor] = field(default_factory=list)
    ledger_difference: str | None = None
    peak_bytes: int = 0
    live_bytes_equal: bool = True


def load_batch(case: Case, runner: StepRunner, step: int) -> None:
    """This rank's part of every micro-batch of a step."""
    position = runner.coordinates
    for micro_batch in range(case.plan.micro_batches):
        inputs = training_inputs(case.config, case.plan, case.batch)
        batch = global_batch(case, step, micro_batch)
        runner.load(micro_batch, data_share(batch, inputs, case.plan, position))


def run_rank(
    case: Case,
    mesh: Mesh | None = None,
    runner: StepRunner | None = None,
    *,
    planned: Program | None = None,
    watched: bool = True,
    begin: Begin = lambda _: None,
) -> RankRun:
    """Run the case on this rank, watched from outside on the last step, in which what is dead is overwritten.

    ``begin`` is told of every step.
    Doors for tests: a ``runner`` with a fault in it, the program that it should have run, and ``watched``.
    """
    runner = runner or StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(weights_by_name.probe_values(case.seed))
    program, executor = runner.program, runner.executor
    optimizer_record = next(i for i, op in enumerate(program.ops) if op.kind == "adamw")
    lives, on_host = lifetimes(program, workspace=executor.workspace), lifetimes(program, Space.HOST)
    run = RankRun(runner.coordinates, executor.device, max(lives.workspace_bytes))

    def copy(tensor: Tensor) -> Tensor:
        with _disable_current_modes():  # this copy is not the step's
            return tensor.to("cpu", torch.float64, copy=True).view(-1)

    def note_gradient(i: int) -> None:
        if i == optimizer_record:
            run.gradients.append(copy(executor.tensor(program.ops[i].inputs[4])))

    def overwrite(names: Iterable[str]) -> None:
        """Every bit set is a NaN: whoever reads what is dead, or not yet written, ends with one."""
        with _disable_current_modes():
            for name in names:
                executor.tensor(name).view(-1).view(torch.uint8).fill_(0xFF)

    run.weights.append(copy(runner.buffers["master"]))
    run.ema.append(copy(runner.buffers["ema"]))
    for step in each(range(case.steps), begin, lambda step: f"step {step + 1}"):
        load_batch(case, runner, step)
        if watched and step == case.steps - 1:
            alive = [executor.buffers[name] for name in persistent(program)]
            held_bytes = lives.persistent_bytes + executor.placement.total_bytes + executor.host_placement.total_bytes
            if isinstance(runner.replay, Frozen):
                alive.append(runner.replay.workspace)
                held_bytes += runner.replay.workspace.numel()
            arenas = [executor.arena, executor.host.arena]
            witness = Witness([*alive, *arenas], held_bytes + max(lives.workspace_bytes), executor.host.arena)
            overwrite([*executor.placement.offsets, *executor.host_placement.offsets])
            executor.host.record = True
            if runner.comm is not None:
                runner.comm.record = True

            def watch(i: int, witness: Witness = witness, held_bytes: int = held_bytes) -> None:
                run.live_bytes_equal = run.live_bytes_equal and witness.settles_at(held_bytes)
                note_gradient(i)
                overwrite([*lives.free[i], *on_host.free[i]])

            with witness:
                runner.step(LR, watch)
            _note_what_was_seen(case, runner, witness, planned or program, run)
        else:
            runner.step(LR, note_gradient)
        run.losses.append(runner.loss.item())
        run.norms.append(runner.gradient_norm.item())
        run.weights.append(copy(runner.buffers["master"]))
        run.ema.append(copy(runner.buffers["ema"]))
    return run


def _note_what_was_seen(case: Case, runner: StepRunner, witness: Witness, planned: Program, run: RankRun) -> None:
    """Both ledgers against the program's: what the dispatcher saw, and what ``comm.py`` and ``host.py`` wrote."""
    wanted = ledger.expected(planned)
    run.peak_bytes = witness.peak_bytes
    run.ledger_difference = ledger.difference(witness.entries(case.plan), wanted)
    if run.ledger_difference is None and runner.comm is not None:
        run.ledger_difference = ledger.difference([*runner.comm.ledger, *runner.executor.host.ledger], wanted)


# -- what should have run ---------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """Whole tensors by name, one entry a step. ``weights``: what the step started from, EMA included."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Named] = field(default_factory=list)
    weights: list[Named] = field(default_factory=list)
    updates: list[Named] = field(default_factory=list)


def whole(case: Case, members: list[RankRun]) -> Trajectory:
    """What the ranks of one replica computed together."""
    units = unit_layout(case.config, case.plan)

    def collect(what: str, step: int) -> Named:
        return weights_by_name.collect([(run.coordinates, getattr(run, what)[step]) for run in members], units)

    states = [
        collect("weights", step) | {_ema(name): value for name, value in collect("ema", step).items()}
        for step in range(case.steps + 1)
    ]
    return Trajectory(
        members[0].losses,
        members[0].norms,
        [collect("gradients", step) for step in range(case.steps)],
        states[:-1],
        [{n: after[n] - before[n] for n in before} for before, after in itertools.pairwise(states)],
    )


def _ema(name: str) -> str:
    return f"EMA of {name}"


def starting_weights(case: Case) -> Named:
    """What every plan of the case begins with and trains, EMA included, in float64."""
    everything = _begun(case)
    values = {row.name: everything[row.name] for row in trained(case.config)}
    return values | {_ema(name): value.clone() for name, value in values.items()}


def _begun(case: Case) -> Named:
    return weights_by_name.full(parameters(case.config), weights_by_name.probe_values(case.seed), torch.float64)


def run_reference(case: Case, followed: Trajectory, dtype: torch.dtype = torch.float64) -> Trajectory:
    """Autograd, ``clip_grad_norm_``, ``torch.optim.AdamW`` and EMA in ``dtype`` on one process.

    Every step starts from the weights of ``followed``, and AdamW gets its gradients: see [Note: step by step].
    """
    model = Reference(case.config).to(dtype)
    model.load_state_dict(_begun(case))
    model.requires_grad_(False)
    table = trained(case.config)
    named = {row.name: model.get_parameter(row.name).requires_grad_() for row in table}
    groups = [
        {"params": [named[r.name] for r in table if r.decay == decay], "weight_decay": rate}
        for decay, rate in ((True, OPTIMIZER.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    run = Trajectory()
    for step, before in enumerate(followed.weights):
        model.load_state_dict({name: before[name] for name in named}, strict=False)
        adamw.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for micro_batch in range(case.plan.micro_batches):
            batch = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in global_batch(case, step, micro_batch).items()
            }
            loss = training_loss(model, batch, case.seed, step) / case.plan.micro_batches
            loss.backward()
            total += loss.detach()
        run.losses.append(total.item())
        run.gradients.append({n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None})
        run.norms.append(math.hypot(*(gradient.norm().item() for gradient in run.gradients[-1].values())))
        for name, parameter in named.items():
            parameter.grad = followed.gradients[step][name].to(dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(named.values(), OPTIMIZER.clip_norm)
        adamw.step()
        now = {name: parameter.detach().clone() for name, parameter in named.items()}
        decay = min(OPTIMIZER.ema_decay, (2 + step) / (11 + step))  # (1 + n) / (10 + n) at update n = step + 1
        now |= {_ema(n): decay * before[_ema(n)] + (1 - decay) * now[n] for n in named}
        run.weights.append(before)
        run.updates.append({name: now[name] - before[name] for name in now})
    return run
