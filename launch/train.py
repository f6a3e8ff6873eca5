"""The cluster entry: ``torchrun ... -m cinemesh.launch.train CONFIG [--set KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cluster.processes import rank_main
from .training.loop import run


def main() -> None:
    """Under torchrun: the same as ``cinemesh train CONFIG``."""
    parser = argparse.ArgumentParser(prog="cinemesh.launch.train", description="Train a model, or resume its training.")
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    sys.exit(rank_main(lambda: run(config=given.config, nproc=None, overrides=given.overrides)))


if __name__ == "__main__":
    main()
