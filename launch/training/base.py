"""The base of a LoRA: the checkpoint whose weights stay frozen under the factors, and are known by their digest.

A checkpoint of factors holds nothing of them. Its note says what it began with; whoever runs it names the base with
``start_from``, and another one is refused, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CinemeshError
from ...model.config import ModelConfig
from ...parallel.ir.units import Units
from ..storage.places import Location, location_of
from .checkpoint.choosing import check_files
from .checkpoint.layout import Coordinates
from .checkpoint.loading import load_weights
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.same_model import check_model
from .model_section import StartFrom

BEGUN_WITH = "begun_with"  # of a checkpoint's note: what the run began with, and so the base of its factors
DIGEST = "digest"  # of the weights there


def check_base(section: StartFrom, model: ModelConfig, note: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of the base that a recipe names for a model with factors.

    ``note``: of a checkpoint of factors, which must be of this base. Raises CinemeshError for another one, for one of
    another model, and for weights that it has not.
    """
    path, found = section.checkpoint, read_manifest(section.checkpoint)
    if found.model.get("lora"):
        raise CinemeshError(
            f"start_from: checkpoint {path} holds low-rank factors, and no weights to add others to",
            remedy="cinemesh merge makes weights of it and its base",
        )
    check_model(path, found, model.base)
    check_files(path, found)
    if section.weights not in found.states:
        raise CinemeshError(
            f"start_from: checkpoint {path} holds {', '.join(found.states)} and no {section.weights}",
            remedy="take others with start_from.weights, or name another checkpoint",
        )
    if note is not None:
        wanted, here = note.get(BEGUN_WITH, {}).get(DIGEST), found.digests[section.weights]
        if here != wanted:
            raise CinemeshError(
                f"these low-rank factors are of another base: the {section.weights} weights of {path} have digest "
                f"{here}, and theirs {wanted}",
                remedy=f"name theirs with start_from: {_told(note)}",
            )
    return found


def read_base(section: StartFrom, frozen: Tensor, units: Units, at: Coordinates) -> None:
    """A rank's shard of the base, cast to the dtype of ``frozen``; ``units``: of the model with factors."""
    load_weights(section.checkpoint, section.weights, frozen, units.of_frozen, at)


def base_section(note: Mapping[str, Any], path: Location, given: Location | None = None) -> StartFrom:
    """The base of the factors in a checkpoint, as its note says; ``given``: where it lies now.

    Raises CinemeshError for a note that does not say it.
    """
    begun = note.get(BEGUN_WITH)
    kinds = {"checkpoint": str, "weights": str, DIGEST: str}
    if not isinstance(begun, Mapping) or any(not isinstance(begun.get(key), kind) for key, kind in kinds.items()):
        raise CinemeshError(
            f"checkpoint {path} does not say of which base its low-rank factors are", remedy="restore the file"
        )
    weights: Any = begun["weights"]
    return StartFrom(checkpoint=given or location_of(begun["checkpoint"]), weights=weights)


def _told(note: Mapping[str, Any]) -> str:
    begun = note.get(BEGUN_WITH, {})
    return f"they began with the {begun.get('weights')} weights of {begun.get('checkpoint')}"
