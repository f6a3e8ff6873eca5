"""A checkpoint of every released format is read by every later release, which goes on from it to the same bits.

``golden/format-N`` holds two checkpoints of one run, behind steps 2 and 4, written by ``python test_golden.py`` in this
folder: when a format is released, never again. A test that fails says that a draw, a kernel or a reader changed.
"""

import platform
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cinemesh.launch.training.checkpoint.loading import load
from cinemesh.launch.training.checkpoint.manifest import READS, SAVED_STATES, read_manifest
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.model.config import preset
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
SMALL = replace(preset("tiny"), layers=1, width=12, heads=2, ffn=16, position_lengths=(2, 2, 2))
BATCH = BatchShape(2, (2, 2, 4))
MOST_BYTES = 1_000_000  # of a format
MACHINE = "machine"  # of the note: on others a product may be summed in another order


def machine() -> str:
    info = Path("/proc/cpuinfo")
    vendor = next((line for line in info.read_text().splitlines() if line.startswith("vendor_id")), "")
    return f"{platform.machine()} {vendor.partition(': ')[2]} {torch.backends.cpu.get_cpu_capability()}"


def runner_of_golden() -> StepRunner:
    """Of one thread: several sum in another order."""
    torch.set_num_threads(1)
    return StepRunner(SMALL, Plan(dtype="float64"), BATCH, Optimizer(ema_decay=0.9), None, seed=5)


def numbers(*shape: int) -> Tensor:
    """In [-1, 1], exact: no generator whose numbers may change."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 37 % 129 - 64) / 64).double().view(shape)


def steps_to(runner: StepRunner, step: int) -> None:
    while runner.steps_done < step:
        ids = torch.tensor([runner.steps_done * 2, runner.steps_done * 2 + 1])
        text = {text_input(e.name): numbers(e.tokens, 2, e.width) for e in SMALL.encoders}
        mask = torch.ones(2, SMALL.text_tokens, dtype=torch.bool)
        given = {LATENTS: numbers(2, SMALL.channels, *BATCH.latent), IDS: ids, PLACES: torch.tensor([0, 1])}
        runner.load(0, {**given, MASK: mask, **text})
        runner.step(1e-2)


@pytest.mark.parametrize("released", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_a_golden_checkpoint_is_gone_on_from(released: Path, one_process: None) -> None:
    """From step 2 to step 4; every bit on the machine and torch that wrote it, elsewhere all but rounding."""
    runner, want = runner_of_golden(), runner_of_golden()
    load(released / "step-00000002", runner)
    steps_to(runner, 4)
    written = load(released / "step-00000004", want)
    same = written.note[MACHINE] == machine() and written.code["torch"] == torch.__version__
    for state in SAVED_STATES:
        got, due = runner.buffers[state], want.buffers[state]
        assert torch.equal(got, due) if same else (got - due).abs().max() <= 1e-12 * due.abs().max(), state
    assert runner.buffers["counters"].tolist() == want.buffers["counters"].tolist() == [4, 4]


def test_golden_checkpoints_are_small() -> None:
    """And there is one of each format that is read."""
    assert {path.name for path in GOLDEN.iterdir()} == {f"format-{number}" for number in READS}
    for released in GOLDEN.iterdir():
        assert sum(file.stat().st_size for file in released.rglob("*") if file.is_file()) <= MOST_BYTES
        assert {read_manifest(path).step for path in released.iterdir()} == {2, 4}


if __name__ == "__main__":
    runner = runner_of_golden()
    runner.initialise(probe_values(0))
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        for step in (2, 4):
            steps_to(runner, step)
            save(Path(folder), runner, note={MACHINE: machine()})
        shutil.copytree(folder, target)
