"""Which tests run which lines of the package: one run of the suite in which every block of a function marks itself.

The marks lie in shared memory, so that the ranks that a test forks leave theirs too. What a test starts as a program
of its own cannot be seen: such a test may reach anything. The body of a module or a class belongs to all the file's
blocks, and so does a function that Triton compiles, whose source is read and rewritten.
"""

from __future__ import annotations

import ast
import builtins
import functools
import gc
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

MARKS = "__marks__"  # builtin that the blocks write into


@dataclass(frozen=True)
class Reach:
    """``blocks``: (file, first line). ``programs``: it starts programs, which may reach more. ``cpu_s`` of the test."""

    test: str
    cpu_s: float
    programs: bool
    blocks: frozenset[tuple[str, int]]

    def told(self) -> str:
        """A line of JSON."""
        return json.dumps([self.test, self.cpu_s, self.programs, sorted(self.blocks)])

    @staticmethod
    def read(path: Path) -> list[Reach]:
        """What ``told`` wrote."""
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [Reach(test, cpu_s, programs, frozenset(map(tuple, at))) for test, cpu_s, programs, at in rows]


def blocks(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """The bodies within the functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                for name in ("body", "orelse", "finalbody"):
                    body = getattr(inner, name, None)
                    if isinstance(body, list) and body and not isinstance(inner, ast.ClassDef):
                        yield body


def block_of(source: bytes, line: int) -> int | None:
    """First line of the innermost block around ``line``; None in the body of a module or a class."""
    spans = [(body[0].lineno, body[-1].end_lineno or 0) for body in blocks(ast.parse(source))]
    return max((start for start, end in spans if start <= line <= end), default=None)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def put(changed: dict[str, CodeType]) -> list[Any]:
    """Give every function of the files named its code in the changed module; the caches of the package, emptied."""
    found = {
        (path, code.co_qualname, code.co_firstlineno): code for path, whole in changed.items() for code in codes(whole)
    }
    package = f"{os.sep}cinemesh{os.sep}"
    caches = []
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in changed:
            old = thing.__code__
            new = found[old.co_filename, old.co_qualname, old.co_firstlineno]
            if len(new.co_freevars) == len(old.co_freevars):
                thing.__code__ = new
        elif type(thing) is functools._lru_cache_wrapper:
            wrapped: Any = thing.__wrapped__
            if package in getattr(getattr(wrapped, "__code__", None), "co_filename", ""):
                thing.cache_clear()
                caches.append(thing)
    return caches


class Watched:
    """Pytest plugin's part: runs tests, and writes what each reached."""

    def __init__(self, root: Path, files: Sequence[str], cpu_s: Callable[[], float]) -> None:
        self.places: list[tuple[str, int]] = []
        self.cpu_s = cpu_s
        changed: dict[str, CodeType] = {}
        for file in files:
            path = str(root / file)
            tree = ast.parse((root / file).read_bytes())
            for body in {id(body): body for body in blocks(tree)}.values():
                mark = ast.parse(f"{MARKS}[{len(self.places) + 1}] = 1").body[0]
                for node in ast.walk(mark):
                    if isinstance(node, (ast.expr, ast.stmt)):
                        node.lineno = node.end_lineno = body[0].lineno
                        node.col_offset = node.end_col_offset = 0
                self.places.append((file, body[0].lineno))
                body.insert(0, mark)
            changed[path] = compile(tree, path, "exec")
        self.marks = mmap.mmap(-1, len(self.places) + 1)
        setattr(builtins, MARKS, self.marks)
        self.caches = put(changed)
        sys.addaudithook(self.program)

    def program(self, event: str, _: tuple[Any, ...]) -> None:
        """An audit hook, which the ranks inherit."""
        if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
            self.marks[0] = 1

    def run(self, items: Sequence[pytest.Item], out: Path) -> None:
        """All, a line each; what was computed for one test is computed again for the next."""
        for item, following in zip(items, (*items[1:], None), strict=True):
            for cache in self.caches:
                cache.cache_clear()
            self.marks[:] = bytes(len(self.marks))
            before_s = self.cpu_s()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            reached = frozenset(place for place, mark in zip(self.places, self.marks[1:], strict=True) if mark)
            reach = Reach(item.nodeid, round(self.cpu_s() - before_s, 2), bool(self.marks[0]), reached)
            with out.open("a") as lines:
                lines.write(reach.told() + "\n")


def _folder(test: str) -> Path:
    return Path(test.partition("::")[0]).parent


def _far(test: str, file: Path) -> int:
    """0: in the mirror of a file; 1: beside it."""
    mirror = Path(test.partition("::")[0]).name.startswith(f"test_{file.stem}")
    return (0 if mirror else 1) if _folder(test) == "tests" / file.parent else 2


def order(reaches: Sequence[Reach], file: str, block: int | None, budget_s: float) -> list[str]:
    """The tests that run the block, each within ``budget_s``.

    If there are none, or in a module's body: those of its folder and of none that run no function of the package, and
    read what modules hold; those that run anything of the file; those of its folder that start programs. The tests
    of its mirror come first, then those beside it; one instance of every test before the second of any; cheap ones.
    """
    folder = "tests" / Path(file).parent
    groups = [[reach for reach in reaches if (file, block) in reach.blocks]]
    if not groups[0]:
        near = [reach for reach in reaches if any(of == file for of, _ in reach.blocks)]
        beside = [reach for reach in reaches if reach not in near and _folder(reach.test) in (folder, Path("tests"))]
        groups = [[reach for reach in beside if not reach.blocks and not reach.programs and block is None], near]
        groups.append([reach for reach in beside if reach.programs and _folder(reach.test) == folder])
    chosen: list[str] = []
    for group in groups:
        seen: Counter[str] = Counter()
        rounds: list[tuple[int, int, float, str]] = []
        for reach in sorted(group, key=lambda reach: reach.cpu_s):
            function = reach.test.partition("[")[0]
            rounds.append((_far(reach.test, Path(file)), seen[function], reach.cpu_s, reach.test))
            seen[function] += 1
        chosen += [test for *_, cpu_s, test in sorted(rounds) if cpu_s < budget_s]
    return chosen
