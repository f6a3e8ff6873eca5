"""``cinemesh data build``: the version of the latent cache that a recipe trains on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...data.cache.building import CacheBuild, say_old
from ...data.cache.storage import is_url
from ...data.encoding import Encoding
from ...errors import CinemeshError
from ..cluster.environment import cores_each
from ..cluster.processes import launch, rank_main
from ..training.captions import cache_encoding
from ..training.recipe import Config, read_recipe
from ..written import wrote


@dataclass(frozen=True)
class BuildOrder:
    config: Config
    after: str | None


def run_build(*, config: Path, nproc: int | None, after: str | None, overrides: Sequence[str]) -> None:
    """On ``nproc`` processes, beside those of other machines. Exits with their code."""
    recipe, _ = read_recipe(config, overrides)
    if is_url(recipe.data.cache):
        raise CinemeshError(f"data.cache is {recipe.data.cache}, and a cache is built in a folder", remedy="mount it")
    order = BuildOrder(recipe, after)
    code = launch(nproc, built, order) if nproc and nproc > 1 else rank_main(lambda: built(order))
    if code:
        sys.exit(code)


def built(order: BuildOrder) -> None:
    """The work of one process; the first of a machine speaks."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    torch.set_num_threads(cores_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    data, root = order.config.data, Path(order.config.data.cache)
    encoding = Encoding.of(order.config.codec, data.encoders, data.low_resolution)
    encoding = cache_encoding(order.config, encoding)
    build = CacheBuild.planned(data, encoding, root, order.after)
    if speaks:
        say_old(root)
    name = build.version() or build.work(progress=speaks)
    if speaks:
        wrote(root / "versions" / f"{name}.json", f"cinemesh data show {root}")
