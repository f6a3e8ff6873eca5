"""The step that cinemesh's is compared with: torch's own FSDP2, DTensor TP + SP and gathered K and V.

Written to be fast, not to be checked (``tests/oracle.py`` is the checked one): residuals and
modulation are plain local tensors, DTensor is used only where it communicates, K and V travel
together, FSDP is left out where it has one rank, and the optimizer is the fused one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import forget_meshes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from cinemesh.model.config import ModelConfig

Recompute = Literal["none", "full"]


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def local(parameter: Tensor) -> Tensor:
    """A tensor that tp replicates, for use on this rank's tokens: its gradient is a sum over tp."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter


class GatherTokens(torch.autograd.Function):
    """[S, ...] of every rank, concatenated; the gradient of each rank's tokens is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        out = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_single(out, gradient.contiguous(), group=ctx.group)
        return out, None


class Attention(nn.Module):
    """Self-attention, or attention to ``source``; keys of self-attention come from the whole ``group``."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.group: dist.ProcessGroup | None = None
        self.q, self.k, self.v, self.o = (linear(c.width, c.width) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        # [B, S, h * K] -> [B, S, h, K]
        q, k, v = (
            f(y).unflatten(-1, (-1, self.head_dim)) for f, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        if self.group is not None:
            kv = torch.stack([k.transpose(0, 1), v.transpose(0, 1)], dim=1)  # [S, 2, B, h, K]
            k, v = GatherTokens.apply(kv, self.group).permute(1, 2, 0, 3, 4)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate, self.up = linear(c.width, c.ffn), linear(c.width, c.ffn)
        self.down = linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.width, self.eps = (c.width,), c.norm_eps
        self.norm1 = nn.Parameter(torch.ones(c.width))
        self.norm2 = nn.Parameter(torch.ones(c.width))
        self.table = nn.Parameter(torch.zeros(6, c.width))
        self.attention, self.cross, self.ffn = Attention(c), Attention(c), FeedForward(c)

    def forward(self, x: Tensor, position: Tensor, modulation: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        rows = modulation + local(self.table)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.split(1, dim=1)
        x = x + position
        h = F.rms_norm(x, self.width, local(self.norm1), self.eps)
        x = torch.addcmul(x, gate1, self.attention(torch.addcmul(shift1, h, 1 + scale1)))
        x = x + self.cross(x, text, mask)
        h = F.rms_norm(x, self.width, local(self.norm2), self.eps)
        return torch.addcmul(x, gate2, self.ffn(torch.addcmul(shift2, h, 1 + scale2)))


class Transformer(nn.Module):
    """Predicts the velocity of this rank's tokens, [B, T, P]."""

    def __init__(self, c: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = c, recompute
        self.patchify = nn.Parameter(torch.randn(c.width, c.patch_features) * c.patch_features**-0.5)
        self.position = nn.ParameterList(torch.randn(n, c.width) * 0.02 for n in c.position_lengths)
        self.time_first, self.time_second = linear(256, c.width), linear(c.width, c.width)
        self.adaln = linear(c.width, 6 * c.width)
        self.text = nn.ModuleList(nn.Sequential(linear(e.width, c.width), nn.LayerNorm(c.width)) for e in c.encoders)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.width))
        self.table = nn.Parameter(torch.zeros(2, c.width))
        self.head = nn.Parameter(torch.randn(c.patch_features, c.width) * c.width**-0.5)

    def forward(
        self, patches: Tensor, coordinates: Tensor, features: Tensor, text: list[Tensor], mask: Tensor
    ) -> Tensor:
        c = self.config
        tables = [local(table) for table in self.position]
        position = sum(table[i] for table, i in zip(tables, coordinates.unbind(1), strict=True))
        time = self.time_second(F.silu(self.time_first(features)))
        modulation = local(self.adaln(F.silu(time)).unflatten(-1, (6, -1)))
        context = torch.cat([f(y) for f, y in zip(self.text, text, strict=True)], dim=1)
        x = F.linear(patches, local(self.patchify))
        for block in self.blocks:
            arguments = (x, position, modulation, context, mask)
            x = checkpoint(block, *arguments, use_reentrant=False) if self.recompute == "full" else block(*arguments)
        shift, scale = (local(time)[:, None] + local(self.table)).split(1, dim=1)
        h = F.rms_norm(x, (c.width,), local(self.norm), c.norm_eps)
        return F.linear(torch.addcmul(shift, h, 1 + scale), local(self.head))


class TorchBaseline:
    """One rank of the baseline. Needs an initialised process group; inputs are drawn once, of the usual shapes.

    ``sizes`` gives the degrees of dp_shard, cp and tp. Every call of :meth:`step` is one optimizer
    step over the global batch of ``samples``: noise, forward, backward, clipping, AdamW.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: Mapping[str, int],
        latent: tuple[int, int, int],
        samples: int,
        *,
        recompute: Recompute = "none",
        lr: float = 1e-4,
    ) -> None:
        forget_meshes()
        torch.manual_seed(0)
        shards, cp, tp = (sizes.get(axis, 1) for axis in ("dp_shard", "cp", "tp"))
        root = init_device_mesh("cpu", (shards * cp, tp), mesh_dim_names=("fsdp", "tp"))
        root._flatten()  # lets DTensor reduce the gradient norm over both axes at once
        mesh = root._unflatten("fsdp", (shards, cp), ("dp_shard", "cp"))
        self.tp = root["tp"] if tp > 1 else None
        self.model = Transformer(config, recompute)
        if cp > 1:
            for block in self.model.blocks:
                assert isinstance(block, Block)
                block.attention.group = mesh["cp"].get_group()
        self._parallelize(shards * cp > 1, root)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), fused=True)
        self._share = [  # (dim of a global [samples, tokens, ...], parts, this rank's part)
            (0, shards, mesh["dp_shard"].get_local_rank()),
            (1, cp, mesh["cp"].get_local_rank()),
            (1, tp, mesh["tp"].get_local_rank()),
        ]
        self._draw_inputs(latent, samples)

    def _parallelize(self, sharded: bool, root: DeviceMesh) -> None:
        if self.tp is not None:
            gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
            gather_cross = PrepareModuleInput(
                input_layouts=(Shard(1), Replicate(), None),
                desired_input_layouts=(Replicate(), Replicate(), None),
            )
            styles: dict[str, Any] = {"attention": gather, "cross": gather_cross, "ffn": gather}
            for part, columns, row in (
                ("attention", "qkv", "o"),
                ("cross", "qkv", "o"),
                ("ffn", ("gate", "up"), "down"),
            ):
                styles |= {f"{part}.{name}": ColwiseParallel() for name in columns}
                styles[f"{part}.{row}"] = RowwiseParallel(output_layouts=Shard(1))
            for block in self.model.blocks:
                parallelize_module(block, self.tp, styles)
            # Few rows go through the adaLN linear and many weights: each rank does its columns.
            gathered = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
            parallelize_module(self.model, self.tp, {"adaln": gathered})
            distribute_module(self.model, self.tp)
        if sharded:
            for block in self.model.blocks:
                fully_shard(block, mesh=root["fsdp"])
            fully_shard(self.model, mesh=root["fsdp"])
        self.sharded = sharded

    def mine(self, tensor: Tensor) -> Tensor:
        """This rank's samples and tokens of a global [samples, tokens, ...]."""
        for dim, parts, part in self._share:
            tensor = tensor.chunk(parts, dim)[part]
        return tensor.contiguous()

    def _draw_inputs(self, latent: tuple[int, int, int], samples: int) -> None:
        c = self.model.config
        index = torch.cartesian_prod(*(torch.arange(n) for n in c.grid(latent)))
        self.coordinates = self.mine(index.expand(samples, -1, -1))[0]
        self.data = self.mine(torch.randn(samples, len(index), c.patch_features))
        _, shards, shard = self._share[0]
        texts = (torch.randn(samples, e.tokens, e.width) for e in c.encoders)
        self.text = [self._whole(text.chunk(shards)[shard]) for text in texts]
        self.mask = torch.ones(len(self.data), 1, 1, c.text_tokens, dtype=torch.bool)
        self.mask[..., -1] = False

    def _whole(self, tensor: Tensor) -> Tensor:
        if self.tp is None:
            return tensor
        return DTensor.from_local(tensor, self.tp, [Replicate()], run_check=False)

    def step(self) -> Tensor:
        """One optimizer step; this rank's share of the loss."""
        loss = self.loss(torch.randn_like(self.data), torch.sigmoid(torch.randn(len(self.data))))
        self.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, noise: Tensor, t: Tensor) -> Tensor:
        """Mean over this rank's samples and tokens, divided by tp: tp sums gradients, FSDP averages them."""
        x_t = torch.lerp(noise, self.data, t[:, None, None])
        frequencies = torch.exp(torch.arange(128) * (-math.log(10000.0) / 128))
        angles = torch.outer(1000 * t, frequencies)
        features = self._whole(torch.cat([angles.cos(), angles.sin()], dim=1))
        prediction = self.model(x_t, self.coordinates, features, self.text, self.mask)
        loss = F.mse_loss(prediction, self.data - noise)
        return loss if self.tp is None else loss / self.tp.size()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the global mean loss, on every parameter."""
        loss.backward()
        if not self.sharded:
            self._finish_partial_gradients()

    def _finish_partial_gradients(self) -> None:
        """FSDP sums what is Partial over tp; without it this does, once a step."""
        for parameter in self.model.parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = gradient.redistribute(placements=parameter.placements)
