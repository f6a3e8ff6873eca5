"""The same model on torch's own parallelism: FSDP2, DTensor tensor and sequence parallel, context_parallel.

An independent truth for every plan: nothing here comes from ``cinemesh.parallel`` but the record that
a row of the parameter table is, and of ``cinemesh.model`` only the configuration, that table, the names
of the inputs and the random draws. Activations are [B, S, D], weights those of ``nn.Linear``.

What torch's parts do and do not do, and what follows here:

- FSDP2 AVERAGES gradients over its mesh, dp_shard x cp (and dp_replicate). Every rank's loss is the
  mean over its own samples and tokens, all ranks hold equally many, so the average is the gradient
  of the global mean.
- Gradients of parameters that tp replicates (norm gains, tables, the patchifier...) are Partial
  over tp. They are DTensors, so torch sums them before FSDP reduces; a plain tensor there would
  silently lose the other ranks' tokens.
- ``context_parallel`` replaces every ``F.scaled_dot_product_attention`` and takes its keys for
  token shards. The text is whole on every rank, so cross-attention calls the function it replaced.
- ``context_parallel`` reorders tokens for causal load balancing unless told not to; its ring
  handles only the CUDA kernels. With the MATH backend attention is matmul, softmax, matmul on
  DTensors, and DTensor gathers what they need.

A block of form ``dit`` and v-prediction are written apart too: torch's LayerNorm, biases of ``nn.Linear``, levels of
noise by cumulative products as Lin et al. 2023 list them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import forget_meshes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from cinemesh.model import flow
from cinemesh.model.config import ModelConfig, parameters
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, text_input
from cinemesh.model.paths import PATHS
from cinemesh.parallel.ir.units import Parameter

# It reports every reduction over two axes as slow; here only the result matters.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

_plain_attention = F.scaled_dot_product_attention  # what context_parallel replaces


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def in_dit(c: ModelConfig) -> bool:
    """Whether the blocks are those of DiT: Movie Gen, Table 9."""
    return c.block == "dit"


def block_norm(c: ModelConfig) -> nn.Module:
    if in_dit(c):
        return nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
    return nn.RMSNorm(c.width, c.norm_eps)


class Attention(nn.Module):
    """The four projections of multi-head attention; under tp this rank's heads."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q, self.k, self.v, self.o = (linear(c.width, c.width, bias=in_dit(c)) for _ in range(4))

    def heads(self, x: Tensor, source: Tensor) -> list[Tensor]:
        """Queries of x, keys and values of source: [B, S, D] -> [B, h, S, K] each."""
        pairs = ((self.q, x), (self.k, source), (self.v, source))
        return [project(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project, y in pairs]


class SelfAttention(Attention):
    """[B, S, D] -> [B, S, D]; under cp the tokens are this rank's and context_parallel finds the other keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x, x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=False)
        return self.o(out.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x, text)
        out = _plain_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate = None if in_dit(c) else linear(c.width, c.ffn)
        self.up, self.down = linear(c.width, c.ffn, bias=in_dit(c)), linear(c.ffn, c.width, bias=in_dit(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = block_norm(c), block_norm(c)
        self.table = nn.Parameter(torch.empty(6, c.width))
        self.attention = SelfAttention(c)
        self.cross = CrossAttention(c)
        self.ffn = FeedForward(c)

    def forward(self, x: Tensor, position: Tensor, modulation: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Shapes: x [B, S, D], position [S, D], modulation [B, 6, D], text [B, L, D], mask [B, L]."""
        rows = modulation + self.table
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[:, i : i + 1] for i in range(6))
        x = x + position
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross(x, text, mask)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class TextProjection(nn.Module):
    def __init__(self, inputs: int, c: ModelConfig) -> None:
        super().__init__()
        self.linear = linear(inputs, c.width)
        self.norm = nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Model(nn.Module):
    """Predicts the target of each token, [B, S, P]."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.patchify = linear(c.patch_features, c.width)
        self.position = nn.ModuleList(nn.Embedding(n, c.width) for n in c.position_lengths)
        self.time_first = linear(256, c.width)
        self.time_second = linear(c.width, c.width)
        self.adaln = linear(c.width, 6 * c.width)
        self.text = nn.ModuleDict({e.name: TextProjection(e.width, c) for e in c.encoders})
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.final_table = nn.Parameter(torch.empty(2, c.width))
        self.final = linear(c.width, c.patch_features)

    def forward(
        self,
        patches: Tensor,
        coordinates: Tensor,
        features: Tensor,
        text: Mapping[str, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """Shapes: patches [B, S, P], coordinates [S, 3] (t, h, w), features [B, 256], text {encoder: [B, L, W]}."""
        position = sum(table(index) for table, index in zip(self.position, coordinates.unbind(1), strict=True))
        time = self.time_second(F.silu(self.time_first(features)))
        modulation = self.adaln(F.silu(time)).unflatten(-1, (6, -1))
        context = torch.cat([project(text[name]) for name, project in self.text.items()], dim=1)
        x = self.patchify(patches)
        for block in self.blocks:
            x = block(x, position, modulation, context, mask)
        rows = time[:, None] + self.final_table
        return self.final(self.final_norm(x) * (1 + rows[:, 1:2]) + rows[:, 0:1])


# --- weights: the parameter table's names and layouts <-> the modules above -----------------------


@dataclass(frozen=True)
class _Map:
    """How one row of the table is laid out in modules: their parameter names and the two directions."""

    names: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]


def _same(name: str) -> _Map:
    return _Map((name,), lambda w: (w,), lambda w: w)


def _matrix(name: str, shape: tuple[int, ...], inputs: int) -> _Map:
    """A table row [inputs..., outputs...] whose first dims multiply to ``inputs``, as the weight of a Linear."""
    return _Map((f"{name}.weight",), lambda w: (w.reshape(inputs, -1).T,), lambda w: w.T.reshape(shape))


def _bias(module: str, row: Parameter) -> _Map:
    """A row of biases, as those of the products that its name lists: ``kv_bias`` [2, h, k]."""
    product = row.name.rpartition(".")[2].removesuffix("_bias")
    if product == "kv":
        names = (f"{module}.k.bias", f"{module}.v.bias")
        return _Map(names, lambda b: (b[0].flatten(), b[1].flatten()), lambda k, v: torch.stack([k, v]).view(row.shape))
    return _Map((f"{module}.{product}.bias",), lambda b: (b.flatten(),), lambda b: b.view(row.shape))


def _maps(c: ModelConfig) -> dict[str, _Map]:
    d = c.width
    fixed = {
        "time.first": "time_first",
        "time.second": "time_second",
        "patchify.weight": "patchify",
        "final.weight": "final",
    }
    maps: dict[str, _Map] = {}
    for row in parameters(c):
        head, _, leaf = row.name.rpartition(".")
        if row.name in fixed:
            maps[row.name] = _matrix(fixed[row.name], row.shape, row.shape[0])
        elif head == "position":
            maps[row.name] = _same(f"position.{'thw'.index(leaf)}.weight")
        elif row.name == "adaln.weight":
            maps[row.name] = _Map(
                ("adaln.weight",),
                lambda w: (w.movedim(1, 0).reshape(6 * d, d),),
                lambda w: w.view(6, d, d).movedim(0, 1),
            )
        elif head.startswith("text."):
            if leaf == "weight":
                maps[row.name] = _matrix(f"{head}.linear", row.shape, row.shape[0])
            else:
                maps[row.name] = _same(f"{head}.norm.{'weight' if leaf == 'gain' else 'bias'}")
        elif row.name in ("final.norm", "final.table"):
            maps[row.name] = _same("final_norm.weight" if leaf == "norm" else "final_table")
        elif leaf in ("norm1", "norm2"):
            maps[row.name] = _same(f"{row.name}.weight")
        elif leaf == "table":
            maps[row.name] = _same(row.name)
        elif leaf in ("gate", "up", "down"):
            maps[row.name] = _matrix(f"{head}.ffn.{leaf}", row.shape, row.shape[0])
        elif leaf in ("up_bias", "down_bias"):
            maps[row.name] = _bias(f"{head}.ffn", row)
        else:
            module = head if head.endswith("cross") else f"{head}.attention"
            if leaf.endswith("_bias"):
                maps[row.name] = _bias(module, row)
            elif leaf == "kv":
                maps[row.name] = _Map(
                    (f"{module}.k.weight", f"{module}.v.weight"),
                    lambda w: (w[:, 0].reshape(d, d).T, w[:, 1].reshape(d, d).T),
                    lambda k, v, shape=row.shape: torch.stack([k.T, v.T], dim=1).reshape(shape),
                )
            else:
                maps[row.name] = _matrix(f"{module}.{leaf}", row.shape, d)
    return maps


def random_weights(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full weights without a zero in sight: a zero gate or head would hide every gradient behind it."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for row in parameters(config):
        noise = torch.randn(row.shape, generator=generator, dtype=torch.float64)
        center = 1.0 if row.init == "ones" else 0.0
        weights[row.name] = (center + noise * (row.std or 0.2)).to(dtype)
    return weights


def random_batch(
    config: ModelConfig, latent: tuple[int, int, int], samples: int, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """By input name, as ``model.reference.training_loss`` takes them, with holes in the mask."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    text = {text_input(e.name): noise(e.tokens, samples, e.width) for e in config.encoders}
    mask = torch.ones(samples, config.text_tokens, dtype=torch.bool)
    mask[0, -1] = mask[-1, 1] = False
    places = torch.arange(samples)
    return {
        LATENTS: noise(samples, config.channels, *latent),
        IDS: 3 + places // 2,  # a window may occur twice in a step
        PLACES: places,
        MASK: mask,
        **text,
    }


# --- the parallel model ---------------------------------------------------------------------------


@dataclass
class Oracle:
    """A wrapped model with its mesh and AdamW. Every rank passes the global batch and takes its share of it."""

    config: ModelConfig
    mesh: DeviceMesh
    model: Model
    optimizer: torch.optim.AdamW


def parallelize(config: ModelConfig, model: Model, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallel over ``tp``, then FSDP over dp_shard x cp, replicated over dp_replicate."""
    tokens, whole = Shard(1), Replicate()
    styles: dict[str, ParallelStyle] = {
        "norm1": SequenceParallel(),
        "norm2": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole),
        "cross": PrepareModuleInput(input_layouts=(tokens, whole, None), desired_input_layouts=(whole, whole, None)),
        "ffn": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole),
    }
    columns = ["attention.q", "attention.k", "attention.v", "cross.q", "cross.k", "cross.v", "ffn.gate", "ffn.up"]
    if in_dit(config):
        columns.remove("ffn.gate")
    for name in columns:
        styles[name] = ColwiseParallel()
    for name in ("attention.o", "cross.o", "ffn.down"):
        styles[name] = RowwiseParallel(output_layouts=tokens, use_local_output=False)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], styles)
    parallelize_module(model, mesh["tp"], {"final_norm": SequenceParallel()})
    distribute_module(model, mesh["tp"])  # all other parameters: Replicate
    data = mesh["dp_replicate", "fsdp"] if mesh["dp_replicate"].size() > 1 else mesh["fsdp"]
    for block in model.blocks:
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)


def build_oracle(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype = torch.float64,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
) -> Oracle:
    """``weights``: full, by the names of the parameter table. ``sizes``: degree of each axis, 1 where it is missing."""
    forget_meshes()
    replicas, shards, cp, tp = (sizes.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "cp", "tp"))
    # FSDP needs dp_shard x cp as one axis of the mesh that tp is an axis of; cut that axis for
    # those who see two.
    mesh = init_device_mesh("cpu", (replicas, shards * cp, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    cut = mesh._unflatten("fsdp", (shards, cp), ("dp_shard", "cp"))
    model = Model(config).to(dtype)
    maps = _maps(config)
    state = {
        name: part
        for row in parameters(config)
        for name, part in zip(maps[row.name].names, maps[row.name].split(weights[row.name]), strict=True)
    }
    model.load_state_dict(state)  # strict: every parameter of the modules is in the table
    parallelize(config, model, mesh)
    by_name = dict(model.named_parameters())
    groups = [
        {
            "params": [by_name[n] for r in parameters(config) if r.decay == decay for n in maps[r.name].names],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    return Oracle(config, cut, model, optimizer)


@contextlib.contextmanager
def _shared_attention(cp: DeviceMesh, tokens: list[Tensor]) -> Iterator[None]:
    """Inside, ``tokens`` (dim 1, or 0 for a matrix) are this cp rank's, and self-attention sees all of them."""
    if cp.size() == 1:
        yield
        return
    balanced, _cp_options.enable_load_balance = _cp_options.enable_load_balance, False
    try:
        dims = [0 if tensor.dim() == 2 else 1 for tensor in tokens]
        with context_parallel(cp, buffers=tokens, buffer_seq_dims=dims):
            yield
    finally:
        _cp_options.enable_load_balance = balanced


def _patches(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, S, P] by sliding windows."""
    for dim, size in enumerate(patch, start=2):
        latent = latent.unfold(dim, size, size)
    return latent.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3).contiguous()


def _interpolated(x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target) of flow matching: Movie Gen 3.1.2."""
    amount = t[:, None, None, None, None]
    return torch.lerp(x0, x1, amount) + 1e-5 * amount * x0, x1 - x0 + 1e-5 * x0


def _diffused(x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target) of v-prediction with zero terminal SNR: Lin et al. 2023, algorithm 1, step for step."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alphas_bar_sqrt = torch.cumprod(1 - betas, 0).sqrt()
    first, last = alphas_bar_sqrt[0].clone(), alphas_bar_sqrt[-1].clone()
    alphas_bar_sqrt = (alphas_bar_sqrt - last) * first / (first - last)
    alpha = alphas_bar_sqrt[(999 - 1000 * t).round().long()][:, None, None, None, None]
    sigma = (1 - alpha.square()).sqrt()
    return alpha * x1 + sigma * x0, alpha * x0 - sigma * x1


def oracle_loss(
    oracle: Oracle,
    batch: Mapping[str, Tensor],
    seed: int,
    step: int,
    caption_dropout: float = flow.CAPTION_DROPOUT,
) -> float:
    """Forward and backward of the global batch; the global mean loss. Shapes as in ``model.reference``."""
    mesh, c = oracle.mesh, oracle.config
    ranks = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    rank = mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size() + mesh["dp_shard"].get_local_rank()
    mine = torch.arange(batch[LATENTS].shape[0]).chunk(ranks)[rank]

    latent, ids, places, mask = (batch[name][mine] for name in (LATENTS, IDS, PLACES, MASK))
    counter = torch.tensor(step)
    t = PATHS[c.objective].draw_time(seed, counter, ids, places).to(latent.dtype)
    x0 = flow.draw_noise(seed, counter, ids, places, tuple(latent.shape[1:])).to(latent.dtype)
    keep = flow.draw_keep_caption(seed, counter, ids, places, caption_dropout)
    x_t, target = (_diffused if c.objective == "v-prediction" else _interpolated)(latent, x0, t)
    patches, target = _patches(x_t, c.patch), _patches(target, c.patch)
    grid = (s // p for s, p in zip(latent.shape[2:], c.patch, strict=True))
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    frequencies = 10000.0 ** (-torch.arange(128, dtype=t.dtype) / 128)
    angles = torch.outer(1000 * t, frequencies)

    def on_tp(tensor: Tensor, dim: int | None = None) -> Tensor:
        whole = DTensor.from_local(tensor, mesh["tp"], [Replicate()], run_check=False)
        return whole if dim is None else whole.redistribute(placements=[Shard(dim)])

    captions = {
        e.name: on_tp(torch.where(keep[:, None, None], batch[text_input(e.name)][:, mine].transpose(0, 1), 0.0))
        for e in c.encoders
    }
    seen = mask | ~keep[:, None]
    with sdpa_kernel(SDPBackend.MATH), _shared_attention(mesh["cp"], [patches, target, coordinates]):
        prediction = oracle.model(
            on_tp(patches, 1),
            on_tp(coordinates, 0),
            on_tp(torch.cat([angles.cos(), angles.sin()], 1)),
            captions,
            seen,
        )
        # A sum, then a plain division: the backward of a DTensor's mean over a sharded dim is tp
        # times too large.
        squares = (prediction - on_tp(target, 1)).square().sum()
        loss = squares.full_tensor() / target.numel()
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def oracle_update(oracle: Oracle, max_norm: float) -> float:
    """Clip the gradients by their global norm, step AdamW, drop the gradients; the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(oracle.model.parameters(), max_norm)
    oracle.optimizer.step()
    oracle.optimizer.zero_grad()
    return norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()


def full_weights(oracle: Oracle) -> dict[str, Tensor]:
    """Every parameter of the table, whole, on every rank."""
    return _whole(oracle, {name: p.detach() for name, p in oracle.model.named_parameters()})


def full_gradients(oracle: Oracle) -> dict[str, Tensor]:
    """The gradient of every parameter of the table, whole, on every rank; of the global mean loss."""
    gradients = {name: p.grad for name, p in oracle.model.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient: {missing}"
    return _whole(oracle, {name: g for name, g in gradients.items() if g is not None})


def _whole(oracle: Oracle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    maps = _maps(oracle.config)

    def full(name: str) -> Tensor:
        tensor = tensors[name]
        assert isinstance(tensor, DTensor), name
        return tensor.full_tensor()

    return {
        # A copy: on a mesh of one rank, full_tensor is the tensor itself, which clipping and AdamW
        # change in place.
        row.name: maps[row.name].join(*(full(n) for n in maps[row.name].names)).clone()
        for row in parameters(oracle.config)
    }
