"""Every command looks at what it shall write before it works; and what CPU processes will hold before they hold it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import refusal

from cinemesh.errors import CinemeshError
from cinemesh.kernels import compile as compiling
from cinemesh.launch import preflight, train
from cinemesh.launch.card import Card
from cinemesh.launch.cli import app
from cinemesh.launch.commands import calibrate, plan, trace
from cinemesh.launch.preflight import PROCESS_BYTES, STEP_BYTES, check_host_memory
from cinemesh.launch.training import loop, needs, sample
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.calibration import card

pytestmark = pytest.mark.usefixtures("one_process")


def work(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize(
    ("command", "option", "module", "name"),
    [
        (("plan", "--gpus", "8"), "--out", plan, "search"),
        (("plan", "--gpus", "8"), "--report", plan, "search"),
        (("trace", "--plan", "tp=2"), "--out", trace, "read_plan"),
        (("calibrate",), "--out", calibrate, "launch"),
        (("calibrate", "--card", "card.json"), "--out", card, "_read"),
        (("sample", "recipe.yaml", "--prompt", "x"), "--out", sample.Setting, "of"),
    ],
)
def test_a_command_that_could_not_write_does_not_begin(
    command: tuple[str, ...],
    option: str,
    module: Any,
    name: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    Path("file").touch()
    monkeypatch.setattr(module, name, work)
    with pytest.raises(CinemeshError, match=rf"^{option} file/x\.yaml.*is a file, where a folder is wanted"):
        app([*command, option, "file/x.yaml"], standalone_mode=False)


def test_nor_does_the_compile_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    (tmp_path / "cinemesh").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_work_through", work)
    with pytest.raises(CinemeshError, match=r"^the kernel cache .*is a file, where a folder is wanted"):
        app(["kernels", "--model", "tiny", "--plan", "tp=1", "--compile", "sm_90"], standalone_mode=False)


@pytest.mark.parametrize(
    ("key", "in_the_way"), [("logging.directory", "out"), ("logging.directory", "out/below"), ("data.cache", "out")]
)
def test_nor_does_a_run(values: dict[str, Any], tmp_path: Path, key: str, in_the_way: str) -> None:
    """A file where a folder is wanted; for the run, below it too."""
    if in_the_way == "out":
        (tmp_path / "out").touch()
    else:
        below = {"logging.directory": "checkpoints", "data.cache": "latents"}[key]
        (tmp_path / "out" / below).parent.mkdir(parents=True)
        (tmp_path / "out" / below).touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CinemeshError, match=f"^{key}"):
        train.run(config=path, nproc=None, overrides=[f"{key}={tmp_path / 'out'}"])


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_a_step_will_hold_is_compared_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the byte; and the remedy is one that helps."""
    program = build_step(preset("tiny"), Plan(dtype="float32"), BatchShape(1, USUAL_LATENTS["tiny"]))
    lives = lifetimes(program)
    states = lives.persistent_bytes
    held = states + place(program, lives).total_bytes + max(lives.workspace_bytes)
    needed = 3 * (held + PROCESS_BYTES)

    def refused(free: int, **more: int) -> str | None:
        monkeypatch.setattr(preflight, "available_bytes", lambda: free)
        try:
            check_host_memory([program], 3, **more)  # pyright: ignore[reportArgumentType]  counts, each
        except CinemeshError as error:
            return error.remedy
        return None

    assert refused(needed) is None
    assert "smaller batch" in str(refused(needed - 1))
    assert "smaller batch" in str(refused(3 * (states + PROCESS_BYTES)))
    assert "smaller model" in str(refused(3 * (states + PROCESS_BYTES) - 1))
    assert "smaller model" in str(refused(3 * PROCESS_BYTES))
    assert refused(3 * PROCESS_BYTES - 1) == "start fewer processes, end other jobs"
    assert refused(needed, steps=1) == refused(needed - 1)
    assert "lower schedule.steps" in str(refused(needed, steps=10**9))
    assert refused(needed + 3 * 10**9 * STEP_BYTES, steps=10**9) is None
    assert refused(needed, beside_bytes=1) is not None


def test_pinned_memory_of_all_processes_is_compared_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs nothing else of a step lies in host memory: 3 of 4 blocks send one storage each, closed form."""
    config = replace(preset("movie-gen-30b"), layers=4)
    plan = Plan.parse("tp=2,recompute=selective,offload=gate")
    program = prepare(build_step(config, plan, BatchShape(1, (4, 32, 32))), backend="nccl")
    pinned = 3 * 4 * 32 * 32 // 4 * config.ffn // 2 * 2  # tokens, columns of a rank's tp share, bf16
    needed = 2 * (pinned + PROCESS_BYTES)
    monkeypatch.setattr(preflight, "available_bytes", lambda: needed)
    check_host_memory([program], 2, on_gpus=True)
    monkeypatch.setattr(preflight, "available_bytes", lambda: needed - 1)
    with pytest.raises(CinemeshError, match=r"of pinned host memory .*offload fewer activations"):
        check_host_memory([program], 2, on_gpus=True)


def test_a_run_is_compared_with_the_gpu_before_ranks_start(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "device_here", lambda wanted, local: "cuda:0")
    monkeypatch.setattr(preflight, "card_here", lambda: Card("sm_90", "NVIDIA H100 80GB HBM3", 10**8))
    assert "than the 0.10 GB that are left there" in refusal(values, tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(preflight, "card_here", lambda: asked.append("card"))
    monkeypatch.setattr(loop, "rank_main", lambda work: 0)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    loop.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[])
    assert asked, "no GPU is told of: nothing is refused"


def test_a_run_that_will_not_fit_is_refused_before_it_allocates(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10**9)
    assert "of buffers and 0.3 GB for itself, together" in refusal(values, tmp_path, "data.global_batch=1000000")
    assert "lower schedule.steps" in refusal(values, tmp_path, "schedule.steps=10000000")


def test_a_trace_that_will_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace, "traced", work)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10**9)
    with pytest.raises(CinemeshError, match="each of the 4 processes of this machine needs"):
        app(["trace", "--plan", "tp=2,cp=2", "--out", str(tmp_path / "x.json")], standalone_mode=False)


# -- a terminal without signs -----------------------------------------------------------------------------------------

HELP = """
from cinemesh.launch.cli import app, main
import sys, typer
groups = [f"judge {name}" for name in ("make", "serve", "score", "export", "import")]
groups += ["codec eval", "codec fit", *(f"rewrite {name}" for name in ("make", "serve", "export", "score"))]
for name in (*typer.main.get_command(app).commands, *groups):
    sys.argv = ["cinemesh", *name.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, name
sys.argv = ["cinemesh", *"plan --gpus 8 --model tiny-video --dtype float32".split()]
main()
"""


def test_a_terminal_that_lacks_signs_shows_question_marks() -> None:
    """LC_ALL=C with Python's UTF-8 mode off; a plan's error bar is ±. Data files are read as UTF-8 all the same."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\n? -" in done.stdout and done.stdout.isascii() and b"Traceback" not in done.stderr
