"""What step 0 of an autoencoder's training begins with, beside random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ...data.context_codec import ContextDCTCodec
from ...model.tae.files import is_autoencoder, read_trained
from ...model.tae.grid import GridAutoencoder
from ...model.tae.inflate import inflate, read_diffusers_image
from .networks import Networks
from .recipe import TAERecipe


def warm_start(networks: Networks, recipe: TAERecipe) -> list[str]:
    """Set the autoencoder's first weights; what was done, in lines.

    A body grid begins as the linear codec; with ``start_from``, whatever body takes that directory's weights, by name.
    Raises CinemeshError for a directory or a file that holds none that fit.
    """
    net, said = networks.autoencoder, list[str]()
    if recipe.start_from is not None:
        source = recipe.start_from
        said.append(f"begun as {source}: {inflate(net, _weights(source))}")
    elif isinstance(net, GridAutoencoder):
        codec = ContextDCTCodec.read(recipe.linear)
        if codec.channels == net.config.channels:
            net.begin_as(codec.basis, codec.mean, codec.std, codec.correction)
            said.append(f"begun as the linear codec of {recipe.linear.name}")
    networks.begin_again()
    return said


def _weights(path: Path) -> dict[str, torch.Tensor]:
    if is_autoencoder(path):
        return dict(read_trained(path, "start_from").net.named_parameters())
    return read_diffusers_image(path)
