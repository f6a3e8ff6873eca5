"""Validation loss: the velocity loss of the weights on held-out windows, with the same t and noise every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.cache import Sample, collate
from ...kernels.dtypes import TORCH_DTYPES
from ...model.flow import draw_time, interpolate
from ...model.forward import build_velocity
from ...model.inputs import IDS, LATENTS
from ...model.runner import StepRunner, load_inputs, named_buffers
from ...parallel.ir.layout import TOKENS
from ...parallel.ir.units import nested_index
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.comm import sum_over_ranks
from ...parallel.runtime.executor import Executor
from ...parallel.runtime.mesh import backend_of
from .recipe import Config

SEED = 1  # of the draws: fixed, so that losses of different runs can be compared


class Validation:
    """Runs the forward program on the runner's own shard of the recipe's ``weights``; every rank takes part.

    Each sample is seen at ``logging.validation_draws`` fixed (t, noise), captions never dropped. The loss is the mean
    over a sample's elements, then over samples and draws.
    """

    def __init__(self, runner: StepRunner, samples: Sequence[Sample], config: Config) -> None:
        self._runner, self._samples = runner, samples
        draws = range(config.logging.validation_draws)
        self._items = [(index, draw) for draw in draws for index in range(len(samples))]
        backend = backend_of(runner.executor.device)
        program = prepare(build_velocity(runner.config, runner.plan, runner.batch), backend=backend)
        shared = {program.states["master"]: runner.buffers[config.weights]}
        train = runner.executor  # never runs while this does: the same arena serves
        self._forward = Executor(
            program, runner.coordinates, runner.comm, train.device, train.kernels, shared, train.arena
        )
        self._buffers = named_buffers(self._forward)

    def loss(self) -> float:
        """Of all validation samples, the same on every rank."""
        size = self._runner.batch.samples * self._runner.plan.data_ranks
        total = torch.zeros(2, dtype=torch.float64)  # squared error, elements
        for start in range(0, len(self._items), size):
            items = self._items[start : start + size]
            total += self._squared_error(items + items[:1] * (size - len(items)), len(items))
        if self._runner.mesh is not None:
            total = sum_over_ranks(total)
        return (total[0] / total[1]).item()

    def _squared_error(self, items: list[tuple[int, int]], counted: int) -> torch.Tensor:
        """(sum, elements) of this rank's tokens of ``items``; those from ``counted`` on only fill the batch."""
        runner, forward = self._runner, self._forward
        plan, config = runner.plan, runner.config
        share, rank = runner.batch.samples, runner.mesh.data_rank if runner.mesh else 0
        batch = collate([self._samples[index] for index, _ in items], rank, plan.data_ranks)
        mine = items[rank * share : (rank + 1) * share]
        draws = torch.tensor([draw for _, draw in mine])
        t = draw_time(SEED, draws, batch[IDS], torch.zeros_like(batch[IDS]))

        # This rank's tokens, where and as wide as the model's own statistics are.
        x0, x1 = (torch.empty_like(self._buffers["x_t"], dtype=TORCH_DTYPES[plan.stat_dtype]) for _ in range(2))
        wide = {"device": x0.device, "dtype": x0.dtype}
        geometry = {
            "patch": config.patch,
            "latent": tuple(batch[LATENTS].shape[1:]),
            "rank": nested_index(plan, TOKENS, runner.coordinates),
        }
        forward.kernels["patchify"]([batch[LATENTS].to(**wide)], [x1], **geometry)
        nowhere = torch.zeros(1, dtype=torch.int64, device=x0.device)  # in no step's batch
        for i in range(share):
            drawn = torch.empty_like(x0[:, :1], memory_format=torch.contiguous_format)
            of = batch[IDS][i : i + 1].to(x0.device), nowhere, torch.stack([draws[i], draws[i]]).to(x0.device)
            forward.kernels["draw_noise"]([*of], [drawn], seed=SEED, **geometry)
            x0[:, i : i + 1].copy_(drawn)
        x_t, wanted = (x.transpose(0, 1) for x in interpolate(x1.transpose(0, 1), x0.transpose(0, 1), t.to(**wide)))
        self._buffers["x_t"].copy_(x_t)
        self._buffers["t"].copy_(t)
        load_inputs(forward, batch)
        forward.run()
        error = (self._buffers["velocity"].to(x0.dtype) - wanted)[:, : max(0, counted - rank * share)]
        return torch.stack([error.square().sum(dtype=torch.float64).cpu(), torch.tensor(error.numel()).double()])
