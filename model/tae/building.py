"""The autoencoder of a configuration."""

from __future__ import annotations

from .autoencoder import Autoencoder, PyramidAutoencoder
from .config import Body, TAEConfig
from .grid import GridAutoencoder

BODIES: dict[Body, type[Autoencoder]] = {"pyramid": PyramidAutoencoder, "grid": GridAutoencoder}


def build(config: TAEConfig) -> Autoencoder:
    """Its weights are not set yet: ``initialise`` them, or load some."""
    return BODIES[config.body](config)
