"""YAML and JSON that people write, read strictly: what is not plainly so is an error, never a guess (torch-free).

PyYAML reads YAML 1.1: there ``off`` is False, ``1:30`` is 90, ``010`` is 8, ``1_000`` is 1000, ``.nan`` a number; of
two equal keys the last one wins. Here, of plain scalars

    true, false                   are booleans
    null, ~ and nothing at all    are None
    decimal numbers, 2e-3 too     are numbers, where they are finite and do not begin with a needless 0
    everything else               is text, for whoever reads the value to refuse

and keys are always text. A key given twice, a tag (``!!int``), a second document, nesting beyond ``MOST_DEPTH`` and
more than ``MOST_VALUES`` values, those that aliases repeat counted each time, are refused. JSON is held to the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from .errors import CinemeshError, did_you_mean, in_a_line

MOST_BYTES = 64 * 2**20  # of a file; captions of some 300,000 scenes. Values take about ten times as much memory
MOST_SHOWN = 300  # signs of a path in a message
MOST_DEPTH = 64  # of mappings and lists in one another; no file of ours passes 6
MOST_VALUES = 5_000_000  # of a file: an alias of aliases of aliases would stand for more than any memory holds

_WORDS: dict[str, object] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})", re.ASCII)  # int() takes more: 1_000, other scripts' digits
_REAL = re.compile(r"[-+]?(?=.*[.eE])((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same events, ten times as fast


def read_yaml(path: Path, what: str, remedy: str) -> Any:
    """The one document of a YAML file; None when it is empty.

    ``what`` the file is (``"the recipe"``) and the ``remedy`` go into the CinemeshError for one that cannot be read.
    """
    return parse_yaml(file_text(path, what, remedy), f"{what} {path}", remedy)


def read_json(path: Path, what: str, remedy: str) -> Any:
    """The value of a JSON file. Arguments and errors as of ``read_yaml``."""
    return parse_json(file_text(path, what, remedy), f"{what} {path}", remedy)


def parse_yaml(text: str, what: str, remedy: str) -> Any:
    """As ``read_yaml``, of a text; ``what`` names where it comes from."""

    def wrong(problem: str) -> CinemeshError:
        return CinemeshError(f"{what} is not valid YAML: {problem}", remedy=remedy)

    try:
        return _Builder(wrong).document(yaml.parse(text, Loader=_LOADER))
    except (yaml.YAMLError, UnicodeError) as error:
        raise wrong(in_a_line(error)) from None


def parse_json(text: str, what: str, remedy: str) -> Any:
    """As ``read_json``, of a text; ``what`` names where it comes from."""

    def wrong(problem: str) -> CinemeshError:
        return CinemeshError(f"{what} is not valid JSON: {problem}", remedy=remedy)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise wrong(f"key {next(key for key in keys if keys.count(key) > 1)!r:.100} is given twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise wrong(f"{number:.100} is no finite number")
        return value

    try:
        found = json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return found
    except (ValueError, RecursionError) as error:
        raise wrong(in_a_line(error)) from None


def mapping(
    value: Any, where: str, known: Collection[str], *, required: Collection[str] = (), remedy: str = ""
) -> dict[str, Any]:
    """``value``, a mapping with some of the ``known`` keys and all ``required`` ones.

    Raises CinemeshError; ``remedy`` is said where the file is not the user's to write.
    """
    if not isinstance(value, dict):
        raise CinemeshError(
            f"{where} holds no mapping but {quoted(value)}", remedy=remedy or f"give it {', '.join(known)}"
        )
    for key in value:
        if key not in known:
            raise CinemeshError(f"{where}: unknown key {quoted(key)}", remedy=remedy or did_you_mean(key, known))
    if lacking := [key for key in required if key not in value]:
        raise CinemeshError(f"{where} has no {', '.join(lacking)}", remedy=remedy or "add it")
    return value


def exactly(value: Any, where: str, kinds: Mapping[str, type | UnionType], *, remedy: str) -> dict[str, Any]:
    """``value``, a mapping of exactly these keys, each value of its kind. Raises CinemeshError."""
    found = mapping(value, where, kinds, required=kinds, remedy=remedy)
    for key, kind in kinds.items():
        if not isinstance(found[key], kind):
            raise CinemeshError(f"{where}: {key} is {quoted(found[key])}", remedy=remedy)
    return found


def quoted(value: object) -> str:
    """A value for a message: one line, and not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def write_yaml(values: Any, **options: Any) -> str:
    """YAML that ``parse_yaml`` reads back as it was: no aliases, and texts that look like other values are quoted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def file_text(path: Path, what: str, remedy: str) -> str:
    """A text file. Arguments and errors as of ``read_yaml``."""
    try:
        with path.open("rb") as file:
            read = file.read(MOST_BYTES + 1)
        if len(read) > MOST_BYTES:
            raise CinemeshError(f"{what} {path} has more than {MOST_BYTES:,} bytes", remedy=remedy)
        return read.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: of bytes that are no UTF-8, of a path with a NUL
        name, said = str(path), getattr(error, "strerror", None) or in_a_line(error)  # strerror: without the path
        name = name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."
        raise CinemeshError(f"cannot read {what} {name}: {said}", remedy=remedy) from error


def _value(text: str) -> Any:
    """What a plain scalar stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _REAL.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


class _Builder:
    """Values from the events of a YAML text. ``wrong`` makes the error of a problem."""

    def __init__(self, wrong: Callable[[str], CinemeshError]) -> None:
        self._wrong = wrong
        self._count = 0
        self._anchors: dict[str, tuple[Any, int]] = {}  # value, and how many values it is

    def document(self, events: Iterator[yaml.Event]) -> Any:
        self._events = events
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self._node(next(events), 0)
        next(events)  # the document's end
        if not isinstance(more := next(events), yaml.StreamEndEvent):
            raise self._at(more, "a second document begins")
        return value

    def _at(self, event: yaml.Event, problem: str) -> CinemeshError:
        return self._wrong(f"line {event.start_mark.line + 1}: {problem}")

    def _node(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._at(event, f"nothing complete is named &{event.anchor:.100}")
            value, count = self._anchors[event.anchor]
            self._add(event, count)
            return value
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            raise self._at(event, f"the tag {event.tag!r:.100} is not read: write the value alone")
        if depth > MOST_DEPTH:
            raise self._at(event, f"more than {MOST_DEPTH} mappings and lists in one another")
        before = self._count
        self._add(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            value = _value(event.value) if event.implicit[0] else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._node(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._count - before
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.tag is not None:
                raise self._at(key, "a key must be a plain word")
            if key.value in found:
                raise self._at(key, f"key {key.value!r:.100} is given twice")
            found[key.value] = self._node(next(self._events), depth + 1)
        return found

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _add(self, event: yaml.Event, count: int) -> None:
        self._count += count
        if self._count > MOST_VALUES:
            raise self._at(event, f"more than {MOST_VALUES:,} values, those of aliases counted each time")


class _Dumper(yaml.SafeDumper):
    """Quotes a text that ``_value``, or a reader of YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if _value(text) is text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)
