"""Autoencoders of the package diffusers as codecs, from a directory that its ``save_pretrained`` wrote.

A latent is the mean of what the encoder says, normalised by the mean and std that the configuration states. A clip is
encoded whole on the CPU; its last frame is repeated to as many as the autoencoder takes.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..documents import parse_json
from ..errors import CinemeshError, did_you_mean, in_a_line
from ..files import file_digest

CONFIGURATION, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' own names
IMAGE, WAN, HUNYUAN = "AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo"
REMEDY = "name a directory that diffusers' save_pretrained wrote, of one of these"


class DiffusersCodec:
    """1 + k r frames give 1 + k latent frames (r = 1: every frame by itself)."""

    errors = "A network decodes latents: an error in one smears what lies about it."

    def __init__(self, path: Path) -> None:
        """Raises CinemeshError where diffusers is missing, or the directory holds none of its known autoencoders."""
        try:
            text = (path / CONFIGURATION).read_text(encoding="utf-8")
            weights = file_digest(path / WEIGHTS)
        except (OSError, UnicodeDecodeError) as error:
            raise CinemeshError(
                f"codec.path: {path} holds no autoencoder ({in_a_line(error)})", remedy=REMEDY
            ) from error
        stated = parse_json(text, f"codec.path: {path / CONFIGURATION}", REMEDY)
        name = stated.get("_class_name")
        if name not in (IMAGE, WAN, HUNYUAN):
            raise CinemeshError(f"codec.path: {path} is a {name}", remedy=did_you_mean(name, [IMAGE, WAN, HUNYUAN]))
        try:
            diffusers: Any = importlib.import_module("diffusers")
        except ImportError as error:
            raise CinemeshError(
                "codec.kind diffusers needs the package diffusers", remedy="pip install 'cinemesh[diffusers]'"
            ) from error
        try:
            model: Any = getattr(diffusers, name).from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise CinemeshError(f"codec.path: {path} cannot be loaded ({in_a_line(error)})", remedy=REMEDY) from error
        self._model, self._frame_by_frame, config = model.eval().requires_grad_(False), name == IMAGE, model.config
        self.channels = config.z_dim if name == WAN else config.latent_channels
        self.temporal_stride = (
            1 if name == IMAGE else (config.scale_factor_temporal if name == WAN else config.temporal_compression_ratio)
        )
        self.spatial_stride = (
            2 ** (len(config.block_out_channels) - 1)
            if name == IMAGE
            else config.scale_factor_spatial
            if name == WAN
            else config.spatial_compression_ratio
        )
        if config.get("latents_mean") is not None:
            mean, std = config.latents_mean, config.latents_std
        else:
            mean = [config.get("shift_factor") or 0.0] * self.channels
            std = [1 / config.scaling_factor] * self.channels
        self.mean, self.std = torch.tensor(mean).flatten().float(), torch.tensor(std).flatten().float()
        self.fingerprint = f"diffusers-{hashlib.sha256(f'{text} {weights}'.encode()).hexdigest()[:16]}"

    def latent_frames(self, frames: int) -> int:
        return 1 + math.ceil((frames - 1) / self.temporal_stride)

    def encode(self, frames: Tensor) -> Tensor:
        """See ``LatentCodec.encode``."""
        stride, (height, width) = self.spatial_stride, frames.shape[1:3]
        if not len(frames) or height % stride or width % stride:
            raise CinemeshError(
                f"{len(frames)} frames of {height} x {width} pixels: {height} % {stride} = {height % stride}, "
                f"{width} % {stride} = {width % stride}",
                remedy=f"a clip has a frame at least, and both sizes are multiples of {stride}",
            )
        length = 1 + (self.latent_frames(len(frames)) - 1) * self.temporal_stride
        whole = torch.cat([frames, frames[-1:].expand(length - len(frames), -1, -1, -1)])
        pixels = whole.permute(3, 0, 1, 2).float() / 127.5 - 1  # [3, T, H, W]
        latent = self._turned(self._model.encode(self._turned(pixels)).latent_dist.mode())
        return ((latent - self._wide(self.mean)) / self._wide(self.std)).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """See ``LatentCodec.decode``."""
        if latent.dim() != 4 or latent.shape[0] != self.channels or not torch.isfinite(latent).all():
            raise CinemeshError(
                f"a latent of {list(latent.shape)}, {int((~torch.isfinite(latent)).sum())} of its values not finite",
                remedy=f"read are finite ones of [{self.channels}, t, h, w]",
            )
        own = latent.float() * self._wide(self.std) + self._wide(self.mean)
        pixels = self._turned(self._model.decode(self._turned(own)).sample)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()

    def _turned(self, clip: Tensor) -> Tensor:
        """[C, T, H, W] to what the network takes, and back: a batch of one clip, or one of T images."""
        if self._frame_by_frame:
            return clip.transpose(0, 1)
        return clip[None] if clip.dim() == 4 else clip[0]

    @staticmethod
    def _wide(of_channels: Tensor) -> Tensor:
        return of_channels.view(-1, 1, 1, 1)
