"""Progress of long work: on standard error, on a terminal and without one, and never beside --json."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from cinemesh.kernels import compile as compiling
from cinemesh.launch import progress as shown
from cinemesh.launch.commands import compare, compile_check, explain
from cinemesh.launch.options import Asked
from cinemesh.launch.progress import each, progress
from cinemesh.launch.proof import lint, verify
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long work without a terminal said nothing; a line a piece would be as bad."""
    clock = iter([0.0, 0.0, 4.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(shown.time, "monotonic", lambda: next(clock))
    with progress("report", 4) as begin:
        assert list(each("abcd", begin, str)) == ["a", "b", "c", "d"]
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["report: a (1 of 4)", "report: c (3 of 4)"]


def test_on_a_terminal_a_bar_stands_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it in the end is nothing: the answer of the command stands alone."""
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with progress("report", 2) as begin:
        begin("first")
        begin("second")
    assert "report: " in err.getvalue() and "second" in err.getvalue() and "\x1b[2K" in err.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_commands_say_what_they_do_unless_asked_for_json(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Asked(model="tiny")
    explain.run(plan="tp=2", asked=asked, as_json=as_json)
    compare.run(plans=["tp=2", "cp=2"], asked=asked, as_json=as_json)
    said = (
        []
        if as_json
        else ["explaining: playing the whole step (1 of 6)", "comparing: playing tp=2 recompute=selective (1 of 3)"]
    )
    assert capsys.readouterr().err.splitlines() == ([] if as_json else said)


@pytest.mark.parametrize("as_json", [False, True])
def test_proofs_say_each_piece_of_their_work(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With overlap, whose pass is one more; of a proof on several ranks the first speaks, and that one alone."""
    monkeypatch.setattr(shown, "EVERY_S", 0.0)
    assert lint.run(plan="tp=2,tp_slices=2", model="tiny", as_json=as_json) == 0
    assert verify.run(verify.ProofOrder("tp=2", "tiny", "float32", 2, 2, None, "cpu", as_json)) == 0
    behind = ("rematerialize", "fuse", "prefetch", "elide", "scheduled", "stage_symmetric", "mark")
    pieces = ["building the program", *(f"behind {name}" for name in behind), "the arena", "a small step, as it runs"]
    wanted = [f"linting: {what} ({i + 1} of {len(pieces)})" for i, what in enumerate(pieces)]
    steps = ("step 1", "step 2", "comparing with plain autograd")
    wanted += [f"verifying: {what} ({i + 1} of 3)" for i, what in enumerate(steps)]
    assert capfd.readouterr().err.splitlines() == ([] if as_json else wanted)


def test_the_compile_check_says_each_module_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Minutes on a machine of two cores: it builds, then counts."""
    pytest.importorskip("triton")

    class Worker:
        """Of no process: it is done at once."""

        def __init__(self, look: object, interpret: bool) -> None:
            self.job, self.connection, self.process = None, self, self

        def send(self, job: object) -> None: ...
        def kill(self) -> None: ...
        def join(self) -> None: ...
        def answer(self) -> list[object]:
            return []

    monkeypatch.setattr(shown, "EVERY_S", 0.0)
    monkeypatch.setattr(compiling, "_Worker", Worker)
    monkeypatch.setattr(compiling, "wait", lambda connections, timeout: connections)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = {"target": "sm_90", "as_json": False}
    compile_check.run(preset("tiny"), Plan(dtype="float32"), BatchShape(1, (3, 4, 12)), **given)
    modules = compiling.triton_modules()
    said = [f"{what} {module}" for what in ("building", "counting") for module in modules]
    wanted = [f"compile check: {what} ({i + 1} of {2 * len(modules)})" for i, what in enumerate(said)]
    assert capsys.readouterr().err.splitlines() == wanted
