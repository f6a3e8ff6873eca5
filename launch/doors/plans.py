"""Commands of plans and their prices, from ``list`` to ``validate``: options and help (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...ranges import BATCH_RANGE
from ..examples import epilog
from ..options import (
    DEFAULT_CLUSTER,
    DEFAULT_DTYPE,
    GPUS_RANGE,
    MODEL_HELP,
    PLAN_HELP,
    PRICE_RANGE,
    SHOWN_RANGE,
    TEXT_RANGE,
    TRIED,
    AsJson,
    Asked,
    LatentOption,
    Latents,
    ModelName,
    On,
    PlanArgument,
    PlanText,
    bounds,
    taking,
)

plans = typer.Typer(rich_markup_mode=None)


@plans.command("list", epilog=epilog("list"))
def list_known(as_json: AsJson = False) -> None:
    """List what can be named: models, clusters, text encoders, recipes.

    Needs no GPU and no torch.
    """
    from ..commands.known import run

    run(as_json=as_json)


@plans.command(epilog=epilog("model"))
def model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    as_json: AsJson = False,
) -> None:
    """Print a model's parameter table.

    One line a part, with shapes and totals.
    """
    from ..commands.show import model_table

    model_table(name=name, as_json=as_json)


@plans.command(epilog=epilog("program"))
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
    from ..commands.show import program_listing

    program_listing(
        model=model,
        plan=plan,
        latent=latent,
        text_tokens=text_tokens,
        batch=batch,
        as_json=as_json,
    )


@plans.command("cluster", epilog=epilog("cluster"))
def cluster_constants(
    name: Annotated[str, typer.Argument(metavar="CLUSTER", help="A cluster by name, or a file that ends in .yaml.")],
    as_json: AsJson = False,
) -> None:
    """Print every constant of a cluster, and where each comes from.

    What the prices of plan, explain and compare are made of: value and unit as its file says them,
    whether it is from a datasheet, measured, fitted or a placeholder, its source and date. Needs no
    GPU and no torch.
    """
    from ..commands.cluster import run

    run(name=name, as_json=as_json)


@plans.command(epilog=epilog("plan"))
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
    sample: Annotated[
        bool, typer.Option("--sample", help="How long one clip takes instead, on 8 and 16 GPUs unless --gpus says.")
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
    encode: Annotated[
        str | None,
        typer.Option(
            "--encode",
            metavar="TxHxW[:CLIPS]",
            help="Price latents of clips of so many frames and pixels, 1e8 unless said, in place of a search.",
        ),
    ] = None,
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
    if sample:
        of_search = {"--fix": fix, "--tune": tune, "--explain": explain, "--paper": paper, "--goodput": goodput,
                     "--report": report, "--out": out, "--global-batch": on.global_batch,
                     "--samples": on.samples}  # fmt: skip
        from ..commands.plan_sample import run as price_clip

        asked = [name for name, value in of_search.items() if value]
        price_clip(on=on, recipe=config, gpus=gpus, latents=latent or [], dtype=dtype, beside=asked, as_json=as_json)
        return
    if encode is not None:
        from ..commands.encode_price import run as price_encode

        asked = {"--gpus": gpus, "--latent": latent, "--fix": fix, "--tune": tune, "--explain": explain, "--out": out,
                 "--paper": paper, "--goodput": goodput, "--report": report, "CONFIG": config}  # fmt: skip
        others = [name for name, value in asked.items() if value]
        price_encode(encode, cluster=on.cluster or DEFAULT_CLUSTER, others=others, as_json=as_json)
        return
    from ..commands.plan import run

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


@plans.command(epilog=epilog("explain"))
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
    from ..commands.explain import run

    run(plan=plan, asked=asked, as_json=as_json)


@plans.command(epilog=epilog("compare"))
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
    from ..commands.compare import run

    run(plans=plans, asked=asked, as_json=as_json)


@plans.command(epilog=epilog("validate"))
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
    from ..commands.validate import run

    run(rows=rows or [], cluster=cluster, show_all=show_all, refit=fit, as_json=as_json)
