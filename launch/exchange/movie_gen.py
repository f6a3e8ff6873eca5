"""The Movie Gen Video transformer and its sampler in plain torch, for one device: an export's own code.

    model = MovieGenTransformer.from_pretrained(folder)
    schedule = FlowScheduler.from_pretrained(folder)
    latents = schedule.sample(model, noise, text, mask)

It needs torch and safetensors alone. Architecture: Movie Gen (arXiv 2410.13720 v1), 3.1.3 and Fig. 8.

    B samples   S tokens   D width   L text tokens   C channels   T, H, W dims of a latent
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

MODEL_CONFIG, SCHEDULER_CONFIG, INDEX = "config.json", "scheduler_config.json", "model.safetensors.index.json"
TIME_FEATURES = 256


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Bidirectional multi-head attention, of [B, S, D] over [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (_linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool [B, N], True where a key is valid."""
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        keys = None if mask is None else mask[:, None, None, :]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = _linear(width, inner), _linear(width, inner), _linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer. Positions are added in each; text attention has no norm and no gate."""

    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads)
        self.ffn = FeedForward(width, inner)

    def forward(self, x: Tensor, position: Tensor, modulation: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Shapes: x [B, S, D], position [S, D], modulation [B, 6, D], text [B, L, D], mask [B, L]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.scale_shift_table).unsqueeze(2).unbind(1)
        x = x + position
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(y, y)
        x = x + self.attn2(x, text, mask)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class TextProjection(nn.Module):
    """Of one text encoder's embeddings."""

    def __init__(self, inputs: int, width: int, eps: float) -> None:
        super().__init__()
        self.linear, self.norm = _linear(inputs, width), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class MovieGenTransformer(nn.Module):
    """Predicts the velocity of a latent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width, eps = config["width"], config["norm_eps"]
        self.patch: tuple[int, int, int] = tuple(config["patch"])
        features = math.prod(self.patch)
        self.patch_embed = _linear(config["channels"] * features, width)
        self.condition_embed = nn.ModuleDict(
            {c["name"]: _linear(c["channels"] * features, width) for c in config["latent_conditions"]}
        )
        self.pos_embed = nn.ModuleList(nn.Embedding(length, width) for length in config["position_lengths"])
        self.time_embed = nn.ModuleList([_linear(TIME_FEATURES, width), _linear(width, width)])
        self.time_modulation = _linear(width, 6 * width)
        self.text_embed = nn.ModuleDict({e["name"]: TextProjection(e["width"], width, eps) for e in config["encoders"]})
        self.blocks = nn.ModuleList(Block(width, config["heads"], config["ffn"], eps) for _ in range(config["layers"]))
        self.norm_out = nn.RMSNorm(width, eps)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = _linear(width, config["channels"] * features)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> MovieGenTransformer:
        """The model of an export, in the dtype of its weights unless told."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")))
        weights: dict[str, Tensor] = {}
        names: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(names.values())):
            with safe_open(folder / file, "pt", device=device) as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no mapping
                    weights[name] = tensors.get_tensor(name).to(dtype)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Mapping[str, Tensor],
        mask: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Velocity [B, C, T, H, W] at x [B, C, T, H, W] and t [B] in [0, 1], where 0 is noise.

        ``text``: embeddings [B, L, W] of each encoder; ``mask``: bool [B, sum of L], True where a token is valid.
        ``conditions``: latents [B, C', T, H, W], of a model that has them.
        """
        grid = [size // step for size, step in zip(x.shape[2:], self.patch, strict=True)]
        position: Any = 0
        for dim, (table, size) in enumerate(zip(self.pos_embed, grid, strict=True)):
            assert isinstance(table, nn.Embedding)
            shape = [1, 1, 1, -1]
            shape[dim] = size
            position = position + table.weight[:size].view(shape)
        position = position.flatten(0, 2)
        time = F.silu(self.time_embed[0](self._time_features(t)))
        time = self.time_embed[1](time)
        modulation = self.time_modulation(F.silu(time)).unflatten(-1, (6, -1))
        context = torch.cat([project(text[name]) for name, project in self.text_embed.items()], dim=1)
        tokens = self.patch_embed(self._patchify(x))
        for name, embed in self.condition_embed.items():
            tokens = tokens + embed(self._patchify((conditions or {})[name]))
        for block in self.blocks:
            tokens = block(tokens, position, modulation, context, mask)
        shift, scale = (time[:, None] + self.scale_shift_table).unsqueeze(2).unbind(1)
        out = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        tiles = out.unflatten(-1, (self.config["channels"], *self.patch)).unflatten(1, grid)
        return tiles.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(x.shape)

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, S, P]; tokens in (t, h, w) order, their values in (C, kt, kh, kw) order."""
        kt, kh, kw = self.patch
        tiles = x.unflatten(4, (-1, kw)).unflatten(3, (-1, kh)).unflatten(2, (-1, kt))  # [B, C, t, kt, h, kh, w, kw]
        return tiles.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def _time_features(self, t: Tensor) -> Tensor:
        """Sinusoidal, scaled by 1000 as in DiT: [B] -> [B, 256]."""
        half = TIME_FEATURES // 2
        frequency = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000.0) / half))
        angle = 1000.0 * t[:, None] * frequency
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


class FlowScheduler:
    """Euler steps from noise at t = 0 to a latent at t = 1, at linear-quadratic times, with guidance (3.1.2, 3.4.2).

    ``steps`` stand for ``emulated_steps`` equal ones: the first half are of those, the rest grow quadratically.
    """

    def __init__(self, steps: int = 50, emulated_steps: int = 250, guidance: float = 7.5) -> None:
        self.steps, self.emulated_steps, self.guidance = steps, emulated_steps, guidance

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FlowScheduler:
        """That of an export."""
        return cls(**json.loads((Path(folder) / SCHEDULER_CONFIG).read_text(encoding="utf-8")))

    def times(self) -> list[float]:
        """``steps`` + 1 times."""
        emulated = max(self.emulated_steps, self.steps)
        linear, bend = self.steps // 2, 1 - self.steps / emulated
        curve = [max(0, i - linear) / (self.steps - linear) for i in range(self.steps)]
        return [*(i / emulated + bend * bent**2 for i, bent in enumerate(curve)), 1.0]

    @torch.no_grad()
    def sample(
        self,
        model: MovieGenTransformer,
        noise: Tensor,
        text: Mapping[str, Tensor],
        mask: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents [B, C, T, H, W] of ``noise`` of this shape; the rest as the model takes it."""
        x = noise.clone()
        nothing = {name: torch.zeros_like(embeddings) for name, embeddings in text.items()}
        for time, after in pairwise(self.times()):
            t = x.new_full((len(x),), time)
            velocity = model(x, t, nothing, torch.ones_like(mask), conditions)
            if self.guidance:
                velocity = velocity + self.guidance * (model(x, t, text, mask, conditions) - velocity)
            x = x + (after - time) * velocity
        return x
