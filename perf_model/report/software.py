"""Which attention kernels a step is priced on, and what other software would give it (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...kernels.catalogue import OPTIONAL
from ...kernels.ops import OPS
from ...kernels.selection import Software
from ...model.config import ModelConfig
from ..clusters.cluster import Cluster
from ..prices.compute import Compute

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
    """The same plan's step where ``name`` is installed or asked for, and the kernels that change."""

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


def _others(software: Software) -> Iterator[tuple[str, Software]]:
    for package in OPTIONAL:
        if package in software.missing:
            yield package, software.beside([package])
    if not software.deterministic:
        yield "deterministic", replace(software, deterministic=True)


def other_software(
    cluster: Cluster, config: ModelConfig, dtype: str, step_s: float, price: Callable[[Cluster], float]
) -> list[OtherSoftware]:
    """Every package that would make the step faster, and what deterministic kernels would cost it.

    ``price``: seconds of the step that takes ``step_s``, on the cluster with such software.
    """
    now = kernels_of(cluster, config, dtype)
    found: list[OtherSoftware] = []
    for name, software in _others(cluster.software):
        there = cluster.running(software)
        changed = [kernel for kernel in kernels_of(there, config, dtype) if kernel not in now]
        if not changed:
            continue
        seconds = price(there)
        if seconds < step_s or name == "deterministic":
            found.append(OtherSoftware(name, seconds, changed))
    return found
