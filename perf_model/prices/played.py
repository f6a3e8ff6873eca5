"""The whole step of one plan, built, priced and played record by record: no extrapolation (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.flops import hardware_flops
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.passes.device_memory import Workspaces
from ...parallel.passes.pipeline import prepare
from ..clusters.cluster import Cluster
from .encoders import FrozenCost
from .footprint import ByteStack, Footprint, footprint, stack, workspaces
from .models import PriceModels
from .timeline import Tape, Timeline, play, price


@dataclass(frozen=True)
class PlayedStep:
    """``step_s``: with the frozen encoders, and the stragglers of the plan's ranks. ``workspaces``: of its kernels."""

    plan: Plan
    batch: BatchShape
    program: Program
    tape: Tape
    timeline: Timeline
    footprint: Footprint
    workspaces: Workspaces
    step_s: float
    frozen: FrozenCost | None = None

    @property
    def samples(self) -> int:
        """Of the step, on all ranks."""
        return self.batch.samples * self.plan.data_ranks * self.plan.micro_batches

    @property
    def stack(self) -> ByteStack:
        """Live bytes while every record runs."""
        return stack(self.program, self.workspaces)

    @property
    def hardware_flops(self) -> int:
        """Of the matrix products that one rank runs."""
        return hardware_flops(self.program)

    @property
    def gpu_s_per_sample(self) -> float:
        """What one sample costs, whatever the GPUs and the batch."""
        return self.step_s * self.plan.world_size / self.samples

    def played_as(self, timeline: Timeline, cluster: Cluster) -> float:
        """Seconds of the step if its records were played so: with the encoders as they are, and stragglers."""
        return self.step_s + (timeline.step_s - self.timeline.step_s) * cluster.spread.factor(self.plan.world_size)


def play_step(
    config: ModelConfig,
    plan: Plan,
    batch: BatchShape,
    on: Cluster | PriceModels,
    frozen: FrozenCost | None = None,
    *,
    graphs: int = 1,
    marked: bool = False,
) -> PlayedStep:
    """Build, price and play every record of a step. ``marked``: its records tell a watchdog where it stands.

    Raises CinemeshError for a plan that cannot run it.
    """
    models = on if isinstance(on, PriceModels) else PriceModels.of(on)
    program = prepare(build_step(config, plan, batch), backend=models.cluster.backend, marked=marked)
    return play_program(program, batch, models, frozen, graphs=graphs)


def play_program(
    program: Program,
    batch: BatchShape,
    on: Cluster | PriceModels,
    frozen: FrozenCost | None = None,
    *,
    graphs: int = 1,
) -> PlayedStep:
    """Price and play a program that was prepared, one of ``graphs`` that a run captures.

    Raises CinemeshError where host memory is too small for it.
    """
    models = on if isinstance(on, PriceModels) else PriceModels.of(on)
    cluster, plan = models.cluster, program.plan
    held = footprint(program, cluster, frozen.bytes if frozen else 0, graphs)
    cluster.check_host(held.host_bytes)
    tape = price(program, models.compute, models.network, cluster)
    timeline = play(tape)
    return PlayedStep(
        plan,
        batch,
        program,
        tape,
        timeline,
        held,
        workspaces(cluster),
        (timeline.step_s + (frozen.seconds if frozen else 0.0)) * cluster.spread.factor(plan.world_size),
        frozen,
    )
