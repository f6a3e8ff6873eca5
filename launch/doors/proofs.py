"""Commands that hold a step against what it should be, ``verify`` to ``kernels``: options and help (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...ranges import BATCH_RANGE, PROCESSES_RANGE
from ..examples import PAPER, epilog
from ..options import (
    HEAD_DIM_RANGE,
    SECONDS_RANGE,
    TRIED_RANGE,
    AsJson,
    ConfigFile,
    LatentOption,
    LocalProcesses,
    ModelName,
    OnDevice,
    Overrides,
    PlanText,
    RecipeDevice,
    RecipePlan,
    bounds,
)
from ..plans import device_override, plan_override

proofs = typer.Typer(rich_markup_mode=None)


@proofs.command(epilog=epilog("verify"))
def verify(
    plan: PlanText,
    model: ModelName = "tiny",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float64 for proof, or float32 or bf16. Default: float64, on GPUs float32."),
    ] = None,
    max_procs: Annotated[
        int | None,
        typer.Option(
            "--max-procs",
            **bounds(PROCESSES_RANGE),
            help="Most local processes; a larger plan is shrunk in dp. Default: 8, and on GPUs no more than there are.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", **bounds(TRIED_RANGE), help="Training steps to compare.")] = 3,
    head_dim: Annotated[
        int | None,
        typer.Option("--head-dim", **bounds(HEAD_DIM_RANGE), help="Of the shrunk model. Default: 8, on GPUs 128."),
    ] = None,
    device: OnDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Prove that a plan computes the right thing.

    Shrinks the model, runs the plan on processes of this machine and the plain reference beside it, and
    reports the worst relative error of loss, gradients and weight updates, whether every collective
    that ran was the program's, and peak memory. Where the plan will run, on many nodes:
    torchrun ... -m cinemesh.launch.verify --plan PLAN

    Exit code 1 when a bound does not hold.
    """
    from ..proof.verify import ProofOrder, run

    raise typer.Exit(run(ProofOrder(plan, model, dtype, max_procs, steps, head_dim, device, as_json)))


@proofs.command(epilog=epilog("lint"))
def lint(
    plan: PlanText,
    model: ModelName = "tiny",
    as_json: AsJson = False,
) -> None:
    """Prove that a step can be captured.

    Shows without a GPU that a step reads nothing back to the host, allocates nothing that its program
    does not list, writes where it may, keeps the order of collectives, and holds no value that changes
    from step to step: what a CUDA Graph demands. The program is checked at the model's own size, the
    step on a shrunk one with the plan's own degrees.

    Exit code 1, and each finding with its op, when it cannot.
    """
    from ..proof.lint import run

    raise typer.Exit(run(plan=plan, model=model, as_json=as_json))


@proofs.command(epilog=epilog("trace"))
def trace(
    plan: PlanText,
    model: ModelName = "tiny-video",
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the trace.")] = Path("trace.json"),
    steps: Annotated[int, typer.Option("--steps", **bounds(TRIED_RANGE), help="Steps to trace.")] = 3,
    max_procs: Annotated[int, typer.Option("--max-procs", **bounds(PROCESSES_RANGE), help="Most local processes.")] = 8,
    cluster: Annotated[
        str, typer.Option("--cluster", help="Prices to predict by: the file that cinemesh calibrate wrote.")
    ] = "local-cpu",
    as_json: AsJson = False,
) -> None:
    """Show when every op and collective of a plan's step ran.

    Runs the plan on CPU processes, writes a trace that Perfetto opens, and prints for every record and
    lane how long it ran and how long it held compute, predicted beside measured: what profile does for
    the steps of a recipe.
    """
    from ..commands.trace import run

    run(plan=plan, model=model, out=out, steps=steps, max_procs=max_procs, cluster=cluster, as_json=as_json)


@proofs.command("profile", epilog=epilog("profile"))
def profile_recipe(
    config: ConfigFile,
    steps: Annotated[int, typer.Option("--steps", **bounds(TRIED_RANGE), help="Steps to watch, and as many not.")] = 10,
    latent: LatentOption = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Prices to predict by. Default: the recipe's; on CPUs local-cpu.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write. Default: profile/ in the run's folder.")
    ] = None,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: RecipePlan = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a recipe's steps goes, beside where it should go.

    Runs some of its steps, on its data, as training would, half of them with the times of every record, and
    writes a page, a trace that Perfetto opens, profile.json, from which calibrate takes the level of the
    prices, and with 6 steps or more rows.yaml for validate. Saves nothing of what the steps learn. The
    worst disagreements of measured and predicted come first. On GPUs, torchrun starts the same command.
    """
    from ..commands.profiled import ProfileOrder, run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    run(ProfileOrder(config, given, nproc, steps, latent, cluster, out, as_json))


@proofs.command(epilog=epilog("kernels"))
def kernels(
    model: ModelName = "movie-gen-30b",
    plan: Annotated[str | None, typer.Option("--plan", help=f"Default of the 30B: {PAPER}; of others one GPU.")] = None,
    latent: LatentOption = None,
    batch: Annotated[int, typer.Option("--batch", **bounds(BATCH_RANGE), help="Samples of a data rank.")] = 1,
    device: Annotated[str | None, typer.Option("--device", help="cpu or sm_90; default: this machine's GPU.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="sm_90",
            help="Build every Triton kernel, without a GPU, and show registers, spills, tensor-core instructions and "
            "bytes moved; at tp 1, 2, 4, 8 and cp 1, 2 where no --plan is given.",
        ),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Measure tiles on this GPU; rewrite its table.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With --tune: the table, in place of the package's.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", **bounds(SECONDS_RANGE), help="With --tune: for at most so long; default: to the end."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which kernel runs each op of a step, and why not another.

    Choices follow device, dtype, shape, what is installed and the rate classes. The variable CINEMESH_KERNELS
    overrides them: CINEMESH_KERNELS=attention=torch,adamw=reference
    """
    from ..commands.kernels import Tuning, run

    asked = Tuning.asked(tune, out, seconds)
    run(
        model=model, plan=plan, latent=latent, batch=batch, device=device, target=target, tune=asked, as_json=as_json
    )  # fmt: skip
