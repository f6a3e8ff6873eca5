"""Numbers that people give: what each may be, and why (torch-free).

A range stands in the type of the field that it bounds, ``Annotated[int, Range(...)]``: pydantic checks recipes by it,
the command line takes its bounds, docs/recipe.md prints it. Booleans, texts, NaN and infinities are no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
