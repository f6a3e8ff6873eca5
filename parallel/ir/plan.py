"""Plan: everything that decides how a step is run, and its legality (torch-free).

A plan is frozen, printable and round-trips through YAML and the command line. Whatever is illegal is refused with the
rule and its numbers before any tensor exists. Its fields stand in ``fields.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...documents import parse_yaml, quoted, write_yaml
from ...errors import CinemeshError, did_you_mean
from .fields import AXES, Degrees, Memory, Overlap, Streams
from .knobs import Knob, Size, knobs, written
from .layout import Axes


@dataclass(frozen=True)
class Plan(Streams, Overlap, Memory, Degrees):  # a dataclass takes the fields of its last base first
    """All that decides how a step is run: ``Degrees``, ``Memory``, ``Overlap`` and ``Streams``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = vars(self)
        for name, knob in KNOBS.items():
            if (value := given[name]) is not knob.default and value != knob.off:
                self._check_acts(knob, value)
                for other, why in knob.excludes.items():
                    self._check_alone(knob, value, KNOBS[other], why)

    def _check_acts(self, knob: Knob, value: object) -> None:
        """Refuse what has nothing to act on under these degrees."""
        idle = knob.idles(value, self.size)
        if idle is None:
            return
        asked, axes, remedy = idle
        degrees = self.equation() if axes == AXES else ", ".join(f"{axis}(1)" for axis in axes)
        rule = f"{knob.rule}, so {knob.idle}"
        raise CinemeshError(
            f"plan: {knob.name}({asked}) with {degrees}: {rule}",
            remedy=f"{remedy} or raise {'a degree' if axes == AXES else ' or '.join(axes)}",
            what=knob.name,
            value=value,
            rule=rule,
        )

    def _check_alone(self, knob: Knob, value: object, other: Knob, why: str) -> None:
        """Refuse ``other`` beside a knob that excludes it."""
        beside = getattr(self, other.name)
        if beside != other.off:
            raise CinemeshError(
                f"plan: {knob.name}({knob.write(value)}) with {other.name}({other.write(beside)}): {why}",
                remedy=f"set {knob.name} to {knob.write(knob.off)} or {other.name} to {other.write(other.off)}",
                what=knob.name,
                value=value,
                rule=why,
            )

    def with_degrees(self, **degrees: int) -> Plan:
        """The same plan on other degrees, less what would have no effect there."""
        size = {axis: self.size(axis) for axis in AXES} | degrees

        def ranks(axes: Axes) -> int:
            return math.prod([size[axis] for axis in axes])

        on = [(knob, value) for n, knob in KNOBS.items() if (value := getattr(self, n)) is not knob.off]
        return replace(self, **{knob.name: knob.left(value, ranks) for knob, value in on} | degrees)

    def without_overlap(self) -> Plan:
        """The same plan, every record in the builder's order and whole. Units are prefetched all the same."""
        return replace(self, **{name: knob.off for name, knob in knobs(Overlap).items() if knob.axes})

    def without_streams(self) -> Plan:
        """The same records, the GPU shared as it is by default."""
        return replace(self, **{name: knob.off for name, knob in knobs(Streams).items()})

    # -- the model ------------------------------------------------------------------------------------------------

    def divisors(self, size: Size) -> list[int]:
        """What a size of the model must divide by, all of them."""
        demands = (demand for knob in KNOBS.values() for demand in knob.divides if demand.size == size)
        return [self._product(demand.after) * self._product(demand.by) for demand in demands]

    def check_model(self, *, heads: int, ffn: int, tokens: int, text_widths: dict[str, int], latent: str) -> None:
        """Refuse a model or a sample that the degrees, or parts of an exchange, do not divide."""
        sizes: dict[Size, dict[str, int]] = {
            "heads": {"heads": heads},
            "ffn": {"ffn": ffn},
            "text": {f"width of text encoder {name}": width for name, width in text_widths.items()},
            "tokens": {f"tokens of a {latent} latent": tokens},
        }
        for knob in KNOBS.values():
            for demand in knob.divides:
                for what, value in sizes[demand.size].items():
                    share, by = value // self._product(demand.after), self._product(demand.by)
                    if share % by == 0:
                        continue
                    rule = f"{demand.share or what}({share}) % {self._shown(demand.by)} = {share % by}, it must be 0"
                    through = f"{demand.size}({value}) / {self._shown(demand.after, whole=False)}"
                    remedy = demand.remedy or f"choose a {knob.name} that divides {through}"
                    raise CinemeshError(rule, remedy=remedy, what=demand.size, value=value, rule=rule)

    def _product(self, names: tuple[str, ...]) -> int:
        return math.prod([getattr(self, name) for name in names])

    def _shown(self, names: tuple[str, ...], *, whole: bool = True) -> str:
        """``kv_slices(4)``, ``(cp(2) * tp(4) = 8)``; without the product where not ``whole``."""
        factors = " * ".join(f"{name}({getattr(self, name)})" for name in names)
        return factors if len(names) == 1 else f"({factors} = {self._product(names)})" if whole else f"({factors})"

    # -- reading and writing --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in KNOBS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())

    def to_text(self) -> str:
        """As ``parse`` reads it: what differs from the defaults."""
        return ",".join(written(self, KNOBS))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        for name in values:
            if name not in KNOBS:
                remedy = did_you_mean(name, KNOBS)
                raise CinemeshError(f"plan: unknown key {quoted(name)}", remedy=remedy, what="key", value=name)
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """Of one ``key: value`` a line, each as ``parse`` reads it or a list; in a recipe, of the section ``plan``."""
        return cls.of_file(parse_yaml(text, "plan: the text", MAPPING))

    @classmethod
    def of_file(cls, values: Any) -> Plan:
        """As ``from_yaml``, of what a file holds."""
        plan = values["plan"] if isinstance(values, dict) and "plan" in values else values
        if not isinstance(plan, dict):
            raise CinemeshError(f"plan: the plan there is {quoted(plan)}", remedy=MAPPING)
        return cls.from_dict(_read(plan.items()))

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> Plan:
        """From the command line: ``tp=4,cp=2,dp_shard=96``. What is left out is as in ``defaults``."""
        return cls.from_dict(defaults | fields_of(text))


MAPPING = "it must be a mapping of fields: write one 'key: value' a line"


def fields_of(text: str) -> dict[str, Any]:
    """What the command line gives of a plan, each value as its knob reads it; no knob has checked it."""
    items: list[tuple[str, str]] = []
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise CinemeshError(
                f"plan: {quoted(item)} is not key=value", remedy="write for example tp=4,cp=2,dp_shard=96"
            )
        items.append((key.strip(), value.strip()))
    return _read(items)


def _read(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in items:
        if key in values:
            raise CinemeshError(f"plan: {key} is given twice", remedy="leave one of them out", what=key)
        values[key] = KNOBS[key].read(value) if key in KNOBS and isinstance(value, str) else value
    return values


KNOBS: Mapping[str, Knob] = knobs(Plan)
