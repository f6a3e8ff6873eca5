"""From low-rank factors and their base to the weights that both make: an ordinary checkpoint.

W + alpha / rank A B     in float64, a parameter at a time, written in the dtype of the base
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.config import ModelConfig
from ...model.lora import factors_of
from ..storage.places import Location
from ..training.base import BEGUN_WITH, DIGEST, base_section, check_base
from ..training.checkpoint.alone import write_alone
from ..training.checkpoint.layout import Coordinates, Layout
from ..training.checkpoint.loading import read_parameter, read_states
from ..training.checkpoint.manifest import Manifest, read_manifest
from ..training.differences import RECIPE
from ..training.resume import CONTENTS
from ..training.sample import FRAME_RATE
from ..training.validation import WEIGHTS
from .factors import adapted, checked_factors

MERGED = "merged"  # of a checkpoint's note: the factors and the base that it was made of


def merge(checkpoint: Location, out: Location, base: Location | None) -> ModelConfig:
    """Write the checkpoint ``out``, a new folder: ``master`` and ``ema`` of the factors, each on the base's weights.

    ``base``: where the checkpoint that the factors were trained on lies now; by default where it did. Returns the
    model. Raises CinemeshError for a checkpoint without factors, and for another base.
    """
    found = read_manifest(checkpoint)
    config = checked_factors(checkpoint, found)
    section = base_section(found.note, checkpoint, base)
    below = check_base(section, config, found.note)
    states = {which: below.states[section.weights] for which in WEIGHTS if which in found.states}

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        for which, flat in flats.items():
            read_states(section.checkpoint, below, layout, at, {section.weights: flat})
            _add(config, checkpoint, found, which, layout, at, flat)

    kept = {key: found.note[key] for key in (RECIPE, CONTENTS, FRAME_RATE) if key in found.note}
    digests = {which: found.digests[which] for which in states}
    kept[MERGED] = {"factors": str(checkpoint), "digests": digests, "base": found.note[BEGUN_WITH][DIGEST]}
    write_alone(out, config.base, states, fill, step=found.step, updates=found.updates, note=kept)
    return config.base


def _add(
    config: ModelConfig, path: Location, found: Manifest, which: str, layout: Layout, at: Coordinates, flat: Tensor
) -> None:
    """What the factors add to the weights that a flat shard holds."""
    assert config.lora is not None
    wanted = {f"{block}.{name}": (block, name) for block, name in adapted(config)}
    for run in layout.runs(at):
        if run.parameter.name in wanted:
            block, name = wanted[run.parameter.name]
            down, up = (read_parameter(path, found, which, f"{block}.{f}").double() for f in factors_of(name))
            added = config.lora.scale * torch.tensordot(down, up, 1).view(-1)[run.start : run.stop]
            held = flat[run.position : run.position + run.stop - run.start]
            held.copy_(held.double() + added)
