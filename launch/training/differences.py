"""What a run goes on with that is not what its checkpoint was written with, by every key of the recipe.

A checkpoint's note holds the recipe, its plan as it was resolved: every key with its value, defaults too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .checkpoint.same_model import shown

RECIPE = "recipe"  # of a checkpoint's note


def recorded(config: Any) -> dict[str, Any]:
    """A recipe, of whatever sections, as JSON values: what a checkpoint keeps of it."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)  # a path


def recipe_facts(config: Any) -> dict[str, str]:
    """Every key of the recipe with its value, as texts: what all ranks of a run must have alike."""
    return {key: shown(value) for key, value in _keys(recorded(config))}


@dataclass(frozen=True)
class OtherValue:
    """A key whose value is another one; None: absent. As a text ``optimizer.lr: 0.01 -> 0.02``."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.then)} -> {shown(self.now)}"


def differences(note: Mapping[str, Any], config: Any) -> list[OtherValue]:
    """All keys of the recipe in a checkpoint's ``note`` and in ``config`` whose values differ."""
    then, now = dict(_keys(note[RECIPE])), dict(_keys(recorded(config)))
    return [
        OtherValue(key, then.get(key), now.get(key))
        for key in dict.fromkeys((*then, *now))
        if then.get(key) != now.get(key)
    ]


def _keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no section, by its key; those of a list of sections by their number in it."""
    inside = value
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inside = dict(enumerate(value))
    if not isinstance(inside, dict):
        yield path, value
        return
    for name, item in inside.items():
        yield from _keys(item, f"{path}.{name}" if path else str(name))
