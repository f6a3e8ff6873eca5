"""From times measured on a machine to its cluster file: the laws of ``compute.py`` and ``network.py``, fitted.

No law is written here: a constant is moved up and down, the cluster's own prices are asked, and the change stays where
the mean error over the samples falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast, get_args, get_type_hints

from ...documents import write_yaml
from ...kernels.ops import OPS
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ..clusters.cluster import Cluster, load, write_cluster
from ..clusters.constants import LIMITS, UNITS, Fact, Rule
from ..clusters.schema import Measured
from ..prices.compute import AttentionCall, Compute, Direction, matmul_shape
from ..prices.network import Group, Network, ring_group
from .descent import descend

Key = tuple[int, ...]
Times = dict[str, dict[Key, list[float]]]
FitRows = Sequence[tuple[str, Key, float]]
PARTS = ("matmul", "attention", "stream", "collectives")
TILES = (4, 8, 16, 32)  # sides of a tile that a matmul's law may have
ROWS = (8, 16, 32, 64, 128)  # of a block of attention
STEPS = (2.0, 1.3, 1.1, 1.03)  # by which a constant is moved, one after the other
LEAST_GAIN = 1e-3  # of the error, for a step to be kept
LEAST_CONSTANT = LIMITS["time"][0]
LEAST_S = 1e-5  # a shorter collective was lost in the compute that it was measured against


@dataclass
class TimedSamples:
    """Seconds by name and shape; several where several ranks measured the same.

    matmul       by dtype: (batch, m, n, k, accumulates)
    attention    by direction: (batch, queries, keys, heads, head dim)
    stream       the other ops, by kind: (bytes that it reads and writes,)
    collectives  by kind: (bytes of the full side, ranks, servers)
    copying      of those, the seconds in which the cores of a server were busy
    slowdown     of those, how many times as long the bytes take while compute runs beside them
    """

    matmul: Times = field(default_factory=dict)
    attention: Times = field(default_factory=dict)
    stream: Times = field(default_factory=dict)
    collectives: Times = field(default_factory=dict)
    copying: Times = field(default_factory=dict)
    slowdown: Times = field(default_factory=dict)

    def add(self, part: str, name: str, key: Key, seconds: float) -> None:
        getattr(self, part).setdefault(name, {}).setdefault(key, []).append(seconds)

    def add_op(self, program: Program, op: Op, seconds: float) -> None:
        z, spec = program.label_sizes(op), OPS[op.kind]
        if spec.law == "matmul":
            signature = program.label_signature(op)
            shape = matmul_shape(signature.inputs, signature.outputs[0], z)
            accumulates = len(op.inputs) > len(signature.inputs)
            self.add("matmul", program.buffers[op.inputs[0]].dtype, (*shape, int(accumulates)), seconds)
        elif spec.law == "attention":
            direction = "backward" if spec.backward else "forward"
            self.add("attention", direction, tuple(z[label] for label in "btshk"), seconds)
        else:
            self.add("stream", op.kind, (program.bytes_moved(op),), seconds)

    @classmethod
    def joined(cls, parts: Iterable[TimedSamples]) -> TimedSamples:
        whole = cls()
        for part in parts:
            for where in (*PARTS, "copying", "slowdown"):
                for name, times in getattr(part, where).items():
                    for key, seconds in times.items():
                        getattr(whole, where).setdefault(name, {}).setdefault(key, []).extend(seconds)
        return whole

    def scaled(self, factor: float) -> TimedSamples:
        """All times multiplied."""
        scaled = TimedSamples(slowdown=self.slowdown)
        for part in (*PARTS, "copying"):
            for name, times in getattr(self, part).items():
                for key, seconds in times.items():
                    getattr(scaled, part).setdefault(name, {})[key] = [factor * s for s in seconds]
        return scaled

    def rows(self, part: str) -> list[tuple[str, Key, float]]:
        """(name, shape, median seconds); of collectives, which others disturb most, the least."""
        middle = min if part in ("collectives", "copying") else median
        return [
            (name, key, max(middle(seconds), LEAST_S if part == "collectives" else LEAST_CONSTANT))
            for name, times in getattr(self, part).items()
            for key, seconds in sorted(times.items())
        ]


@dataclass(frozen=True)
class Machine:
    """What was measured, where and when. ``processes`` ran at once on each of ``servers``."""

    name: str
    about: str
    date: str
    processes: int
    servers: int
    memory_bytes: int  # of one process


# -- prices of samples ------------------------------------------------------------------------------------------------


def attention_call(name: str, key: Key, dtype: str) -> AttentionCall:
    """The kernel of a measured direction and its sizes."""
    batch, queries, keys, heads, head_dim = key
    return AttentionCall(
        direction=cast(Direction, name),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
    )


def price_of(cluster: Cluster) -> Callable[[str, str, Key], float]:
    """Seconds that a cluster predicts for a sample (part, name, shape)."""
    compute, network = Compute(cluster, unfused=()), Network(cluster)
    groups: dict[tuple[int, int], Group] = {}

    def price(part: str, name: str, key: Key) -> float:
        if part == "matmul":
            batch, m, n, k, accumulates = key
            return compute.matmul_s(m, n, k, name, batch=batch, accumulate=bool(accumulates))
        if part == "attention":
            return compute.attention_s(attention_call(name, key, "float32"), "sdpa")
        if part == "stream":
            measured = cluster.measured
            assert measured is not None
            return measured.floor_s[name] + key[0] / measured.bytes_per_s[name]
        size, ranks, servers = key
        if (ranks, servers) not in groups:
            stride = cluster.gpus_per_server if servers == ranks > 1 else 1
            groups[ranks, servers] = ring_group(cluster, ranks, stride)
        return network.collective(name, size, groups[ranks, servers]).seconds

    return price


def residuals(samples: TimedSamples, cluster: Cluster) -> dict[str, float]:
    """Mean relative error of the cluster's prices over the samples, by part and name; ``stream`` as one."""
    price = price_of(cluster)
    errors: dict[str, list[float]] = {}
    for part in PARTS:
        for name, key, seconds in samples.rows(part):
            errors.setdefault(part if part == "stream" else f"{part} {name}", []).append(
                abs(price(part, name, key) / seconds - 1.0)
            )
    return {name: fmean(found) for name, found in errors.items()}


# -- fitting ----------------------------------------------------------------------------------------------------------


def error_of(cluster: Cluster, part: str, rows: FitRows) -> float:
    """Mean of |log(predicted / measured)|."""
    price = price_of(cluster)
    return fmean(abs(math.log(price(part, name, key) / seconds)) for name, key, seconds in rows)


def _descend(cluster: Cluster, names: Sequence[str], part: str, rows: FitRows, most: float = math.inf) -> Cluster:
    """Move the constants ``names`` (dotted), none above ``most``, until no step helps."""
    if not rows:
        return cluster

    def under(values: Sequence[float]) -> Cluster:
        return cluster.with_(**dict(zip(names, values, strict=True)))

    def error(values: Sequence[float]) -> float:
        return error_of(under(values), part, rows)

    start = [_find(cluster, name) for name in names]
    return under(descend(start, error, STEPS, gain=LEAST_GAIN, least=LEAST_CONSTANT, most=most))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, of seconds = a + b * size with the least squared relative error."""
    weight = [(1.0 / seconds, size / seconds) for size, seconds in points]
    saa, sab, sbb = (sum(x * y for x, y in terms) for terms in (
        [(p, p) for p, _ in weight], [(p, q) for p, q in weight], [(q, q) for _, q in weight]
    ))  # fmt: skip
    sa, sb = sum(p for p, _ in weight), sum(q for _, q in weight)
    determinant = saa * sbb - sab * sab
    if determinant > 1e-9 * saa * sbb:
        a, b = (sa * sbb - sb * sab) / determinant, (saa * sb - sab * sa) / determinant
        if a >= 0.0 and b >= 0.0:
            return a, b
        if a < 0.0:
            return 0.0, sb / sbb
    return sa / saa, 0.0


def fit(samples: TimedSamples, machine: Machine) -> Cluster:
    """A cluster whose prices follow the samples. It starts from the placeholders of ``local-cpu``."""
    cluster = load("local-cpu")
    matmuls, attention, collectives = (samples.rows(part) for part in ("matmul", "attention", "collectives"))
    dtypes = sorted({name for name, _, _ in matmuls})
    peak = {dtype: max(2 * math.prod(key[:4]) / s for name, key, s in matmuls if name == dtype) for dtype in dtypes}
    lines = {
        kind: line([(key[0], s) for name, key, s in samples.rows("stream") if name == kind])
        for kind in sorted(samples.stream)
    }
    shortest, fastest = LIMITS["time"][0], LIMITS["rate"][1]
    measured = {
        "floor_s": {kind: max(a, shortest) for kind, (a, _) in lines.items()},
        "bytes_per_s": {kind: min(1.0 / b, fastest) if b else fastest for kind, (_, b) in lines.items()},
    }
    copies = line([(key[0], s) for name, key, s in samples.rows("stream") if name == "copy"])
    memory = 1.0 / copies[1]
    dims = sorted({key[4] for _, key, _ in attention})
    speed = dict.fromkeys(map(str, dims), 0.5 * max(peak.values()))
    ones = dict.fromkeys(dtypes, 1.0)
    small = 1e-6
    cluster = cluster.with_(
        **{
            "gpu.memory_bytes": machine.memory_bytes,
            "gpu.memory_bytes_per_s": memory,
            "gpu.peak_flops": peak,
            "gpu.sustained": ones,
            "matmul.efficiency": dict.fromkeys(dtypes, 0.8),  # here and below: where the search starts
            "matmul.memory_fraction": 0.8,
            "matmul.prologue_s": small / 10,
            "matmul.floor_s": small,
            "attention.sdpa.forward.speed": speed,
            "attention.sdpa.backward.speed": speed,
            **{f"attention.sdpa.{d}.{c}": small for d in ("forward", "backward") for c in ("prologue_s", "floor_s")},
            "stream.fraction": 1.0,
            "stream.floor_s": max(copies[0], shortest),
            "launch.eager_s": shortest,  # the host is the device: its time is part of every op's
            "launch.graph_s": shortest,
            "memory.usable_bytes": machine.memory_bytes,
            "topology.gpus_per_server": machine.processes,
            "topology.servers": machine.servers,
            "measured": Measured(**measured),
        }
    )
    cluster = _fit_network(_fit_compute(cluster, matmuls, attention), collectives, machine.servers)
    copying = {(kind, key): seconds for kind, key, seconds in samples.rows("copying")}
    shares = [
        copying[kind, key] / seconds for kind, key, seconds in collectives if key[2] == 1 or machine.processes == 1
    ]
    cluster = cluster.with_(**{"gloo.core_fraction": min(1.0, max(median(shares), LIMITS["fraction"][0]))})
    slowdowns = [ratio for _, _, ratio in samples.rows("slowdown")]
    return cluster.with_(**{"overlap.communication_slowdown": median(slowdowns)}) if slowdowns else cluster


def _fit_compute(cluster: Cluster, matmuls: FitRows, attention: FitRows) -> Cluster:
    names = ["matmul.floor_s", "matmul.prologue_s", "matmul.memory_fraction"]
    names += [f"matmul.efficiency.{dtype}" for dtype in cluster.matmul.efficiency]
    tiled = (cluster.with_(**{"matmul.tile": tile}) for tile in TILES)
    fitted = [_descend(candidate, names, "matmul", matmuls, most=1.0) for candidate in tiled]
    cluster = min(fitted, key=lambda candidate: error_of(candidate, "matmul", matmuls))
    for direction in ("forward", "backward"):
        law = f"attention.sdpa.{direction}"
        dims = getattr(cluster.attention["sdpa"], direction).speed
        names = [f"{law}.floor_s", f"{law}.prologue_s", *(f"{law}.speed.{dim}" for dim in dims)]
        own = [row for row in attention if row[0] == direction]
        blocks = (cluster.with_(**{f"{law}.rows": rows}) for rows in ROWS)
        fitted = [_descend(candidate, names, "attention", own) for candidate in blocks]
        cluster = min(fitted, key=lambda candidate: error_of(candidate, "attention", own))
    return cluster


def _fit_network(cluster: Cluster, collectives: FitRows, servers: int) -> Cluster:
    primitives = ("all_gather", "all_reduce", "all_to_all")
    names = [f"gloo.{constant}.{name}" for name in primitives for constant in ("message_s", "bytes_per_s")]
    inside = [row for row in collectives if row[1][2] == 1]
    cluster = _descend(cluster, [*names, "gloo.sum_bytes_per_s"], "collectives", inside)
    for constant in ("message_s", "bytes_per_s"):  # an all-to-all is made of them
        value = _find(cluster, f"gloo.{constant}.all_to_all")
        cluster = cluster.with_(**{f"gloo.{constant}.send_recv": value})
    if servers > 1:
        outside = [row for row in collectives if row[1][2] > 1]
        _, (size, *_), seconds = max(outside, key=lambda row: row[1])  # the link sets its pace: a start near the end
        cluster = cluster.with_(**{"topology.nic_bytes_per_s": size / seconds})
        cluster = _descend(cluster, ["topology.nic_bytes_per_s", "topology.nic_latency_s"], "collectives", outside)
    return cluster


# -- the file ---------------------------------------------------------------------------------------------------------

SHOWN_UNITS = {"time": "us", "size": "MiB", "rate": "GB/s", "speed": "GFLOP/s", "power": "W"}
FITTED = ("matmul", "attention", "measured", "gloo", "launch")  # sections whose numbers are constants of a law
MEASURED = {
    *(f"gpu.{name}" for name in ("memory_bytes", "memory_bytes_per_s", "peak_flops", "sustained")),
    *("stream.fraction", "stream.floor_s", "memory.usable_bytes"),
    "overlap.communication_slowdown",
    *(f"topology.{name}" for name in ("gpus_per_server", "servers", "nic_bytes_per_s", "nic_latency_s")),
}


def cluster_text(cluster: Cluster, machine: Machine) -> str:
    """The cluster file. What was not measured keeps the origin that it has in ``local-cpu``."""
    base = load("local-cpu")
    sources: dict[str, Any] = {"calibration": {"title": f"cinemesh calibrate on {machine.about}", "date": machine.date}}

    def entry(path: str, value: Any, rule: Rule) -> dict[str, Any]:
        unit = SHOWN_UNITS.get(rule.quantity, rule.quantity)
        scale = UNITS[unit][1]
        shown = {k: _short(v / scale) for k, v in value.items()} if rule.table else _short(value / scale)
        if path in MEASURED or path.startswith(FITTED):
            origin = "measured" if path in MEASURED else "fitted"
            return {"value": shown, "unit": unit, "origin": origin, "source": "calibration"}
        fact: Fact = base.facts[path]
        sources["placeholder"] = {"title": fact.source, "date": fact.date}
        return {"value": shown, "unit": unit, "origin": fact.origin, "source": "placeholder"}

    def section(path: str, part: Any) -> dict[str, Any]:
        written: dict[str, Any] = {}
        hints = get_type_hints(type(part), include_extras=True)
        for f in fields(part):
            value, where = getattr(part, f.name), f"{path}.{f.name}"
            rule = next((x for x in get_args(hints[f.name]) if isinstance(x, Rule)), None)
            if value == f.default:
                continue
            if rule is not None:
                written[f.name] = entry(where, value, rule)
            elif is_dataclass(value):
                written[f.name] = section(where, value)
            elif value:
                written[f.name] = value
        return written

    parts = ("gpu", "matmul", "stream", "measured", "launch", "memory", "topology", "overlap", "spread", "gloo", "host")
    body: dict[str, Any] = {name: section(name, getattr(cluster, name)) for name in parts}
    body["attention"] = {name: section(f"attention.{name}", family) for name, family in cluster.attention.items()}
    head = {"name": machine.name, "about": f"{machine.about}. Measured {machine.date}", "sources": sources}
    return write_yaml({**head, **body}, default_flow_style=None, width=120)


def _short(value: float) -> float | int:
    """Four significant digits."""
    return int(value) if value == int(value) else float(f"{value:.4g}")


def _find(cluster: Cluster, path: str) -> Any:
    found: Any = cluster
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
    return found


def write(cluster: Cluster, machine: Machine, path: Path) -> Cluster:
    """Write the file, whole or not at all; the cluster as read back from it."""
    return write_cluster(path, cluster_text(cluster, machine))
