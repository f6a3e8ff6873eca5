"""A recipe from its file: sections that are dataclasses with ranges, filled from YAML and ``a.b=value`` overrides.

Pydantic checks them: frozen, no unknown keys. Whatever is wrong becomes one ``CinemeshError`` that names the key, the
value and the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...documents import mapping, parse_yaml, quoted, read_yaml
from ...errors import CinemeshError, did_you_mean

T = TypeVar("T")


def read_values(kind: type, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of a recipe of a ``kind``, with overrides, as plain values.

    Raises CinemeshError for a file that cannot be read, for unknown sections, and for keys given twice.
    """
    sections = keys(kind)
    values = read_yaml(path, "the recipe", f"a recipe is a YAML file with the sections {', '.join(sections)}")
    mapping(values, f"the recipe {path}", sections)
    override(values, overrides)
    return values


def from_values(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A recipe from plain values; ``where`` names their origin in errors."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise section_error(error, kind, f"{where}: ") from None


def override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``a.b=value`` into what a file holds. Raises CinemeshError for one that is not of that form."""
    given: set[str] = set()
    for override in overrides:
        said = f"--set {quoted(override)}"
        key, equals, text = (part.strip() for part in override.partition("="))
        path = key.split(".")
        if not equals or not all(path):
            raise CinemeshError(f"{said} is not KEY=VALUE", remedy="write for example --set optimizer.lr=1e-3")
        if key in given:
            raise CinemeshError(f"{said}: {key} is given twice", remedy="leave one of them out")
        given.add(key)
        section: Any = values
        for name in path[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise CinemeshError(
                    f"{said}: {name} is {quoted(section)}, no section", remedy="--set replaces one value"
                )
        section[path[-1]] = parse_yaml(text, f"{said}: {quoted(text)}", "quote it")


def section_error(error: ValidationError, section: Any, where: str = "") -> CinemeshError:
    """The first complaint of pydantic: key path, value, rule and, for an unknown key, the nearest known one.

    ``section``: the class that was to be filled.
    """
    complaints = error.errors(include_url=False)
    unknown = {"unexpected_keyword_argument", "extra_forbidden"}
    first = next((c for c in complaints if c["type"] in unknown), complaints[0])  # a typo also leaves a key missing
    path = tuple(first["loc"])
    key = ".".join(map(str, path))
    if first["type"] in unknown:
        known = keys(_type_at(section, path[:-1]))
        return CinemeshError(f"{where}unknown key {key!r}", remedy=did_you_mean(path[-1], known))
    if first["type"] in ("missing", "missing_argument"):
        return CinemeshError(f"{where}the key {key!r} is missing", remedy="add it")
    if first["type"] == "range":
        return CinemeshError(f"{where}{key} is {quoted(first['input'])}", remedy=first["msg"], what=key)
    rule = first["msg"][0].lower() + first["msg"][1:]
    return CinemeshError(f"{where}{key} is {quoted(first['input'])}: {rule}")


def _type_at(section: Any, path: tuple[int | str, ...]) -> Any:
    """The class at a key path below ``section``."""
    at = section
    for part in path:
        if isinstance(part, str):
            at = get_type_hints(at)[part]
        candidates = [a for a in (at, *get_args(at)) if is_dataclass(a)]
        at = candidates[0] if candidates else at
    return at


def keys(section: Any) -> list[str]:
    return [f.name for f in fields(section)]
