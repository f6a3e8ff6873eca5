"""Steps of several shapes on the same weights: one program and one captured step a bucket, one arena for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import CinemeshError
from ..kernels.reference import Kernel
from ..memory import uncollected
from ..parallel.ir.nccl_stack import Capture
from ..parallel.ir.records import Space
from ..parallel.runtime.frozen import Frozen
from ..parallel.runtime.mesh import Mesh, backend_of
from .blueprint import Blueprint, BuildSteps, build_here
from .config import latent_text
from .inputs import LATENTS
from .runner import Batch, StepRunner

Latent = tuple[int, int, int]


class BucketRunner:
    """One :class:`StepRunner` a blueprint, which differ in their shapes; states are shared.

    ``first`` is the runner of the shape that needs most memory; whatever is read of the states may be read of it.
    Each shape has its own samples. All micro-batches of a step are of one shape: the one that was loaded last.
    ``build``: who builds the programs. Raises CinemeshError when two buckets have the same latent, and as StepRunner.
    """

    @uncollected()
    def __init__(
        self,
        blueprints: Sequence[Blueprint],
        mesh: Mesh | None,
        *,
        device: str = "cpu",
        kernels: dict[str, Kernel] | None = None,
        slot: Tensor | None = None,
        build: BuildSteps = build_here,
    ) -> None:
        latents = [blueprint.batch.latent for blueprint in blueprints]
        if not latents or len({*latents}) != len(latents):
            raise CinemeshError(f"buckets {[*map(latent_text, latents)]}", remedy="name at least one, each latent once")
        steps = zip(blueprints, build(blueprints), strict=True)
        self.runners: dict[Latent, StepRunner] = {}
        last: StepRunner | None = None
        for of, step in sorted(steps, key=lambda one: -one[1].arenas[Space.DEVICE].total_bytes):
            assert of.marked == (slot is not None) and of.backend == backend_of(device)
            options: dict[str, Any] = {"device": device, "kernels": kernels, "slot": slot, "beside": last}
            options |= {"program": step.program, "placement": step.arenas}
            last = self.runners[of.batch.latent] = StepRunner(
                of.config, of.plan, of.batch, of.optimizer, mesh, **options
            )
        self.first = self.current = next(iter(self.runners.values()))
        self.buffers = self.first.buffers

    def capture(self, mode: Capture = "auto") -> str | None:
        """As :meth:`StepRunner.capture`, for every bucket: all replay or none does."""
        for runner in self.runners.values():
            runner.pool = self.first.pool  # made by the first's capture
            if (failure := runner.capture(mode)) is not None:
                for other in self.runners.values():
                    other.replay = None
                return f"bucket {latent_text(runner.batch.latent)}, {failure}"
        return None

    def report(self) -> str:
        """How many captured steps there are, and what they hold beside the states."""
        captured = [runner.replay for runner in self.runners.values() if runner.replay is not None]
        arena = self.first.executor.arena.numel()
        own = sum(r.workspace.numel() + r.constant_bytes if isinstance(r, Frozen) else r.pool_bytes for r in captured)
        return (
            f"{_counted(len(self.runners), 'bucket')}, {_counted(len(captured), 'captured step')}; one arena of "
            f"{arena / 1e6:.1f} MB, workspace and constants {own / 1e6:.1f} MB"
        )

    def load(self, micro_batch: int, batch: Batch) -> None:
        """As :meth:`StepRunner.load`. Raises CinemeshError for latents of a shape that has no bucket."""
        t, h, w = batch[LATENTS].shape[2:]
        runner = self.runners.get((t, h, w))
        if runner is None:
            raise CinemeshError(
                f"a batch of latents {latent_text((t, h, w))} has no bucket",
                remedy=f"buckets are {', '.join(map(latent_text, self.runners))}: steps are captured when a run "
                "starts, so name it then",
            )
        assert micro_batch == 0 or runner is self.current, "micro-batches of one step have one shape"
        self.current = runner
        runner.load(micro_batch, batch)

    def step(self, lr: float, watch: Callable[[int], None] | None = None, *, replays: bool = True) -> None:
        """One optimizer update on what was loaded last; the rest as :meth:`StepRunner.step`."""
        self.current.step(lr, watch, replays=replays)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
