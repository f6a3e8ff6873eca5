"""A job as a script for sbatch: what is of this job stands first, as directives and variables (torch-free).

``slurm.sh`` is the rest, the same for every job.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...documents import quoted
from ...errors import CinemeshError
from .job import ClusterJob, in_words, printable, word
from .variables import site, variables

REST = Path(__file__).with_name("slurm.sh")
WARNED_S = 300  # seconds before the time limit at which the ranks are asked to save: a step, then a checkpoint
ATTEMPTS = 3  # starts of the ranks in one allocation, after failures
REQUEUES = 10  # of a job that finds too few healthy nodes


@dataclass(frozen=True, kw_only=True)
class SlurmAsked:
    """Options. ``spares``: nodes more; ``container``: an image that pyxis starts; ``time_limit``: as sbatch has it."""

    spares: int = 0
    time_limit: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    interface: str | None = None


def script(jobs: Sequence[ClusterJob], asked: SlurmAsked) -> str:
    """The script's text: of one job, or of an array of them, which run one after another.

    Raises CinemeshError for an option that a directive cannot hold, and for jobs of unlike nodes.
    """
    largest = max(jobs, key=lambda job: job.nodes)
    for job in jobs:
        if job.nodes != largest.nodes and not job.short:
            raise CinemeshError(
                f"{job.stage} runs on {job.nodes} nodes and {largest.stage} on {largest.nodes}: an array has as many "
                "for each",
                remedy="give their plans as many ranks, or submit stages of their own: cinemesh stages CHAIN --stage",
            )
    lines = ["#!/bin/bash", "# shellcheck disable=SC2016  # words in single quotes are meant as they are", ""]
    lines += [f"# {line}" for job in jobs for line in job.about()]
    for option, why in _directives(largest, len(jobs), asked):
        lines += [f"# {why}", f"#SBATCH {option}"] if why else [f"#SBATCH {option}"]
    lines += ["", f"cd -- {shlex.quote(str(largest.directory))} || exit 2"]
    lines += [f"{name}={value}" for name, value in _shared(largest, asked)]
    files = max(job.open_files for job in jobs)
    lines += [f"# a process of this job opens up to {files:,} files", 'ulimit -S -n "$(ulimit -H -n)"', ""]
    for one in variables(largest, asked.interface):
        lines += [f"# {one.why}", f"export {one.name}={shlex.quote(one.value)}"]
    lines += [f"# {line}" for line in site(largest)]
    if len(jobs) == 1:
        lines += [f"{name}={value}" for name, value in _own(largest)]
    else:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        for number, job in enumerate(jobs):
            lines += [f"  {number})", *(f"    {name}={value}" for name, value in _own(job)), "    ;;"]
        lines += ['  *) echo "there is no stage $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n\n" + REST.read_text(encoding="utf-8")


def _directives(job: ClusterJob, jobs: int, asked: SlurmAsked) -> Iterator[tuple[str, str]]:
    """Each with its reason, where it needs one."""
    if re.fullmatch(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}", asked.time_limit) is None:
        raise CinemeshError(
            f"--time is {quoted(asked.time_limit)}",
            remedy="write days-hours:minutes:seconds, for example 1-12:00:00",
            what="--time",
            value=asked.time_limit,
        )
    yield f"--job-name={job.name}", ""
    if jobs > 1:
        yield f"--array=0-{jobs - 1}%1", "stages, one after another: each begins with the end of one before it"
    yield f"--output={job.name}-{'%A-%a' if jobs > 1 else '%j'}.log", ""
    yield "--open-mode=append", "the log goes on when the job is started again"
    for name, value in (("partition", asked.partition), ("account", asked.account)):
        if value is not None:
            yield f"--{name}={word(value, f'--{name}')}", ""
    spare = f"{job.nodes} run, and {asked.spares} wait for one of them to fail" if asked.spares else ""
    yield f"--nodes={job.nodes + asked.spares}", spare
    yield "--ntasks-per-node=1", "one agent a node, which starts its ranks"
    if job.on_gpus:
        yield f"--gpus-per-node={job.ranks_of_a_node}", "one a rank"
    yield "--exclusive", "a neighbour on one node would slow all of them"
    yield "--mem=0", "all of a node's memory"
    yield f"--time={asked.time_limit}", ""
    yield f"--signal=B:USR1@{WARNED_S}", "before the time limit: ranks save, and the job queues again"
    yield "--requeue", "after a preemption, and when the first node fails: the run goes on from its last checkpoint"
    if asked.spares:
        yield "--no-kill", "the job outlives another node, and a spare takes its place"


def _own(job: ClusterJob) -> Iterator[tuple[str, str]]:
    """The rest's variables that say what one job is, as bash reads them."""
    yield "nodes", str(job.nodes)
    yield "ranks_of_a_node", str(job.ranks_of_a_node)
    yield "ranks", str(job.plan.world_size)
    doctor = ["--device", "cuda" if job.on_gpus else "cpu", "--per-node", str(job.ranks_of_a_node)]
    yield "doctor", f"({in_words(['-m', 'cinemesh.launch', 'doctor', *doctor])})"
    yield "train", f"({in_words(job.training(str(job.recipe)))})"
    yield "place", f"({in_words(job.about())})"


def _shared(job: ClusterJob, asked: SlurmAsked) -> Iterator[tuple[str, str]]:
    """Those that say how any of the jobs is started."""
    python = "python3" if asked.container is not None else sys.executable
    yield "attempts", str(ATTEMPTS)
    yield "requeues", str(REQUEUES)
    yield "python", shlex.quote(printable(python, "python"))
    step = ["--mpi=none", "--cpu-bind=none", "--overlap"]  # see slurm.sh
    if asked.container is not None:
        step += [f"--container-image={printable(asked.container, '--container')}", "--container-mount-home"]
        step += [f"--container-mounts={job.directory}:{job.directory}", f"--container-workdir={job.directory}"]
    yield "step", f"({in_words(step)})"
