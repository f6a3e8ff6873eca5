"""Knobs: what a field of a plan may be, where it has an effect, and what is said where it has none (torch-free).

A field is declared once, with its knob::

    kv_slices: int = knob(1, Whole(least=1, most=1024, axes=("cp",), rule="K and V are gathered over cp", ...))

Checks, ``Plan.with_degrees``, reading and writing, the tables of docs/overlap.md, the command line's help and the
tuner's candidates all follow from what is said there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, TypeVar, cast

from ...errors import CinemeshError
from .layout import Axes

Size = Literal["heads", "ffn", "text", "tokens"]  # of a model or a sample
T = TypeVar("T")

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})")  # int() takes more: 1_000, 010, other digits
WORDS: dict[str, object] = {"true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True)
class Divides:
    """A size of the model that must divide: ``size`` over the knobs ``after`` that have split it, by the knobs ``by``.

    ``share``: what is left of the size, in words, where something has split it before; else the remedy is given.
    """

    size: Size
    by: tuple[str, ...]
    after: tuple[str, ...] = ()
    share: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """What a field of a plan is. ``knobs`` fills in ``name``, ``default``, ``off`` and ``rivals``.

    does         what it does, and ``bound``, what that costs or is limited by: for people
    axes         it acts on communication over these. Where each of them is 1 it is refused, and ``with_degrees`` sets
                 it to ``off``: then, by the ``rule``, it would come to what ``idle`` says
    off          the value without effect; the field's default, unless given
    excludes     knobs that may not be on as well, and why; ``rivals``: these, and those that exclude this one
    divides      what of a model or a sample it must divide
    reorders     records then leave the builder's order: the schedule pass is needed
    tries        values that the tuner tries, ``tried_with`` every one of these knobs' own
    """

    name: str = ""
    default: Any = None
    does: str
    bound: str = ""
    axes: Axes = ()
    rule: str = ""
    idle: str = "nothing would overlap"
    off: Any = None
    excludes: Mapping[str, str] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    divides: tuple[Divides, ...] = ()
    reorders: bool = False
    tries: tuple[Any, ...] = ()
    tried_with: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        """What it may be, in words."""
        raise NotImplementedError

    def check(self, value: object) -> None:
        """Raise CinemeshError for a value that it may not have, whatever the others are."""
        raise NotImplementedError

    def read(self, text: str) -> object:
        """A value from text. What is none stays as it is, for ``check`` to refuse."""
        return WORDS[text] if text in WORDS else int(text) if NUMBER.fullmatch(text) else text

    def write(self, value: Any) -> str:
        """A value as ``read`` takes it."""
        return str(value).lower() if isinstance(value, bool) else str(value)

    def left(self, value: Any, size: Callable[[Axes], int]) -> Any:
        """What is left of a value where a group of axes has ``size`` ranks."""
        return self.off if self.axes and value != self.off and size(self.axes) == 1 else value

    def idles(self, value: Any, size: Callable[[Axes], int]) -> tuple[str, Axes, str] | None:
        """What of a value has nothing to act on, over which axes, and how it is taken back."""
        if self.left(value, size) == value:
            return None
        return self.write(value), self.axes, f"set {self.name} to {self.write(self.off)}"

    def wrong(self, value: object, must: str) -> CinemeshError:
        shown = list(value) if isinstance(value, tuple) else value
        return CinemeshError(
            f"plan: {self.name} is {shown!r:.200}", remedy=must, what=self.name, value=value, rule=must
        )


@dataclass(frozen=True, kw_only=True)
class Whole(Knob):
    """A whole number from ``least`` to ``most``, and ``why`` not more. ``of_sms``: so many SMs of a GPU."""

    least: int
    most: int
    why: str
    of_sms: bool = False

    @property
    def values(self) -> str:
        return f"{self.least} to {self.most:,}"

    def check(self, value: object) -> None:
        if type(value) is not int or value < self.least:  # True is no number
            raise self.wrong(value, f"it must be a whole number of at least {self.least}")
        if value > self.most:
            rule = f"{self.name}({value}) > {self.most}, {self.why}"
            raise CinemeshError(
                f"plan: {rule}", remedy=f"use {self.most} or fewer", what=self.name, value=value, rule=rule
            )


@dataclass(frozen=True, kw_only=True)
class Switch(Knob):
    """True or false."""

    @property
    def values(self) -> str:
        return "true, false"

    def check(self, value: object) -> None:
        if not isinstance(value, bool):
            raise self.wrong(value, "it must be true or false")


@dataclass(frozen=True, kw_only=True)
class OneOf(Knob):
    """One of some words."""

    words: tuple[str, ...]

    @property
    def values(self) -> str:
        return ", ".join(self.words)

    def check(self, value: object) -> None:
        if value not in self.words:
            raise self.wrong(value, f"choose one of {self.values}")


@dataclass(frozen=True, kw_only=True)
class Names(Knob):
    """Several names; in text ``a:b``."""

    def read(self, text: str) -> object:
        return tuple(filter(None, text.split(":")))

    def write(self, value: tuple[str, ...]) -> str:
        return ":".join(value)

    @staticmethod
    def are_names(value: object) -> bool:
        return isinstance(value, tuple) and all(isinstance(name, str) and name.isidentifier() for name in value)


@dataclass(frozen=True, kw_only=True)
class Order(Names):
    """All of some names."""

    words: tuple[str, ...]

    @property
    def values(self) -> str:
        return f"{', '.join(self.words)} in any order"

    def check(self, value: Any) -> None:
        if not self.are_names(value) or sorted(value) != sorted(self.words):
            raise self.wrong(value, f"it must name each of {', '.join(self.words)} once")


@dataclass(frozen=True, kw_only=True)
class SomeOf(Names):
    """Some of the names of groups of axes, each of which needs more than one rank there."""

    groups: Mapping[str, Axes]

    @property
    def values(self) -> str:
        return f"some of {', '.join(self.groups)}"

    def check(self, value: Any) -> None:
        if not self.are_names(value) or len({*value}) < len(value):
            raise self.wrong(value, f"list some of {', '.join(self.groups)}, each once")
        for name in value:
            if name not in self.groups:
                raise CinemeshError(
                    f"plan: {self.name} names {name!r}",
                    remedy=f"choose from {', '.join(self.groups)}",
                    what=self.name,
                    value=value,
                )

    def left(self, value: tuple[str, ...], size: Callable[[Axes], int]) -> tuple[str, ...]:
        return tuple(name for name in value if size(self.groups[name]) > 1)

    def idles(self, value: tuple[str, ...], size: Callable[[Axes], int]) -> tuple[str, Axes, str] | None:
        alone = (name for name in value if size(self.groups[name]) == 1)
        return next(((name, self.groups[name], f"take {name} out of {self.name}") for name in alone), None)


@dataclass(frozen=True, kw_only=True)
class Kept(Names):
    """One of some words, or a list of names, in text ``a:`` when it is one; ``optional``: or nothing, ``null``."""

    words: tuple[str, ...]
    optional: bool = False

    @property
    def values(self) -> str:
        return f"{', '.join(self.words)}, or a list of activations"

    def check(self, value: object) -> None:
        if value not in self.words and not self.are_names(value) and not (self.optional and value is None):
            raise self.wrong(value, f"choose one of {', '.join(self.words)}, or list the activations to keep")

    def read(self, text: str) -> object:
        return super().read(text) if ":" in text else None if self.optional and text in ("null", "~", "") else text

    def write(self, value: str | tuple[str, ...] | None) -> str:
        if value is None or isinstance(value, str):
            return value or "null"
        return super().write(value) + ":" * (len(value) < 2)  # else it would be a word


@dataclass(frozen=True, kw_only=True)
class Activations(Names):
    """Some activations of a block."""

    @property
    def values(self) -> str:
        return "a list of activations"

    def check(self, value: Any) -> None:
        if not self.are_names(value) or len({*value}) < len(value):
            raise self.wrong(value, "list activations, each once")


def knob(default: T, facts: Knob) -> T:
    """A field of a group of settings, for ``dataclass``."""
    return cast(T, field(default=default, metadata={"knob": facts}))


@cache
def knobs(of: type) -> dict[str, Knob]:
    """The knobs of a plan, or of one of its groups, by name, in the order of their declaration."""
    declared: dict[str, Knob] = {f.name: f.metadata["knob"] for f in fields(of)}
    made: dict[str, Knob] = {}
    for f in fields(of):
        facts = declared[f.name]
        off = f.default if facts.off is None else facts.off
        assert off == f.default or not facts.axes, f"{f.name} is on by default, and has no effect on one rank"
        rivals = (name for name, other in declared.items() if name in facts.excludes or f.name in other.excludes)
        made[f.name] = replace(facts, name=f.name, default=f.default, off=off, rivals=tuple(rivals))
    return made


class KnobGroup:
    """Settings that check themselves, each by its knob."""

    def __post_init__(self) -> None:
        given = vars(self)
        for name, facts in knobs(type(self)).items():
            if given[name] is not facts.default:  # else there is nothing to check: thousands of plans are compared
                facts.check(given[name])


def written(settings: object, table: Mapping[str, Knob]) -> list[str]:
    """Those of the knobs that are not at their defaults, as text that they read: ``["tp=4"]``."""
    values = ((facts, getattr(settings, name)) for name, facts in table.items())
    return [f"{facts.name}={facts.write(value)}" for facts, value in values if value != facts.default]
