"""The Movie Gen Video transformer as plain autograd modules: the specification, and the oracle of every parity test.

One device, no parallelism, nothing fused. Parameter names and shapes are those of ``config.parameters``.

    S tokens   B samples   D width   H heads   K head dim   F ffn   L text tokens   P values of a patch

Activations are [S, B, D]. A block (Movie Gen Fig. 8):
    x += position;  x += gate1 * self_attention(norm1(x) modulated);  x += cross_attention(x, text);
    x += gate2 * ffn(norm2(x) modulated)

Weights with low-rank factors are multiplied merged: W + alpha / rank A B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow
from .config import CAPTION_DROPOUT, MODULATION_ROWS, TIME_FEATURES, ModelConfig, parameters
from .inputs import IDS, LATENTS, MASK, PLACES, text_input
from .lora import factors_of
from .paths import PATHS

Multiply = Callable[[str, Tensor, str], Tensor]


def patchify(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [S, B, P]; tokens in (t, h, w) order, a token's values in (C, kt, kh, kw) order."""
    b, c, t, h, w = latent.shape
    kt, kh, kw = patch
    tiles = latent.reshape(b, c, t // kt, kt, h // kh, kh, w // kw, kw)
    return tiles.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(-1, b, c * kt * kh * kw)


def unpatchify(tokens: Tensor, channels: int, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`."""
    b, (gt, gh, gw), (kt, kh, kw) = tokens.shape[1], grid, patch
    tiles = tokens.reshape(gt, gh, gw, b, channels, kt, kh, kw).permute(3, 4, 0, 5, 1, 6, 2, 7)
    return tiles.reshape(b, channels, gt * kt, gh * kh, gw * kw)


def time_features(t: Tensor) -> Tensor:
    """Sinusoidal features of t in [0, 1], scaled by 1000 as in DiT: [B] -> [B, 256]."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000.0) / half))
    angle = 1000.0 * t[:, None] * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bidirectional softmax attention. q [S, B, H, K]; k, v [N, B, H, K]; ``mask`` bool [B, N], True = valid key."""
    scores = torch.einsum("sbhk,nbhk->bhsn", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.einsum("bhsn,nbhk->sbhk", scores.softmax(-1), v)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Without gain and bias, as in DiT."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class CrossAttention(nn.Module):
    """Queries from the video tokens, keys and values from the text; no norm and no gate (Fig. 8)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.empty(c.width, c.heads, c.head_dim))
        self.kv = nn.Parameter(torch.empty(c.width, 2, c.heads, c.head_dim))
        self.o = nn.Parameter(torch.empty(c.heads, c.head_dim, c.width))
        if c.style.biases:
            self.q_bias = nn.Parameter(torch.empty(c.heads, c.head_dim))
            self.kv_bias = nn.Parameter(torch.empty(2, c.heads, c.head_dim))
            self.o_bias = nn.Parameter(torch.empty(c.width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, product: Multiply) -> Tensor:
        """``product``: of the block, by the weight's name."""
        q = product("sbd,dhk->sbhk", x, "cross.q")
        k, v = product("lbd,dchk->lbchk", text, "cross.kv").unbind(2)
        return product("sbhk,hkd->sbd", attention(q, k, v, mask), "cross.o")


class Block(nn.Module):
    """In either form of ``block_style.py``."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.eps, self.lora, self.style = c.block_eps, c.lora, c.style
        if c.style.gains:
            self.norm1 = nn.Parameter(torch.empty(c.width))
            self.norm2 = nn.Parameter(torch.empty(c.width))
        self.table = nn.Parameter(torch.empty(MODULATION_ROWS, c.width))
        self.q = nn.Parameter(torch.empty(c.width, c.heads, c.head_dim))
        self.kv = nn.Parameter(torch.empty(c.width, 2, c.heads, c.head_dim))
        self.o = nn.Parameter(torch.empty(c.heads, c.head_dim, c.width))
        self.cross = CrossAttention(c)
        if c.style.gated:
            self.gate = nn.Parameter(torch.empty(c.width, c.ffn))
        self.up = nn.Parameter(torch.empty(c.width, c.ffn))
        self.down = nn.Parameter(torch.empty(c.ffn, c.width))
        if c.style.biases:
            self.q_bias = nn.Parameter(torch.empty(c.heads, c.head_dim))
            self.kv_bias = nn.Parameter(torch.empty(2, c.heads, c.head_dim))
            self.o_bias = nn.Parameter(torch.empty(c.width))
            self.up_bias = nn.Parameter(torch.empty(c.ffn))
            self.down_bias = nn.Parameter(torch.empty(c.width))
        if c.lora is not None:
            shapes = {row.in_block: row.shape for row in parameters(c)}
            for factors in zip(*map(factors_of, c.lora.targets), strict=True):  # all A, all B
                group = factors[0].partition(".")[0]
                self.add_module(group, _weights(**{name.partition(".")[2]: shapes[name] for name in factors}))

    def weight(self, name: str) -> Tensor:
        """That of a product, with what its factors add to it."""
        whole = self.get_parameter(name)
        if self.lora is None or name not in self.lora.targets:
            return whole
        down, up = (self.get_parameter(factor) for factor in factors_of(name))
        return whole + self.lora.scale * torch.tensordot(down, up, 1)

    def product(self, signature: str, x: Tensor, name: str) -> Tensor:
        """With the weight of that name, and its bias if it has one."""
        made = torch.einsum(signature, x, self.weight(name))
        return made + self.get_parameter(f"{name}_bias") if self.style.biases else made

    def norm(self, x: Tensor, gain: str) -> Tensor:
        return rms_norm(x, self.get_parameter(gain), self.eps) if self.style.gains else layer_norm(x, self.eps)

    def forward(self, x: Tensor, position: Tensor, modulation: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """X [S, B, D], position [S, D], modulation [6, B, D] (shared by all layers), text [L, B, D], mask [B, L]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation + self.table[:, None, :]
        x = x + position[:, None, :]
        h = self.norm(x, "norm1") * (1 + scale1) + shift1
        q = self.product("sbd,dhk->sbhk", h, "q")
        k, v = self.product("sbd,dchk->sbchk", h, "kv").unbind(2)
        x = x + gate1 * self.product("sbhk,hkd->sbd", attention(q, k, v), "o")
        x = x + self.cross(x, text, mask, self.product)
        h = self.norm(x, "norm2") * (1 + scale2) + shift2
        hidden = self.product("sbd,df->sbf", h, "up")
        gate = self.product("sbd,df->sbf", h, "gate") if self.style.gated else None
        hidden = F.silu(hidden) if gate is None else F.silu(gate) * hidden
        return x + gate2 * self.product("sbf,fd->sbd", hidden, "down")


def _weights(**shapes: tuple[int, ...]) -> nn.ParameterDict:
    """A named group of parameters, so that names read ``time.first`` and ``text.ul2.gain``."""
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})


class Reference(nn.Module):
    """``forward`` predicts the objective's target. Weights are empty: load them by name (``weights.py``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        d = c.width
        conditions = {condition.name: (c.condition_features(condition), d) for condition in c.latent_conditions}
        self.patchify = _weights(weight=(c.patch_features, d), **conditions)
        self.position = _weights(**{a: (n, d) for a, n in zip("thw", c.position_lengths, strict=True)})
        self.time = _weights(first=(TIME_FEATURES, d), second=(d, d))
        self.adaln = _weights(weight=(d, MODULATION_ROWS, d))
        self.text = nn.ModuleDict({e.name: _weights(weight=(e.width, d), gain=(d,), bias=(d,)) for e in c.encoders})
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final = _weights(norm=(d,), table=(2, d), weight=(d, c.patch_features))

    def _project(self, encoder: str, embedding: Tensor) -> Tensor:
        """One encoder's embeddings [L, B, W] -> [L, B, D]."""
        w = self.text[encoder]
        assert isinstance(w, nn.ParameterDict)
        return F.layer_norm(embedding @ w["weight"], (self.config.width,), w["gain"], w["bias"], self.config.norm_eps)

    def forward(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """x_t [B, C, T, H, W], t [B] -> velocity [B, C, T, H, W].

        ``conditions``, by input name: text of each encoder [L, B, W], ``mask`` bool [B, L], latents [B, C', T, H, W].
        """
        c = self.config
        gt, gh, gw = grid = c.grid((x_t.shape[2], x_t.shape[3], x_t.shape[4]))
        position = (
            self.position["t"][:gt, None, None]
            + self.position["h"][None, :gh, None]
            + self.position["w"][None, None, :gw]
        ).reshape(-1, c.width)
        time = F.silu(time_features(t) @ self.time["first"]) @ self.time["second"]
        modulation = torch.einsum("orj,bj->rbo", self.adaln["weight"], F.silu(time))
        context = torch.cat([self._project(e.name, conditions[text_input(e.name)]) for e in c.encoders])
        x = patchify(x_t, c.patch) @ self.patchify["weight"]
        for condition in c.latent_conditions:
            x = x + patchify(conditions[condition.input], c.patch) @ self.patchify[condition.name]
        for block in self.blocks:
            x = block(x, position, modulation, context, conditions[MASK])
        shift, scale = time + self.final["table"][:, None, :]
        h = rms_norm(x, self.final["norm"], c.norm_eps) * (1 + scale) + shift
        return unpatchify(h @ self.final["weight"], c.channels, grid, c.patch)


def training_loss(
    model: Reference, batch: Mapping[str, Tensor], seed: int, step: int, caption_dropout: float = CAPTION_DROPOUT
) -> Tensor:
    """The loss of one micro-batch: mean over a sample's elements, then over samples. ``batch``: by input name."""
    latent, ids, places, mask = batch[LATENTS], batch[IDS], batch[PLACES], batch[MASK]
    counter = torch.tensor(step)
    path = PATHS[model.config.objective]
    t = path.draw_time(seed, counter, ids, places).to(latent.dtype)
    x0 = flow.draw_noise(seed, counter, ids, places, tuple(latent.shape[1:])).to(latent.dtype)
    keep = flow.draw_keep_caption(seed, counter, ids, places, caption_dropout)
    conditions = dict(batch)
    for encoder in model.config.encoders:
        name = text_input(encoder.name)
        conditions[name] = flow.drop_captions(batch[name], mask, keep)[0]
    conditions[MASK] = mask | ~keep[:, None]
    x_t, target = path.noised(latent, x0, t)
    prediction = model(x_t, t, conditions)
    return (prediction - target).pow(2).mean()
