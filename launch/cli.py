"""The ``cinemesh`` command: options and help of every subcommand (torch-free).

Each command imports its work when it is called, so ``--help`` answers at once and planning commands
never load torch.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CinemeshError

USER_ERROR = 2  # exit code of a mistake that the message says how to mend; also click's code for wrong usage

EXAMPLES = """\b
See what there is:      cinemesh model movie-gen-30b
                        cinemesh program --model movie-gen-30b --latent 32x96x96 \\
                            --plan tp=4,cp=2,dp_shard=768
Prove a plan:           cinemesh verify --plan tp=2,cp=2,dp_shard=2
Train on this machine:  cinemesh train configs/quickstart.yaml --nproc 2
Train on a cluster:     torchrun ... -m cinemesh.launch.train CONFIG
Make a clip:            cinemesh sample configs/quickstart.yaml --prompt "a red car"

Exit codes: 0 done; 1 a check did not hold; 2 wrong input, with a line that says how to mend it.
"""

app = typer.Typer(
    name="cinemesh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is a bug: show it plainly
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML recipe, for example configs/quickstart.yaml.")]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="AXES",
        help="Degree of each mesh axis, for example tp=2,cp=2,dp_shard=2; "
        "axes are tp, cp, dp_shard, dp_replicate, and one left out is 1.",
    ),
]
LocalProcesses = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Start this many processes on this machine. Leave it out under torchrun.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(epilog=EXAMPLES)
def cinemesh() -> None:
    """Train the Movie Gen Video transformer on many GPUs.

    A training step is one program, written by hand: these commands show it, prove it and run it.
    """


@app.command()
def train(
    config: ConfigFile,
    nproc: LocalProcesses = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace one value of the recipe, for example --set optimizer.lr=1e-3; may be repeated.",
        ),
    ] = None,
) -> None:
    """Train a model, or resume its training.

    Started again, a run goes on from its last checkpoint. On a cluster, torchrun starts the same
    command on every node: torchrun ... -m cinemesh.launch.train CONFIG
    """
    from .train import run

    run(config=config, nproc=nproc, overrides=overrides or [])


@app.command()
def sample(
    config: ConfigFile,
    prompt: Annotated[str, typer.Option("--prompt", help="What the clip shall show.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="Default: the newest one of the recipe's run."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the clip.")] = Path("sample.mp4"),
    steps: Annotated[
        int,
        typer.Option("--steps", min=1, help="Euler steps, spaced linearly, then quadratically."),
    ] = 50,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance scale; default: the recipe's."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Picks the starting noise.")] = 0,
    nproc: LocalProcesses = None,
) -> None:
    """Sample a clip from a trained model.

    Writes an mp4 file.
    """
    from .sample import run

    run(
        config=config,
        prompt=prompt,
        checkpoint=checkpoint,
        out=out,
        steps=steps,
        guidance=guidance,
        seed=seed,
        nproc=nproc,
    )


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset, for example movie-gen-30b or tiny.")],
    as_json: AsJson = False,
) -> None:
    """Print a model's parameter table.

    One line a part, with shapes and totals.
    """
    from .show import model_table

    model_table(name=name, as_json=as_json)


@app.command()
def verify(
    plan: PlanText,
    model: Annotated[str, typer.Option("--model", help="The preset to shrink.")] = "tiny",
    dtype: Annotated[str, typer.Option("--dtype", help="float64 for proof, or float32 or bf16.")] = "float64",
    max_procs: Annotated[
        int,
        typer.Option("--max-procs", min=1, help="Most local processes; a larger plan is shrunk in dp."),
    ] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps to compare.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Prove that a plan computes the right thing.

    Shrinks the model, runs the plan on CPU processes and the plain reference beside it, and reports
    the worst relative error of loss, gradients and weight updates, whether every collective that
    ran was the program's, and peak memory.

    Exit code 1 when a bound does not hold.
    """
    from .verify import run

    raise typer.Exit(run(plan=plan, model=model, dtype=dtype, max_procs=max_procs, steps=steps, as_json=as_json))


@app.command()
def program(
    model: Annotated[str, typer.Option("--model", help="A preset, for example movie-gen-30b.")],
    plan: PlanText,
    latent: Annotated[
        str,
        typer.Option("--latent", metavar="TxHxW", help="Latent frames, height, width: 32x96x96."),
    ],
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", min=1, help="Text tokens of all encoders together.")
    ] = 868,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in a micro-batch of one data rank.")] = 1,
    as_json: AsJson = False,
) -> None:
    """List the records of a training step.

    Blocks that repeat are shown once; totals by lane come last. Needs no GPU, no processes and no
    torch, whatever the plan's size.
    """
    from .show import program_listing

    program_listing(
        model=model,
        plan=plan,
        latent=latent,
        text_tokens=text_tokens,
        batch=batch,
        as_json=as_json,
    )


def main() -> None:
    """Run the command line; a ``CinemeshError`` becomes one line on stderr and exit code 2."""
    try:
        app()
    except CinemeshError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
