"""The paper's own plans (Movie Gen, arXiv 2410.13720v1, Table 3), to be shown beside the planner's (torch-free).

Degrees, samples a data rank, GPUs, global batch, learning rate and steps are the table's, but for one number: the first
256 px T2I/V row says 123k steps, where the 173.6M samples that it has seen are 113k steps of its batch, and so says the
table's own total of 185k. The table has no clip length: latents are the longest bucket of a stage (3.2.1). FSDP is over
all data-parallel GPUs, as the paper defines it (3.1.6). What it leaves open (recompute, placement) is searched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One row of Table 3. ``latent``: (T, H, W); ``samples``: of a data rank; ``steps``: optimizer updates."""

    name: str
    latent: tuple[int, int, int]
    tp: int
    cp: int
    samples: int
    gpus: int
    global_batch: int
    lr: float
    steps: int

    @property
    def fixed(self) -> dict[str, object]:
        """What the paper says of the plan."""
        return {"tp": self.tp, "cp": self.cp, "dp_replicate": 1, "micro_batches": 1}


STAGES = (
    Stage("256 px T2I", (1, 32, 32), 1, 1, 6, 1536, 9216, 1e-4, 210_000),
    Stage("256 px T2I/V", (32, 32, 32), 4, 1, 2, 3072, 1536, 6e-5, 113_000),
    Stage("256 px T2I/V", (32, 32, 32), 4, 1, 2, 6144, 3072, 6e-5, 72_000),
    Stage("768 px T2I/V", (32, 96, 96), 4, 1, 1, 6144, 1536, 6e-5, 19_600),
    Stage("768 px T2I/V", (32, 96, 96), 4, 1, 1, 6144, 1536, 3e-5, 11_000),
    Stage("768 px T2I/V", (32, 96, 96), 4, 2, 1, 6144, 768, 2e-5, 15_900),
    Stage("768 px T2I/V", (32, 96, 96), 4, 2, 1, 4096, 512, 1e-5, 28_000),
)
