"""What a program of nccl-tests would print on a cluster, its times the cluster's own prices."""

from __future__ import annotations

from collections.abc import Sequence

from cinemesh.perf_model.calibration.nccl_logs import PROGRAMS
from cinemesh.perf_model.clusters.cluster import Cluster
from cinemesh.perf_model.prices.network import Network, ring_group

SIZES = tuple(2**power for power in range(12, 34, 3))  # 4 KiB to 8 GiB
NAMED = "# Collective test starting: {}\n"


def printed(
    program: str, cluster: Cluster, ranks: int, each: int, *, sizes: Sequence[int] = SIZES, named: bool = True
) -> str:
    """``each``: ranks on a host. Widths and decimals as in NVIDIA/nccl-tests, src/common.cu."""
    kind, reduces, of = PROGRAMS[program]
    stride = cluster.gpus_per_server // each if ranks > each else 1
    group, network = ring_group(cluster, ranks, stride), Network(cluster)
    lines = [
        "# nThread 1 nGpus 1 minBytes 4096 maxBytes 8589934592 step: 8(factor) warmup iters: 1 iters: 20 agg iters: 1",
        "#",
        "# Using devices",
        *(
            f"#  Rank {rank:2} Group  0 Pid {3000 + rank:6} on host{rank // each:03} device {rank % each:2} [0x1b] GPU"
            for rank in range(ranks)
        ),
        "NCCL version 2.27.5+cuda12.9",
        "#",
        "#                                                              out-of-place                       in-place",
        "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw"
        " #wrong",
        "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)",
    ]
    for size in sizes:
        time_us = network.collective(kind, size, group).seconds * 1e6
        rate = size / time_us / 1e3
        columns = f"{time_us:8.2f} {rate:7.2f} {rate * of(ranks):7.2f}"
        redop = "sum" if reduces else "none"
        lines.append(f"{size:12} {size // 4:13} {'float':>9} {redop:>7} {-1:7} {columns}      0 {columns}    N/A")
    lines += ["# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 123.456", "#"]
    return (NAMED.format(program) if named else "") + "\n".join(lines) + "\n"
