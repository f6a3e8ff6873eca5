"""The sampler: Euler steps along the predicted velocity, under any plan (Movie Gen 3.1.2, 3.4.2).

    x <- x + (t_next - t) * v(x, t),  from t = 0, pure noise, to t = 1
    v = v_unconditional + guidance * (v_conditional - v_unconditional)

Each rank integrates its own tokens; the velocity is the forward program of a step, run on the same flat shards.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor

from ..kernels.philox import Purpose
from ..parallel.ir.layout import TOKENS
from ..parallel.ir.plan import Plan
from ..parallel.ir.units import nested_index
from ..parallel.runtime.comm import Communicator
from ..parallel.runtime.executor import Executor
from ..parallel.runtime.mesh import Mesh, coordinates
from .config import ModelConfig
from .forward import build_unpatchify, build_velocity
from .runner import as_dtype, tp_slice
from .step import Batch, prepare

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
    is read, never written. ``batch.samples`` are those of one data rank. Raises CinemeshError when the plan does not
    divide the model or the latent.
    """

    def __init__(
        self, config: ModelConfig, plan: Plan, batch: Batch, mesh: Mesh | None, master: Tensor, device: str = "cpu"
    ) -> None:
        self.config, self.plan, self.batch, self.device = config, plan, batch, device
        self.coordinates = mesh.coordinates if mesh else coordinates(plan, 0)
        comm = Communicator(mesh) if mesh else None
        backend = "gloo" if device == "cpu" else "nccl"
        velocity = prepare(build_velocity(config, plan, batch), backend=backend)
        # What was integrated in the statistics dtype is put together in it.
        exact = replace(plan, dtype=cast(Literal["float32", "float64"], plan.stat_dtype))
        whole = prepare(build_unpatchify(config, exact, batch), backend=backend)
        self.velocity = Executor(velocity, self.coordinates, comm, device, shared={"master": master.view(1, -1)})
        self.unpatchify = Executor(whole, self.coordinates, comm, device)

    def sample(
        self, text: dict[str, Tensor], mask: Tensor, seed: int, ids: Tensor, steps: int = 50, guidance: float = GUIDANCE
    ) -> Tensor:
        """Latents [B, C, T, H, W] of this data rank's samples, on every rank that has a part in them.

        ``text`` {encoder: [L, B, W]} and ``mask`` bool [B, L] are whole, ``ids`` int64 [B]. A sample's noise depends on
        (``seed``, its id) alone. ``guidance`` 1 is the conditional model, 0 the unconditional one.
        """
        x = self._noise(seed, ids)
        conditional = {name: tp_slice(value, self.plan, self.coordinates) for name, value in text.items()}
        null = {name: torch.zeros_like(value) for name, value in conditional.items()}
        for t, after in pairwise(linear_quadratic(steps)):
            if guidance == 0:
                v = self._velocity(x, t, null, torch.ones_like(mask))
            else:
                v = self._velocity(x, t, conditional, mask)
                if guidance != 1:
                    unguided = self._velocity(x, t, null, torch.ones_like(mask))
                    v = unguided + guidance * (v - unguided)
            x += (after - t) * v
        self.unpatchify.load("tokens", x)
        self.unpatchify.run()
        return self.unpatchify.buffers["latents"].clone()

    def _noise(self, seed: int, ids: Tensor) -> Tensor:
        """x at t = 0: this rank's tokens [T, B, P], in the statistics dtype."""
        shape = self.velocity.buffers["x_t"].shape
        x = torch.empty(shape, dtype=as_dtype(self.plan.stat_dtype), device=self.device)
        step = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.velocity.kernels["draw_noise"](
            [ids.to(self.device), step],
            [x],
            seed=seed,
            patch=self.config.patch,
            latent=(self.config.channels, *self.batch.latent),
            rank=nested_index(self.plan, TOKENS, self.coordinates),
            purpose=Purpose.SAMPLING,
        )
        return x

    def _velocity(self, x: Tensor, t: float, text: dict[str, Tensor], mask: Tensor) -> Tensor:
        """At (x, t), in the dtype of x."""
        buffers = self.velocity.buffers
        buffers["t"].fill_(t)
        self.velocity.load("x_t", x)
        self.velocity.load("mask", mask)
        for name, value in text.items():
            self.velocity.load(f"text.{name}", value)
        self.velocity.run()
        return buffers["velocity"].to(x.dtype, copy=True)
