"""Records from files: a dataclass from a mapping, each value as its field's type and range say (torch-free)."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .documents import mapping, quoted
from .errors import CinemeshError, did_you_mean
from .ranges import check_ranges, range_in

T = TypeVar("T")
RULES: dict[Any, str] = {float: "a positive number", int: "a whole number", bool: "true or false"}


def read_record(kind: type[T], values: Any, where: str, inside: str = ": ") -> T:
    """The dataclass ``kind`` from a mapping of its fields. Raises CinemeshError.

    ``where`` it stands; ``inside`` joins that and a field's name. Fields may be numbers, texts, booleans, dataclasses,
    tuples, mappings, and ``None`` where their type says so.
    """
    told = get_type_hints(kind, include_extras=True)
    hints = {each.name: told[each.name] for each in fields(kind)}  # type: ignore[arg-type]  # a ClassVar is no field
    required = [each.name for each in fields(kind) if each.default is each.default_factory is MISSING]  # type: ignore[arg-type]
    given = mapping(values, where, [*hints], required=required)
    read = {name: read_value(hints[name], item, f"{where}{inside}{name}") for name, item in given.items()}
    try:
        made = kind(**read)
    except CinemeshError as error:
        raise CinemeshError(f"{where}: {error.problem}", remedy=error.remedy) from None
    check_ranges(made, f"{where}{inside}")
    return made


def read_value(kind: Any, value: Any, where: str) -> Any:
    """A value of a file as its field's type says. Raises CinemeshError for any other.

    A float is positive, unless its type has a range, which ``read_record`` asks.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        if inner[0] is float and range_in(kind) is not None and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        return read_value(inner[0], value, where)
    if origin in (Union, UnionType) and NoneType in inner:
        return None if value is None else read_value(next(one for one in inner if one is not NoneType), value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return read_record(kind, value, where, ".")
    if origin is dict:
        found = mapping(value, where, value if isinstance(value, dict) else ("a mapping",))
        return {name: read_value(inner[1], item, f"{where}.{name}") for name, item in found.items()}
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, list) else inner
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _wrong(where, value, f"a list of {len(inner)}" if inner[-1] is not ... else "a list")
        return tuple(
            read_value(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is Any:
        return value
    if origin is Literal:
        if value in inner:
            return value
        raise CinemeshError(f"{where} is {quoted(value)}", remedy=did_you_mean(value, inner))
    if kind is float and type(value) in (int, float) and math.isfinite(value) and value > 0:
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise _wrong(where, value, RULES.get(kind, "a text"))


def _wrong(where: str, value: object, rule: str) -> CinemeshError:
    return CinemeshError(f"{where} is {quoted(value)}", remedy=f"it must be {rule}")
