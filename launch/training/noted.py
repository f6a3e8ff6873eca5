"""The recipe that a checkpoint was written with, read back from its note: what needs no file beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CinemeshError
from ..storage.places import Location
from .checkpoint.manifest import Manifest
from .differences import RECIPE
from .recipe import Config, check_config


def noted_recipe(path: Location, found: Manifest, changed: Mapping[str, Any]) -> Config:
    """With other values of some of its keys, and the plan of one process.

    Raises CinemeshError for a checkpoint that does not say it, and for a recipe that this release does not read.
    """
    values = found.note.get(RECIPE)
    if not isinstance(values, Mapping):
        raise CinemeshError(
            f"checkpoint {path} does not say with which recipe it was written",
            remedy="name one that cinemesh train wrote",
        )
    return check_config({**values, "plan": {}, **changed}, f"the recipe in checkpoint {path}")
