"""``cinemesh kernels``: what would run and why, without torch; and the search behind --tune, on a made-up device."""

from __future__ import annotations

import json
import subprocess
import sys
from math import log2

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import tuning
from cinemesh.kernels.reference import REFERENCE
from cinemesh.launch.cli import app
from cinemesh.launch.commands.calls import calls_of, tensors
from cinemesh.launch.commands.tune import search
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan

WITHOUT_TORCH = """
import sys
for name in ("torch", "triton", "numpy"):
    sys.modules[name] = None
from cinemesh.launch.cli import main
sys.argv = ["cinemesh", "kernels", "--device", "sm_90", *{arguments!r}]
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH.format(arguments=list(arguments))]
    return subprocess.run(command, capture_output=True, text=True)


def test_choices_of_the_30b_step_without_torch() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    attention = next(row for row in shown["ops"] if row["op"] == "attention")
    assert attention["package"] == "cudnn" and attention["function"] == "torch_cuda.cudnn_attention"
    assert attention["sizes"] == {"t": 36864, "s": 73728, "b": 1, "h": 12, "k": 128}
    assert attention["calls"] == 48
    assert {"flash-attn", "flash-attn-3", "flash-attn-4", "triton", "torch", "reference"} == attention["others"].keys()
    assert attention["others"]["torch"] == "rate class torch (0.39) is below cudnn (0.60)"
    config = preset("movie-gen-30b")
    program = build_step(config, Plan(tp=4, cp=2, dp_shard=768), BatchShape(1, USUAL_LATENTS["movie-gen-30b"]))
    assert {row["op"] for row in shown["ops"]} <= set(REFERENCE)
    assert sum(row["bytes"] for row in shown["ops"]) >= sum(program.bytes_moved(op) for op in program.ops)


def test_the_table_names_every_package_once_a_reason() -> None:
    done = run("--model", "tiny", "--plan", "dtype=float64")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "why not the others" in text
    assert "takes bfloat16 or float32, got float64" in text


def test_mistakes_are_one_line() -> None:
    for arguments, said in (
        (("--model", "tiny", "--plan", "tp=5"), "heads(6) % tp(5) = 1"),
        (("--compile", "sm_90", "--tune"), "give one of the two"),
        (("--model", "tiny", "--seconds", "9"), "--out and --seconds are those of --tune; add it"),
        (("--model", "tiny", "--device", "h100"), "device 'h100' is unknown; write cpu, cuda or a capability"),
        (("--model", "tiny", "--plan", "dtype=float64", "--compile", "sm_90"), "dtype float64: Triton's kernels take"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr


def test_tune_wants_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CinemeshError, match="--tune measures on a GPU and there is none here"):
        app(["kernels", "--model", "tiny", "--plan", "tp=1", "--tune"], standalone_mode=False)


def test_calls_of_a_step_run() -> None:
    """Every distinct call runs alone on tensors made for it, and the counts add up to the step's."""
    program = build_step(preset("tiny"), Plan(dtype="float32"), BatchShape(1, USUAL_LATENTS["tiny"]))
    calls = calls_of(program)
    assert sum(call.times for call in calls) == len([op for op in program.ops if op.kind in REFERENCE])
    for call in calls:
        inputs, outputs = tensors(call, "cpu")
        REFERENCE[call.op](inputs, outputs, **call.attrs)
        for x in outputs:
            assert not x.is_floating_point() or x.isfinite().all(), call.op


def test_search_finds_the_fastest_tile_that_fits() -> None:
    """A device on which blocks of 128 and 4 warps are fastest, 3 stages do not fit, and timings have 1 % of noise."""
    from triton.runtime.errors import OutOfResources

    default = {"BLOCK": 32, "num_warps": 8, "num_stages": 1}
    used: dict[str, int] = {}

    def launch() -> None:
        used.update(tuning.tile("kernel.forward", "T64", default))
        if used["num_stages"] > 2:
            raise OutOfResources(300_000, 232_448, "shared memory")

    def time_s(launch: object) -> float:
        assert callable(launch)
        launch()
        distance = abs(log2(used["BLOCK"]) - 7) + abs(log2(used["num_warps"]) - 2) - 0.005 * used["num_stages"]
        return 1.0 + distance

    ((asked, best, seconds, first),) = search(launch, time_s)
    assert asked == ("kernel.forward", "T64")
    assert best == {"BLOCK": 128, "num_warps": 4, "num_stages": 1}  # 2 stages gain less than the noise
    assert seconds == pytest.approx(0.995) and first == pytest.approx(3.995)
    launch()
    assert used == default  # nothing of the search is left behind
