"""Mutants: one small change of the package's code at a place that a seed draws (torch-free).

Never changed are docstrings, annotations, texts (f-strings too), what a ``raise`` says, assertions (an ``assert`` and
``zip``'s ``strict`` state what holds: weaker ones change nothing), and the options of ``dataclass``.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

FOLDERS = ("kernels", "parallel", "model", "data", "launch")
ARITHMETIC = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "//", "Pow": "*"}
COMPARISON = {
    **{"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "=="},
    **{"Is": "is not", "IsNot": "is", "In": "not in", "NotIn": "in"},
}
SYMBOLS = {
    **{"Add": "+", "Sub": "-", "Mult": "*", "Div": "/", "FloorDiv": "//", "Mod": "%", "Pow": "**"},
    **{"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!="},
    **{"Is": "is", "IsNot": "is not", "In": "in", "NotIn": "not in"},
}
TOLD = ("help", "remedy", "what", "value", "rule", "strict")  # keywords whose values are texts or assertions


@dataclass(frozen=True)
class Mutant:
    """``old``, at byte ``start`` of ``file`` (relative to the root) and on ``line`` (from 1), becomes ``new``."""

    kind: str
    file: str
    line: int
    start: int
    old: str
    new: str

    def of(self, source: bytes) -> bytes:
        """The changed source."""
        old = self.old.encode()
        assert source[self.start :].startswith(old), self
        return source[: self.start] + self.new.encode() + source[self.start + len(old) :]

    def moved(self, before: bytes, after: bytes) -> Mutant | None:
        """The same change in a later source of the file; None if its line, or one beside it, is no longer the same."""
        first = before.rfind(b"\n", 0, before.rfind(b"\n", 0, self.start)) + 1
        end = before.find(b"\n", before.find(b"\n", self.start + len(self.old.encode())) + 1)
        around = before[first : end if end >= 0 else len(before)]
        if after.count(around) != 1:
            return None
        start = after.index(around) + self.start - first
        return replace(self, start=start, line=after.count(b"\n", 0, start) + 1)


@dataclass(frozen=True)
class _Source:
    """A file whose nodes are found by byte."""

    file: str
    text: bytes
    starts: tuple[int, ...]  # byte at which each line starts

    @staticmethod
    def read(root: Path, path: Path) -> _Source:
        text = path.read_bytes()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return _Source(str(path.relative_to(root)), text, tuple(starts))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First byte of a node, and the one after its last."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def mutant(self, kind: str, start: int, end: int, new: str) -> Mutant:
        line = self.text.count(b"\n", 0, start) + 1
        return Mutant(kind, self.file, line, start, self.text[start:end].decode(), new)

    def text_of(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def operator(self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Mutant]:
        """The operator between two nodes, changed."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = self.text.find(old.encode(), start, end)
        if found >= 0:
            yield self.mutant(kind, found, found + len(old), new)

    def of_node(self, node: ast.AST, *, index: bool) -> Iterator[Mutant]:
        """The mutants of one node, without those of its children; ``index``: it stands in the brackets of one."""
        match node:
            case ast.BinOp(left=left, op=op, right=right) if (name := type(op).__name__) in ARITHMETIC:
                yield from self.operator("arithmetic", left, right, SYMBOLS[name], ARITHMETIC[name])
            case ast.AugAssign(target=left, op=op, value=right) if (name := type(op).__name__) in ARITHMETIC:
                yield from self.operator("arithmetic", left, right, SYMBOLS[name], ARITHMETIC[name])
            case ast.Compare(left=left, ops=ops, comparators=others):
                for a, op, b in zip((left, *others), ops, others, strict=False):
                    name = type(op).__name__
                    yield from self.operator("comparison", a, b, SYMBOLS[name], COMPARISON[name])
            case ast.BoolOp(op=op, values=values):
                words = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                for a, b in pairwise(values):
                    yield from self.operator("boolean", a, b, *words)
            case ast.UnaryOp(op=ast.Not()):
                start, _ = self.span(node)
                yield self.mutant("boolean", start, start + len("not "), "")
            case ast.Constant(value=bool(value)):
                yield self.mutant("constant", *self.span(node), str(not value))
            case ast.Constant(value=int(value) | float(value)):
                changed = (value + 1,) if index or not value else (value * 2, value + 1, -value)
                for new in changed:
                    yield self.mutant("index" if index else "constant", *self.span(node), repr(new))
            case ast.Expr(value=ast.Call()):
                yield self.mutant("dropped call", *self.span(node), "...")
            case ast.Call(args=args) if not any(isinstance(a, ast.Starred) for a in args):
                for a, b in pairwise(args):
                    if (one := self.text_of(a)) != (two := self.text_of(b)):
                        (start, middle), (middle_too, end) = self.span(a), self.span(b)
                        between = self.text[middle:middle_too].decode()
                        yield self.mutant("swapped arguments", start, end, f"{two}{between}{one}")
            case _:
                pass

    def of(self, node: ast.AST, *, index: bool = False) -> Iterator[Mutant]:
        """The mutants of a node and of all below it that is neither told to people nor asserted."""
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        if isinstance(node, ast.keyword) and node.arg in TOLD:
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("dataclass", "CinemeshError"):
            return
        yield from self.of_node(node, index=index)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            inside = isinstance(node, ast.Subscript) and name == "slice"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    passes_on = isinstance(node, (ast.Slice, ast.Tuple, ast.UnaryOp))
                    yield from self.of(child, index=inside or (index and passes_on))


def mutants(root: Path) -> list[Mutant]:
    """All mutants of the package under ``root``, in the order of its files."""
    found: list[Mutant] = []
    for path in (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))):
        source = _Source.read(root, path)
        found += source.of(ast.parse(source.text))
    return found


def draw(root: Path, seed: int) -> Iterator[Mutant]:
    """Mutants in an order that ``seed`` draws: a kind in turn, then a place of that kind, then one change there."""
    rng = random.Random(seed)
    places: dict[str, dict[tuple[str, int], list[Mutant]]] = {}
    for mutant in mutants(root):
        places.setdefault(mutant.kind, {}).setdefault((mutant.file, mutant.start), []).append(mutant)
    kinds = sorted(places)
    orders = {kind: rng.sample(sorted(places[kind]), len(places[kind])) for kind in kinds}
    while any(orders.values()):
        for kind in kinds:
            if orders[kind]:
                yield rng.choice(places[kind][orders[kind].pop()])
