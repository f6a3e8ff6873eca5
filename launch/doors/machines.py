"""Commands of machines, ``doctor``, ``launch``, ``calibrate``: options and help (torch-free)."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...ranges import PROCESSES_RANGE
from ..examples import epilog
from ..options import (
    DEFAULT_CLUSTER,
    GPUS_RANGE,
    AsJson,
    JobOptions,
    OnDevice,
    Overrides,
    RecipeDevice,
    RecipePlan,
    bounds,
    taking,
)
from ..plans import device_override, plan_override

machines = typer.Typer(rich_markup_mode=None)


@machines.command(epilog=epilog("doctor"))
def doctor(
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="What the machine should be: a cluster by name, or a .yaml file.")
    ] = None,
    device: OnDevice = "auto",
    per_node: Annotated[
        int | None,
        typer.Option("--per-node", **bounds(PROCESSES_RANGE), help="Ranks that shall run on it. Default: its GPUs."),
    ] = None,
    directory: Annotated[Path, typer.Option("--directory", help="Where runs write.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Look whether this machine is fit to train.

    Versions and what they do to overlap, GPUs with ECC, clocks, power caps and links, NICs, shared memory,
    limits, clock, disk. Without a GPU it looks at the rest, and says so; --device cuda demands one. On all
    machines of a job, torchrun ... -m cinemesh.launch doctor also compares their software and clocks, and
    names ranks and links that are slower than the others.

    Exit code 1 when something is at fault.
    """
    from ..commands.doctor import DoctorOrder, run

    raise typer.Exit(run(DoctorOrder(cluster, device, per_node, directory, as_json)))


@machines.command("launch", epilog=epilog("launch"))
@taking(JobOptions)
def launch_job(
    target: Annotated[
        Literal["slurm", "kubernetes", "local"],
        typer.Argument(metavar="slurm|kubernetes|local", help="What starts the run."),
    ],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML recipe, for example configs/gpu-8.yaml. slurm: also a chain.")
    ],
    *,
    plan: RecipePlan = None,
    device: RecipeDevice = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", **bounds(GPUS_RANGE), help="Of the job; default: the plan's.")
    ] = None,
    options: JobOptions,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there. Default: standard output.")
    ] = None,
) -> None:
    """Print what starts a run on a cluster, or start it here.

    slurm: a script for sbatch. Every node is looked at first, a spare takes the place of one that fails,
    and the job queues again after a preemption, a lost node and the time limit. Of a chain it is an array
    of its stages, one after another. kubernetes: manifests of a TrainJob with its runtime, or of a JobSet.
    local: as many agents of torchrun as there are nodes, all on this machine. Ranks lie on nodes as the
    plan's order says; what is printed shows where.
    """
    from ..commands.launch import LaunchOrder, run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    raise typer.Exit(run(LaunchOrder(target, config, given, ranks, out), options))


@machines.command(epilog=epilog("calibrate"))
def calibrate(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The cluster file to write.")] = Path("local.yaml"),
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=2,
            max=int(PROCESSES_RANGE.most),
            help="Processes to measure with; default: 4. Leave it out under torchrun.",
        ),
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", metavar="JSON", help="What kernels_gpu.py wrote of a GPU.")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", metavar="FILE", help="With --card: the GPU's tuning table, by which kernels are chosen."
        ),
    ] = None,
    nccl_tests: Annotated[
        list[Path] | None,
        typer.Option("--nccl-tests", metavar="LOG", help="What a program of nccl-tests printed; several times."),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option("--acceptance", metavar="JSON", help="What cinemesh.launch.acceptance wrote of a job's links."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="JSON", help="What cinemesh profile wrote of a recipe's steps.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The cluster of all that is not measured. Default: with --profile the one that it was priced on, else "
            f"{DEFAULT_CLUSTER}.",
        ),
    ] = None,
    device: OnDevice = "auto",
) -> None:
    """Measure this machine, or take what was measured on GPUs, and write a cluster file.

    Times CPU processes, all at once as in a training step, and fits the prices to them; in a job
    over several servers, the links between them too. About a minute when idle. On GPUs
    it times the links alone: start it on all of them. Plan with --cluster FILE.
    """
    from ..commands.calibrated import CalibrateOrder, run

    raise typer.Exit(run(CalibrateOrder(out, nproc, card, table, nccl_tests or [], acceptance, profile, base, device)))
