"""The entry of training: ``torchrun ... -m cinemesh.launch.train CONFIG [--set KEY=VALUE ...]``, ``cinemesh train``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cluster.processes import rank_main, world_size
from .training import loop
from .training.recipe import read_recipe


def run(*, config: Path, nproc: int | None, overrides: Sequence[str]) -> None:
    """Settle the plan, then train, on ``nproc`` processes of this machine or on those that torchrun started."""
    recipe, auto = read_recipe(config, overrides)
    if recipe.cluster is not None:
        from .training.resolve import resolve  # the planner: loaded by who needs it

        resolve(recipe, auto, world_size(nproc), int(os.environ.get("RANK", "0")))
    loop.run(config=config, nproc=nproc, overrides=overrides)


def main() -> None:
    """Under torchrun: the same as ``cinemesh train CONFIG``."""
    parser = argparse.ArgumentParser(prog="cinemesh.launch.train", description="Train a model, or resume its training.")
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    sys.exit(rank_main(lambda: run(config=given.config, nproc=None, overrides=given.overrides)))


if __name__ == "__main__":
    main()
