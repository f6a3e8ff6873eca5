"""``torchrun ... -m cinemesh.launch.acceptance --out DIR``: can this job be trusted with a training run?"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from ...errors import CinemeshError
from ...interrupt import interrupted_in_a_line
from ..cluster.environment import launched
from ..cluster.processes import rank_main
from ..options import DEVICE_HELP, SECONDS_RANGE
from ..terminal import show_what_it_can
from .here import AcceptanceOptions
from .stages import STAGES
from .supervisor import run

SECONDS = 1800.0
HELP = """Finds out in half an hour whether cinemesh computes the right thing on these GPUs, how fast, and what
becomes of a run that breaks. Start it on all GPUs of the job, a process each, on one server or several:

    torchrun --nproc-per-node 8 -m cinemesh.launch.acceptance --out DIR

    #!/bin/bash
    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8
    srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d \\
        --rdzv-endpoint $(scontrol show hostnames | head -1):29500 -m cinemesh.launch.acceptance --out /shared/DIR

DIR must be one folder for all hosts. There are
    acceptance.json   all that was found, written anew after every stage: send this back, or give it to
                      cinemesh calibrate --acceptance FILE   a cluster file with the links as they were measured
                      cinemesh validate FILE                 its steps beside their prediction
    acceptance.log    what happened when

Stages, what there is to know first first:
"""
END = """
Every stage runs in processes of its own. One that fails, or is killed at its deadline, does not keep the next from
running; the file says which ranks were where. Without GPUs all of it runs on CPU processes (gloo), with small numbers.

Exit codes: 0 all is well; 1 something is not, the last lines say what; 2 wrong input, with a line that says how to mend
it; 128 + n when signal n stopped it.
"""


def parser() -> argparse.ArgumentParser:
    """The options, and the help that says all that one needs."""
    about = "".join(f"    {stage.name:<12} {stage.share:4.0f} s  {stage.about}\n" for stage in STAGES)
    made = argparse.ArgumentParser(
        prog="cinemesh.launch.acceptance",
        description=HELP + about,
        epilog=END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all that is written")
    made.add_argument(
        "--seconds", type=float, default=SECONDS, help="of all stages together, in the shares above; default: 1800"
    )
    made.add_argument("--only", nargs="+", metavar="STAGE", choices=[stage.name for stage in STAGES], help="run these")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP)
    made.add_argument(
        "--cluster", help="whose prices stand beside what is measured, by name or file; default: that of the card"
    )
    return made


def start() -> None:
    given = parser().parse_args()
    show_what_it_can()
    with interrupted_in_a_line(last=True):
        sys.exit(rank_main(lambda: _main(given)))


def _main(given: argparse.Namespace) -> int:
    if must := SECONDS_RANGE.wrong(given.seconds):
        raise CinemeshError(f"--seconds is {given.seconds:g}", remedy=must)
    if not launched():
        raise CinemeshError(
            "acceptance is of a job, and this process is not of one",
            remedy="start one process a GPU: torchrun --nproc-per-node 8 -m cinemesh.launch.acceptance --out DIR",
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it knows is written
    stages = [stage for stage in STAGES if given.only is None or stage.name in given.only]
    return run(AcceptanceOptions(given.out, given.seconds, given.device, given.cluster), stages)


if __name__ == "__main__":
    start()
