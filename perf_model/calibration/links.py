"""A cluster file from timed collectives: the links' rates and latencies, fitted over a shipped cluster (torch-free).

Tests within one NVLink domain scale its rates and its latencies, tests over several the NICs' rate and the latency of a
hop between them, each until the prices of ``network.py`` meet the times. What no test shows stays the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ...documents import write_yaml
from ...errors import CinemeshError
from ..acceptance import link_times
from ..clusters.cluster import Cluster, load, over, write_cluster
from ..prices.network import Group, Network, ring_group
from .descent import descend

STEPS = (2.0, 1.3, 1.1, 1.03, 1.01, 1.003, 1.001)  # by which a scale is moved, one after the other
LEAST_GAIN = 1e-6  # of the error, for a step to be kept
LEAST_SHARE = 0.5  # of a time, that latency must be in some row for it to be told from the rate


@dataclass(frozen=True)
class LinkTest:
    """Times of one collective over ``ranks``, as many on each of ``servers``. ``seconds`` by bytes of the full side.

    ``origin``: who measured it, as an error names it.
    """

    origin: str
    kind: str
    ranks: int
    servers: int
    seconds: Mapping[int, float]

    @property
    def title(self) -> str:
        """In a line."""
        return f"{self.kind} over {self.ranks} ranks on {self.servers} server{'s' if self.servers > 1 else ''}"


@dataclass(frozen=True)
class LinkSource:
    """Where tests come from, as the file says it. ``date``: of the newest, ISO."""

    key: str  # of the file's ``sources``
    name: str
    date: str


LATENCIES = {  # constants that latency scales, within a domain and between domains
    True: ("ring_base_s", "ring_hop_s", "tree_base_s", "tree_hop_s", "nvls_s"),
    False: ("ring_network_hop_s", "tree_network_hop_s", "nvls_tree_network_hop_s"),
}


def group_on(test: LinkTest, cluster: Cluster) -> Group:
    """Where a test's ranks lie. Raises CinemeshError where the cluster's servers cannot hold them."""
    each, server = test.ranks // test.servers, cluster.gpus_per_server
    if server % each or test.servers > cluster.topology.servers:
        raise CinemeshError(
            f"{test.origin}: {each} ranks on each of {test.servers} servers, and {cluster.name} has "
            f"{cluster.topology.servers} of {server} GPUs",
            remedy="name with --base the cluster that it was run on",
        )
    return ring_group(cluster, test.ranks, server // each if test.servers > 1 else 1)


def log_error(cluster: Cluster, tests: Sequence[LinkTest]) -> float:
    """Mean of |log(predicted / measured)|."""
    network = Network(cluster)
    return fmean(
        abs(math.log(network.collective(test.kind, size, group_on(test, cluster)).seconds / seconds))
        for test in tests
        for size, seconds in test.seconds.items()
    )


def scaled(cluster: Cluster, inside: bool, rate: float, latency: float = 1.0) -> Cluster:
    """With the links within a domain, or between domains, that much faster, and their latencies that much longer."""
    changed = cluster.with_(**{"nvlink_scale" if inside else "nic_scale": rate})
    for name in LATENCIES[inside]:
        value = getattr(cluster.nccl, name)
        more = {k: v * latency for k, v in value.items()} if isinstance(value, Mapping) else value * latency
        changed = changed.with_(**{f"nccl.{name}": more})
    return changed


def _tells_latency(cluster: Cluster, tests: Sequence[LinkTest]) -> bool:
    network = Network(cluster)
    costs = (network.collective(t.kind, size, group_on(t, cluster)) for t in tests for size in t.seconds)
    return any(cost.latency_s >= LEAST_SHARE * cost.seconds for cost in costs)


def fit(base: Cluster, tests: Sequence[LinkTest]) -> Cluster:
    """The base with rates and latencies that follow the tests: those within a domain first, then the others."""
    cluster = base
    for inside in (True, False):
        own = [test for test in tests if (group_on(test, base).domains == 1) == inside]
        if own:
            cluster = _scaled_to(cluster, inside, own)
    return cluster


def _scaled_to(cluster: Cluster, inside: bool, tests: Sequence[LinkTest]) -> Cluster:
    def error(scales: Sequence[float]) -> float:
        return log_error(scaled(cluster, inside, *scales), tests)

    start = [1.0, 1.0] if _tells_latency(cluster, tests) else [1.0]  # of rates, of latencies
    return scaled(cluster, inside, *descend(start, error, STEPS, gain=LEAST_GAIN))


# -- the file ---------------------------------------------------------------------------------------------------------


def _numbers(base: Cluster, made: Cluster, source: str) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(section, name, number) of every constant that the fit moved, in the unit that the base has it in."""
    paths = [f"topology.{name}" for name in ("nvlink_bytes_per_s", "nic_bytes_per_s")]
    paths += [f"nccl.{name}" for name in ("server_channel_bytes_per_s", "nvls_channel_bytes_per_s")]
    paths += [f"nccl.{name}" for names in LATENCIES.values() for name in names]
    for path in paths:
        section, name = path.split(".")
        before, after = (getattr(getattr(cluster, section), name) for cluster in (base, made))
        if before == after:
            continue
        fact = base.facts[path]
        if isinstance(after, Mapping):
            value: object = {k: _short(fact.value[k] * after[k] / before[k]) for k in after}
        else:
            value = _short(fact.value * after / before)
        yield section, name, {"value": value, "unit": fact.unit, "origin": "fitted", "source": source}


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def gpu_cluster(name: str) -> Cluster:
    """The cluster by name or file. Raises CinemeshError for one without GPUs."""
    base = load(name)
    if base.nccl is None:
        raise CinemeshError(f"{name} is no GPU cluster", remedy="name with --base the one that was measured")
    return base


def write(
    tests: Sequence[LinkTest], base_name: str, source: LinkSource, out: Path
) -> tuple[Cluster, list[tuple[str, float]]]:
    """Fit and write the cluster file. It as it is read back, and the mean error of its price by test.

    Raises CinemeshError for a base without GPUs or without such servers.
    """
    base = gpu_cluster(base_name)
    made = fit(base, tests)
    shown = "; ".join(dict.fromkeys(test.title for test in tests))
    values: dict[str, Any] = {
        "name": out.stem,
        "about": f"{base.about}; links as {source.name} measured them",
        "sources": {source.key: {"title": f"{source.name}: {shown}", "date": source.date}},
    }
    for section, name, number in _numbers(base, made, source.key):
        values.setdefault(section, {})[name] = number
    cluster = write_cluster(out, write_yaml(over(base_name, values)))
    return cluster, [(test.title, math.expm1(log_error(cluster, [test]))) for test in tests]


def write_measured(path: Path, base_name: str, out: Path) -> tuple[Cluster, list[tuple[str, float]]]:
    """As :func:`write`, of the links that an acceptance run measured. Raises CinemeshError for a file without any."""
    times, day = link_times(path)
    tests = [LinkTest(**{**test, "origin": f"the acceptance file {path}"}) for test in times]
    return write(tests, base_name, LinkSource("acceptance", "python -m cinemesh.launch.acceptance", day), out)
