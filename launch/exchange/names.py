"""Parameters of a model <-> weights of an export: names, and matrices as ``nn.Linear`` has them, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.config import MODULATION_ROWS, ModelConfig, block_unit, parameters


@dataclass(frozen=True)
class Exported:
    """One parameter of ``shape``: ``names`` of the weights that it becomes, and both ways between them."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def exported(config: ModelConfig) -> dict[str, Exported]:
    """By name, every parameter of a model, in the order of its table."""
    shapes = {row.name: row.shape for row in parameters(config)}
    found = {name: make(shapes[name]) for name, make in _kinds(config)}
    return {name: found[name] for name in shapes}


_Kind = Callable[[tuple[int, ...]], Exported]


def _same(name: str) -> _Kind:
    return lambda shape: Exported(shape, (name,), lambda w: [w], lambda parts: parts[0])


def _matrix(name: str, *, inputs: int = 1) -> _Kind:
    """``inputs``: how many of its first dims are those that a product sums over."""

    def split(w: Tensor) -> Sequence[Tensor]:
        return [w.flatten(0, inputs - 1).flatten(1).T]

    return lambda shape: Exported(shape, (f"{name}.weight",), split, lambda parts: parts[0].T.reshape(shape))


def _keys_and_values(module: str) -> _Kind:
    """[D, 2, H, K]."""

    def split(w: Tensor) -> Sequence[Tensor]:
        return [w[:, i].flatten(1).T for i in range(2)]

    def join(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([part.T for part in parts], 1).reshape(shape)

    names = (f"{module}.to_k.weight", f"{module}.to_v.weight")
    return lambda shape: Exported(shape, names, split, lambda parts: join(parts, shape))


def _modulation(name: str) -> _Kind:
    """[D, 6, D]: output, row, input."""

    def split(w: Tensor) -> Sequence[Tensor]:
        return [w.transpose(0, 1).flatten(0, 1)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return parts[0].unflatten(0, (MODULATION_ROWS, -1)).transpose(0, 1)

    return lambda shape: Exported(shape, (f"{name}.weight",), split, join)


def _kinds(c: ModelConfig) -> Iterator[tuple[str, _Kind]]:
    yield "patchify.weight", _matrix("patch_embed")
    for condition in c.latent_conditions:
        yield f"patchify.{condition.name}", _matrix(f"condition_embed.{condition.name}")
    for dim, axis in enumerate("thw"):
        yield f"position.{axis}", _same(f"pos_embed.{dim}.weight")
    yield "time.first", _matrix("time_embed.0")
    yield "time.second", _matrix("time_embed.1")
    yield "adaln.weight", _modulation("time_modulation")
    for encoder in c.encoders:
        yield f"text.{encoder.name}.weight", _matrix(f"text_embed.{encoder.name}.linear")
        yield f"text.{encoder.name}.gain", _same(f"text_embed.{encoder.name}.norm.weight")
        yield f"text.{encoder.name}.bias", _same(f"text_embed.{encoder.name}.norm.bias")
    for layer in range(c.layers):
        row, module = block_unit(layer), f"blocks.{layer}"
        yield f"{row}.norm1", _same(f"{module}.norm1.weight")
        yield f"{row}.norm2", _same(f"{module}.norm2.weight")
        yield f"{row}.table", _same(f"{module}.scale_shift_table")
        for prefix, attention in (("", "attn1"), ("cross.", "attn2")):
            yield f"{row}.{prefix}q", _matrix(f"{module}.{attention}.to_q")
            yield f"{row}.{prefix}kv", _keys_and_values(f"{module}.{attention}")
            yield f"{row}.{prefix}o", _matrix(f"{module}.{attention}.to_out", inputs=2)
        for name in ("gate", "up", "down"):
            yield f"{row}.{name}", _matrix(f"{module}.ffn.{name}")
    yield "final.norm", _same("norm_out.weight")
    yield "final.table", _same("scale_shift_table")
    yield "final.weight", _matrix("proj_out")
