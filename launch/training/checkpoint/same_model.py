"""Whether a checkpoint is of a model: all that fixes weights and their meaning, compared."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from typing import Any

from ....documents import parse_json
from ....errors import CinemeshError
from ....model.config import ModelConfig
from ...storage.places import Location
from .layout import Layout
from .manifest import Manifest

OTHER_MODEL = "load it with the recipe that wrote it, or name another checkpoint or output directory"


def check_model(path: Location, found: Manifest, config: ModelConfig) -> None:
    """Raise CinemeshError when the model of the checkpoint at ``path`` differs, naming the first difference.

    Compared is all that fixes weights and their meaning: not the preset's name, nor how many text tokens there are.
    What a checkpoint does not say had its default when it was written.
    """
    defaults = {f.name: f.default for f in fields(ModelConfig) if f.default is not MISSING}

    def facts(model: dict[str, Any]) -> dict[str, Any]:
        model = parse_json(json.dumps(defaults | model), "the model", "")  # as the manifest has it: lists
        plain = {key: value for key, value in model.items() if key not in ("name", "encoders")}
        return plain | {f"width of text encoder {e['name']}": e["width"] for e in model.get("encoders", ())}

    here, there = facts(asdict(config)), facts(found.model)
    _compare(path, there, here)


def check_shapes(path: Location, found: Manifest, here: Layout) -> None:
    """Raise CinemeshError when the checkpoint at ``path`` has not exactly the parameters of a model."""
    _compare(path, found.layout.shapes, here.shapes)


def _compare(path: Location, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key in dict.fromkeys((*here, *there)):
        if there.get(key) != here.get(key):
            raise CinemeshError(
                f"checkpoint {path} is of another model: {key} is {shown(there.get(key))} there and "
                f"{shown(here.get(key))} here",
                remedy=OTHER_MODEL,
            )


def shown(value: object) -> str:
    """A value for a message; None is absent."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return "absent" if value is None else str(value)
