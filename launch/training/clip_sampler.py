"""Clips of prompts, as a recipe's section ``sample`` says, under any plan: which rank makes which."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...model.inputs import BatchShape
from ...model.paths import PATHS
from ...model.runner import StepRunner
from ...model.sampler import Sampler
from ...model.solvers import SOLVERS
from ...parallel.runtime.comm import Communicator, gather_objects
from ..cluster.marks import Doing
from ..cluster.processes import Joined
from ..progress import progress
from .block_change import BlockChange
from .captions import place_encoders
from .setting import Setting


class ClipSampler:
    """Makes a clip of each prompt as often as it is asked, of the ``weights`` as they are then.

    Every rank builds one and asks for all. ``weights`` is this rank's flat shard. Each data rank makes at most
    ``samples`` clips at once. A prompt's noise depends on (seed, its number) alone. ``beside``: the runner of a
    training that does not run meanwhile. ``frozen``: as the sampler takes it. ``traced``: what every block changes is
    summed in ``change``, and velocities are not captured.
    """

    def __init__(
        self,
        setting: Setting,
        place: Joined,
        weights: Tensor,
        prompts: Mapping[int, str],
        *,
        samples: int = 1,
        beside: StepRunner | None = None,
        frozen: Tensor | None = None,
        traced: bool = False,
    ) -> None:
        plan, mesh, section = setting.config.plan, place.mesh, setting.config.sample
        assert section is not None
        self.setting, self.place, self.section, self.prompts = setting, place, section, prompts
        self.times = PATHS[setting.model.objective].times(section.schedule, section.steps)
        comm = beside.comm if beside is not None else Communicator(mesh) if mesh is not None else None
        place_encoders(setting.config, setting.encoding, place, comm)
        # A second replica that would have no clip of its own makes the halves without the caption.
        apart = plan.dp_replicate == 2 and len(prompts) <= plan.dp_shard and section.guidance not in (0.0, 1.0)
        self.ranks, self.rank = plan.data_ranks, mesh.data_rank if mesh else 0
        if apart and mesh is not None:
            self.ranks, self.rank = plan.dp_shard, mesh.coordinates["dp_shard"]
        self.samples = min(samples, -(-len(prompts) // self.ranks))
        batch = BatchShape(self.samples, setting.config.sampled.latent(setting.encoding.codec))
        kernels = setting.kernels(place.device)
        choices: dict[str, Any] = {"guidance": section.guidance, "kernels": kernels, "beside": beside, "frozen": frozen}
        choices["apart"] = apart
        self.sampler = Sampler(setting.model, plan, batch, mesh, weights, place.device, **choices)
        self.change = BlockChange(self.sampler, section.steps) if traced else None
        failure = None if traced else self.sampler.capture(setting.config.capture)
        if failure is not None and place.rank == 0:
            print(f"sampling is NOT captured, on any rank: {failure}; it runs from the executor", file=sys.stderr)

    def latents(self, *, silent: bool = False) -> Iterator[tuple[int, Tensor]]:
        """A clip's latent [C, T, H, W] of each prompt with its number, as it is made: on rank 0, none elsewhere."""
        ordered, section, place, size = list(self.prompts), self.section, self.place, self.samples
        # Ranks that share a sample all end with all of it: one of them hands it on.
        speaks = self.sampler.coordinates["tp"] == self.sampler.coordinates["cp"] == 0
        rounds = range(0, len(ordered), size * self.ranks)
        with progress("sampling", len(rounds) * section.steps, silent=silent or place.rank > 0) as begin:
            for start in rounds:
                mine = range(start + self.rank * size, start + (self.rank + 1) * size)
                at = [ordered[i % len(ordered)] for i in mine]  # past the end: such clips are dropped
                conditions = self.setting.encoding.captions([self.prompts[number] for number in at])
                which = f"clips {start + 1} to {min(start + size * self.ranks, len(ordered))}"

                def step_begins(step: int, which: str, counted: Tensor) -> None:
                    begin(f"{which}, step {step + 1}")
                    if self.change is not None:
                        self.change.begin(step, counted)

                place.marks.at(start, Doing.SAMPLING)
                made = self.sampler.sample(
                    conditions,
                    section.seed,
                    torch.tensor(at),
                    self.times,
                    SOLVERS[section.solver],
                    partial(step_begins, which=which, counted=torch.tensor([i < len(ordered) for i in mine])),
                ).cpu()
                kept = {i: clip for i, clip in zip(mine, made, strict=True) if i < len(ordered) and speaks}
                latents: dict[int, Tensor] = {}
                for part in gather_objects(kept) if place.mesh else [kept]:
                    assert isinstance(part, dict)
                    latents |= part
                if place.rank == 0:
                    for i in sorted(latents):
                        place.marks.at(i, Doing.DECODING)
                        yield ordered[i], latents[i]
