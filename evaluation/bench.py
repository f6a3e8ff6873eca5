"""Bench prompts: a YAML list, or JSONL, of prompts with their concept and level of motion (torch-free).

The published benches are their authors'; a file of them is read, none is shipped. ``BENCH`` is a small one of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..documents import file_text, mapping, parse_json, quoted, read_yaml
from ..errors import CinemeshError
from ..files import file_name

BENCH = Path(__file__).parent / "bench.yaml"
MOTIONS = ("low", "medium", "high")
FORM = "write a YAML list, or a line of JSON each, with prompt, and name, concept, motion where there are"


@dataclass(frozen=True)
class BenchPrompt:
    """``name``: what a system's clip of it is called, without suffix. ``concept`` and ``motion``: "" where untold."""

    name: str
    prompt: str
    concept: str = ""
    motion: str = ""


def read_prompts(path: Path) -> list[BenchPrompt]:
    """The prompts of a file that ends in .yaml, .yml or .jsonl, in its order.

    One without a name is called by its number in the file, from 0. Raises CinemeshError for a file that cannot be read
    or holds none, and where two prompts have one name or one text: it would count twice.
    """
    found = [_prompt(row, where, number) for number, (row, where) in enumerate(_rows(path))]
    if not found:
        raise CinemeshError(f"{path} holds no prompt", remedy=FORM)
    for what in ("name", "prompt"):
        seen: dict[str, int] = {}
        for number, each in enumerate(found, 1):
            value = getattr(each, what)
            if (first := seen.setdefault(value, number)) != number:
                raise CinemeshError(
                    f"prompts {first} and {number} of {path} have the same {what}, {quoted(value)}, "
                    "and a prompt counts once",
                    remedy="remove one of them",
                )
    return found


def json_lines(path: Path, what: str, remedy: str, *, grows: bool = False) -> Iterator[tuple[Any, str]]:
    """Each line's value of a JSONL file, and where it stands; empty lines are none. Raises CinemeshError.

    ``grows``: it is written to line by line, and of a last line without its end nothing is read.
    """
    lines = file_text(path, what, remedy).split("\n")
    for number, line in enumerate(lines[:-1] if grows else lines, 1):
        if line.strip():
            where = f"line {number} of {path}"
            yield parse_json(line, where, remedy), where


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    if path.suffix == ".jsonl":
        yield from json_lines(path, "the prompts", FORM)
    elif path.suffix in (".yaml", ".yml"):
        rows = read_yaml(path, "the prompts", FORM)
        if not isinstance(rows, list):
            raise CinemeshError(f"{path} holds no list of prompts", remedy=FORM)
        yield from ((row, f"prompt {number} of {path}") for number, row in enumerate(rows, 1))
    else:
        raise CinemeshError(f"prompts {path}: the file ends in none of .yaml, .yml, .jsonl", remedy=FORM)


def _prompt(row: object, where: str, number: int) -> BenchPrompt:
    given = mapping(row, where, [field.name for field in fields(BenchPrompt)], required=["prompt"])
    given = {"name": str(number)} | given
    if isinstance(given["name"], int) and not isinstance(given["name"], bool):
        given["name"] = str(given["name"])
    for key, value in given.items():
        if not isinstance(value, str) or (key in ("name", "prompt") and not value.strip()):
            raise CinemeshError(f"{where}: {key} is {quoted(value)}", remedy="it must be a text: quote it")
    file_name(given["name"], f"{where}: name")
    prompt = BenchPrompt(**given)
    if prompt.motion not in ("", *MOTIONS):
        raise CinemeshError(f"{where}: motion is {prompt.motion!r}", remedy=f"it is one of {', '.join(MOTIONS)}")
    return prompt
