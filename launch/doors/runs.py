"""Commands of runs, ``train``, ``stages``, ``replay``: options and help (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import CinemeshError
from ...ranges import STEPS_RANGE
from ..examples import epilog
from ..options import (
    GPUS_RANGE,
    AsJson,
    ConfigFile,
    LocalProcesses,
    Overrides,
    RecipeDevice,
    RecipePlan,
    bounds,
)
from ..plans import device_override, plan_override

runs = typer.Typer(rich_markup_mode=None)


@runs.command(epilog=epilog("train"))
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
    lost: Annotated[
        int | None,
        typer.Option("--lost", **bounds(GPUS_RANGE), help="Devices that its run has lost, and goes on without."),
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
        from ..commands.dry_run import run as show

        return show(config=config, ranks=ranks or nproc, lost=lost, overrides=given, as_json=as_json)
    of_dry_run = (("--ranks", ranks is not None), ("--lost", lost is not None), ("--json", as_json))
    for option in [name for name, said in of_dry_run if said]:
        raise CinemeshError(f"{option} says nothing to a run that starts", remedy="add --dry-run, or leave it out")
    from ..train import run

    run(config=config, nproc=nproc, overrides=given)


@runs.command(epilog=epilog("stages"))
def stages(
    chain: Annotated[Path, typer.Argument(metavar="CHAIN", help="YAML chain, for example configs/chain.yaml.")],
    only: Annotated[str | None, typer.Option("--stage", metavar="NAME", help="This one alone. Default: all.")] = None,
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    overrides: Overrides = None,
) -> None:
    """Run a chain of stages, or go on with it: runs that begin with others' ends, averages, clips, larger clips.

    What is done is not done again. Between two runs it says both plans, batches and step times. On a
    cluster, launch slurm CHAIN makes an array of its stages.
    """
    from ..commands.stages import run

    run(path=chain, only=only, nproc=nproc, overrides=[*device_override(device), *(overrides or [])])


@runs.command(epilog=epilog("replay"))
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
    from ..training.replay import run

    given = [*plan_override(plan), *device_override(device), *(overrides or [])]
    raise typer.Exit(run(config=config, step=step, nproc=nproc, overrides=given, exact=exact, as_json=as_json))
