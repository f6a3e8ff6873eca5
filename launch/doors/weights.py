"""Commands of trained weights, from ``sample`` to ``average``: options and help (torch-free)."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...errors import CinemeshError
from ...model.windows import OVERLAP, UPSAMPLING_STEPS
from ...ranges import EULER_RANGE, SEED_RANGE, integers
from ..examples import epilog
from ..options import (
    FILE_RANGE,
    AsJson,
    ConfigFile,
    LocalProcesses,
    Overrides,
    RecipeDevice,
    RecipePlan,
    bounds,
)
from ..plans import device_override, plan_override, read_plan

weights = typer.Typer(rich_markup_mode=None)

WINDOW_RANGE = integers(1, 10_000, "all frames of a window are in memory at once", "frames")
OVERLAP_RANGE = integers(0, 9_999, "a window shares fewer frames than it has", "frames")


@weights.command(epilog=epilog("sample"))
def sample(
    config: ConfigFile,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the clip shall show.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="YAML list or JSONL of prompts with names, as judge make's."),
    ] = None,
    rewrite: Annotated[
        Path | None,
        typer.Option(
            "--rewrite",
            metavar="FILE",
            help="Rewrite prompts first, in the words of training captions, as this file says: configs/rewriting.yaml.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="DIR", help="Or its URL. Default: the newest one of the recipe's run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Of the clip; default sample.mp4. A folder, for --prompts."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", **bounds(EULER_RANGE), help="From noise to the clip; default: the recipe's."),
    ] = None,
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
    seed: Annotated[
        int | None,
        typer.Option("--seed", **bounds(SEED_RANGE), help="Picks the starting noise; default: the recipe's."),
    ] = None,
    weights: Annotated[
        Literal["ema", "master"] | None,
        typer.Option("--weights", help="Their running average, or the last step's own; default: the recipe's."),
    ] = None,
    trace_change: Annotated[
        Path | None,
        typer.Option(
            "--trace-change",
            metavar="FILE.png",
            help="Draw how much every block changes of what it is given, step by step; the numbers stand beside it.",
        ),
    ] = None,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: RecipePlan = None,
    overrides: Overrides = None,
) -> None:
    """Sample clips from a trained model.

    Writes an mp4 file for each prompt. Of a file of prompts, those whose clip is in the folder are passed over.
    With --rewrite, a prompt that cannot be rewritten is sampled as it is, and a line says why; one that was
    rewritten once stays so, so that the same command makes the same clip.
    """
    from ..training.sample import run

    run(
        config=config,
        prompt=prompt,
        prompts=prompts,
        rewrite=rewrite,
        checkpoint=checkpoint,
        out=out,
        trace_change=trace_change,
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


@weights.command(epilog=epilog("upsample"))
def upsample(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Of an upsampler: a step-* folder, a run's directory, or a URL.")
    ],
    clip: Annotated[Path, typer.Argument(metavar="CLIP", help="A video, or a folder of videos.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Default upsampled.mp4; a folder, of a folder: upsampled."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="Of the result, 1080x1920; default: the scale that was learnt."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", **bounds(WINDOW_RANGE), help="Frames that are sampled at once; default: as it was trained."
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            "--overlap",
            **bounds(OVERLAP_RANGE),
            help=f"Frames that a window shares with the next; default {OVERLAP}, or half of a shorter window.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", **bounds(EULER_RANGE), help="From noise to the clip.")
    ] = UPSAMPLING_STEPS,
    schedule: Annotated[
        Literal["linear-quadratic", "linear"],
        typer.Option("--schedule", help="Steps spaced linearly, then quadratically; or equally."),
    ] = "linear-quadratic",
    seed: Annotated[int, typer.Option("--seed", **bounds(SEED_RANGE), help="Picks the starting noise.")] = 0,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What the clips show. Default: the model without a caption.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Classifier-free guidance scale of a prompt; default 1.")
    ] = None,
    weights: Annotated[
        Literal["ema", "master"] | None,
        typer.Option("--weights", help="Their running average, or the last step's own; default: the recipe's."),
    ] = None,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="PLAN", help="How ranks share it; default: windows over all of them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make clips larger with a trained spatial upsampler.

    Each clip is enlarged bilinearly and its detail sampled beside it, in windows that overlap: where two
    do, what they say is blended in every step. Windows are spread over processes, which change no bit of
    the clip. It keeps its frames and their rate. Of a folder, clips that are there already are passed over.
    A clip's noise depends on --seed and its file's name.
    """
    from ..commands.upsample import run, size_asked
    from ..training.upsampling import UpsampleChoices

    if guidance is not None and prompt is None:
        raise CinemeshError("--guidance without --prompt has nothing to guide to", remedy="add --prompt")
    asked = UpsampleChoices(
        None if size is None else size_asked(size), window, overlap, steps, schedule, seed, prompt,
        1.0 if guidance is None else guidance,
    )  # fmt: skip
    run(
        checkpoint=checkpoint,
        clip=clip,
        out=out,
        choices=asked,
        weights=weights,
        plan=None if plan is None else read_plan(plan),
        device=device,
        nproc=nproc,
        as_json=as_json,
    )


@weights.command(epilog=epilog("export"))
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A step-* folder, or a run's directory, or a URL of one.")
    ],
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
    time is in memory. Needs no GPU. Of a run with model.lora the factors are written as PEFT has
    them, for PeftModel.from_pretrained on an export of their base.
    """
    from ..commands.exchange import run_export

    run_export(checkpoint, out, weights=weights, dtype=dtype, file_bytes=round(file_gb * 1e9))


@weights.command("import", epilog=epilog("import"))
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As cinemesh export writes it.")],
    out: Annotated[str, typer.Option("--out", metavar="CHECKPOINT", help="A new folder, or its URL.")],
) -> None:
    """Make a checkpoint of the weights that cinemesh export wrote, bit by bit.

    It holds that one state: cinemesh sample takes it, with a recipe of its model. Needs no GPU.
    """
    from ..commands.exchange import run_import

    run_import(folder, out)


@weights.command(epilog=epilog("merge"))
def merge(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Of a run with model.lora: a step-* folder, or its directory.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="A new folder for the merged weights, or its URL.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="CHECKPOINT", help="Where the base lies now. Default: where the run found it."),
    ] = None,
) -> None:
    """Add low-rank factors to the weights that they were trained on.

    Both the running averages of the factors and the last step's own are added, a weight at a time. The
    result is an ordinary checkpoint: sample from it, export it, average it, or begin a run with it.
    The base is known by the digest of its weights: another one is refused. Needs no GPU.
    """
    from ..commands.exchange import run_merge

    run_merge(checkpoint, out, base)


@weights.command(epilog=epilog("average"))
def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="DIR DIR ...", help="step-* folders, or their URLs, of one model, any plans.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="A new folder for the average, or its URL.")],
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
    from ..commands.average import run

    run(
        members=checkpoints,
        shares=weights,
        out=out,
        config=config,
        greedy=greedy,
        overrides=overrides or [],
    )
