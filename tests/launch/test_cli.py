"""The command line: exit codes, what a user reads, and that help loads no torch."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch import cli
from cinemesh.launch.proof import verify

COMMANDS = ("train", "sample", "model", "plan", "explain", "compare", "verify", "program")


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Exit code of ``cinemesh ARGS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["cinemesh", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    code = stop.value.code
    assert isinstance(code, int)
    return code


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str, work: Any) -> None:
    """Let ``cinemesh.launch.MODULE`` hold only ``work``, as ``function``."""
    fake = ModuleType(f"cinemesh.launch.{module}")
    setattr(fake, function, work)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_loads_neither_torch_nor_numpy(command: tuple[str, ...]) -> None:
    """Only this sees a module-level import creep in: help stays right, but takes seconds."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        f"sys.argv = ['cinemesh', *{command}, '--help']\n"
        "from cinemesh.launch.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: cinemesh" in done.stdout


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("trian",), "trian"),
        (("verify",), "--plan"),
        (("verify", "--plan", "tp=2", "--steps", "none"), "--steps"),
        (("train", "recipe.yaml", "--nproc", "0"), "--nproc"),
        (("program", "--model", "tiny", "--latent", "3x4x12"), "--plan"),
        (("model", "tiny", "--yaml"), "--yaml"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_culprit(
    args: tuple[str, ...],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, *args) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert shown.out == ""


def test_user_error_is_one_line_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(**_: object) -> None:
        raise CinemeshError("tp(5) does not divide heads(48); choose 1, 2, 3, 4, 6 or 8")

    stand_in(monkeypatch, "commands.show", "model_table", work)
    assert run_main(monkeypatch, "model", "tiny") == 2
    shown = capsys.readouterr()
    assert shown.err == "error: tp(5) does not divide heads(48); choose 1, 2, 3, 4, 6 or 8\n"
    assert shown.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug reported as a user's error would send the user to look for a mistake of theirs."""

    def work(**_: object) -> None:
        raise AssertionError("a bug")

    stand_in(monkeypatch, "commands.show", "model_table", work)
    monkeypatch.setattr(sys, "argv", ["cinemesh", "model", "tiny"])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("code", [0, 1])
def test_verify_passes_its_verdict_on(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that is dropped would exit 0 on a wrong gradient."""
    seen: list[verify.ProofOrder] = []

    def work(order: verify.ProofOrder) -> int:
        seen.append(order)
        return code

    monkeypatch.setattr(verify, "run", work)
    assert run_main(monkeypatch, "verify", "--plan", "tp=2,cp=2", "--json", "--head-dim", "64") == code
    assert seen == [verify.ProofOrder("tp=2,cp=2", "tiny", None, None, 3, 64, "auto", as_json=True)]


def test_options_reach_train_sample_and_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values cross from the command line under the names that the called functions have."""
    seen: dict[str, object] = {}

    def work(**options: object) -> None:
        seen.clear()
        seen.update(options)

    stand_in(monkeypatch, "train", "run", work)
    args = ("train", "a.yaml", "--nproc", "4", "--set", "plan.tp=2", "--set", "seed=7")
    assert run_main(monkeypatch, *args) == 0
    assert seen == {"config": Path("a.yaml"), "nproc": 4, "overrides": ["plan.tp=2", "seed=7"]}
    assert run_main(monkeypatch, "train", "a.yaml", "--plan", "best.yaml", "--set", "seed=7") == 0
    assert seen == {"config": Path("a.yaml"), "nproc": None, "overrides": ['plan="best.yaml"', "seed=7"]}

    stand_in(monkeypatch, "training.sample", "run", work)
    asked = ("--prompt", "a car", "--guidance", "1.5", "--weights", "master", "--plan", "tp=2", "--set", "seed=7")
    assert run_main(monkeypatch, "sample", "a.yaml", *asked) == 0
    assert seen == {
        "config": Path("a.yaml"),
        "prompt": "a car",
        "prompts": None,
        "rewrite": None,
        "checkpoint": None,
        "out": None,
        "trace_change": None,
        "asked": {
            "weights": "master",
            "sample.steps": None,
            "sample.schedule": None,
            "sample.solver": None,
            "sample.guidance": 1.5,
            "sample.seed": None,
        },
        "nproc": None,
        "overrides": ['plan="tp=2"', "seed=7"],
    }

    stand_in(monkeypatch, "commands.show", "program_listing", work)
    args = ("program", "--model", "tiny", "--plan", "tp=2", "--latent", "4x8x8", "--batch", "2")
    assert run_main(monkeypatch, *args) == 0
    assert seen == {
        "model": "tiny",
        "plan": "tp=2",
        "latent": "4x8x8",
        "text_tokens": None,
        "batch": 2,
        "as_json": False,
    }


@pytest.mark.parametrize("letters", [300, 5000])  # beyond what a folder holds, and beyond what a path may have
@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--cluster", "NAME"),
        ("explain", "tp=2", "--cluster", "NAME"),
        ("doctor", "--cluster", "NAME"),
        ("cluster", "NAME"),
        ("data", "show", "NAME"),
        ("data", "check", "NAME"),
        ("codec", "eval", "--codec", "NAME"),
        ("export", "NAME", "--out", "x"),
        ("upsample", "NAME", "x.mp4"),
        ("train", "NAME"),
        ("doctor", "--device", "NAME"),
        ("NAME",),
        ("judge", "make", "NAME", "x", "--out", "y"),
    ],
)
def test_a_word_longer_than_any_name_is_one_short_line(
    words: tuple[str, ...],
    letters: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system's own refusal of a file's name was a traceback, and choices said the word whole."""
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *(letters * "a" if word == "NAME" else word for word in words)) == 2
    said = capsys.readouterr().err
    assert len(said) < 1200 and "Traceback" not in said and not [*tmp_path.iterdir()]


LEFT_BEHIND = """
import sys
from cinemesh.launch import __main__, cli

class Left:
    def __del__(self):
        print("found")

def main():
    left = Left()
    left.itself = left

cli.main = main
getattr(__main__, sys.argv[1])() if sys.argv[1:] else cli.main()
"""


@pytest.mark.parametrize("entered", [(), ("enter",)])
def test_what_a_command_leaves_behind_is_let_go(entered: tuple[str, ...]) -> None:
    """Else libraries tell of leaks behind the command's own last line: nanobind's functions of triton, after a run."""
    ended = subprocess.run([sys.executable, "-c", LEFT_BEHIND, *entered], capture_output=True, text=True, check=True)
    assert ended.stdout == "found\n"
