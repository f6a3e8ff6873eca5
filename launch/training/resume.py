"""What a resume may change of the recipe that a checkpoint was written with.

Every key has a rule. What decides how a step is run may be another one without a word; what decides how far a run goes
is told; what would make it another run is refused unless the recipe names it in ``may_change``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from ...errors import CinemeshError, did_you_mean
from .differences import RECIPE, OtherValue, differences, recipe_facts
from .recipe import Config


class Allowed(Enum):
    """What becomes of a key whose value is another one than that of the run so far."""

    FREE = "without a word"
    TOLD = "the run says so"
    ASKED = "refused, unless may_change names it"


CONTENTS = "data.contents"  # versions of the cache by step: captions, videos, encoders, kind of latents. Not a key
# By the longest beginning of the key.
ALLOWED = {
    "model": Allowed.FREE,  # a checkpoint of another model is refused by itself
    "plan": Allowed.FREE,
    "plan.dtype": Allowed.ASKED,
    "codec": Allowed.FREE,  # what it encodes is among the contents; how it decodes changes no weight
    "cluster": Allowed.FREE,
    "data": Allowed.ASKED,
    "data.encoders": Allowed.FREE,  # what they make of a caption is among the contents
    "data.embeddings": Allowed.FREE,  # and whether they do it in the loop
    "data.embedding_steps": Allowed.FREE,
    "data.clips": Allowed.FREE,  # where they are; what they hold is among the contents
    "data.captions": Allowed.FREE,
    "data.cache": Allowed.FREE,
    "data.versions": Allowed.FREE,  # those of the steps so far are among the contents
    CONTENTS: Allowed.ASKED,
    "optimizer": Allowed.ASKED,
    "optimizer.lr": Allowed.TOLD,
    "schedule": Allowed.TOLD,
    "logging": Allowed.FREE,
    "start_from": Allowed.ASKED,
    "spikes": Allowed.TOLD,
    "sample": Allowed.FREE,
    "weights": Allowed.TOLD,
    "seed": Allowed.ASKED,
    "caption_dropout": Allowed.ASKED,
    "on_loss": Allowed.FREE,
    "capture": Allowed.FREE,
    "marks": Allowed.FREE,
    "device": Allowed.TOLD,
    "kernels": Allowed.TOLD,
    "packages": Allowed.FREE,
    "deterministic": Allowed.TOLD,
    "may_change": Allowed.FREE,
}


def rule_of(key: str) -> Allowed:
    """Raises KeyError for a key that has none."""
    at = key
    while at not in ALLOWED and "." in at:
        at = at.rpartition(".")[0]
    return ALLOWED[at]


def check_may_change(config: Config) -> None:
    """Raises CinemeshError for a name in ``may_change`` that is no key, nor the section of some."""
    keys = [*recipe_facts(config), *ALLOWED]
    for name in config.may_change:
        if not any(_under(key, name) for key in keys):
            raise CinemeshError(f"may_change: {name!r} is no key of a recipe", remedy=did_you_mean(name, keys))


def allowed_changes(note: Mapping[str, Any], config: Config, contents: str) -> list[str]:
    """What a resumed run says, a line for each change that is to be told.

    ``note`` is the checkpoint's, ``contents`` the digest of this run's data. Raises CinemeshError for changes that are
    refused.
    """
    if RECIPE not in note:
        return ["the checkpoint does not say with which recipe it was written: what differs cannot be told"]
    found = differences(note, config)
    if CONTENTS in note and note[CONTENTS] != contents:
        found.append(OtherValue(CONTENTS, note[CONTENTS], contents))
    named = [one for one in found if any(_under(one.key, name) for name in config.may_change)]
    refused = [one for one in found if rule_of(one.key) is Allowed.ASKED and one not in named]
    if refused:
        raise CinemeshError(
            f"not as in the run so far: {', '.join(map(str, refused))}",
            remedy="put it back, begin another run in an empty logging.directory, or go on as another run with "
            f"--set may_change=[{','.join(one.key for one in refused)}]",
        )
    return [str(one) for one in found if rule_of(one.key) is Allowed.TOLD or one in named]


def _under(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")
