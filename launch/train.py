"""The entry of training: ``cinemesh train``, and ``torchrun ... -m cinemesh.launch.train CONFIG`` with its options.

What takes time is imported when it is wanted, with Ctrl-C heard.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..interrupt import interrupted_in_a_line

PROMPT = "a red car"  # of the clip that a finished run proposes


def run(*, config: Path, nproc: int | None, overrides: Sequence[str]) -> None:
    """Settle the plan, then train, on ``nproc`` processes of this machine or on those that torchrun started."""
    from .cluster.environment import launched, processes_here, say_device, world_size
    from .cluster.lease import leased
    from .cluster.processes import meet_alike
    from .cluster.rounds import begin_round
    from .training import loop
    from .training.checkpoint.choosing import kept_in, latest
    from .training.differences import recipe_facts
    from .training.measured_rows import ROWS_FILE
    from .training.needs import check_outputs
    from .training.recipe import read_recipe
    from .written import command, wrote

    recipe, auto = read_recipe(config, overrides)
    if launched():
        meet_alike("recipe", recipe_facts(recipe) | {"plan as given": str(auto)})
    world = world_size(nproc)
    say_device(recipe.device, processes_here(world))
    check_outputs(recipe)
    rank = int(os.environ.get("RANK", "0"))
    written_to = {recipe.logging.directory, recipe.logging.checkpoints or recipe.logging.directory}
    with ExitStack() as leases:
        for place in sorted(written_to, key=str) if rank == 0 else ():
            leases.enter_context(leased(place))
        if launched() and rank == 0 and (before := begin_round(recipe.logging.directory)):
            print(f"the round before ended: {before}", flush=True)
        if recipe.cluster is not None:
            from .training.resolve import resolve  # the planner: loaded by who needs it

            resolve(recipe, auto, world, rank)
        loop.run(config=config, nproc=nproc, overrides=overrides)
    newest = latest(kept_in(recipe))
    if newest is not None and rank == 0:
        given = [word for override in overrides for word in ("--set", override)]
        wrote(newest, command("sample", config, *given, prompt=PROMPT))
        if (rows := recipe.logging.directory / ROWS_FILE).exists():
            wrote(rows, command("validate", rows))


def main() -> None:
    """Under torchrun: the same as ``cinemesh train CONFIG``."""
    with interrupted_in_a_line(last=True):
        _main()


def _main() -> None:
    from .cluster.processes import rank_main
    from .plans import device_override, plan_override
    from .terminal import show_what_it_can

    parser = argparse.ArgumentParser(prog="cinemesh.launch.train", description="Train a model, or resume its training.")
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("--plan", metavar="PLAN", help="in place of the recipe's, as cinemesh train takes it")
    parser.add_argument("--device", metavar="DEVICE", help="in place of the recipe's: auto, cpu or cuda")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    overrides = [*plan_override(given.plan), *device_override(given.device), *given.overrides]
    show_what_it_can()
    sys.exit(rank_main(lambda: run(config=given.config, nproc=None, overrides=overrides)))


if __name__ == "__main__":
    main()
