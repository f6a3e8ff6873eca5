"""Numbers that people give: what each may be, and why (torch-free).

A range stands in the type of the field that it bounds, ``Annotated[int, Range(...)]``: pydantic checks recipes by it,
the command line takes its bounds, docs/recipe.md prints it. Booleans, texts, NaN and infinities are no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from .documents import quoted
from .errors import CinemeshError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from ``least`` to ``most``, ``whole`` ones or all; ``why`` not others. ``above``: ``least`` is none."""

    least: float
    most: float
    why: str
    unit: str = ""
    whole: bool = False
    above: bool = False

    @property
    def values(self) -> str:
        """As ``1 to 64``, ``above 0, to 10``."""
        least, most = (f"{end:,}" if isinstance(end, int) else f"{end:.8g}" for end in (self.least, self.most))
        return f"{f'above {least},' if self.above else least} to {most}"

    def wrong(self, value: object) -> str | None:
        """What a value must be instead, None where nothing is wrong."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float) or value != value:
            return f"it must be a {'whole ' * self.whole}number, {self.values}"
        inside = self.least < value if self.above else self.least <= value
        return None if inside and value <= self.most else f"it must be {self.values}: {self.why}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Called by pydantic alone, where a field has this range."""
        from pydantic_core import PydanticCustomError, core_schema

        def checked(value: Any) -> Any:
            if must := self.wrong(value):
                raise PydanticCustomError("range", "{must}", {"must": must})
            return value if self.whole else float(value)

        return core_schema.no_info_plain_validator_function(checked)


def integers(least: int, most: int, why: str, unit: str = "") -> Range:
    return Range(least=least, most=most, why=why, unit=unit, whole=True)


def reals(least: float, most: float, why: str, unit: str = "", *, above: bool = False) -> Range:
    return Range(least=least, most=most, why=why, unit=unit, above=above)


def range_in(hint: Any) -> Range | None:
    """The range that a type has somewhere inside, ``Annotated[int, Range(...)] | None`` too."""
    if isinstance(hint, Range):
        return hint
    return next((found for inner in get_args(hint) if (found := range_in(inner)) is not None), None)


@cache
def ranges_of(kind: type) -> dict[str, Range]:
    """Of the fields of a dataclass that have one."""
    hints = get_type_hints(kind, include_extras=True)
    found = {f.name: range_in(hints[f.name]) for f in fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


@cache
def _left_out(kind: type) -> set[str]:
    """Fields of a dataclass that may be None."""
    return {name for name, hint in get_type_hints(kind).items() if type(None) in get_args(hint)}


def check_ranges(settings: Any, where: str) -> None:
    """Raise CinemeshError for the first field out of its range; ``where`` the settings stand."""
    for name, allowed in ranges_of(type(settings)).items():
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else (value,):
            if (one is not None or name not in _left_out(type(settings))) and (must := allowed.wrong(one)):
                raise CinemeshError(f"{where}{name} is {quoted(value)}", remedy=must, what=name, value=value, rule=must)


# Ranges that recipes and the command line share.
SEED_RANGE = integers(0, 2**64 - 1, "it is the key of Philox, two words of 32 bits")
MOST_STEPS = 10**7
STEPS_RANGE = integers(1, MOST_STEPS, "a run draws the buckets of all its steps before the first", "steps")
EULER_RANGE = integers(1, 10_000, "each is one or two passes of the model; the paper takes at most 1000", "steps")
GUIDANCE_RANGE = reals(
    0, 100, "0 is without the caption, 1 with it; the paper takes 7.5, and far above it clips saturate"
)
BATCH_RANGE = integers(1, 2**20, "no job has more samples in a step", "samples")
WEIGHT_RANGE = reals(1e-6, 1e6, "beside one of another size it would be drawn never, or always")
PROCESSES_RANGE = integers(1, 1024, "no machine starts as many", "processes")
