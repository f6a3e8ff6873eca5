"""What is changed and what is not; a mutant finds its place again in a later source."""

from __future__ import annotations

from pathlib import Path

from benchmarks.mutants import Mutant, draw, mutants

SOURCE = b'''"""A docstring: 1 + 1."""
LIMIT: tuple[int, 2] = (3, True)


def f(x, y):
    """Not 2."""
    assert x > 0
    if not x or x[0] == y:
        raise ValueError(f"{x + 1}", 5)
    g(x, y)
    return dict(zip(x, y, strict=True), help=7)
'''


def test_every_kind_and_nothing_that_is_told_or_asserted(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.py").write_bytes(SOURCE)
    found = mutants(tmp_path)
    assert [(m.kind, m.line, m.old, m.new) for m in found] == [
        ("constant", 2, "3", "6"),
        ("constant", 2, "3", "4"),
        ("constant", 2, "3", "-3"),
        ("constant", 2, "True", "False"),
        ("boolean", 8, "or", "and"),
        ("boolean", 8, "not ", ""),
        ("comparison", 8, "==", "!="),
        ("index", 8, "0", "1"),
        ("dropped call", 10, "g(x, y)", "..."),
        ("swapped arguments", 10, "x, y", "y, x"),
        ("swapped arguments", 11, "x, y", "y, x"),
    ]
    drawn = list(draw(tmp_path, 3))
    assert {m.start for m in drawn} == {m.start for m in found} and len(drawn) == 9, "one change a place"
    assert drawn == list(draw(tmp_path, 3)) != list(draw(tmp_path, 4))


def test_a_mutant_moves_with_its_line() -> None:
    mutant = Mutant("index", "kernels/a.py", 8, SOURCE.index(b"[0]") + 1, "0", "1")
    later = SOURCE.replace(b"    assert x > 0\n", b"    assert x > 0\n    assert y\n")
    assert mutant.moved(SOURCE, later) is None, "the line before it is another"
    later = b"# a comment\n" + SOURCE
    moved = mutant.moved(SOURCE, later)
    assert moved is not None and moved.line == 9 and moved.of(later) == b"# a comment\n" + mutant.of(SOURCE)
