"""The paper's own plans (Movie Gen Table 3), to be shown beside the planner's (torch-free).

Degrees, samples a GPU group, GPUs and global batch are the paper's; latents are derived from its buckets (3.2.1). The
FSDP group of the 768 px stage is 1,536 ways in both plans: dp_shard * cp. What the paper leaves open (recompute, shard
group of the other stages, placement) is searched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One row of Table 3."""

    name: str
    latent: tuple[int, int, int]
    tp: int
    cp: int
    samples: int
    gpus: int
    global_batch: int
    dp_shard: int | None = None

    @property
    def fixed(self) -> dict[str, object]:
        values: dict[str, object] = {"tp": self.tp, "cp": self.cp, "micro_batches": 1}
        return values | ({"dp_shard": self.dp_shard} if self.dp_shard else {})


STAGES = (
    Stage("256 px T2I", (1, 32, 32), 1, 1, 6, 1536, 9216),
    Stage("256 px T2I/V", (32, 32, 32), 4, 1, 2, 6144, 3072),
    Stage("768 px T2I/V", (32, 96, 96), 4, 1, 1, 6144, 1536, dp_shard=1536),
    Stage("768 px T2I/V", (32, 96, 96), 4, 2, 1, 6144, 768, dp_shard=768),
)
