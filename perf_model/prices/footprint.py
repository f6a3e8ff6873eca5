"""Where a rank's memory goes: every byte of the program by class, and what the program does not own (torch-free).

The program's own bytes are exact: the same liveness rule by which the executor allocates, and the workspace of the
kernels that the catalogue chooses for the cluster. The rest is counted as the runtime counts it, with what the cluster
file says of context and communicators.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.tuning import device_key
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import BufferKind, Holds, Phase, Space
from ...parallel.passes.device_memory import Workspaces, bytes_beside
from ...parallel.passes.liveness import lifetimes
from ..clusters.cluster import Cluster

CLASSES = (
    "optimizer",
    "EMA",
    "gradients",
    "weights",
    "frozen weights",
    "gathered units",
    "unit gradients",
    "kept activations",
    "transients",
    "workspace",
    "inputs",
    "frozen encoders",
    "NCCL",
    "cuBLAS",
    "CUDA graphs",
    "CUDA context",
)
FLAT = ("optimizer", "EMA", "gradients", "weights")  # one flat shard of everything that is trained each
FROZEN_CLASS = "frozen weights"  # one of everything else
UNIT = ("gathered units", "unit gradients")  # one unit each
_CLASS_OF = {
    Holds.MASTER: "optimizer",
    Holds.MOMENT: "optimizer",
    Holds.EMA: "EMA",
    Holds.GRADIENT: "gradients",
    Holds.WEIGHTS: "weights",
    Holds.FROZEN: "frozen weights",
    Holds.GATHERED_UNIT: "gathered units",
    Holds.UNIT_GRADIENT: "unit gradients",
}


def class_of(program: Program, root: str, kept: set[str]) -> str:
    """The class of a storage."""
    buffer = program.buffers[root]
    if buffer.kind is BufferKind.WORKSPACE:
        return "workspace"
    if (unit_sized := _CLASS_OF.get(buffer.holds)) is not None:
        return unit_sized
    if buffer.kind is not BufferKind.TEMPORARY:
        return "inputs"
    return "kept activations" if root in kept else "transients"


def _kept(program: Program) -> set[str]:
    """Storages written in forward and read in backward: what lives from one to the other."""
    written: set[str] = set()
    kept: set[str] = set()
    for op in program.ops:
        if op.clone or op.place.phase in (Phase.BACKWARD, Phase.GRADIENT):
            kept.update(root for name in op.inputs if (root := program.root(name)[0]) in written)
        elif op.place.phase is Phase.FORWARD:
            written.update(program.root(name)[0] for name in op.outputs)
    return kept


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one rank by class, at the record where the program's own buffers peak.

    Beside them stands the most workspace of any record: the arena is held while that one runs, too. ``host_bytes``: the
    most that lies in host memory.
    """

    peak_bytes: int
    by_class: dict[str, int]
    peak_op: str
    limit_bytes: float
    host_bytes: int = 0


def outside(cluster: Cluster, plan: Plan, graphs: int = 1) -> dict[str, int]:
    """Bytes of a device that no program owns. ``graphs``: captured steps, where there are GPUs."""
    memory = cluster.memory
    on_gpus = cluster.device == "cuda"
    return bytes_beside(plan, memory.context_bytes, memory.communicator_bytes, graphs=graphs if on_gpus else 0)


def workspaces(cluster: Cluster) -> Workspaces:
    """Of the kernels that run on a cluster."""
    return Workspaces(cluster.gpu.device, cluster.software, device_key(cluster.gpu.name))


@dataclass(frozen=True)
class ByteStack:
    """Live bytes by class while every record runs: what the memory picture shows."""

    by_class: dict[str, list[int]]
    total: list[int]


def stack(program: Program, on: Workspaces) -> ByteStack:
    """Live bytes by class, record by record (the program's own bytes; workspace as a class of its own)."""
    lives = lifetimes(program, workspace=on.bytes)
    kept = _kept(program)
    roots = {program.root(name)[0] for name in program.buffers}
    classes = {root: class_of(program, root, kept) for root in roots}
    current: dict[str, int] = dict.fromkeys(CLASSES, 0)
    for root, buffer in program.buffers.items():
        if buffer.base is None and buffer.kind is not BufferKind.TEMPORARY:
            current[classes[root]] += program.bytes(root)
    series: dict[str, list[int]] = {name: [] for name in CLASSES}
    totals: list[int] = []
    always = current["workspace"]
    for i in range(len(program.ops)):
        for root in lives.allocate[i]:
            current[classes[root]] += program.bytes(root)
        current["workspace"] = always + lives.workspace_bytes[i]
        for name in CLASSES:
            series[name].append(current[name])
        totals.append(sum(current.values()))
        for root in lives.free[i]:
            current[classes[root]] -= program.bytes(root)
    return ByteStack({name: values for name, values in series.items() if any(values)}, totals)


def footprint(program: Program, cluster: Cluster, frozen_bytes: int = 0, graphs: int = 1) -> Footprint:
    """The whole program's peak on a cluster's device, where a run captures ``graphs`` steps."""
    stacked = stack(program, workspaces(cluster))
    work = stacked.by_class.get("workspace", [0] * len(program.ops))
    at = max(range(len(program.ops)), key=lambda i: stacked.total[i] - work[i])
    by_class = {name: values[at] for name, values in stacked.by_class.items() if values[at]}
    if most := max(work):
        by_class["workspace"] = most
    by_class |= outside(cluster, program.plan, graphs)
    if frozen_bytes:
        by_class["frozen encoders"] = frozen_bytes
    host_bytes = lifetimes(program, Space.HOST).peak_bytes if program.plan.offload else 0
    return Footprint(sum(by_class.values()), by_class, program.ops[at].name, cluster.memory.usable_bytes, host_bytes)
