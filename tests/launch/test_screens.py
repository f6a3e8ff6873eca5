"""What the commands print for people: every part is there, in its order. Only a person would miss one.

The parts are named by what no number changes; numbers stand in the tests of what computes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.commands import validate as command
from cinemesh.launch.proof import verify
from cinemesh.perf_model.calibration.fit import Constant, Fit
from cinemesh.perf_model.published import validate

SCREENS: dict[str, tuple[str, ...]] = {
    "plan --gpus 8 --model tiny --top 2": (
        "tiny on 8 GPUs of grand-teton-h100, 3x4x12 (36 tokens), bf16. Predicted",
        "plan  batch  step s  samples/s  MFU  beside compute  peak GB",
        "1  ",
        "2  ",
        "Step times are of each plan's own program, played record by record",
        "±",
        "GB are usable on a GPU; ",
        "  tp=1",
        "samples of a data rank: ",
    ),
    "plan --gpus 8 --model tiny --top 2 --goodput --price 2": (
        "samples of a data rank: ",
        "the best plan with failures, simulated: a checkpoint of ",
        "failures  more failures",
        "one every  ",
        "checkpoint every, steps  ",
        "  that is  ",
        "  best simulated, steps  ",
        "spare nodes worth having  0  0",
        "goodput  ",
        "  lost: pauses for checkpoints  ",
        "  lost: steps made again  ",
        "  lost: until a failure is noticed  ",
        "  lost: waiting for a node  ",
        "  lost: starting again  ",
        "samples a day  ",
        "GPU hours of a million samples  ",
        "  at 2 each  ",
    ),
    "doctor --device cpu": (
        "  ok  software  ",
        "  ok  GPUs  none is looked at: ",
        "/dev/shm  ",
        "host memory  ",
        "open files  ",
        "disk  ",
    ),
    "explain tp=2,dp_shard=4 --model tiny": (
        "tiny on grand-teton-h100, 3x4x12 (36 tokens). Predicted, not measured.",
        "tp=2 dp_shard=4 recompute=selective: ",
        "what binds",
        "  compute: ",
        "  memory: ",
        "busy share of the step",
        "  compute ",
        "exposed communication",
        "  forward/h1_gathered (all_gather, tp): ",
        "duplicates: ",
        "  forward/modulation on tp (2 ranks, 5 times): ",
        "where it loses to ",
        "  compute: +",
    ),
    "compare tp=2,dp_shard=4 dp_shard=8 --model tiny": (
        "tiny on grand-teton-h100",
        "  1: tp=2 dp_shard=4",
        "  2: dp_shard=8",
        "  1  2",
        "GPUs  8  8",
        "samples of a step  4  8",
        "step, s  ",
        "samples/s  ",
        "GPU seconds of a sample  ",
        "MFU  ",
        "HFU  ",
        "peak, GB  ",
        "fits  yes  yes",
        "exposed, s  ",
        "  compute, s  ",
        "  exposed tp, s  ",
        "2 against 1: ",
        "on its own  costs  in 1  in 2",
        "degrees  ",
        "together  ",
    ),
    "kernels --model tiny --plan tp=2 --device sm_90": (
        "tiny, tp(2) * cp(1) * dp_shard(1) = 2, bf16, on sm_90: asked for",
        "op  calls  local shape  runs  rate class  share of",
        "cast  ",
        "attention  ",
        "adamw  ",
        "why not the others",
        "package  does not run, since  ops",
        "flash-attn",
        " calls a step, ",
    ),
    "program --model tiny --plan tp=2": (
        "tiny, latent 3x4x12 = 36 tokens",
        "tp(2) * cp(1) * dp_shard(1) = 2 ranks, 1 micro-batch(es), bf16, recompute selective",
        " records of one rank, in the order of execution",
        "columns  ",
        "work  ",
        "outputs  ",
        "mb0/embedding.forward",
        "weights  cast  compute  ",
        "mb0/blocks.1.forward: as mb0/blocks.0.forward",
        "mb0/blocks.0.backward",
        "tp all_gather  ",
        "compute: ",
        "memory:  peak ",
    ),
    "list": (
        "models",
        "name  parameters  layers  width  heads  usual latent  tokens",
        "movie-gen-30b  ",
        "clusters",
        "name  gpus  gpus per server  memory, GB  about",
        "grand-teton-h100  ",
        "encoders",
        "ul2  ",
        "any other  ",
        "recipes",
        "configs/quickstart.yaml  ",
        "--model and --cluster also take a file.",
    ),
    "cluster local-cpu": (
        "local-cpu: One machine, CPU processes over gloo",
        "4 x CPU core",
        "constant  value  unit  origin  source  date",
        "gpu.sms  1  count  placeholder  ",
        "gloo.message_s  all_gather: ",
    ),
}


def in_order(parts: Sequence[str], shown: str) -> None:
    """Every part, from somewhere in a line, in a line below the one before it; gaps between columns are two spaces."""
    lines = iter([re.sub(r"(?<=\S) {2,}", "  ", line) for line in shown.splitlines()])
    for part in parts:
        assert any(part.strip() in line for line in lines), f"{part!r} is not there, or not in its place, in:\n{shown}"


@pytest.mark.parametrize("request_", SCREENS)
def test_a_command_prints_all_its_parts(request_: str) -> None:
    shown = CliRunner().invoke(app, request_.split())
    assert shown.exit_code == 0, shown.output
    in_order(SCREENS[request_], shown.stdout)


def test_validate_prints_what_a_fit_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = validate.validate().times[:2]
    found = Fit("H100", (Constant("speed", ("a.b", "c"), 0.5, 2.0),), {"speed": 1.25}, {"speed": 1.75}, 0.5, 0.25, rows)
    monkeypatch.setattr(command, "_fits", lambda *_, **__: [found])
    shown = CliRunner().invoke(app, ["validate", "--rows", "--fit"])
    parts = (
        "row  unit  measured  predicted  error",
        f"{rows[0].id}  ",
        "not predicted  why",
        "absolute error of time, by source  rows  mean  median  95th  worst  bias",
        "steps and layers, trust A  ",
        "trust A, averaged a source first: mean ",
        "runs out of memory that are predicted to be: ",
        " rows are not predicted; --rows shows which, and why",
        "plans of one job  plans  Spearman  chosen plan loses",
        "mean  ",
        "H100: constant  now  fitted  range  in the cluster file",
        "speed  1.25  1.75  0.5 to 2  a.b, c",
        "loss 0.5000 now, 0.2500 fitted; rows of a source that the fit left out:",
        "source left out  rows  mean  median  95th  worst  bias",
        "all, each left out  2  ",
    )
    assert shown.exit_code == 0, shown.output
    in_order(parts, shown.stdout)


@pytest.mark.parametrize("ok", [True, False])
def test_verify_prints_every_thing_it_proved(ok: bool, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"loss": 1e-9, "gradient": 2e-9, "weight": 3e-9}
    where = {"loss": "step 1", "gradient": "a.weight", "weight": "b.weight"}
    difference = None if ok else "rank 1 sent 3 B less"
    report = verify.Report(
        ok, errors, dict.fromkeys(errors, 4e-9), where, ok, difference, 5000, 600, 5500, ok, ok,
        "tp=2", "bf16", 2, "cuda:0", ["a remark"],
    )  # fmt: skip
    verify._show(report)
    parts = (
        "plan tp=2, on 2 processes (cuda:0, bf16)",
        "  a remark",
        "relative error of  worst  bound  where",
        "loss  1.0e-09  4.0e-09  step 1",
        "gradient  2.0e-09  4.0e-09  a.weight",
        "weight  3.0e-09  4.0e-09  b.weight",
        "collectives  " + ("equal to the program, on every rank" if ok else "rank 1 sent 3 B less"),
        "live bytes  " + ("persistent buffers and one arena" if ok else "NOT those of the program"),
        "peak  5,500 B ran; 5,000 B predicted + 600 B workspace",
        "replicas  " + ("bitwise equal" if ok else "NOT bitwise equal"),
        "ok" if ok else "NOT ok",
    )
    in_order(parts, capsys.readouterr().out)
