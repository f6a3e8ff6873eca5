"""Which tests are near a file of the package: its mirror first, then by how many imports away it is (torch-free)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FAR = 99  # imports away: reached by a command line, or not at all


@cache
def _imports(root: Path, path: Path) -> tuple[Path, ...]:
    """Files of the package and of the tests that ``path`` imports, inside functions too."""
    return tuple(
        found
        for node in ast.walk(ast.parse(path.read_text()))
        for candidate in _targets(root, path, node)
        for found in (candidate.with_suffix(".py"), candidate / "__init__.py")
        if found.is_file()
    )


def _targets(root: Path, path: Path, node: ast.AST) -> Iterator[Path]:
    """Where the modules of an import would stand: a name may be one too."""
    if isinstance(node, ast.Import):
        stems, names = [alias.name.split(".") for alias in node.names], []
    elif isinstance(node, ast.ImportFrom):
        stems, names = [(node.module or "").split(".") if node.module else []], [alias.name for alias in node.names]
    else:
        return
    for stem in stems:
        if isinstance(node, ast.ImportFrom) and node.level:
            starts = [path.parents[node.level - 1]]
        elif stem[0] == "cinemesh":
            starts, stem = [root], stem[1:]
        else:
            starts = [path.parent, root / "tests"]  # a neighbour of a test
        for start in starts:
            yield start.joinpath(*stem) if stem else start
            yield from (start.joinpath(*stem, name) for name in names)


@cache
def _distances(root: Path, test: Path) -> dict[Path, int]:
    """How many imports away from ``test`` each file is."""
    found, edge = {test: 0}, [test]
    while edge:
        steps = [(new, found[old] + 1) for old in edge for new in _imports(root, old) if new not in found]
        found |= dict(steps)
        edge = list(dict(steps))
    return found


def rank(root: Path, file: str, test: str) -> tuple[bool, int, bool]:
    """Sorts test files by nearness to ``file``; both are relative to ``root``."""
    of, by = Path(file), Path(test)
    mirror = by.parent == "tests" / of.parent and by.stem.startswith(f"test_{of.stem}")
    return not mirror, _distances(root, root / test).get(root / file, FAR), by.parts[1] != of.parts[0]
