"""A cluster file from a profile: the prices of a cluster, each law at the level at which real steps ran (torch-free).

A profile has few shapes, those of one plan: they tell how fast a law is, and not its form. So every law keeps its form
and takes one factor, by dtype of the products, direction of attention, kind of the other ops and of the collectives:
seconds that the profile's records took over those that the base says of them, weighted by how often a step has them.
What no record shows stays the base's, but for kinds of ops for which it has one law together: they take the factor of
all. Of GPUs, the ops that are neither product nor attention stay: their bytes depend on how the software fuses them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from ...documents import quoted, read_json, write_yaml
from ...errors import CinemeshError, did_you_mean
from ...files import atomic_file
from ...kernels.ops import OPS
from ...parallel.ir.collectives import COLLECTIVES
from ...ranges import integers, reals
from ...reading import read_record
from ..clusters.cluster import Cluster, load, merged_values, write_cluster
from ..clusters.constants import LIMITS, UNITS, Rule
from ..clusters.schema import Measured
from ..prices.compute import Compute
from . import links
from .calibrate import SHOWN_UNITS, Key, attention_call, price_of

KEY_LENGTHS: dict[str, int] = {"matmul": 5, "attention": 5, "stream": 1, "collectives": 3}
NAMES = {  # of a matmul: dtypes, which its cluster must know
    "attention": ("forward", "backward"),
    "stream": tuple(kind for kind, spec in OPS.items() if spec.law not in ("matmul", "attention")),
    "collectives": COLLECTIVES,
}
SECTIONS = (
    "gpu",
    "matmul",
    "attention",
    "forward",
    "backward",
    "launch",
    "measured",
    "gloo",
    "topology",
    "nccl",
)  # with laws
_REMEDY = "give the profile.json that cinemesh profile wrote"
_SECONDS = reals(0.0, 1e6, "no record takes longer", "s", above=True)


@dataclass(frozen=True, kw_only=True)
class ProfileSample:
    """Records of one shape: the mean of their ``seconds``, and how many a step has.

    ``part``, ``name`` and ``key`` are as in :class:`~.calibrate.TimedSamples`.
    """

    part: str
    name: str
    key: tuple[int, ...]
    seconds: Annotated[float, _SECONDS]
    count: Annotated[int, integers(1, 10**9, "no step has more records")]

    def __post_init__(self) -> None:
        if self.part not in KEY_LENGTHS:
            raise CinemeshError(f"part is {quoted(self.part)}", remedy=f"it must be one of {', '.join(KEY_LENGTHS)}")
        if len(self.key) != KEY_LENGTHS[self.part] or min(self.key) < 0:
            raise CinemeshError(
                f"key is {quoted(list(self.key))}", remedy=f"{KEY_LENGTHS[self.part]} sizes are a {self.part}'s"
            )
        if self.name not in NAMES.get(self.part, (self.name,)):
            raise CinemeshError(f"name is {quoted(self.name)}", remedy=did_you_mean(self.name, NAMES[self.part]))


@dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """What ``profile.json`` says of the machine: its records' times. ``dtype``: that of the plan's compute."""

    about: str
    date: str
    device: str
    cluster: str
    dtype: str
    samples: tuple[ProfileSample, ...]

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path) -> MachineProfile:
    """Raises CinemeshError for a file that is no profile."""
    read = read_record(MachineProfile, read_json(path, "the profile", _REMEDY), f"the profile {path}")
    if not read.samples:
        raise CinemeshError(f"the profile {path} has no samples", remedy=_REMEDY)
    return read


def write_leveled(source: Path, base_name: str | None, out: Path) -> tuple[Cluster, dict[str, tuple[float, float]]]:
    """Write the base's cluster file at the profile's levels. It as it is read back, and errors by part.

    Unless told the base is the cluster on which the profile was priced.

    These are of seconds of a step, predicted against measured: before and after. Raises CinemeshError for a file that
    is no profile, and for a base of another kind of device.
    """
    profile = read_profile(source)
    base_name = base_name or profile.cluster
    base = load(base_name)
    if profile.device != base.device:
        raise CinemeshError(
            f"the profile {source} is of {profile.device}, and {base_name} of {base.device}",
            remedy=f"name with --base a cluster of its kind, as {profile.cluster}, on which it was priced",
        )
    about = f"{base.about}; levels as a profile on {profile.about} measured them"
    values = _text_of(merged_values(base_name), base, leveled(base, profile), profile)
    values |= {"name": out.stem, "about": about}
    made = write_cluster(out, write_yaml(values, default_flow_style=None, width=120))
    before, after = _errors(_prepared(base), profile), _errors(made, profile)
    return made, {part: (before[part], after[part]) for part in before}


def leveled(base: Cluster, profile: MachineProfile) -> Cluster:
    """The base with each of its laws at the profile's level."""
    on = cluster = _prepared(base)
    for (part, name), factor in factors(on, profile).items():
        cluster = _LEVELS[part](cluster, name, factor, profile)
    if base.device == "cuda":
        tests = [
            links.LinkTest("the profile", sample.name, sample.key[1], sample.key[2], {sample.key[0]: sample.seconds})
            for sample in profile.samples
            if sample.part == "collectives"
        ]
        return links.fit(cluster, tests)
    whole = factors(on, profile, by_name=False).get(("stream", ""), 1.0)
    shown = {sample.name for sample in profile.samples if sample.part == "stream"}
    for kind in sorted(_own_laws(on) - _own_laws(base) - shown):  # the base has one law for all of these
        cluster = _stream(cluster, kind, whole, profile)
    return cluster


def _own_laws(cluster: Cluster) -> set[str]:
    return {*cluster.measured.floor_s} if cluster.measured is not None else set()


def _prepared(base: Cluster) -> Cluster:
    """A base of CPUs with a law of its own for every op, and no launch beside it."""
    if base.device != "cpu":
        return base
    kinds = NAMES["stream"]
    rate = base.stream.fraction * base.gpu.memory_bytes_per_s
    floors, rates = dict.fromkeys(kinds, base.stream.floor_s), dict.fromkeys(kinds, rate)
    if base.measured is not None:
        floors, rates = floors | dict(base.measured.floor_s), rates | dict(base.measured.bytes_per_s)
    launch = dict.fromkeys(("launch.eager_s", "launch.graph_s"), LIMITS["time"][0])  # the host is the device
    return base.with_(measured=Measured(floor_s=floors, bytes_per_s=rates), **launch)


def factors(cluster: Cluster, profile: MachineProfile, *, by_name: bool = True) -> dict[tuple[str, str], float]:
    """By part and name: seconds of a step that the profile's records take over those that the cluster says.

    Not ``by_name``: of all of a part, under no name.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for sample, said in _priced(cluster, profile):
        of = sums.setdefault((sample.part, sample.name if by_name else ""), [0.0, 0.0])
        of[0] += sample.count * sample.seconds
        of[1] += sample.count * said
    return {law: measured / said for law, (measured, said) in sums.items()}


def _errors(cluster: Cluster, profile: MachineProfile) -> dict[str, float]:
    """By part, the seconds of a step by which prices err, as a share of those measured."""
    off: dict[str, list[float]] = {}
    for sample, said in _priced(cluster, profile):
        of = off.setdefault(sample.part, [0.0, 0.0])
        of[0] += sample.count * abs(said - sample.seconds)
        of[1] += sample.count * sample.seconds
    return {part: wrong / whole for part, (wrong, whole) in off.items()}


def _priced(cluster: Cluster, profile: MachineProfile) -> Iterator[tuple[ProfileSample, float]]:
    """The samples whose law takes a factor here, with what it says of each."""
    on_cpu = cluster.device == "cpu"
    price = price_of(cluster) if on_cpu else _price_on_gpus(cluster, profile.dtype)
    for sample in profile.samples:
        if on_cpu or sample.part in ("matmul", "attention"):
            yield sample, price(sample.part, sample.name, sample.key)


def _price_on_gpus(cluster: Cluster, dtype: str) -> Callable[[str, str, Key], float]:
    compute = Compute(cluster)

    def price(part: str, name: str, key: Key) -> float:
        if part == "matmul":
            batch, m, n, k, accumulates = key
            return compute.matmul_s(m, n, k, name, batch=batch, accumulate=bool(accumulates))
        call = attention_call(name, key, dtype)
        return compute.attention_s(call, _family(compute, name, dtype, call.head_dim))

    return price


def _family(compute: Compute, direction: str, dtype: str, head_dim: int) -> str:
    if compute.cluster.device == "cpu":
        return "sdpa"
    op = "attention" if direction == "forward" else "attention_backward"
    return compute.kernel(op, dtype, head_dim).rate_class


# -- one law ----------------------------------------------------------------------------------------------------------


def _within(quantity: str, value: float) -> float:
    low, high = LIMITS[quantity]
    return min(max(value, low), high)


def _matmul(cluster: Cluster, dtype: str, factor: float, profile: MachineProfile) -> Cluster:
    law = cluster.matmul
    efficiency = law.efficiency[dtype] / factor
    if efficiency > 1.0 and cluster.device == "cpu":  # whose peak is what was reached so far
        cluster = cluster.with_(**{f"gpu.peak_flops.{dtype}": cluster.gpu.peak_flops[dtype] * efficiency})
    changed = {f"matmul.efficiency.{dtype}": _within("fraction", efficiency)}
    if dtype == profile.dtype:  # what all dtypes share follows that of the plan
        changed["matmul.memory_fraction"] = _within("fraction", law.memory_fraction / factor)
        changed |= {f"matmul.{name}": getattr(law, name) * factor for name in ("prologue_s", "floor_s")}
    return cluster.with_(**changed)


def _attention(cluster: Cluster, direction: str, factor: float, profile: MachineProfile) -> Cluster:
    compute = Compute(cluster)
    dims = {s.key[4] for s in profile.samples if s.part == "attention" and s.name == direction}
    for family in {_family(compute, direction, profile.dtype, dim) for dim in dims} & {*cluster.attention}:
        law, at = getattr(cluster.attention[family], direction), f"attention.{family}.{direction}"
        changed: dict[str, Any] = {f"{at}.{name}": getattr(law, name) * factor for name in ("prologue_s", "floor_s")}
        changed[f"{at}.speed"] = {dim: speed / factor for dim, speed in law.speed.items()}
        cluster = cluster.with_(**changed)
    return cluster


def _stream(cluster: Cluster, kind: str, factor: float, profile: MachineProfile) -> Cluster:
    assert cluster.measured is not None
    floor, rate = cluster.measured.floor_s[kind] * factor, cluster.measured.bytes_per_s[kind] / factor
    return cluster.with_(
        **{f"measured.floor_s.{kind}": _within("time", floor), f"measured.bytes_per_s.{kind}": _within("rate", rate)}
    )


def _collective(cluster: Cluster, kind: str, factor: float, profile: MachineProfile) -> Cluster:
    """Between servers the link is slower, and takes the factor too: which of the two it is, no sum tells."""
    assert cluster.gloo is not None
    gloo, changed = cluster.gloo, dict[str, float]()
    for primitive in ("all_to_all", "send_recv") if kind == "reduce_scatter" else (kind,):
        changed[f"gloo.message_s.{primitive}"] = gloo.message_s[primitive] * factor
        changed[f"gloo.bytes_per_s.{primitive}"] = gloo.bytes_per_s[primitive] / factor
    if kind == "reduce_scatter":
        changed["gloo.sum_bytes_per_s"] = gloo.sum_bytes_per_s / factor
    return cluster.with_(**changed)


_LEVELS: dict[str, Callable[[Cluster, str, float, MachineProfile], Cluster]] = {
    "matmul": _matmul,
    "attention": _attention,
    "stream": _stream,
    "collectives": _collective,
}


# -- the file ---------------------------------------------------------------------------------------------------------


def _text_of(values: dict[str, Any], base: Cluster, made: Cluster, profile: MachineProfile) -> dict[str, Any]:
    """The base's merged values with every number in which the two clusters differ."""
    values = copy.deepcopy(values)
    title = f"cinemesh profile on {profile.about}"
    values["sources"] = {**values.get("sources", {}), "profile": {"title": title, "date": profile.date}}
    for path, value, unit in _changes(base, made):
        *sections, name = path
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = {"value": value, "unit": unit, "origin": "fitted", "source": "profile"}
    return values


def _changes(base: Any, made: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """(path, value, unit) of every number that differs."""
    if isinstance(made, Mapping):  # sections by name
        for name in made:
            yield from _changes(base.get(name), made[name], (*at, name))
        return
    hints = get_type_hints(type(made), include_extras=True)
    for field in fields(made):
        before, after = getattr(base, field.name, None), getattr(made, field.name)
        rule = next((x for x in get_args(hints[field.name]) if isinstance(x, Rule)), None)
        if rule is not None and before != after:
            unit = SHOWN_UNITS.get(rule.quantity, rule.quantity)
            scale = UNITS[unit][1]
            shown = {k: _short(v / scale) for k, v in after.items()} if rule.table else _short(after / scale)
            yield (*at, field.name), shown, unit
        elif rule is None and field.name in SECTIONS and before != after:
            yield from _changes(before, after, (*at, field.name))


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
