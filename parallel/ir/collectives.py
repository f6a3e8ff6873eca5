"""Records that are no ops of the table: collectives, alone or fused with the products next to them (torch-free)."""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")
# A collective and the products next to it as one record (``fuse_tp.py``), and the collective that it holds.
FUSED = {"gather_matmul": "all_gather", "matmul_scatter": "reduce_scatter"}
