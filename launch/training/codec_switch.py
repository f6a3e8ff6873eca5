"""A run that begins on latents of another codec than its checkpoint's: the two products that read and make latents.

Latents are standardised, so the two codecs' have one mean and std; what a channel means may be another. ``anew``: the
patchifier and the final layer begin as in a new model, for an autoencoder whose channels are others. ``rescale``: for
one whose channels mean the same and were standardised by other numbers, as clips' and images' are. Of the raw value
z_old = std_new / std_old z_new, but for the means, so a channel's rows of the patchifier are multiplied by
std_new / std_old and its columns of the final layer by std_old / std_new: of data the model says what it said. Of noise
it is told another strength, and no rescaling mends that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...data.codec import LatentCodec
from ...documents import quoted
from ...errors import CinemeshError
from ...model.config import ModelConfig
from ...model.weights import full, initial_values
from ...parallel.ir.units import Parameter
from .checkpoint.choosing import VALIDATION_LOSS
from .model_section import StartFrom

SWITCHED = "switched_to"  # of what a note says of its beginning: the codec that took the place of another
LATENTS_OF = "latents"  # of a checkpoint's note: what made the latents that it was trained on
READS, MAKES = "patchify.weight", "final.weight"  # [values of a patch, D] and [D, values of a patch]


def latents_noted(codec: LatentCodec) -> dict[str, Any]:
    """What a checkpoint's note says of its latents."""
    return {"codec": codec.fingerprint, "mean": codec.mean.tolist(), "std": codec.std.tolist()}


def check_switch(section: StartFrom, note: Mapping[str, Any], model: ModelConfig, codec: LatentCodec) -> None:
    """Raises CinemeshError where a run that begins so would read other latents than its section says."""
    there = note.get(LATENTS_OF)
    if section.latents == "same":
        if isinstance(there, Mapping) and there.get("codec") != codec.fingerprint:
            raise CinemeshError(
                f"start_from: checkpoint {section.checkpoint} was trained on latents of {there.get('codec')}, and the "
                f"codec here makes those of {codec.fingerprint}",
                remedy="say start_from.latents: anew, or rescale where the channels mean the same",
            )
        return
    if section.moments == "keep":
        raise CinemeshError(
            f"start_from: moments: keep with latents: {section.latents}: the moments are of other latents",
            remedy="drop the moments",
        )
    if model.latent_conditions:
        names = ", ".join(condition.name for condition in model.latent_conditions)
        raise CinemeshError(
            f"start_from: latents: {section.latents} of a model with the latent condition {names}, which the "
            "checkpoint's codec made too",
            remedy="switch the codec of the model without it, then begin with that",
        )
    if section.latents == "rescale":
        _std_there(section, note, len(codec.std))


def switched(
    section: StartFrom, note: Mapping[str, Any], row: Parameter, held: Tensor, codec: LatentCodec, seed: int
) -> Tensor:
    """One of the two weights as the run begins with it, float64; ``held``: as the checkpoint has it."""
    if section.latents == "anew":
        return full((row,), initial_values(seed), torch.float64)[row.name]
    ratio = codec.std.double() / _std_there(section, note, len(codec.std))
    values = held.shape[0] if row.name == READS else held.shape[1]
    each = ratio.repeat_interleave(values // len(ratio))  # a patch's values stand channel by channel
    return held * each[:, None] if row.name == READS else held / each


def switch_told(section: StartFrom, note: Mapping[str, Any], codec: LatentCodec) -> str:
    """In a line."""
    there = note.get(LATENTS_OF, {}).get("codec", "a codec that the checkpoint does not name")
    how = "begin anew" if section.latents == "anew" else "are rescaled by the stds of both"
    return f"latents are those of {codec.fingerprint}, of {there} before: {READS} and {MAKES} {how}"


def losses_told(begun: Mapping[str, Any], step: int, loss: float) -> str | None:
    """The held-out loss before the switch and after it, at step 0 of a run that begins with one."""
    if step or SWITCHED not in begun or begun.get(VALIDATION_LOSS) is None:
        return None
    return (
        f"the codec was switched: validation loss {begun[VALIDATION_LOSS]:.4f} before, of the former latents, "
        f"{loss:.4f} after, of these"
    )


def _std_there(section: StartFrom, note: Mapping[str, Any], channels: int) -> Tensor:
    """Std of each channel of the checkpoint's latents, float64 [C]. Raises CinemeshError where it does not say them."""
    there = note.get(LATENTS_OF)
    std = there.get("std") if isinstance(there, Mapping) else None
    if std is None:
        raise CinemeshError(
            f"start_from: latents: rescale, but checkpoint {section.checkpoint} does not say the std of its latents",
            remedy="say latents: anew",
        )
    positive = isinstance(std, list) and all(type(s) is float and 0 < s < math.inf for s in std)
    if not positive or len(std) != channels:
        raise CinemeshError(
            f"start_from: latents: rescale from {quoted(std)}, the stds of checkpoint {section.checkpoint}, to "
            f"{channels} channels",
            remedy="say latents: anew: the channels are others",
        )
    return torch.tensor(std, dtype=torch.float64)
