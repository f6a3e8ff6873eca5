"""Stage 2: steps of small models on the card against plain autograd in float64, within derived bounds.

Head dims that Triton's attention takes, float32 and bf16, every way to recompute. See ``launch/proof/bounds.py``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

from benchmarks.kernels_gpu import card_here
from benchmarks.on_card.compiled import compile_all
from benchmarks.on_card.stage import Here

from cinemesh.errors import in_a_line
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.commands.calls import DistinctCall, calls_of
from cinemesh.launch.commands.tune import launcher, usable
from cinemesh.launch.proof.bounds import QUANTITIES, bounds_of, worst_of
from cinemesh.launch.proof.parity import OPTIMIZER, Case, run_rank
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

WIDTH = 256
HEAD_DIMS = (64, 128)
DTYPES = ("float32", "bf16")
RECOMPUTE = ("none", "selective", "full")
LATENT = (3, 6, 10)  # 45 tokens: no block of any kernel divides them
COMPILE_SHARE = 0.5  # of the stage's time, at most
SMOKE = ((64, "bf16", "full"), (128, "float32", "none"))


def cases(smoke: bool) -> list[tuple[int, str, str]]:
    """Head dim, dtype, recompute; every combination, those of one dtype and head dim together last."""
    return list(SMOKE) if smoke else [(k, d, r) for r, d, k in product(RECOMPUTE, DTYPES, HEAD_DIMS)]


def case_of(head_dim: int, dtype: str, recompute: str, smoke: bool) -> Case:
    layers, width, latent, steps = (1, 128, (1, 4, 6), 1) if smoke else (2, WIDTH, LATENT, 3)
    encoders = (Encoder("a", 24, 3), Encoder("b", 40, 5))
    config = ModelConfig(
        f"head dim {head_dim}", layers, width, width // head_dim, 2 * width, encoders, position_lengths=(8, 8, 8)
    )
    return Case(Plan.parse(f"dtype={dtype},recompute={recompute}"), config, 2, latent, steps)


@lru_cache(maxsize=8)
def calls(head_dim: int, dtype: str, smoke: bool) -> list[DistinctCall]:
    """Every call of a step that recomputes all: those of the other steps are among them."""
    case = case_of(head_dim, dtype, "full", smoke)
    return calls_of(prepare(build_step(case.config, case.plan, case.batch, OPTIMIZER), backend="nccl"))


def launch(task: tuple[int, str, int], place: str) -> None:
    """Our kernel of a call, once: see ``compiled.py``."""
    head_dim, dtype, index = task
    call = calls(head_dim, dtype, place == "cpu")[index]
    for entry in usable(call, card_here(place).device):
        if entry.package == "triton":
            launcher(entry, call, place)()


def run(here: Here) -> None:
    steps = dict.fromkeys((head_dim, dtype) for head_dim, dtype, _ in cases(here.smoke))
    tasks = [(*step, i) for step in steps for i in range(len(calls(*step, here.smoke)))]
    here.note(compiled_s=compile_all(launch, tasks[: 2 if here.smoke else None], here, COMPILE_SHARE * here.left_s))
    found: list[dict[str, Any]] = []
    for head_dim, dtype, recompute in cases(here.smoke):
        row: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, "recompute": recompute}
        try:
            row |= compared(case_of(head_dim, dtype, recompute, here.smoke), here)
        except Exception as error:  # noqa: BLE001  a case that cannot run is a finding; the others are tried
            row |= {"ok": False, "failed": f"{type(error).__name__}: {in_a_line(error)}"}
        found.append(row)
        print(row, flush=True)
        here.note(ok=all(row["ok"] for row in found), cases=found)


def compared(case: Case, here: Here) -> dict[str, Any]:
    """The largest relative errors beside their bounds."""
    kernels = kernels_for(here.place, {"all": "triton"} if here.smoke else None)
    runner = StepRunner(
        case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed, device=here.place, kernels=kernels
    )
    worst, reference = worst_of(case, [run_rank(case, runner=runner, watched=False)])
    bounds = bounds_of(case, reference)
    errors = {what: worst.error[what] for what in QUANTITIES}
    return {
        "ok": all(errors[what] <= bounds[what] for what in QUANTITIES),
        "errors": errors,
        "bounds": bounds,
        "where": worst.where,
    }
