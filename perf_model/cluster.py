"""Clusters: every constant that the prices use, read from ``clusters/*.yaml`` and checked (torch-free).

How a number is written: see ``constants.py``. A file may name ``base`` files (those beside it that begin with ``_`` are
parts, not clusters) whose numbers it inherits and may replace. All numbers are in SI units once read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml

from ..errors import CinemeshError
from .constants import (
    Bytes,
    BytesOrZero,
    BytesPerSecond,
    BytesPerSecondTable,
    Count,
    Fact,
    FlopsTable,
    Fraction,
    FractionOrZero,
    FractionTable,
    Ratio,
    Reader,
    Seconds,
    SecondsOrZero,
    SecondsTable,
    Watts,
)
from .grid import Grid, read_grid

FOLDER = Path(__file__).parent / "clusters"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. ``sustained``: clock of a long step under its power limit over that of a short isolated kernel."""

    name: str
    sms: Count
    power_w: Watts
    memory_bytes: Bytes
    memory_bytes_per_s: BytesPerSecond
    peak_flops: FlopsTable
    sustained: FractionTable


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """Law of a matmul (``compute.Compute.matmul_s``). ``efficiency``: of the peak, by dtype.

    ``grid``: a CSV beside the cluster file, m, n, k, ratio: measured time over the law's.
    """

    efficiency: FractionTable
    tile: Count
    tail: FractionOrZero
    prologue_s: SecondsOrZero
    floor_s: Seconds
    memory_fraction: Fraction
    grid: str = ""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One attention kernel (``compute.attention_s``). ``speed`` by head dim: what a full chip reaches on long rows."""

    speed: FlopsTable
    rows: Count
    tail: FractionOrZero
    prologue_s: SecondsOrZero
    floor_s: Seconds


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of attention kernels."""

    forward: Pass
    backward: Pass


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Memory-bound kernels: ``floor_s`` + bytes / (``fraction`` of the memory's rate)."""

    fraction: Fraction
    floor_s: Seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Ops whose own time was measured, by name: ``floor_s`` + bytes / ``bytes_per_s``. The others follow ``Stream``."""

    floor_s: SecondsTable
    bytes_per_s: BytesPerSecondTable


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Host time of one kernel launched by torch, and the gap between two nodes of a replayed graph."""

    eager_s: Seconds
    graph_s: Seconds


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a process may allocate, and what the program does not own."""

    usable_bytes: Bytes
    context_bytes: BytesOrZero
    communicator_bytes: BytesOrZero


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Servers, links and switches. Rates are of one direction, of one GPU (NVLink) or one NIC.

    A leaf joins ``servers_per_leaf`` servers, a pod ``servers_per_pod``; between pods the NICs of a pod share
    1 / ``pod_oversubscription`` of their rate.
    """

    gpus_per_server: Count
    servers: Count
    nvlink_bytes_per_s: BytesPerSecond
    nics_per_server: Count
    nic_bytes_per_s: BytesPerSecond
    nic_latency_s: SecondsOrZero
    switch_latency_s: SecondsOrZero
    servers_per_leaf: Count
    servers_per_pod: Count
    pod_oversubscription: Ratio


@dataclass(frozen=True, kw_only=True)
class Nccl:
    """What NCCL's tuner knows (``network.py``). Tables by protocol, or by number of servers: "1", "2", "4" (and more).

    ``correction``: a CSV beside the cluster file, kind, ranks, bytes, ratio: measured time over the formula's, in one
    server. ``ring_reach``, ``tree_reach``: rate reached over several servers, of the formula's, by bytes of one rank
    (rings) or of the buffer (trees).
    """

    ring_base_s: SecondsTable
    ring_hop_s: SecondsTable
    ring_network_hop_s: SecondsTable
    tree_base_s: SecondsTable
    tree_hop_s: SecondsTable
    tree_network_hop_s: SecondsTable
    nvls_s: Seconds
    nvls_tree_network_hop_s: Seconds
    pat_base_s: Seconds
    pat_rank_s: Seconds
    pat_hop_fraction: Fraction
    pat_efficiency: Fraction
    post_s: Seconds
    ring_plateau: Ratio
    server_channels: Count
    server_channel_bytes_per_s: BytesPerSecond
    nic_fraction: Fraction
    p2p_fraction: Fraction
    ring_ll_fraction: Fraction
    ring_ll128_fraction: Fraction
    tree_fraction: Fraction
    tree_pattern_fraction: Fraction
    tree_ll_fraction: Fraction
    ll_cap_bytes_per_s: BytesPerSecondTable
    ring_ll128_cap_bytes_per_s: BytesPerSecondTable
    tree_ll128_cap_bytes_per_s: BytesPerSecondTable
    tree_cap_bytes_per_s: BytesPerSecondTable
    nvls_channels: Count
    nvls_channel_bytes_per_s: BytesPerSecond
    nvls_efficiency: Fraction
    nvls_tree_cap_bytes_per_s: BytesPerSecondTable
    nvls_least_ranks: Count
    ctas_per_channel: Count
    ring_reach: FractionTable
    tree_reach: FractionTable
    correction: str = ""


@dataclass(frozen=True, kw_only=True)
class Gloo:
    """Collectives of CPU processes: time of one message and rate of one rank, by primitive.

    Primitives: all_gather, all_reduce, all_to_all, send_recv. The sum after an all-to-all reads ``sum_bytes_per_s``.
    ``core_fraction``: of that time, the part in which the cores copy; the rest is waiting.
    """

    message_s: SecondsTable
    bytes_per_s: BytesPerSecondTable
    sum_bytes_per_s: BytesPerSecond
    core_fraction: Fraction


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Slowdown beyond the SMs and the bandwidth that a collective takes while compute runs, and the reverse."""

    compute_slowdown: Ratio
    communication_slowdown: Ratio


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Spread of the step time of one rank, as a fraction of its mean: the slowest of n ranks sets the pace."""

    step_fraction: FractionOrZero

    def factor(self, ranks: int) -> float:
        """Expected step time of ``ranks`` synchronous ranks over that of one: 1 + sigma sqrt(2 ln n).

        The leading term of the mean of the largest of n normal draws (Cramer 1946, section 28.6).
        """
        return 1.0 + self.step_fraction * math.sqrt(2.0 * math.log(ranks)) if ranks > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Everything that prices need. ``facts`` gives the origin of every number by its dotted name."""

    name: str
    about: str
    gpu: Gpu
    matmul: Matmul
    attention: Mapping[str, Family]
    stream: Stream
    launch: Launch
    memory: Memory
    topology: Topology
    overlap: Overlap
    spread: Spread
    nccl: Nccl | None = None
    gloo: Gloo | None = None
    measured: Measured | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict, compare=False, repr=False)
    folder: Path = field(default=FOLDER, compare=False, repr=False)

    @property
    def gpus_per_server(self) -> int:
        return self.topology.gpus_per_server

    @property
    def gpus(self) -> int:
        return self.topology.gpus_per_server * self.topology.servers

    @property
    def device(self) -> str:
        """The device class of ``kernels/catalogue.py``."""
        return "cuda" if self.nccl is not None else "cpu"

    def grid(self, name: str) -> Grid | None:
        """A CSV beside the cluster file; None for no name."""
        return read_grid(self.beside(name)) if name else None

    def beside(self, name: str) -> str:
        """The path of a table: beside the cluster file, else among the shipped ones, where its base comes from."""
        path = self.folder / name
        return str(path if path.is_file() else FOLDER / name)

    def with_(self, **changes: Any) -> Cluster:
        """A changed copy.

        ``nic_scale``, ``nvlink_scale``, ``memory_scale`` multiply rates; ``memory_bytes`` sets the memory of a GPU; any
        other number goes by its dotted name: ``with_(**{"gpu.sms": 144})``.
        """
        cluster, topology = self, self.topology
        for name, value in changes.items():
            if name == "nic_scale":
                changed = {"topology.nic_bytes_per_s": topology.nic_bytes_per_s * value}
            elif name == "nvlink_scale":
                changed = {"topology.nvlink_bytes_per_s": topology.nvlink_bytes_per_s * value}
                if self.nccl is not None:
                    changed["nccl.server_channel_bytes_per_s"] = self.nccl.server_channel_bytes_per_s * value
                    changed["nccl.nvls_channel_bytes_per_s"] = self.nccl.nvls_channel_bytes_per_s * value
            elif name == "memory_scale":
                changed = {"gpu.memory_bytes_per_s": self.gpu.memory_bytes_per_s * value}
            elif name == "memory_bytes":
                usable = self.memory.usable_bytes * value / self.gpu.memory_bytes
                changed = {"gpu.memory_bytes": value, "memory.usable_bytes": usable}
            else:
                changed = {name: value}
            for path, new in changed.items():
                cluster = _changed(cluster, path.split("."), new, path)
        return cluster


def _changed(owner: Any, path: list[str], value: Any, shown: str) -> Any:
    head, *rest = path
    if isinstance(owner, Mapping):
        known: Sequence[str] = list(owner)
    else:
        known = [f.name for f in fields(owner)]
    if head not in known:
        raise CinemeshError(f"cluster: nothing is named {shown!r}; {head!r} is none of {', '.join(known)}")
    inner = owner[head] if isinstance(owner, Mapping) else getattr(owner, head)
    new = _changed(inner, rest, value, shown) if rest else value
    return {**owner, head: new} if isinstance(owner, Mapping) else replace(owner, **{head: new})


# -- reading ----------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Clusters that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def load(name_or_path: str) -> Cluster:
    """A cluster by name, or from a file (anything that ends in .yaml). ``CinemeshError`` for what cannot be."""
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise CinemeshError(f"cluster: there is no file {name_or_path}; known clusters: {', '.join(names())}")
    else:
        path = FOLDER / f"{name_or_path}.yaml"
        if name_or_path.startswith("_") or not path.is_file():
            near = difflib.get_close_matches(name_or_path, names(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise CinemeshError(
                f"cluster: {name_or_path!r} is unknown; {hint}Known: {', '.join(names())}. Or give a .yaml file"
            )
    return from_dict(_read(path), path.stem, path.parent)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over its bases. A part is looked for beside the file, then among those of the package."""
    if path in seen:
        raise CinemeshError(f"cluster {path.stem}: its base leads back to itself; remove one of the base entries")
    try:
        values = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise CinemeshError(
            f"cluster {path.stem}: cannot be read as YAML ({error}); compare a file that ships"
        ) from None
    if not isinstance(values, dict):
        raise CinemeshError(f"cluster {path.stem}: the file holds no mapping; compare a file that ships")
    merged: dict[str, Any] = {}
    bases = values.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        found = next((p for f in (path.parent, FOLDER) if (p := f / f"{base}.yaml").is_file()), None)
        if found is None:
            raise CinemeshError(f"cluster {path.stem}: base {base!r} is no file beside it or among the shipped ones")
        merged = _merge(merged, _read(found, (*seen, path)))
    return _merge(merged, values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``; a number is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(cast(dict, old), value) if both and "value" not in value else value
    return merged


_SECTIONS: dict[str, Any] = {
    "gpu": Gpu,
    "matmul": Matmul,
    "stream": Stream,
    "launch": Launch,
    "memory": Memory,
    "topology": Topology,
    "overlap": Overlap,
    "spread": Spread,
}
_LIBRARIES: dict[str, Any] = {"nccl": Nccl, "gloo": Gloo}


def from_dict(values: dict[str, Any], name: str, folder: Path = FOLDER) -> Cluster:
    """A cluster from the mapping that a file holds, its bases merged in."""
    known = {"name", "about", "sources", "attention", "measured", *_SECTIONS, *_LIBRARIES}
    reader = Reader(name, values.get("sources"))
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise reader.wrong(str(key), "is unknown", f"did you mean {near[0]!r}?" if near else "remove it")
    read = {key: reader.section(kind, values.get(key), key) for key, kind in _SECTIONS.items()}
    libraries = [key for key in _LIBRARIES if key in values]
    if len(libraries) != 1:
        raise reader.wrong("nccl, gloo", f"has {len(libraries)} of the two", "give the constants of exactly one")
    read[libraries[0]] = reader.section(_LIBRARIES[libraries[0]], values[libraries[0]], libraries[0])
    if "measured" in values:
        read["measured"] = reader.section(Measured, values["measured"], "measured")
    families = values.get("attention")
    if not isinstance(families, dict) or not families:
        raise reader.wrong("attention", "is missing", "give at least one family of kernels")
    read["attention"] = {key: reader.section(Family, value, f"attention.{key}") for key, value in families.items()}
    title, about = values.get("name", name), values.get("about", "")
    return Cluster(name=str(title), about=str(about), **read, facts=reader.facts, folder=folder)
