"""The ``cinemesh`` command: options and help of every subcommand (torch-free).

Each command imports its work when it is called, so ``--help`` answers at once and planning commands
never load torch.
"""

import platform
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import CinemeshError
from ..files import check_output_file
from ..interrupt import interrupted_in_a_line
from ..ranges import BATCH_RANGE, EULER_RANGE, PROCESSES_RANGE, SEED_RANGE, STEPS_RANGE
from .codecs import codec
from .examples import PAPER, epilog
from .judging import judge
from .options import (
    DEFAULT_CLUSTER,
    DEFAULT_DTYPE,
    FILE_RANGE,
    GPUS_RANGE,
    HEAD_DIM_RANGE,
    MODEL_HELP,
    PLAN_HELP,
    PRICE_RANGE,
    SECONDS_RANGE,
    SHOWN_RANGE,
    TEXT_RANGE,
    TRIED,
    TRIED_RANGE,
    AsJson,
    Asked,
    ConfigFile,
    JobOptions,
    LatentOption,
    Latents,
    LocalProcesses,
    ModelName,
    On,
    OnDevice,
    Overrides,
    PlanArgument,
    PlanText,
    RecipeDevice,
    RecipePlan,
    bounds,
    taking,
)
from .plans import device_override, plan_override
from .terminal import show_what_it_can
from .written import command, wrote

USER_ERROR = 2  # exit code of a mistake that the message says how to mend; also click's code for wrong usage

EXAMPLES = f"""\b
See what there is:      cinemesh list
                        cinemesh program --model movie-gen-30b --plan {PAPER}
Choose a plan:          cinemesh plan --gpus 6144 --explain
                        cinemesh compare {PAPER} tp=2,cp=4,dp_shard=768,recompute=o:lse
Prove a plan:           cinemesh verify --plan tp=2,cp=2,dp_shard=2
                        cinemesh lint --model movie-gen-30b --plan {PAPER}
See a step run:         cinemesh trace --plan tp=2 --out trace.json
Train on this machine:  cinemesh train configs/quickstart.yaml --nproc 2
Train in stages:        cinemesh stages configs/chain.yaml --nproc 2
Look at a machine:      cinemesh doctor
Train on a cluster:     cinemesh launch slurm CONFIG --out run.sbatch
Average models:         cinemesh average DIR DIR --out runs/mean
Make a clip:            cinemesh sample configs/quickstart.yaml --prompt "a red car"
Let people compare:     cinemesh judge make runs/new runs/old --out judged

Every command has --help, with examples. Bytes are of one GPU, 1 GB is 1e9 of them; times are seconds.
Exit codes: 0 done; 1 a check did not hold; 2 wrong input, with a line that says how to mend it;
130 interrupted.
"""

app = typer.Typer(
    name="cinemesh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is a bug: show it plainly
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(judge)
app.add_typer(codec)


def say_version(asked: bool) -> None:
    """Print versions, and end; packages are asked for theirs and not loaded."""
    if not asked:
        return
    from ..kernels.packages import version_of

    print(f"cinemesh {version_of('cinemesh') or 'not installed'}, python {platform.python_version()}", end="")
    for package in ("torch", "triton"):
        if there := version_of(package):
            print(f", {package} {there}", end="")
    print()
    raise typer.Exit


@app.callback(epilog=EXAMPLES)
def cinemesh(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=say_version, help="Print versions: also of python, torch, triton."
        ),
    ] = False,
) -> None:
    """Train the Movie Gen Video transformer on many GPUs.

    A training step is one program, written by hand: these commands show it, prove it and run it.
    """


@app.command(epilog=epilog("train"))
def train(
    config: ConfigFile,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: RecipePlan = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would be, as predicted for the recipe's cluster.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option("--ranks", **bounds(GPUS_RANGE), help="Devices of the dry run; default: the plan's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model, or resume its training.

    Started again, a run goes on from its last checkpoint. On a cluster, torchrun starts the same
    command on every node: torchrun ... -m cinemesh.launch.train CONFIG
    """
    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    if dry_run:
        if ranks is not None and nproc is not None:
            raise CinemeshError(
                f"--ranks {ranks} and --nproc {nproc} both say how many devices the dry run is of",
                remedy="leave one of them out",
            )
        from .commands.dry_run import run as show

        return show(config=config, ranks=ranks or nproc, overrides=given, as_json=as_json)
    for option in [name for name, said in (("--ranks", ranks is not None), ("--json", as_json)) if said]:
        raise CinemeshError(f"{option} says nothing to a run that starts", remedy="add --dry-run, or leave it out")
    from .train import run

    run(config=config, nproc=nproc, overrides=given)


@app.command(epilog=epilog("doctor"))
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
    from .commands.doctor import DoctorOrder, run

    raise typer.Exit(run(DoctorOrder(cluster, device, per_node, directory, as_json)))


@app.command(epilog=epilog("stages"))
def stages(
    chain: Annotated[Path, typer.Argument(metavar="CHAIN", help="YAML chain, for example configs/chain.yaml.")],
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
) -> None:
    """Run a chain of stages, or go on with it: runs that begin with others' ends, averages, clips.

    What is done is not done again. Between two runs it says both plans, batches and step times.
    """
    from .commands.stages import run

    run(path=chain, nproc=nproc, overrides=device_override(device))


@app.command("launch", epilog=epilog("launch"))
@taking(JobOptions)
def launch_job(
    target: Annotated[
        Literal["slurm", "kubernetes", "local"],
        typer.Argument(metavar="slurm|kubernetes|local", help="What starts the run."),
    ],
    config: ConfigFile,
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
    and the job queues again after a preemption, a lost node and the time limit. kubernetes: manifests of
    a TrainJob with its runtime, or of a JobSet. local: as many agents of torchrun as there are nodes,
    all on this machine. Ranks lie on nodes as the plan's order says; what is printed shows where.
    """
    from .commands.launch import LaunchOrder, run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    raise typer.Exit(run(LaunchOrder(target, config, given, ranks, out), options))


@app.command(epilog=epilog("sample"))
def sample(
    config: ConfigFile,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the clip shall show.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="YAML list or JSONL of prompts with names, as judge make's."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="Default: the newest one of the recipe's run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Of the clip; default sample.mp4. A folder, for --prompts."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", **bounds(EULER_RANGE), help="From noise to the clip.")] = 50,
    schedule: Annotated[
        Literal["linear-quadratic", "linear"] | None,
        typer.Option("--schedule", help="Spaced linearly, then quadratically; or equally. Default: the recipe's."),
    ] = None,
    solver: Annotated[
        Literal["euler", "midpoint", "dopri5"] | None,
        typer.Option("--solver", help="One, two or six velocities a step; default: the recipe's."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance scale; default: the recipe's."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", **bounds(SEED_RANGE), help="Picks the starting noise.")] = 0,
    weights: Annotated[
        Literal["ema", "master"] | None,
        typer.Option("--weights", help="Their running average, or the last step's own; default: the recipe's."),
    ] = None,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: RecipePlan = None,
    overrides: Overrides = None,
) -> None:
    """Sample clips from a trained model.

    Writes an mp4 file for each prompt. Of a file of prompts, those whose clip is in the folder are passed over.
    """
    from .training.sample import run

    run(
        config=config,
        prompt=prompt,
        prompts=prompts,
        checkpoint=checkpoint,
        out=out,
        asked={
            "weights": weights,
            "sample.steps": steps,
            "sample.schedule": schedule,
            "sample.solver": solver,
            "sample.guidance": guidance,
            "sample.seed": seed,
        },
        nproc=nproc,
        overrides=[*plan_override(plan), *device_override(device), *(overrides or [])],
    )


@app.command(epilog=epilog("replay"))
def replay(
    config: ConfigFile,
    step: Annotated[int, typer.Option("--step", **bounds(STEPS_RANGE), help="Counted from 1.")],
    exact: Annotated[bool, typer.Option("--float64", help="In float64: what rounding made is not there.")] = False,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: RecipePlan = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a step of a run once more, with every value measured.

    From the newest checkpoint before it, with the same samples, draws and learning rate, under any plan.
    Shows of each block how large its values are, of each unit its gradient, and the first record whose
    values are not finite, with its rank and samples. Writes nothing.

    Exit code 1 when something is not finite.
    """
    from .training.replay import run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    raise typer.Exit(run(config=config, step=step, nproc=nproc, overrides=given, exact=exact, as_json=as_json))


@app.command(epilog=epilog("export"))
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step-* folder, or a run's directory.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    weights: Annotated[
        Literal["ema", "master"], typer.Option("--weights", help="Their running average, or the last step's own.")
    ] = "ema",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option("--dtype", help="Default: that of the checkpoint.")
    ] = None,
    file_gb: Annotated[
        float, typer.Option("--file-gb", **bounds(FILE_RANGE), help="Most of one file, as far as a weight allows.")
    ] = 5.0,
) -> None:
    """Write a checkpoint's weights for other programs.

    As Hugging Face lays them out: config.json, safetensors files with an index, and movie_gen.py, the
    transformer and its sampler in plain torch, which needs nothing of this package. One weight at a
    time is in memory. Needs no GPU.
    """
    from .commands.exchange import run_export

    run_export(checkpoint, out, weights=weights, dtype=dtype, file_bytes=round(file_gb * 1e9))


@app.command("import", epilog=epilog("import"))
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As cinemesh export writes it.")],
    out: Annotated[Path, typer.Option("--out", metavar="CHECKPOINT", help="A new folder.")],
) -> None:
    """Make a checkpoint of the weights that cinemesh export wrote, bit by bit.

    It holds that one state: cinemesh sample takes it, with a recipe of its model. Needs no GPU.
    """
    from .commands.exchange import run_import

    run_import(folder, out)


@app.command(epilog=epilog("average"))
def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR ...", help="step-* folders of one model, of any plans.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, for the average.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One a checkpoint, summing to 1. Default: equal ones."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="RECIPE", help="Say held-out losses on this recipe's windows.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Begin with the best; keep what does not raise the held-out loss.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Average the weights of several checkpoints into one.

    Both the running averages and the last step's own weights are averaged; moments are left out. The
    average is an ordinary checkpoint: sample from it, or begin a run with it (start_from).
    """
    from .commands.average import run

    run(
        members=checkpoints,
        shares=weights,
        out=out,
        config=config,
        greedy=greedy,
        overrides=overrides or [],
    )


@app.command("list", epilog=epilog("list"))
def list_known(as_json: AsJson = False) -> None:
    """List what can be named: models, clusters, text encoders, recipes.

    Needs no GPU and no torch.
    """
    from .commands.known import run

    run(as_json=as_json)


@app.command(epilog=epilog("model"))
def model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    as_json: AsJson = False,
) -> None:
    """Print a model's parameter table.

    One line a part, with shapes and totals.
    """
    from .commands.show import model_table

    model_table(name=name, as_json=as_json)


@app.command("cluster", epilog=epilog("cluster"))
def cluster_constants(
    name: Annotated[str, typer.Argument(metavar="CLUSTER", help="A cluster by name, or a file that ends in .yaml.")],
    as_json: AsJson = False,
) -> None:
    """Print every constant of a cluster, and where each comes from.

    What the prices of plan, explain and compare are made of: value and unit as its file says them,
    whether it is from a datasheet, measured, fitted or a placeholder, its source and date. Needs no
    GPU and no torch.
    """
    from .commands.cluster import run

    run(name=name, as_json=as_json)


@app.command(epilog=epilog("plan"))
@taking(On)
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML recipe, for what the options leave out: model, latents, batch, dtype, cluster, packages, GPUs.",
        ),
    ] = None,
    *,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            **bounds(GPUS_RANGE),
            help="GPUs of the job. Default: those of the recipe's plan; --paper has its own.",
        ),
    ] = None,
    on: On,
    latent: Latents = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help=f"bf16, float32 or float64. Default: the recipe's, else {DEFAULT_DTYPE}."),
    ] = None,
    fix: Annotated[str, typer.Option("--fix", metavar="FIELDS", help="Plan fields by hand: tp=4,cp=2,...")] = "",
    top: Annotated[int, typer.Option("--top", **bounds(SHOWN_RANGE), help="Plans in the table.")] = 5,
    tune: Annotated[
        bool,
        typer.Option("--tune", help=f"Tune the plans shown, seconds each: what is kept, smaller shards, {TRIED}."),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="What binds the best plan, what it duplicates, what would change it.")
    ] = False,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's Table 3 beside the best plans.")] = False,
    goodput: Annotated[
        bool,
        typer.Option("--goodput", help="A run with failures: checkpoint interval, spares, what is lost, GPU hours."),
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", **bounds(PRICE_RANGE), help="Of a GPU hour, with --goodput.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write pictures, an HTML page and a trace.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the best plan as YAML.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a sharding plan for a cluster, by predicted time and memory.

    Searches tp, cp, the shard group and its replicas, how the axes lie on the network, what is
    recomputed in which blocks, and samples of a data rank or, for a given batch, micro-batches. Every
    other field of a plan stays as it is (prefetch 1, nothing sliced) unless --fix gives it, or --tune
    tries it on the plans shown. For a recipe it also prints what a run under the best plan would be,
    as train --dry-run does.

    Needs no GPU, and no torch without a recipe. Every number is predicted, none measured.
    """
    from .commands.plan import run

    run(
        on=on,
        recipe=config,
        gpus=gpus,
        latents=latent or [],
        dtype=dtype,
        fix=fix,
        top=top,
        tune=tune,
        explain_it=explain,
        paper=paper,
        goodput=goodput,
        price=price,
        report=report,
        out=out,
        as_json=as_json,
    )


@app.command(epilog=epilog("explain"))
@taking(Asked)
def explain(
    plan: PlanArgument,
    asked: Asked,
    as_json: AsJson = False,
) -> None:
    """Say why a plan takes as long as it does.

    Plays every record of its step: what binds it, what is exposed, what is done twice, what beats it
    on as many GPUs and why, and what other hardware would change. Needs no GPU, and no torch without a
    recipe.
    """
    from .commands.explain import run

    run(plan=plan, asked=asked, as_json=as_json)


@app.command(epilog=epilog("compare"))
@taking(Asked)
def compare(
    plans: Annotated[list[str], typer.Argument(metavar="PLAN PLAN ...", help=PLAN_HELP)],
    asked: Asked,
    as_json: AsJson = False,
) -> None:
    """Show plans side by side, and what each difference costs.

    Plays every record of each step, and of the first plan's with each difference alone. Costs are
    GPU seconds of a sample, so that jobs of other sizes and batches compare. Needs no GPU, and no torch
    without a recipe.
    """
    from .commands.compare import run

    run(plans=plans, asked=asked, as_json=as_json)


@app.command(epilog=epilog("validate"))
def validate(
    rows: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ROWS ...",
            help="YAML lists of measurements: rows.yaml of a run, or published ones; or acceptance.json of a job. "
            "Default: those that ship.",
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Predict own runs on it, in place of the one that their rows name.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--rows", help="Also list every row, and why rows are left out.")] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the constants again, leaving every source out in turn: minutes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hold the cost model against measured runs: published ones, and your own.

    Predicts each row with its own hardware, model, plan and software, and prints the errors. Published
    rows are steps of other trainers, built from the prices that plan uses. Rows that train writes into
    a run's folder are predicted with this trainer's own program. Needs no GPU and no torch.
    """
    from .commands.validate import run

    run(rows=rows or [], cluster=cluster, show_all=show_all, refit=fit, as_json=as_json)


@app.command(epilog=epilog("verify"))
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
    from .proof.verify import ProofOrder, run

    raise typer.Exit(run(ProofOrder(plan, model, dtype, max_procs, steps, head_dim, device, as_json)))


@app.command(epilog=epilog("lint"))
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
    from .proof.lint import run

    raise typer.Exit(run(plan=plan, model=model, as_json=as_json))


@app.command(epilog=epilog("trace"))
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
    from .commands.trace import run

    run(plan=plan, model=model, out=out, steps=steps, max_procs=max_procs, cluster=cluster, as_json=as_json)


@app.command("profile", epilog=epilog("profile"))
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
    from .commands.profiled import ProfileOrder, run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    run(ProfileOrder(config, given, nproc, steps, latent, cluster, out, as_json))


@app.command(epilog=epilog("program"))
def program(
    model: ModelName,
    plan: PlanText,
    latent: LatentOption = None,
    text_tokens: Annotated[
        int | None,
        typer.Option("--text-tokens", **bounds(TEXT_RANGE), help="Text tokens of all encoders. Default: the model's."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", **bounds(BATCH_RANGE), help="Samples in a micro-batch of one data rank.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """List the records of a training step.

    Blocks that repeat are shown once; totals by lane come last. Needs no GPU, no processes and no
    torch, whatever the plan's size.
    """
    from .commands.show import program_listing

    program_listing(
        model=model,
        plan=plan,
        latent=latent,
        text_tokens=text_tokens,
        batch=batch,
        as_json=as_json,
    )


@app.command(epilog=epilog("kernels"))
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
    from .commands.kernels import Tuning, run

    asked = Tuning.asked(tune, out, seconds)
    run(
        model=model, plan=plan, latent=latent, batch=batch, device=device, target=target, tune=asked, as_json=as_json
    )  # fmt: skip


@app.command(epilog=epilog("calibrate"))
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
    if out.suffix not in (".yaml", ".yml"):
        raise CinemeshError(f"--out {out}: a cluster file ends in .yaml", remedy="write for example --out local.yaml")
    check_output_file(out, "--out")
    measured = {"--card": card, "--nccl-tests": nccl_tests, "--acceptance": acceptance, "--profile": profile}
    given = [name for name, of in measured.items() if of]
    if len(given) > 1:
        raise CinemeshError(
            f"calibrate: {' and '.join(given)} are given", remedy="take one, then the other with --base"
        )
    if table is not None:
        if card is None:
            raise CinemeshError("--table is made of --card", remedy="add it, or leave --table out")
        check_output_file(table, "--table")
    if profile is not None:
        from .commands.links import show_levels

        show_levels(profile, base, out)
        return
    base = base or DEFAULT_CLUSTER
    if card is not None:
        from ..perf_model.calibration.card import write, write_table

        cluster = write(card, base, out)
        if table is not None:
            write_table(card, table)
            wrote(table, "put it into kernels/tuning under the card's name")
        wrote(out, command("plan", gpus=cluster.gpus, cluster=out), cluster.about)
        return
    if nccl_tests:
        from ..perf_model.calibration import nccl_logs
        from .commands.links import show_links

        show_links(out, *nccl_logs.write(nccl_tests, base, out))
        return
    if acceptance is not None:
        from ..perf_model.calibration import links
        from .commands.links import show_links

        show_links(out, *links.write_measured(acceptance, base, out))
        return
    from .commands.calibrate import run

    raise typer.Exit(run(out=out, nproc=nproc, device=device, base=base))


def main() -> None:
    """Run the command line; a ``CinemeshError`` becomes one line on stderr and exit code 2, a Ctrl-C one and 130."""
    show_what_it_can()
    with interrupted_in_a_line():
        try:
            app()
        except CinemeshError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
