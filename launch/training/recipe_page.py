"""docs/recipe.md: every key of a recipe, from the fields themselves.

Written by ``python -m cinemesh.launch.training.recipe_page``. The page
is committed, and a test holds it to be what this makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...data.encoding import CODECS
from ...parallel.ir.fields import Degrees, Memory, Overlap, Streams
from ...parallel.ir.knobs import Whole, knobs
from ...ranges import Range, range_in
from ..storage.remote import RemotePath
from .recipe import Config

HEAD = """# Every key of a recipe

A recipe is a YAML file, for example [configs/quickstart.yaml](../configs/quickstart.yaml). `--set KEY=VALUE` replaces
one value. A key that is unknown or given twice is refused. Numbers are decimal: `off`, `1:30`, `010`, `1_000`, `.nan`
are words. Paths are relative to the current directory. Where the default is empty, `null` is as leaving the key out.

Written by `python -m cinemesh.launch.training.recipe_page`; `docs/overlap.md` says more of the plan's fields.
"""
TABLE = "| key | what it is | default | what it may be | why |\n|---|---|---|---|---|\n"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_sections())


def _sections() -> Iterator[str]:
    hints = get_type_hints(Config, include_extras=True)
    yield "\n## The recipe itself\n\n" + TABLE
    yield from (row for f in fields(Config) if (row := _row(f, hints[f.name], sections=False)))
    for f in fields(Config):
        if f.name == "plan":
            yield from _plan()
        elif f.name == "codec":
            for kind, settings in CODECS.items():
                yield from _section(f"codec, kind {kind}", settings)
        elif (section := _class_in(hints[f.name])) is not None:
            optional = " (may be left out)" if f.default is None else ""
            yield from _section(f.name, section, optional)


def _section(name: str, section: type, note: str = "") -> Iterator[str]:
    """A heading and the table of a section; below it, those of the mappings that are listed in it."""
    hints = get_type_hints(section, include_extras=True)
    yield f"\n## {name}{note}\n\n{_paragraph(section)}\n\n{TABLE}"
    below: list[tuple[str, type]] = []
    for f in fields(section):
        yield _row(f, hints[f.name])
        if (inner := _class_in(hints[f.name])) is not None:
            below.append((f"{name}.{f.name}{', each' if _listed(_parts(hints[f.name])) else ''}", inner))
    for title, inner in below:
        yield from _section(title, inner)


def _paragraph(of: type) -> str:
    """The first one of its docstring."""
    return " ".join((getdoc(of) or "").partition("\n\n")[0].split()).replace("``", "`")


def _row(field: Any, hint: Any, *, sections: bool = True) -> str:
    """One key; of the recipe itself, those alone that are no section."""
    if not sections and (_class_in(hint) is not None or field.name in ("plan", "codec")):
        return ""
    meaning = next((said for said in get_args(hint) if isinstance(said, str)), None)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    may, why = _allowed(hint)
    if meaning is None:
        assert get_origin(hint) is Literal, f"{field.name} says nothing of itself"
        meaning = "which kind it is"
    return _cells(f"`{field.name}`", meaning, _shown(default), may, why)


def _plan() -> Iterator[str]:
    yield (
        "\n## plan\n\nAll that decides how a step is run; or `auto`, or fields beside `auto: true`: then the planner "
        "chooses the others for `cluster`.\n"
    )
    for group in (Degrees, Memory, Overlap, Streams):
        yield f"\n{group.__name__}: {_paragraph(group)}\n\n{TABLE}"
        for name, knob in knobs(group).items():
            why = knob.why if isinstance(knob, Whole) else ""
            does = f"{knob.does}; {knob.bound}" if knob.bound else knob.does
            yield _cells(f"`{name}`", does, _shown(knob.default), knob.values, why)


def _allowed(hint: Any) -> tuple[str, str]:
    """What values a type has, in words, and why no others."""
    if (bounds := range_in(hint)) is not None:
        many = [inner for inner in _parts(hint) if get_origin(inner) is tuple]
        count = f"{len(get_args(many[0]))} of " if many else ""
        kind = "" if bounds.whole else "any number, "
        unit = f" {bounds.unit}" if bounds.unit else ""
        return f"{count}{kind}{bounds.values}{unit}", bounds.why
    parts = [*_parts(hint)]
    if words := [value for part in parts if get_origin(part) is Literal for value in get_args(part)]:
        return ", ".join(f"`{word}`" for word in words), ""
    if any(get_origin(part) is dict for part in parts):
        return "a mapping of texts", ""
    if bool in parts:
        return "true, false", ""
    listed = _listed(parts)
    if _class_in(hint) is not None:
        return "a list of mappings, at least one" if _listed(parts) else "a mapping", ""
    kind = "path or URL" if RemotePath in parts else "path" if Path in parts else "text"
    return f"a list of {kind}s" if listed else f"a {kind}", ""


def _listed(parts: Iterable[Any]) -> bool:
    return any(get_origin(part) is tuple for part in parts)


def _parts(hint: Any) -> Iterator[Any]:
    """A type and the types inside it."""
    yield hint
    for inner in get_args(hint):
        yield from _parts(inner)


def _class_in(hint: Any) -> type | None:
    """The section that a type holds, if it holds one."""
    found = (part for part in _parts(hint) if isinstance(part, type) and is_dataclass(part))
    return next((part for part in found if part not in (Range, RemotePath)), None)


def _shown(default: Any) -> str:
    if default is MISSING:
        return "required"
    if isinstance(default, Path):
        package = Path(__file__).parents[2]
        return f"`{default.relative_to(package) if default.is_relative_to(package) else default}`"
    if default is None or default in ((), {}):
        return ""
    if isinstance(default, tuple):
        inside = [str(value) for value in default if not is_dataclass(value)]
        return f"`[{', '.join(inside)}]`" if inside else "one, of its defaults"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |\n"


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "recipe.md").write_text(page(), encoding="utf-8")
