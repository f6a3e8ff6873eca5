"""What a profile of a recipe writes, each for somebody: a page, a trace, samples for calibrate, a row for validate."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch

from ...kernels.selection import Software
from ...model.config import latent_text
from ...model.runner import StepRunner
from ...perf_model.calibration.levels import MachineProfile
from ..cluster.environment import processes_here
from ..proof.traced import TakenSteps
from ..training.measured_rows import ROWS_FILE, StepTimes, dated, own_row, write_rows
from ..training.recipe import Config
from ..written import command, wrote
from .profile_samples import samples_of
from .profile_shown import ToldProfile

TRACE, PAGE, SAMPLES = "trace.json", "profile.html", "profile.json"


def write_files(out: Path, told: ToldProfile, runner: StepRunner, config: Config, cluster: str) -> None:
    """All of them, and what to do with each. ``cluster``: by its name or file. Raises CinemeshError where it cannot."""
    device, plan = runner.executor.device, config.plan
    told.write_trace(out / TRACE)
    told.write_page(out / PAGE)
    machine = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    profile = MachineProfile(
        about=f"{plan.world_size} x {machine} of {platform.machine()}, torch {torch.__version__}",
        date=str(date.today()),
        device=device.partition(":")[0],
        cluster=cluster,
        dtype=plan.compute_dtype,
        samples=tuple(
            samples_of(runner.program, [rank.watched for rank in told.by_rank], processes_here(plan.world_size))
        ),
    )
    profile.write(out / SAMPLES)
    wrote(out / TRACE, "open it at https://ui.perfetto.dev")
    wrote(out / PAGE, "open it in a browser")
    wrote(out / SAMPLES, command("calibrate", profile=out / SAMPLES, base=cluster, out="local.yaml"))
    if _write_row(out, told.by_rank[0], runner, config, cluster):
        wrote(out / ROWS_FILE, command("validate", out / ROWS_FILE))


def _write_row(out: Path, taken: TakenSteps, runner: StepRunner, config: Config, cluster: str) -> bool:
    """The unwatched steps as a row; whether they were enough for one."""
    times = StepTimes()
    for step_s, loading_s in zip(taken.plain_s, taken.loading_s, strict=True):
        times.add(step_s, loading_s)
    if (measured := times.measured()) is None:
        return False
    software = Software.here(config.kernels, config.deterministic)
    name = f"{out.parent.name}/{out.name}/{latent_text(runner.batch.latent)}"
    row = dated(own_row(runner, software, cluster, name=name, title=str(out)), runner.executor.device)
    write_rows(out / ROWS_FILE, [row | {"measured": measured}])
    return True
