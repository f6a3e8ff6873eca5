"""Stage 7: a short run that is killed and started again, and ends bitwise as one that was not.

torchrun ends a whole job when one of its processes dies. Here what dies is a process that a rank of torchrun's has
started (``child.py``); that rank notices, tells the others through the job's store, and they end theirs. So there are
three jobs on the same ranks, one after the other:

    unbroken all steps; every rank notes what its states are, as a hash
    broken   saves a checkpoint, goes on, and the last rank kills itself in a later step
    again    begins from the newest checkpoint, as a run that is started again does, and takes the steps that are left

Kernels are those that sum in one order. ``--out`` must be one folder for all hosts: checkpoints lie there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from ...errors import CinemeshError
from ...model.runner import StepRunner
from ...parallel.runtime.comm import gather_objects
from ..cluster.processes import Joined
from ..health.groups import ranks_text
from ..proof.parity import LR, Case, load_batch
from ..training.checkpoint import loading
from ..training.checkpoint.manifest import COUNTERS, SAVED_STATES
from ..training.checkpoint.saving import save
from .here import SAID, Here, mesh_of
from .steps import plans_of, proof_case, runner_of

STEPS, SAVED, KILLED = 6, 3, 5  # steps of a run; behind which a checkpoint is written; before which a rank dies
WHOLE = "whole"  # hashes of the ranks' states at the end of the run that nothing broke
STATES = (*SAVED_STATES, COUNTERS)


def unbroken(here: Here) -> None:
    """All steps; what the states are then."""
    with here.joined() as place:
        case = _case(here, place)
        with mesh_of(case.plan, place) as mesh:
            runner = runner_of(case, mesh, place.device, deterministic=True)
            run_steps(here, case, runner, STEPS)
            here.note(**{WHOLE: gather_objects(hashed(runner))}, loss=runner.loss.item(), plan=case.plan.equation())


def broken(here: Here) -> None:
    """A checkpoint, more steps, and the end of one rank."""
    folder = folder_of(here)
    if here.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    with here.joined() as place:
        case = _case(here, place)
        with mesh_of(case.plan, place) as mesh:
            runner = runner_of(case, mesh, place.device, deterministic=True)
            run_steps(here, case, runner, SAVED)
            here.at(f"saving step {SAVED}")
            path = save(folder, runner)
            if unseen := [rank for rank, sees in enumerate(gather_objects(path.is_dir())) if not sees]:
                raise CinemeshError(
                    f"ranks {ranks_text(unseen)} do not see {path}",
                    remedy="give --out a folder that all hosts share",
                )
            run_steps(here, case, runner, KILLED)
            if here.rank == victim(here):
                here.at("killing itself")
                os.kill(os.getpid(), signal.SIGKILL)
            run_steps(here, case, runner, STEPS)


def again(here: Here) -> None:
    """From the newest checkpoint to the end, and whether that is the same."""
    folder = folder_of(here)
    with here.joined() as place:
        case = _case(here, place)
        with mesh_of(case.plan, place) as mesh:
            runner = runner_of(case, mesh, place.device, deterministic=True)
            loading.resume(folder, runner)
            resumed_at = runner.steps_done
            run_steps(here, case, runner, STEPS)
            mine, before = gather_objects(hashed(runner)), here.found.get(WHOLE)
            loss = runner.loss.item()
    if here.rank > 0:
        return
    here.note(resumed_at=resumed_at, again=mine, loss_again=loss)
    if resumed_at != SAVED:
        here.fault(f"resumed at step {resumed_at}, and the checkpoint was written behind step {SAVED}")
    if before is None:
        here.fault("there is no whole run to compare with")
    elif differ := [rank for rank, (a, b) in enumerate(zip(before, mine, strict=True)) if a != b]:
        losses = f"losses {here.found['loss']!r} and {loss!r}"
        here.fault(f"the resumed run ended with other bits on ranks {ranks_text(differ)}; {losses}")
    else:
        here.note(**{SAID: f"rank {victim(here)} killed in step {KILLED + 1}, resumed at {SAVED}, bitwise equal"})
        shutil.rmtree(folder, ignore_errors=True)


def victim(here: Here) -> int:
    """The rank that dies: on the last host, not the one that writes the findings."""
    return here.world - 1


def folder_of(here: Here) -> Path:
    return here.asked.out / "resume"


def _case(here: Here, place: Joined) -> Case:
    return proof_case([*plans_of(here.world, here.local).values()][-1], place.device, STEPS, "float32")


def run_steps(here: Here, case: Case, runner: StepRunner, until: int) -> None:
    """Up to that many steps since the run began."""
    for step in range(runner.steps_done, until):
        here.at(f"step {step + 1} of {STEPS}")
        load_batch(case, runner, step)
        runner.step(LR)


def hashed(runner: StepRunner) -> dict[str, Any]:
    """Every state of this rank, as a hash of its bits."""
    found: dict[str, Any] = {}
    for name in STATES:
        bits = runner.buffers[name].detach().cpu().contiguous().view(-1).numpy().tobytes()
        found[name] = hashlib.sha256(bits).hexdigest()[:16]
    return found
