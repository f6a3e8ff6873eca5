"""Which attention kernels a step is priced on, and what other software, NCCL's too, would give it (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...kernels.catalogue import OPTIONAL
from ...kernels.ops import OPS
from ...model.config import ModelConfig
from ...parallel.ir.nccl_stack import CAPTURED
from ..clusters.cluster import Cluster
from ..prices.compute import Compute

DETERMINISTIC = "deterministic"
ATTENTION = tuple(op for op, spec in OPS.items() if spec.law == "attention")


@dataclass(frozen=True)
class PricedKernel:
    """What runs an attention op. ``deterministic``: it sums in one fixed order; ``guessed``: so are its rates."""

    op: str
    package: str
    why: str
    deterministic: bool
    guessed: bool

    def __str__(self) -> str:
        return f"{self.package} ({self.why}{'; its rates are a guess' if self.guessed else ''})"


@dataclass(frozen=True)
class OtherSoftware:
    """The same plan's step where ``name`` is installed or asked for, and the attention kernels that change."""

    name: str
    step_s: float
    kernels: list[PricedKernel]


def kernels_of(cluster: Cluster, config: ModelConfig, dtype: str) -> list[PricedKernel]:
    """One for each attention op of a model in a dtype. Raises CinemeshError for an override that cannot be met."""
    compute, asked = Compute(cluster), cluster.software.deterministic
    found: list[PricedKernel] = []
    for op in ATTENTION:
        entry = compute.kernel(op, dtype, config.head_dim)
        law = f"attention.{entry.rate_class}.{'backward' if OPS[op].backward else 'forward'}"
        ordered = entry.ordered == "always" or (asked and entry.ordered == "asked")
        found.append(PricedKernel(op, entry.package, entry.why, ordered, cluster.has_placeholders(law)))
    return found


def _others(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    software = cluster.software
    for package in OPTIONAL:
        if package in software.missing:
            yield package, cluster.running(software.beside([package]))
    if not software.deterministic:
        yield DETERMINISTIC, cluster.running(replace(software, deterministic=True))
    if cluster.order_told():
        nccl, driver = (".".join(map(str, release)) for release in CAPTURED)
        yield f"NCCL {nccl} and a driver of CUDA {driver}", replace(cluster, stack=None)
        if not cluster.captured:
            yield "capture: required", cluster.capturing("required")


def other_software(
    cluster: Cluster, config: ModelConfig, dtype: str, step_s: float, price: Callable[[Cluster], float]
) -> list[OtherSoftware]:
    """Every package that would make the step faster, and what deterministic kernels would cost it.

    And, where NCCL and the driver take from its overlap or its capture, what others would give. ``price``: seconds of
    the step that takes ``step_s``, on the cluster with such software.
    """
    now = kernels_of(cluster, config, dtype)
    found: list[OtherSoftware] = []
    for name, there in _others(cluster):
        changed = [kernel for kernel in kernels_of(there, config, dtype) if kernel not in now]
        optional = there.software.missing != cluster.software.missing
        if not changed and there.software != cluster.software:
            continue
        seconds = price(there)
        if seconds < step_s or not optional:
            found.append(OtherSoftware(name, seconds, changed))
    return found
