"""What the environment of a job's ranks says to torch and NCCL, each with its reason (torch-free).

What must be so in any run is not here: the ranks set it themselves (``comm.py``: the order of collectives).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..elastic import OWN_STORE, OWN_STORE_WHY
from .job import ClusterJob, word

STOP_S = 120  # seconds in which ranks save once they are asked to stop
IB_TIMEOUT = 22  # of a queue pair, an exponent: 4.096 us * 2^22 = 17 s, tried 7 times


@dataclass(frozen=True)
class Variable:
    """One variable, and why it is so."""

    name: str
    value: str
    why: str


def variables(job: ClusterJob, interface: str | None) -> Iterator[Variable]:
    """Of every node. ``interface``: of the network that joins the hosts. Raises CinemeshError for one that is none."""
    yield Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        str(STOP_S),
        "ranks that are asked to stop save first; torchrun would kill them after 30 s",
    )
    if job.nodes > 1:
        yield Variable(OWN_STORE, "1", OWN_STORE_WHY)
    yield Variable("OMP_NUM_THREADS", "1", "of libraries: a rank gives torch its share of the cores itself")
    yield Variable("PYTHONFAULTHANDLER", "1", "a rank that dies in native code says where")
    if job.on_gpus:
        yield Variable("NCCL_DEBUG", "WARN", "what NCCL says of the cause of a failure, and nothing else")
        yield Variable("TORCH_FR_BUFFER_SIZE", "2000", "what NCCL's collectives did last is joined to a hang's verdict")
        yield Variable(
            "TRITON_CACHE_DIR",
            f"/tmp/cinemesh-triton-{os.getuid()}",  # nosec B108  on nodes whose other users are trusted
            "on the node's own disk: all ranks of a job would wait for one",
        )
        if job.nodes > 1:
            yield Variable(
                "NCCL_IB_TIMEOUT",
                str(IB_TIMEOUT),
                "17 s, seven times: a link or a switch that comes back by then does not end the job",
            )
    if interface is not None:
        name = word(interface, "--interface")
        yield Variable("GLOO_SOCKET_IFNAME", name, "hosts meet there for votes and reports")
        if job.on_gpus:
            yield Variable("NCCL_SOCKET_IFNAME", name, "NCCL's first meeting, before it opens the fast links")


def site(job: ClusterJob) -> Iterator[str]:
    """What only the site can know, as comments."""
    if job.on_gpus and job.nodes > 1:
        yield "NCCL_IB_HCA=mlx5_0,...: the adapters of the fast network, where others are there too"
        yield "NCCL_IB_GID_INDEX=3: on RoCE, the address that routes (RoCE v2)"
    if job.cluster is not None and (lost := job.cluster.order_told()):
        yield f"NCCL and driver: {lost}"
