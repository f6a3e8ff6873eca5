"""One clip of any length, sampled in windows that overlap, their velocities blended in every step (MultiDiffusion).

    v(x, t) = sum over windows w of share_w * v_w(x[w], t),   shares of a frame sum to 1

Averaging velocities is averaging the latents after the step, as the paper does (3.1.5): all windows step from one x.
Every rank holds the whole clip's tokens; data ranks take windows in turn, and all get what each said. Sums go over the
windows in their order, so the clip has the same bits on any number of data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CinemeshError
from ..parallel.ir.layout import BATCH, TOKENS, WORLD
from ..parallel.ir.units import nested_index
from ..parallel.runtime.mesh import coordinates
from .paths import PATHS
from .runner import Batch
from .sampler import Sampler
from .solvers import SOLVERS, Solver
from .windows import OverlappingWindows


class WindowedSampler:
    """A sampler whose batch is one window on each data rank.

    Raises CinemeshError for patches of more than one frame: a window must begin anywhere.
    """

    def __init__(self, sampler: Sampler, windows: OverlappingWindows) -> None:
        self.sampler, self.windows = sampler, windows
        c, (length, height, width) = sampler.config, sampler.batch.latent
        assert sampler.batch.samples == 1 and length == windows.length
        if c.patch[0] != 1:
            raise CinemeshError(
                f"model {c.name}: its tokens are of {c.patch[0]} frames, and windows begin at any frame",
                remedy="sample with a model whose patch is 1 in T",
            )
        self.latent = (windows.frames, height, width)
        self.grid = (windows.frames, *c.grid(sampler.batch.latent)[1:])
        self._row = self.grid[1] * self.grid[2]  # tokens of a frame
        plan = sampler.plan
        self._of_rank = [coordinates(plan, rank) for rank in range(plan.world_size)]
        self._own = nested_index(plan, BATCH, sampler.coordinates), nested_index(plan, TOKENS, sampler.coordinates)
        self.rounds = range(0, len(windows.starts), plan.data_ranks)
        self.comm = sampler.velocity.comm

    def sample(
        self,
        conditions: Callable[[int], Batch],
        seed: int,
        clip: Tensor,
        times: Sequence[float],
        solver: Solver = SOLVERS["euler"],
        watch: Callable[[int, int], None] = lambda step, first: None,
    ) -> Tensor:
        """The latent [C, T, H, W] of a clip, longer than the model has positions or not, on every rank. Collective.

        ``conditions`` of a window, by its number: as ``condition_inputs`` has them, batches of one; each rank asks for
        those that it takes. ``clip`` int64 [1]: noise depends on (``seed``, ``clip``) and on the element's place in the
        whole clip. ``watch`` is told the step and the first window of a round of data ranks that begins.
        """
        step = 0

        def begins(now: int) -> None:
            nonlocal step
            step = now

        def velocity(x: Tensor, t: float) -> Tensor:
            return self._blended(x, t, conditions, lambda first: watch(step, first))

        c = self.sampler.config
        noise = self.sampler.noise(seed, clip, self.latent, 0, 1)
        x = PATHS[c.objective].followed(noise, times, solver, velocity, begins)
        latent = x.new_empty(1, c.channels, *self.latent)
        self.sampler.velocity.kernels["unpatchify"]([x], [latent], patch=c.patch, grid=self.grid)
        return latent[0]

    def _blended(self, x: Tensor, t: float, conditions: Callable[[int], Batch], watch: Callable[[int], None]) -> Tensor:
        """Of the whole clip's tokens x [T, 1, P]."""
        starts, shares, total = self.windows.starts, self.windows.shares, torch.zeros_like(x)
        tokens = self.windows.length * self._row
        data_rank, part = self._own
        local = tokens // self.sampler.plan.size(TOKENS)
        for first in self.rounds:
            watch(first)
            mine = min(first + data_rank, len(starts) - 1)  # past the end: what is said twice counts once
            begin = starts[mine] * self._row + part * local
            here = self.sampler.velocity_at(x[begin : begin + local], t, self.sampler.given(conditions(mine)))
            for start, share, said in zip(starts[first:], shares[first:], self._everyones(here), strict=False):
                wide = torch.tensor(share, dtype=x.dtype, device=x.device).repeat_interleave(self._row)
                total[start * self._row : start * self._row + tokens] += wide[:, None, None] * said
        return total

    def _everyones(self, said: Tensor) -> Sequence[Tensor]:
        """The tokens of every data rank's window, in their order, from this rank's part [T, 1, P] of its own."""
        plan, source = self.sampler.plan, said.contiguous()
        if self.comm is None or plan.world_size == 1:
            return [said]
        gathered = source.new_empty(plan.world_size, *source.shape)
        collective = self.comm.bind("all_gather", WORLD, source, gathered, None)
        collective.issue()
        collective.wait()
        parts: dict[tuple[int, int], Tensor] = {}
        for at, tokens in zip(self._of_rank, gathered, strict=True):
            parts[nested_index(plan, BATCH, at), nested_index(plan, TOKENS, at)] = tokens
        of_window = range(plan.size(TOKENS))
        return [torch.cat([parts[data_rank, part] for part in of_window]) for data_rank in range(plan.data_ranks)]
