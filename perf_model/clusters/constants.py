"""Numbers in files: each with its unit, origin, source and date, checked and turned into SI (torch-free).

A number is one mapping, ``{value: 3.35, unit: TB/s, origin: datasheet, source: h100}``: its origin is ``datasheet``,
``measured``, ``fitted``, ``inherited, unvalidated`` (another chip's, for want of its own) or ``placeholder``, its
source is an entry of the file's ``sources`` with a title and a date.
A section is a dataclass whose fields have the types below (``Seconds``, ``SecondsTable``, ...); ``Reader`` fills it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, get_args, get_type_hints

from ...documents import quoted
from ...errors import CinemeshError, did_you_mean

PLACEHOLDER, INHERITED = "placeholder", "inherited, unvalidated"
ORIGINS = ("datasheet", "measured", "fitted", INHERITED, PLACEHOLDER)

# unit: (quantity, in SI)
UNITS: dict[str, tuple[str, float]] = {
    "h": ("time", 3600.0),
    "s": ("time", 1.0),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
    "B": ("size", 1.0),
    "KiB": ("size", 2.0**10),
    "MiB": ("size", 2.0**20),
    "GiB": ("size", 2.0**30),
    "GB": ("size", 1e9),
    "B/s": ("rate", 1.0),
    "MB/s": ("rate", 1e6),
    "GB/s": ("rate", 1e9),
    "TB/s": ("rate", 1e12),
    "Mb/s": ("rate", 1.25e5),
    "Gb/s": ("rate", 1.25e8),
    "FLOP/s": ("speed", 1.0),
    "GFLOP/s": ("speed", 1e9),
    "TFLOP/s": ("speed", 1e12),
    "W": ("power", 1.0),
    "count": ("count", 1.0),
    "fraction": ("fraction", 1.0),
    "ratio": ("ratio", 1.0),
}
# What a number of each quantity may be, in SI; a latency above 0.1 s or a rate below 1 kB/s is a slip of the unit.
LIMITS: dict[str, tuple[float, float]] = {
    "time": (1e-10, 0.1),
    "size": (1.0, 1e13),
    "rate": (1e3, 1e14),
    "speed": (1e8, 1e17),
    "power": (1.0, 1e5),
    "count": (1.0, 1e7),
    "fraction": (1e-6, 1.0),
    "ratio": (1e-3, 1e3),
}


@dataclass(frozen=True)
class Rule:
    """What a number must be: of a quantity, or a table of one by name; ``zero``: 0 is a sensible value.

    ``names``: those of a table, where the prices look up each; ``sizes``: its names are whole numbers.
    ``most``: instead of the quantity's upper limit, in SI.
    """

    quantity: str
    table: bool = False
    names: tuple[str, ...] = ()
    sizes: bool = False
    zero: bool = False
    most: float = 0.0


YamlTable = Mapping[str, float]
Seconds = Annotated[float, Rule("time")]
Bytes = Annotated[float, Rule("size")]
BytesPerSecond = Annotated[float, Rule("rate")]
Watts = Annotated[float, Rule("power")]
WholeCount = Annotated[int, Rule("count")]
Fraction = Annotated[float, Rule("fraction")]
Ratio = Annotated[float, Rule("ratio")]

Duration = Annotated[float, Rule("time", most=1e3)]  # of what happens once in a job
LongTime = Annotated[float, Rule("time", most=1e12)]  # between rare events
SecondsOrZero = Annotated[float, Rule("time", zero=True)]
BytesOrZero = Annotated[float, Rule("size", zero=True)]
FractionOrZero = Annotated[float, Rule("fraction", zero=True)]
SecondsTable = Annotated[YamlTable, Rule("time", table=True)]
BytesPerSecondTable = Annotated[YamlTable, Rule("rate", table=True)]
FlopsTable = Annotated[YamlTable, Rule("speed", table=True)]
FractionTable = Annotated[YamlTable, Rule("fraction", table=True)]
FlopsBySize = Annotated[YamlTable, Rule("speed", table=True, sizes=True)]
FractionBySize = Annotated[YamlTable, Rule("fraction", table=True, sizes=True)]


@dataclass(frozen=True)
class Fact:
    """Where a number comes from."""

    value: Any
    unit: str
    origin: str
    source: str
    date: str


class Reader:
    """Turns plain mappings into sections, one message for the first number that cannot be."""

    def __init__(self, cluster: str, sources: Any) -> None:
        self.cluster = cluster
        self.sources: dict[str, Any] = {} if sources is None else self.keyed(sources, "sources")
        self.facts: dict[str, Fact] = {}
        for name, source in self.sources.items():
            for key, text in self.keyed(source, f"sources.{name}", ("title", "date")).items():
                self.text(text, f"sources.{name}.{key}")

    def wrong(self, path: str, what: str, remedy: str) -> CinemeshError:
        return CinemeshError(f"cluster {self.cluster}: {path} {what}", remedy=remedy)

    def keyed(self, values: Any, path: str, known: Collection[str] = ()) -> dict[str, Any]:
        """A mapping, of no other than the ``known`` keys where any are given. Raises CinemeshError."""
        if not isinstance(values, dict):
            raise self.wrong(path, f"is {quoted(values)}, no mapping", f"write {', '.join(known) or 'names'} under it")
        for key in values:
            if known and key not in known:
                raise self.wrong(f"{path}.{key}" if path else key, "is unknown", did_you_mean(key, known))
        return values

    def text(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(path, f"is {quoted(value)}", "it must be a text: quote it")
        return value

    def section(self, kind: Any, values: Any, path: str) -> Any:
        """One section as its dataclass. Raises CinemeshError for a key that is missing or unknown, by its path."""
        if values is None:
            raise self.wrong(path, "is missing", "write its numbers under it")
        hints = _hints(kind)
        self.keyed(values, path, hints)
        read: dict[str, Any] = {}
        for f in fields(kind):
            where = f"{path}.{f.name}"
            if f.name not in values:
                if f.default is MISSING:
                    example = (
                        "a text" if hints[f.name] is str else "{value: ..., unit: ..., origin: measured, source: ...}"
                    )
                    raise self.wrong(where, "is missing", f"add {f.name}: {example}")
                continue
            hint = hints[f.name]
            annotated = get_args(hint)
            if annotated and isinstance(annotated[-1], Rule):
                read[f.name] = self.number(values[f.name], where, annotated[-1], whole=annotated[0] is int)
            elif is_dataclass(hint):
                read[f.name] = self.section(hint, values[f.name], where)
            else:
                read[f.name] = self.text(values[f.name], where)
        return kind(**read)

    def number(self, given: Any, path: str, rule: Rule, *, whole: bool) -> Any:
        """A number in SI units, its origin noted. Raises CinemeshError for a wrong unit, origin or value."""
        if not isinstance(given, dict) or "value" not in given:
            raise self.wrong(path, f"is {quoted(given)}", "write {value: ..., unit: ..., origin: ..., source: ...}")
        self.keyed(given, path, ("value", "unit", "origin", "source"))
        unit, origin, source = (self.text(given.get(key, ""), f"{path}.{key}") for key in ("unit", "origin", "source"))
        quantity, scale = UNITS.get(unit, ("", 1.0))
        if quantity != rule.quantity:
            fit = ", ".join(name for name, (q, _) in UNITS.items() if q == rule.quantity)
            raise self.wrong(path, f"has the unit {unit!r}", f"a {rule.quantity} is given in {fit}")
        if origin not in ORIGINS:
            raise self.wrong(path, f"has the origin {origin!r}", f"say one of {', '.join(ORIGINS)}")
        entry = self.sources.get(source)
        if entry is None or not entry.get("title") or not entry.get("date"):
            raise self.wrong(path, f"has the source {source!r}", "add it under sources with its title and date")
        value = given["value"]
        if rule.table:
            if not isinstance(value, dict) or not value:
                raise self.wrong(path, f"is {quoted(value)}", "it must be a table, {name: number, ...}")
            self.named(value, path, rule)
            read: Any = {k: self.checked(v, f"{path}[{k}]", rule, unit, scale, False) for k, v in value.items()}
        else:
            read = self.checked(value, path, rule, unit, scale, whole)
        self.facts[path] = Fact(value, unit, origin, entry["title"], entry["date"])
        return read

    def named(self, table: dict[str, Any], path: str, rule: Rule) -> None:
        """Refuse a table without a name that the prices look up, or with one that they cannot read."""
        if rule.names:
            self.keyed(table, path, rule.names)
            if missing := [name for name in rule.names if name not in table]:
                raise self.wrong(path, f"has no {missing[0]}", f"give a number for each of {', '.join(rule.names)}")
        if rule.sizes and (other := [name for name in table if not name.isdecimal()]):
            raise self.wrong(path, f"has the name {other[0]!r}", "name each number by a size, a whole number")

    def checked(self, value: Any, path: str, rule: Rule, unit: str, scale: float, whole: bool) -> float | int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(path, f"is {quoted(value)}", f"it must be a number of {unit}")
        if whole and value != int(value):
            raise self.wrong(path, f"is {value}", "it must be a whole number")
        low, high = LIMITS[rule.quantity]
        high = rule.most or high
        si = value * scale
        if not (low <= si <= high or (rule.zero and si == 0)):  # also refuses nan
            span = f"from {low / scale:g} to {high / scale:g} {unit}" + (", or 0" if rule.zero else "")
            raise self.wrong(path, f"is {value} {unit}", f"a {rule.quantity} here lies {span}")
        return int(value) if whole else si


@lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
