"""Tables on a screen of any width, and in a pipe: nothing is cut, nothing wider than it must be."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from cinemesh.launch import tables
from cinemesh.launch.commands import plan, show
from cinemesh.launch.options import On
from cinemesh.launch.tables import PIPED_WIDTH, new_console, plain_table

ROOT = Path(tables.__file__).parents[1]


def shown(width: int, **options: object) -> list[str]:
    table = plain_table("", "plan", "step s", "kept", right=("step s",), **options)  # pyright: ignore[reportArgumentType]
    table.add_row("1", "tp=2 cp=4 dp_shard=96", "8.7", "a")
    table.add_row("2=", "cp=2", "35.28", "b\nlonger")
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(table)
    return out.getvalue().splitlines()


def test_a_table_that_fits_is_one_line_a_row() -> None:
    assert shown(43, breaks=("step s",)) == [
        "    plan                   step s  kept",
        "1   tp=2 cp=4 dp_shard=96     8.7  a",
        "2=  cp=2                    35.28  b",
        "                                   longer",
    ]


def test_one_that_does_not_goes_on_below_and_stays_aligned() -> None:
    assert shown(30, breaks=("step s",)) == [
        "    plan",
        "  step s  kept",
        "1   tp=2 cp=4 dp_shard=96",
        "     8.7  a",
        "2=  cp=2",
        "   35.28  b",
        "          longer",
    ]


def test_what_is_still_too_wide_is_folded_between_words() -> None:
    assert shown(18, breaks=("step s",))[2:5] == ["1   tp=2 cp=4", "    dp_shard=96", "     8.7  a"]
    assert shown(32)[1:3] == ["1   tp=2 cp=4        8.7  a", "    dp_shard=96"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Standard output taken for a terminal of so many columns, without colours."""
    for name, value in {"COLUMNS": str(request.param), "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    return request.param


def plain(text: str) -> list[str]:
    return [line.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "") for line in text.splitlines()]


def search_for(gpus: int) -> None:
    plan.run(
        on=On(model="tiny-video", samples=1), gpus=gpus, top=5, tune=False, explain_it=False, paper=False, report=None,
        out=None, as_json=False,
    )  # fmt: skip


@pytest.mark.parametrize("terminal", [60, 80, 100], indirect=True)
def test_plans_stand_on_lines_of_their_own_below_110_columns(terminal: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect was a plan folded to one word a line; here the least that can be is asked for: a fold at most."""
    search_for(64)
    lines = plain(capsys.readouterr().out)
    assert max(map(len, lines)) <= terminal
    first, after = (next(i for i, line in enumerate(lines) if line.startswith(rank)) for rank in ("1 ", "± "))
    assert "recompute=" in " ".join(lines[first : first + 2]) and "%" not in lines[first]
    assert after - first <= 5 * 3


@pytest.mark.parametrize("terminal", [80], indirect=True)
def test_a_listing_at_80_columns_has_whole_words(terminal: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Placements are long: they were told one letter a line."""
    show.program_listing(
        model="tiny-video", plan="tp=2,cp=2,dp_shard=2", latent=None, text_tokens=None, batch=1, as_json=False
    )
    lines = plain(capsys.readouterr().out)
    assert max(map(len, lines)) <= terminal
    assert "  [cp:64, dp_shard:1, 192] bf16 Partial{tp}" in lines
    assert not [line for line in lines if len(line.strip()) == 1]


def test_a_pipe_folds_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a line holds all of a row for grep, whatever the terminal behind the pipe."""
    monkeypatch.setenv("COLUMNS", "80")
    search_for(64)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("1 ")]
    assert "recompute=" in row and "%" in row
    assert new_console().width == PIPED_WIDTH


def test_there_is_one_way_to_print_a_table() -> None:
    """A console or a table of rich's own wraps at 80 in a pipe, whatever is done here."""
    made = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "launch").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "rich.table")
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console")
    }  # fmt: skip
    assert made <= {"launch/tables.py", "launch/progress.py"}
