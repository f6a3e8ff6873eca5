"""The sampler: Euler steps along the predicted velocity, under any plan (Movie Gen 3.1.2, 3.4.2).

    x <- x + (t_next - t) * v(x, t),  from t = 0, pure noise, to t = 1
    v = v_unconditional + guidance * (v_conditional - v_unconditional)

Each rank integrates its own tokens; the velocity is the forward program of a step, run on the same flat shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor

from ..kernels.dtypes import TORCH_DTYPES
from ..kernels.philox import Purpose
from ..kernels.reference import Kernel
from ..parallel.ir.layout import TOKENS
from ..parallel.ir.plan import Plan
from ..parallel.ir.units import nested_index
from ..parallel.passes.device_memory import bytes_beside
from ..parallel.passes.pipeline import prepare
from ..parallel.runtime.comm import Communicator
from ..parallel.runtime.executor import Executor
from ..parallel.runtime.mesh import Mesh, backend_of, coordinates
from .config import ModelConfig
from .forward import build_unpatchify, build_velocity
from .inputs import LATENTS, MASK, BatchShape, text_input
from .runner import Batch, StepRunner, load_inputs, named_buffers

EMULATED_STEPS = 250  # 3.4.2: 50 linear-quadratic steps stand for 250 linear ones
GUIDANCE = 7.5  # 3.1.2, text-to-video


def linear_quadratic(steps: int, emulated: int = EMULATED_STEPS) -> list[float]:
    """The ``steps`` + 1 times from 0 to 1: first half those of an ``emulated``-step linear schedule, then quadratic.

    With L = steps // 2 and Q = steps - L:  t_i = i / N + (1 - steps / N) * (max(0, i - L) / Q)**2.  At the join, value
    and slope are the linear part's. For an odd ``steps`` the quadratic part has one step more; at ``steps`` >= N there
    is nothing to emulate and all steps are equal. The paper gives words and a figure; this is the reading of the
    public implementations (Mochi, diffusers), whose threshold tau is L / N.
    """
    assert steps >= 1
    emulated = max(emulated, steps)
    linear = steps // 2
    bend = 1 - steps / emulated
    times = [i / emulated + bend * (max(0, i - linear) / (steps - linear)) ** 2 for i in range(steps)]
    return [*times, 1.0]


class Sampler:
    """Velocity program, its executor and tensors, on one rank. ``mesh`` is None on one process.

    ``master`` is this rank's flat shard of weights in the plan's statistics dtype, any state of a runner (``ema``); it
    is read, never written. ``batch.samples`` are those of one data rank. ``beside``: a runner of the same plan that
    does not run meanwhile: communicators, kernels and arena are its own. Raises CinemeshError when the plan does not
    divide the model or the latent, and when a CUDA device has too little memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        batch: BatchShape,
        mesh: Mesh | None,
        master: Tensor,
        device: str = "cpu",
        *,
        kernels: dict[str, Kernel] | None = None,
        beside: StepRunner | None = None,
    ) -> None:
        self.config, self.plan, self.batch, self.device = config, plan, batch, device
        self.coordinates = mesh.coordinates if mesh else coordinates(plan, 0)
        to_come = bytes_beside(plan, 0, graphs=0)
        arena: Tensor | None = None
        comm = Communicator(mesh) if mesh else None
        if beside is not None:
            comm, kernels, arena, to_come = beside.comm, beside.executor.kernels, beside.executor.arena, {}
        backend = backend_of(device)
        velocity = prepare(build_velocity(config, plan, batch), backend=backend)
        # What was integrated in the statistics dtype is put together in it, by a program without blocks.
        exact = replace(
            plan, dtype=cast(Literal["float32", "float64"], plan.stat_dtype), recompute_last=None, last_blocks=0
        )
        whole = prepare(build_unpatchify(config, exact, batch), backend=backend)
        shared = {velocity.states["master"]: master.view(1, -1)}
        place = self.coordinates, comm, device
        self.velocity = Executor(velocity, *place, kernels, shared, arena, beside=to_come)
        self._buffers = named_buffers(self.velocity)
        self.unpatchify = Executor(whole, *place, kernels, arena=self.velocity.arena)

    def sample(
        self,
        conditions: Batch,
        seed: int,
        ids: Tensor,
        steps: int = 50,
        guidance: float = GUIDANCE,
        watch: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Latents [B, C, T, H, W] of this data rank's samples, on every rank that has a part in them.

        ``conditions``: those of ``condition_inputs`` by name, not split over tp; ``ids`` int64 [B]. A sample's noise
        depends on (``seed``, its id) alone: step and place are 0. ``guidance`` 1 is the model with the caption, 0 that
        without. ``watch`` is told the step, from 0, that begins.
        """
        x = self._noise(seed, ids)
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        null = dict(conditions) | {MASK: torch.ones_like(conditions[MASK])}
        for encoder in self.config.encoders:
            name = text_input(encoder.name)
            null[name] = torch.zeros_like(conditions[name])
        for step, (t, after) in enumerate(pairwise(linear_quadratic(steps))):
            watch(step)
            if guidance == 0:
                v = self._velocity(x, t, null)
            else:
                v = self._velocity(x, t, conditions)
                if guidance != 1:
                    unguided = self._velocity(x, t, null)
                    v = unguided + guidance * (v - unguided)
            x += (after - t) * v
        whole = named_buffers(self.unpatchify)
        whole["tokens"].copy_(x)
        self.unpatchify.run()
        return whole[LATENTS].clone()

    def _noise(self, seed: int, ids: Tensor) -> Tensor:
        """x at t = 0: this rank's tokens [T, B, P], in the statistics dtype."""
        shape = self._buffers["x_t"].shape
        x = torch.empty(shape, dtype=TORCH_DTYPES[self.plan.stat_dtype], device=self.device)
        ids, step = ids.to(self.device), torch.zeros(2, dtype=torch.int64, device=self.device)
        self.velocity.kernels["draw_noise"](
            [ids, torch.zeros_like(ids), step],
            [x],
            seed=seed,
            patch=self.config.patch,
            latent=(self.config.channels, *self.batch.latent),
            rank=nested_index(self.plan, TOKENS, self.coordinates),
            purpose=Purpose.SAMPLING,
        )
        return x

    def _velocity(self, x: Tensor, t: float, conditions: Batch) -> Tensor:
        """At (x, t), in the dtype of x."""
        self._buffers["t"].fill_(t)
        self._buffers["x_t"].copy_(x)
        load_inputs(self.velocity, conditions)
        self.velocity.run()
        return self._buffers["velocity"].to(x.dtype, copy=True)
