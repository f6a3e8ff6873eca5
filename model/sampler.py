"""The sampler: steps along the predicted velocity, under any plan (Movie Gen 3.1.2, 3.4.2).

    x <- x + (t_next - t) * v(x, t),  from t = 0, pure noise, to t = 1
    v = v_unconditional + guidance * (v_conditional - v_unconditional)

Of another objective than flow matching the step is that of its path (``paths.py``).

Each rank integrates its own tokens; the velocity is the forward program of a step, run on the same flat shards, with
and without the caption in one batch. It may be captured: then each velocity is a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..kernels.dtypes import TORCH_DTYPES
from ..kernels.philox import Purpose
from ..kernels.reference import Kernel
from ..parallel.ir.layout import TOKENS
from ..parallel.ir.nccl_stack import Capture
from ..parallel.ir.plan import Plan
from ..parallel.ir.units import nested_index
from ..parallel.layers.sharded import FROZEN_STATE
from ..parallel.passes.device_memory import bytes_beside
from ..parallel.passes.pipeline import prepare
from ..parallel.runtime.comm import Communicator
from ..parallel.runtime.executor import Executor
from ..parallel.runtime.frozen import Frozen
from ..parallel.runtime.graph import Graph, GraphPool
from ..parallel.runtime.mesh import Mesh, backend_of, coordinates
from .config import ModelConfig
from .forward import SHARES, build_unpatchify, build_velocity
from .inputs import LATENTS, MASK, BatchShape, text_input
from .paths import PATHS
from .runner import Batch, StepRunner, captured, load_inputs, named_buffers
from .solvers import SOLVERS, Solver

GUIDANCE = 7.5  # 3.1.2, text-to-video


class Sampler:
    """Velocity program, its executor and tensors, on one rank. ``mesh`` is None on one process.

    ``master`` is this rank's flat shard of weights in the plan's statistics dtype, any state of a runner (``ema``); it
    is read, never written. ``batch.samples`` are those of one data rank. ``beside``: a runner of the same plan that
    does not run meanwhile: communicators, kernels and arena are its own. ``guidance`` 1 is the model with the caption,
    0 that without: one velocity instead of two. ``frozen``: the shard of weights that ``master`` adds low-rank factors
    to, in the compute dtype. Raises CinemeshError when the plan does not divide the model or the latent, and when a
    CUDA device has too little memory.

    ``apart``, under two replicas: they make the halves of the same guided samples, one each, instead of samples of
    their own.
    """

    def __init__(  # noqa: PLR0913  what a runner takes but for the optimizer, and the guidance
        self,
        config: ModelConfig,
        plan: Plan,
        batch: BatchShape,
        mesh: Mesh | None,
        master: Tensor,
        device: str = "cpu",
        *,
        guidance: float = GUIDANCE,
        kernels: dict[str, Kernel] | None = None,
        beside: StepRunner | None = None,
        frozen: Tensor | None = None,
        apart: bool = False,
    ) -> None:
        self.config, self.plan, self.batch, self.device, self.mesh = config, plan, batch, device, mesh
        self.guidance, self.apart = guidance, apart
        self.halves = 1 if apart or guidance in (0.0, 1.0) else 2
        self.coordinates = mesh.coordinates if mesh else coordinates(plan, 0)
        to_come = bytes_beside(plan, 0, graphs=1)
        arena: Tensor | None = None
        comm = Communicator(mesh) if mesh else None
        if beside is not None:
            comm, kernels, arena, to_come = beside.comm, beside.executor.kernels, beside.executor.arena, {}
        backend = backend_of(device)
        asked = replace(batch, samples=self.halves * batch.samples)
        velocity = prepare(build_velocity(config, plan, asked, apart=apart), backend=backend)
        # What was integrated in the statistics dtype is put together in it, by a program without blocks.
        exact = replace(
            plan, dtype=cast(Literal["float32", "float64"], plan.stat_dtype), recompute_last=None, last_blocks=0
        )
        whole = prepare(build_unpatchify(config, exact, batch), backend=backend)
        shared = {velocity.states["master"]: master.view(1, -1)}
        if frozen is not None:
            shared[velocity.states[FROZEN_STATE]] = frozen.view(1, -1)
        place = self.coordinates, comm, device
        self.velocity = Executor(velocity, *place, kernels, shared, arena, beside=to_come)
        self._buffers = named_buffers(self.velocity)
        self.captioned = not apart or self.coordinates["dp_replicate"] == 0
        if apart:
            self._buffers[SHARES].fill_(guidance if self.captioned else 1 - guidance)
        self.pool = beside.pool if beside is not None else None
        self.replay: Frozen | Graph | None = None
        self.watched: Callable[[int], None] | None = None  # told after every record; velocities are not replayed then
        self.unpatchify = Executor(whole, *place, kernels, arena=self.velocity.arena)

    def capture(self, mode: Capture = "auto") -> str | None:
        """From now on velocities are replayed; answer and error as of :meth:`StepRunner.capture`. Collective."""
        if mode == "off":
            return None
        for name in ("t", "x_t"):
            self._buffers[name].zero_()
        if self.device != "cpu" and self.pool is None:
            self.pool = GraphPool(self.device)
            if self.mesh is not None:
                self.mesh.before_close.append(self.pool.close)
        made, failure = captured(self.velocity, self.pool, self.mesh, mode)
        if failure is None:
            self.replay = made
        return failure

    def sample(
        self,
        conditions: Batch,
        seed: int,
        ids: Tensor,
        times: Sequence[float],
        solver: Solver = SOLVERS["euler"],
        watch: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Latents [B, C, T, H, W] of this data rank's samples, on every rank that has a part in them.

        ``conditions``: those of ``condition_inputs`` by name, not split over tp; ``ids`` int64 [B]; ``times`` from 0 to
        1. A sample's noise depends on (``seed``, its id) alone: step and place are 0. ``watch`` is told the step, from
        0, that begins.
        """
        given = self.given(conditions)
        tokens = nested_index(self.plan, TOKENS, self.coordinates), self.plan.size(TOKENS)
        x = self.noise(seed, ids, self.batch.latent, *tokens)
        path = PATHS[self.config.objective]
        x = path.followed(x, times, solver, lambda x, t: self.velocity_at(x, t, given), watch)
        whole = named_buffers(self.unpatchify)
        whole["tokens"].copy_(x)
        self.unpatchify.run()
        return whole[LATENTS].clone()

    def given(self, conditions: Batch) -> Batch:
        """With the caption, without it, or one half behind the other: embeddings of zero, every key valid.

        On the device, for :meth:`velocity_at`.
        """
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        null = dict(conditions) | {MASK: torch.ones_like(conditions[MASK])}
        text = [text_input(encoder.name) for encoder in self.config.encoders]
        null |= {name: torch.zeros_like(conditions[name]) for name in text}
        if self.halves == 1:
            return conditions if self.guidance and self.captioned else null
        return {name: torch.cat([value, null[name]], int(name in text)) for name, value in conditions.items()}

    def noise(self, seed: int, ids: Tensor, latent: tuple[int, int, int], rank: int, ranks: int) -> Tensor:
        """x at t = 0 of samples ``ids``: a ``rank``'s tokens [T, B, P] of a ``latent``, in the statistics dtype."""
        c = self.config
        wide: dict[str, Any] = {"dtype": TORCH_DTYPES[self.plan.stat_dtype], "device": self.device}
        x = torch.empty(math.prod(latent) // math.prod(c.patch) // ranks, len(ids), c.patch_features, **wide)
        ids, step = ids.to(self.device), torch.zeros(2, dtype=torch.int64, device=self.device)
        self.velocity.kernels["draw_noise"](
            [ids, torch.zeros_like(ids), step],
            [x],
            seed=seed,
            patch=c.patch,
            latent=(c.channels, *latent),
            rank=rank,
            purpose=Purpose.SAMPLING,
        )
        return x

    def velocity_at(self, x: Tensor, t: float, conditions: Batch) -> Tensor:
        """Of this rank's tokens x [T, B, P] at t, guided, in the dtype of x; ``conditions``: from :meth:`given`."""
        self._buffers["t"].fill_(t)
        for half in self._buffers["x_t"].chunk(self.halves, 1):
            half.copy_(x)
        load_inputs(self.velocity, conditions)
        if self.replay is not None and self.watched is None:
            self.replay.run()
        else:
            self.velocity.run(self.watched)
        found = [half.to(x.dtype, copy=True) for half in self._buffers["velocity"].chunk(self.halves, 1)]
        if len(found) == 1:
            return found[0]
        guided, null = found
        return null + self.guidance * (guided - null)
