"""One rank of a training step: program, executor and tensors, from a model, a plan and a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.reference import Kernel
from ..parallel.comm import Communicator
from ..parallel.executor import Executor
from ..parallel.mesh import Mesh, coordinates
from ..parallel.plan import Plan
from ..parallel.program import Program
from .config import CAPTION_DROPOUT, ModelConfig
from .step import Batch, Optimizer, build_step, prepare, unit_layout
from .weights import Values, fill_shard


class StepRunner:
    """Holds the flat states of this rank and runs steps on them.

    ``mesh`` is None on one process. ``program`` may be given (tests alter one after it was built).
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        batch: Batch,
        optimizer: Optimizer,
        mesh: Mesh | None,
        *,
        seed: int = 0,
        caption_dropout: float = CAPTION_DROPOUT,
        device: str = "cpu",
        program: Program | None = None,
        kernels: dict[str, Kernel] | None = None,
        comm: Communicator | None = None,
    ) -> None:
        self.config, self.plan, self.batch, self.mesh = config, plan, batch, mesh
        self.units = unit_layout(config, plan)
        if program is None:
            built = build_step(config, plan, batch, optimizer, seed=seed, caption_dropout=caption_dropout)
            program = prepare(built, backend="gloo" if device == "cpu" else "nccl")
        self.program = program
        self.coordinates = mesh.coordinates if mesh else coordinates(plan, 0)
        self.comm = comm or (Communicator(mesh) if mesh else None)
        self.executor = Executor(program, self.coordinates, self.comm, device, kernels)
        self.buffers = self.executor.buffers

    def initialise(self, values: Values) -> None:
        """Master weights by name, EMA equal to them, moments and counters zero."""
        fill_shard(self.buffers["master"], self.units, self.coordinates, values)
        self.buffers["ema"].copy_(self.buffers["master"])
        for name in ("exp_avg", "exp_avg_sq", "counters"):
            self.buffers[name].zero_()

    def load(self, micro_batch: int, latents: Tensor, ids: Tensor, text: dict[str, Tensor], mask: Tensor) -> None:
        """This data rank's samples: latents [B, C, T, H, W], ids [B], text {name: [L, B, W]} whole, mask [B, L]."""
        prefix = f"mb{micro_batch}/"
        self.executor.load(f"{prefix}latents", latents)
        self.executor.load(f"{prefix}ids", ids)
        self.executor.load(f"{prefix}mask", mask)
        for name, value in text.items():
            self.executor.load(f"{prefix}text.{name}", tp_slice(value, self.plan, self.coordinates))

    def step(self, lr: float, watch: Callable[[int], None] | None = None) -> None:
        """One optimizer update on what was loaded. Read ``loss`` and ``gradient_norm`` afterwards."""
        self.buffers["lr"].fill_(lr)
        self.executor.run(watch)

    @property
    def loss(self) -> Tensor:
        """Of the whole global batch, on every rank; a device scalar."""
        return self.buffers["loss"]

    @property
    def gradient_norm(self) -> Tensor:
        """Before clipping, on every rank; a device scalar."""
        return self.buffers["gradient_norm"]

    @property
    def steps_done(self) -> int:
        return int(self.buffers["counters"][0])


def tp_slice(text: Tensor, plan: Plan, position: dict[str, int]) -> Tensor:
    """This tp rank's columns of text embeddings [L, B, W]."""
    return text.chunk(plan.tp, dim=-1)[position["tp"]]


def data_slice(x: Tensor, plan: Plan, position: dict[str, int], dim: int = 0) -> Tensor:
    """This data rank's samples of a global micro-batch: dp_replicate outer, dp_shard inner."""
    rank = position["dp_replicate"] * plan.dp_shard + position["dp_shard"]
    return x.chunk(plan.data_ranks, dim=dim)[rank]


def as_dtype(name: str) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
