"""Clusters: every constant that the prices use, read from ``clusters/*.yaml`` and checked (torch-free).

How a number is written: see ``constants.py``; what each one is: ``schema.py``. A file may name ``base`` files, those
beside it that begin with ``_`` (parts, not clusters), whose numbers it has and may replace, and the tables of what
kernels reach on a chip (``kernels/rates``); of ``inherits`` files, which tell of another chip, it has the numbers as
unvalidated ones. ``null`` takes out what such a file gives. All numbers are in SI units once read.

Which kernels run is software: a plain install of torch and Triton, and the ``packages`` that a file says are beside it.
Whether collectives run side by side hangs on NCCL and the driver: ``stack: {nccl: "2.28", driver: "12.8"}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from ...documents import mapping, quoted, read_yaml
from ...errors import CinemeshError, did_you_mean
from ...files import atomic_file, file_name
from ...kernels.rates import TABLES, capability_of
from ...kernels.selection import PLAIN_INSTALL, Software, packages_of
from ...parallel.ir.nccl_stack import Capture, NcclStack
from .constants import INHERITED, PLACEHOLDER, Fact, Reader
from .grid import Grid, read_grid
from .schema import (
    AttentionFamily,
    Gloo,
    Gpu,
    Host,
    LaunchConstants,
    Matmul,
    Measured,
    MemoryConstants,
    Nccl,
    Operations,
    OverlapConstants,
    Spread,
    StreamConstants,
    Topology,
)

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Everything that prices need. ``facts`` gives the origin of every number by its dotted name."""

    name: str
    about: str
    gpu: Gpu
    matmul: Matmul
    attention: Mapping[str, AttentionFamily]
    stream: StreamConstants
    launch: LaunchConstants
    memory: MemoryConstants
    topology: Topology
    overlap: OverlapConstants
    spread: Spread
    nccl: Nccl | None = None
    gloo: Gloo | None = None
    measured: Measured | None = None
    host: Host | None = None
    operations: Operations | None = None
    software: Software = PLAIN_INSTALL
    stack: NcclStack | None = None  # None: one on which collectives run side by side
    capture: Capture = "auto"  # of the steps that are priced
    facts: Mapping[str, Fact] = field(default_factory=dict, compare=False, repr=False)
    folder: Path = field(default=FOLDER, compare=False, repr=False)

    @property
    def gpus_per_server(self) -> int:
        return self.topology.gpus_per_server

    @property
    def gpus(self) -> int:
        return self.topology.gpus_per_server * self.topology.servers

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """What carries the collectives of a step there."""
        return "gloo" if self.nccl is None else "nccl"

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return "cuda" if self.nccl is not None else "cpu"

    @property
    def captured(self) -> bool:
        """Whether steps are captured, rather than launched by the host."""
        return self.capture != "off" if self.stack is None else self.stack.captures(self.capture)

    @property
    def one_at_a_time(self) -> bool:
        """Whether NCCL runs collectives of different communicators one after another."""
        return self.stack is not None and bool(self.stack.serial(self.captured))

    def order_told(self) -> str:
        """What NCCL and the driver take from a step, and how it is priced; empty where they take nothing."""
        if self.stack is None or not (lost := self.stack.told()):
            return ""
        order = "one after another" if self.one_at_a_time else "side by side"
        return f"{lost}; priced {order}, {'captured' if self.captured else 'launched by the host'}"

    def capturing(self, capture: Capture) -> Cluster:
        """The same with steps captured as a recipe asks."""
        return replace(self, capture=capture)

    def running(self, software: Software) -> Cluster:
        """The same machines with other software."""
        return replace(self, software=software)

    def with_packages(self, packages: Sequence[str]) -> Cluster:
        """The same with more packages installed, by name. Raises CinemeshError for one that there is not."""
        return self.running(self.software.beside(packages_of(packages)))

    def with_headroom(self, headroom_bytes: float) -> Cluster:
        """The same with less of a GPU's memory to use. Raises CinemeshError where nothing is left."""
        usable = self.memory.usable_bytes
        if headroom_bytes >= usable:
            raise CinemeshError(
                f"headroom {headroom_bytes / 1e9:g} GB >= {usable / 1e9:.1f} GB usable of a GPU of {self.name}",
                remedy="leave less of it free",
            )
        return self.with_(**{"memory.usable_bytes": usable - headroom_bytes})

    def check_host(self, held_bytes: int) -> None:
        """Raise CinemeshError where the host has less memory for a GPU than its rank is to hold there."""
        free = self.host.memory_bytes if self.host else 0.0
        if held_bytes > free:
            raise CinemeshError(
                f"plan: offload puts {held_bytes / 1e9:.1f} GB a GPU into host memory, and {self.name} has "
                f"{free / 1e9:.1f}",
                remedy="offload fewer activations, in fewer blocks (raise last_blocks), or raise tp or cp",
                what="offload",
            )

    def has_placeholders(self, section: str) -> bool:
        """Whether a number of a section, by its dotted name, is no better than an order of magnitude."""
        return any(fact.origin == PLACEHOLDER for path, fact in self.facts.items() if path.startswith(section))

    def grid(self, name: str) -> Grid | None:
        """A CSV beside the cluster file; None for no name."""
        return read_grid(self.beside(name)) if name else None

    def beside(self, name: str) -> str:
        """The path of a table: beside the cluster file, else among the shipped ones, where its base comes from."""
        path = self.folder / file_name(name, f"cluster {self.name}: the table")
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
        raise CinemeshError(f"cluster: nothing is named {shown!r}", remedy=f"{head!r} is none of {', '.join(known)}")
    inner = owner[head] if isinstance(owner, Mapping) else getattr(owner, head)
    new = _changed(inner, rest, value, shown) if rest else value
    return {**owner, head: new} if isinstance(owner, Mapping) else replace(owner, **{head: new})


# -- reading ----------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Clusters that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def load(name_or_path: str, servers: int | None = None, packages: str = "", headroom_gb: float = 0.0) -> Cluster:
    """A cluster by name, or from a file (anything that ends in .yaml). ``CinemeshError`` for what cannot be.

    ``servers``: in place of as many as the file says, in pods of the same size. ``packages``: installed beside those
    that it says, by name, commas between them. ``headroom_gb``: of a GPU's usable memory, left free.
    """
    path = _path_of(name_or_path)
    cluster = from_dict(_read(path), path.stem, path.parent).with_packages(names_in(packages))
    if headroom_gb:
        cluster = cluster.with_headroom(headroom_gb * 1e9)
    return cluster if servers is None else cluster.with_(**{"topology.servers": servers})


def write_cluster(path: Path, text: str) -> Cluster:
    """Write a cluster file, whole and fit to be read or not at all. Raises CinemeshError as :func:`load`."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        return from_dict(_read(unfinished), path.stem, path.parent)


def merged_values(name_or_path: str) -> dict[str, Any]:
    """What a cluster's file says, its bases merged in. Raises CinemeshError as :func:`load`."""
    return _read(_path_of(name_or_path))


def over(name_or_path: str, made: dict[str, Any]) -> dict[str, Any]:
    """A file's values: what ``made`` says, over a cluster.

    One that ships is named as the base; a file's own values are taken in, since the new file may lie elsewhere. Raises
    CinemeshError as :func:`load`.
    """
    if name_or_path in names():
        return {"base": [name_or_path], **made}
    return _merge(merged_values(name_or_path), made)


def _path_of(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise CinemeshError(
                f"cluster: there is no file {name_or_path}", remedy=f"known clusters: {', '.join(names())}"
            )
    else:
        path = FOLDER / f"{name_or_path}.yaml"
        if name_or_path.startswith("_") or not path.is_file():
            raise CinemeshError(
                f"cluster: {name_or_path!r} is unknown",
                remedy=f"{did_you_mean(name_or_path, names())}. Or give a .yaml file",
            )
    return path


def names_in(packages: str) -> list[str]:
    """``fa3,fa4`` -> ``fa3``, ``fa4``."""
    return packages.split(",") if packages else []


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over its bases. A part is looked for beside the file, then among those of the package."""
    if path in seen:
        raise CinemeshError(
            f"cluster {path.stem}: its base leads back to itself", remedy="remove one of the base entries"
        )
    where, remedy = f"cluster {path.stem}", "compare one that ships"
    values = mapping(read_yaml(path, "the cluster file", remedy), where, (*_BELOW, *_KEYS))
    merged: dict[str, Any] = {}
    for kind in _BELOW:
        bases = values.pop(kind, None) or []
        for base in bases if isinstance(bases, list) else [bases]:
            base = file_name(base, f"{where}: {kind}")
            found = next((p for f in (path.parent, FOLDER, TABLES) if (p := f / f"{base}.yaml").is_file()), None)
            if found is None:
                raise CinemeshError(
                    f"{where}: {kind} {base!r} is no file beside it or among the shipped ones",
                    remedy=f"put it there, or remove it from {kind}",
                )
            below = _read(found, (*seen, path))
            merged = _merge(merged, _inherited(below) if kind == "inherits" else below)
    return _merge(merged, values)


def _inherited(values: dict[str, Any]) -> dict[str, Any]:
    """The same with every number marked as one of another chip."""
    if "value" in values:
        return {**values, "origin": INHERITED}
    return {key: _inherited(cast(dict, value)) if isinstance(value, dict) else value for key, value in values.items()}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``; a number is replaced whole, and removed by None."""
    merged = dict(below)
    for key, value in above.items():
        if value is None and merged.pop(key, None) is not None:
            continue
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and "value" not in value:
            merged[key] = _merge(cast(dict, old), cast(dict, value))
        else:
            merged[key] = value
    return merged


_SECTIONS: dict[str, Any] = {
    "gpu": Gpu,
    "matmul": Matmul,
    "stream": StreamConstants,
    "launch": LaunchConstants,
    "memory": MemoryConstants,
    "topology": Topology,
    "overlap": OverlapConstants,
    "spread": Spread,
}
_BELOW = ("inherits", "base")
_LIBRARIES: dict[str, Any] = {"nccl": Nccl, "gloo": Gloo}
_KEYS = (
    "name",
    "about",
    "sources",
    "packages",
    "stack",
    "attention",
    "measured",
    "host",
    "operations",
    *_SECTIONS,
    *_LIBRARIES,
)


def from_dict(values: dict[str, Any], name: str, folder: Path = FOLDER) -> Cluster:
    """A cluster from the mapping that a file holds, its bases merged in."""
    reader = Reader(name, values.get("sources"))
    read = {key: reader.section(kind, values.get(key), key) for key, kind in _SECTIONS.items()}
    libraries = [key for key in _LIBRARIES if key in values]
    if len(libraries) != 1:
        raise reader.wrong("nccl, gloo", f"has {len(libraries)} of the two", "give the constants of exactly one")
    read[libraries[0]] = reader.section(_LIBRARIES[libraries[0]], values[libraries[0]], libraries[0])
    if "measured" in values:
        measured = read["measured"] = reader.section(Measured, values["measured"], "measured")
        if other := sorted(set(measured.floor_s) ^ set(measured.bytes_per_s)):
            raise reader.wrong("measured", f"has {other[0]} in one of its two tables", "give each op in both")
    if "host" in values:
        read["host"] = reader.section(Host, values["host"], "host")
        if (link := read["host"].link) not in ("", "nic"):
            raise reader.wrong("host.link", f"is {quoted(link)}", "write nic, or leave it out")
    if "operations" in values:
        read["operations"] = reader.section(Operations, values["operations"], "operations")
    families = reader.keyed(values.get("attention") or {}, "attention")
    if not families:
        raise reader.wrong("attention", "is missing", "give at least one family of kernels")
    read["attention"] = {
        key: reader.section(AttentionFamily, value, f"attention.{key}") for key, value in families.items()
    }
    gpu_library, kind = libraries[0] == "nccl", capability_of(read["gpu"].device)
    if gpu_library != (kind is not None):
        raise reader.wrong("gpu.device", f"is {quoted(read['gpu'].device)} beside {libraries[0]}", "gloo joins CPUs")
    if (stack := values.get("stack")) is not None:
        if not gpu_library:
            raise reader.wrong("stack", "is beside gloo", "it tells NCCL's release, and its driver's")
        releases = reader.keyed(stack, "stack", ("nccl", "driver"))
        read["stack"] = NcclStack(*(_release(reader, releases, key) for key in ("nccl", "driver")))
    packages = values.get("packages") or []
    if not isinstance(packages, list):
        raise reader.wrong("packages", f"is {quoted(packages)}, no list", "write for example [flash-attn-3]")
    read["software"] = PLAIN_INSTALL.beside(packages_of(reader.text(name, "packages") for name in packages))
    title, about = reader.text(values.get("name", name), "name"), reader.text(values.get("about", ""), "about")
    return Cluster(name=title, about=about, **read, facts=reader.facts, folder=folder)


def _release(reader: Reader, releases: dict[str, Any], key: str) -> tuple[int, int]:
    """Major and minor of a release: as a number, 2.30 would be 2.3."""
    text = releases.get(key)
    if not isinstance(text, str) or not (found := re.fullmatch(r"(\d+)\.(\d+)", text)):
        raise reader.wrong(f"stack.{key}", f"is {quoted(text)}", 'write a release as a text, for example "12.8"')
    return int(found[1]), int(found[2])
