"""A frozen text model on one device, all of it or in shards: forward only, each caption by itself.

What a caption becomes depends on nothing but the caption and the weights: no padding, no batch, no rank. So what is
encoded in the training loop is, bit by bit, what was encoded before it, whatever the plan.

In shards, the model's own forward runs once for all captions up to its first layer, where ``EveryLayer`` stands in
place of all: it takes every caption through a layer before the next one's weights come in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CinemeshError
from ...parallel.ir.frozen_layers import UNIT_ALIGN_BYTES, FrozenLayers, sharing_ranks
from ...parallel.runtime.comm import Communicator
from ...parallel.runtime.frozen_layers import GatheredLayers
from .stretch import stretched
from .weights import (
    WeightFiles,
    check_weight_shapes,
    keys_of,
    named_parameters,
    parameters_on_meta,
    read_span,
    set_parameter,
)

POSITIONS = "position_embedding"  # what a table of positions is called in CLIP (and begins with in BERT)


class Shapes:
    """A model of a config, its parameters as shapes alone: its units, in the order in which forward uses them.

    Unit 0 are the embedding tables, then comes each layer; the rest, norms and poolers, is small.
    """

    def __init__(self, config: Any) -> None:
        with parameters_on_meta():
            self.root, self.model = _built(config)
        self.model.eval()
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        self.layers = max(lists, key=lambda of: sum(p.numel() for p in of.parameters()), default=nn.ModuleList())
        self.names = named_parameters(self.root)
        in_layers = {id(p) for p in self.layers.parameters()}
        tables = {
            id(p): p
            for module in self.model.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters()
            if id(p) not in in_layers
        }
        gathered = [list(tables.values()), *(list(layer.parameters()) for layer in self.layers)]
        self.units: list[list[nn.Parameter]] = gathered if len(self.layers) else []
        inside = {id(p) for unit in self.units for p in unit}
        self.rest = [p for p in self.model.parameters() if id(p) not in inside]

    def sizes(self, dtype: torch.dtype) -> FrozenLayers:
        """Elements of each unit, every parameter aligned."""
        units = tuple(sum(_aligned(p, dtype) for p in unit) for unit in self.units)
        return FrozenLayers(units, sum(p.numel() for p in self.rest), dtype.itemsize)


class Tower:
    """``config``'s model with the weights of ``files`` on a device.

    With ``comm``, its units are in shards over the ranks that share them; ``encode`` is then collective. ``stretch``:
    a position table may be longer than the files'. Raises CinemeshError for weights that are not the model's.
    """

    def __init__(
        self, config: Any, files: WeightFiles, dtype: torch.dtype, device: str, comm: Communicator | None, stretch: bool
    ) -> None:
        shapes = Shapes(config)
        self.model, self.layers, self.device = shapes.model, shapes.layers, device
        self._root = shapes.root
        names = [shapes.names[id(p)] for unit in (*shapes.units, shapes.rest) for p in unit]
        self._keys = dict(zip((several[0] for several in names), keys_of(names, files), strict=True))
        self._files, self._names = files, shapes.names
        own = {self._keys[shapes.names[id(p)][0]]: tuple(p.shape) for u in (*shapes.units, shapes.rest) for p in u}
        self._longer = {k for k, s in own.items() if stretch and POSITIONS in k and files.shapes[k][0] < s[0]}
        check_weight_shapes({key: shape for key, shape in own.items() if key not in self._longer}, files)
        shared = comm is not None and sharing_ranks(comm.mesh.plan) > 1 and bool(shapes.units)
        alone = [shapes.rest] if shared else [*shapes.units, shapes.rest]
        for parameter in (p for unit in alone for p in unit):
            value = torch.empty(parameter.shape, dtype=dtype)
            self._read(parameter, 0, value.view(-1))
            set_parameter(self._root, shapes.names[id(parameter)], value.to(device))
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self.gathered = None
        if shared:
            assert comm is not None
            self.gathered = GatheredLayers(shapes.sizes(dtype), comm, dtype, device)
            for unit, parameters in enumerate(shapes.units):
                self._lay(unit, parameters, self.gathered, dtype)
            _only(self.layers, EveryLayer(list(self.layers)))

    def _lay(self, unit: int, parameters: Sequence[nn.Parameter], into: GatheredLayers, dtype: torch.dtype) -> None:
        """Fill this rank's shard of a unit; its parameters are views of where it is gathered to."""
        offset, parts = 0, []
        for parameter in parameters:
            view = into.values[unit][offset : offset + parameter.numel()].view(parameter.shape)
            set_parameter(self._root, self._names[id(parameter)], view)
            parts.append((offset, parameter.numel(), partial(self._read, parameter)))
            offset += _aligned(parameter, dtype)
        into.fill(unit, lambda first, target: read_span(parts, first, target))

    def _read(self, parameter: nn.Parameter, first: int, target: Tensor) -> None:
        key = self._keys[self._names[id(parameter)][0]]
        if key in self._longer:
            table = stretched(self._files.rows(key, 0, self._files.shapes[key][0]), len(parameter))
            target.copy_(table.reshape(-1)[first : first + len(target)])
        else:
            self._files.elements(key, first, target)

    @torch.no_grad()
    def encode(self, captions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Last hidden states [n, width] of captions of n token ids each. Collective, where weights are in shards."""
        if self.gathered is None:
            return [self._states(torch.tensor([ids], device=self.device))[0] for ids in captions]
        every = self.layers[0]
        assert isinstance(every, EveryLayer)
        longest = max(map(len, captions))
        ids = torch.tensor([[*of, *[0] * (longest - len(of))] for of in captions], device=self.device)
        every.begin(self.gathered.turn(), [len(of) for of in captions])
        states = self._states(ids)
        every.end()
        return [row[: len(of)] for row, of in zip(states, captions, strict=True)]

    def _states(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).last_hidden_state


class EveryLayer(nn.Module):
    """In place of a model's layers: each caption, its own tokens alone, through each layer as its weights come in."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._layers = list(layers)  # no child modules: the model's list holds this alone
        self._takes = inspect.signature(layers[0].forward)
        self._turn: Iterator[int] = iter(())
        self._lengths: list[int] = []

    def begin(self, turn: Iterator[int], lengths: Sequence[int]) -> None:
        """The next forward is of captions of these lengths. Waits for the embedding tables."""
        self._turn, self._lengths = turn, list(lengths)
        next(self._turn)

    def end(self) -> None:
        """All units were there, each in its turn."""
        assert next(self._turn, None) is None, "a unit was gathered that no layer took"

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the last layer would give of [B, S, width], zero where a caption has no token."""
        values = self._takes.bind(*given, **named).arguments
        values |= values.pop("kwargs", {})
        whole: Tensor = values.pop("hidden_states")
        states = [whole[row : row + 1, :length].contiguous() for row, length in enumerate(self._lengths)]
        takes = [_cut(values, row, length) for row, length in enumerate(self._lengths)]
        more: tuple[Any, ...] | None = None
        for layer in self._layers:
            next(self._turn)
            for row, state in enumerate(states):
                out = layer(state, **takes[row])
                if isinstance(out, tuple):  # of T5: its first layer makes the bias of positions for all
                    out, bias, *others = out
                    takes[row]["position_bias"], more = bias, (None, *others)
                states[row] = out
        made = torch.zeros_like(whole)
        for row, state in enumerate(states):
            made[row, : state.shape[1]] = state[0]
        return made if more is None else (made, *more)


def _cut(values: dict[str, Any], row: int, length: int) -> dict[str, Any]:
    """What a layer takes beside its states, of one caption: of a mask [1 or B, heads, S, S], its own rows."""
    own: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.dim() != 4:
                raise CinemeshError(
                    f"its layers take {name} of {list(value.shape)}: such a model is not run a layer at a time",
                    remedy="take sharded from the encoder: every rank then holds it whole",
                )
            at = row if value.shape[0] > 1 else 0
            own[name] = value[at : at + 1, :, :length, :length].contiguous()
        else:
            own[name] = value
    return own


def _built(config: Any) -> tuple[nn.Module, nn.Module]:
    """What names the parameters, and its encoder: all of it but where no model is known of the encoder alone."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # loads the encoder alone
    model = (AutoModelForTextEncoding if known else AutoModel).from_config(config)
    return model, model.get_encoder() if config.is_encoder_decoder and not known else model


def _only(layers: nn.ModuleList, one: nn.Module) -> None:
    del layers[:]
    layers.append(one)


def _aligned(parameter: nn.Parameter, dtype: torch.dtype) -> int:
    step = UNIT_ALIGN_BYTES // dtype.itemsize
    return -(-parameter.numel() // step) * step
