"""The tape: what one record's kernel asked of torch, as calls that can be made again on the same tensors.

A kernel is watched once through torch's dispatcher. What is left of it is flat: views are resolved to tensors, values
that depend on nothing of the step (indices, frequencies) are computed once, and every temporary has a fixed place in
one workspace, written through the op's ``out`` variant. The same calls in the same order give bitwise the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes.arena import pack

aten = torch.ops.aten
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ZEROS = ("zeros", "zeros_like", "new_zeros")
_COPIES = ("clone", "_to_copy")
_SYNONYMS = {"__rshift__": "bitwise_right_shift", "__lshift__": "bitwise_left_shift"}  # of integers; those with `out`
_GEOMETRY = ("layout", "device", "pin_memory", "memory_format", "dtype", "non_blocking")  # what `out` says by itself


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Every tensor of a call's arguments or results: they nest in tuples, lists and keywords only."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from tensors_in(item)
    elif isinstance(x, dict):
        yield from tensors_in(tuple(x.values()))


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    """``x`` with every leaf changed, nested as in :func:`tensors_in`."""
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(item, change) for item in x])
    if isinstance(x, dict):
        return {key: _mapped(value, change) for key, value in x.items()}
    return change(x)


def hazard(op: OpOverload, args: Sequence[Any]) -> str | None:
    """Why a call has no place in a captured step; None: it has."""
    tags, name = op.tags, op._schema.name.removeprefix("aten::")
    if torch.Tag.data_dependent_output in tags or name == "is_nonzero":
        return "reads a value back to the host"
    if torch.Tag.dynamic_output_shape in tags:
        by_mask = any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1:]))
        if not name.startswith("index") or by_mask:
            return "gives a shape that depends on data"
    if torch.Tag.nondeterministic_seeded in tags and "attention" not in name:
        return "draws from a generator's state"
    if torch.Tag.cudagraph_unsafe in tags:
        return "says of itself that it may not be captured"
    if name == "lift_fresh":
        return "makes a tensor from host values"
    return None


class TapedCall:
    """One call that the dispatcher saw, with the tensors that it was given, wrote of those, and returned."""

    __slots__ = ("args", "given", "kwargs", "made", "op", "result", "results", "touched", "written")

    def __init__(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.op, self.args, self.kwargs, self.result = op, args, kwargs, result
        self.results = list(tensors_in(result))
        self.given = {storage_key(t) for t in tensors_in((args, kwargs))}
        self.written = {storage_key(t) for t in written_tensors(op, args, kwargs)}
        self.made = {storage_key(t) for t in self.results}
        self.touched = self.given | self.made

    def tensors(self) -> Iterator[Tensor]:
        yield from tensors_in((self.args, self.kwargs))
        yield from self.results

    @property
    def is_view(self) -> bool:
        """It moved nothing: its result lies in the storage of an argument that it did not write."""
        return bool(self.made) and not self.written and self.made <= self.given


class CallRecorder(TorchDispatchMode):
    """Lists every call that is dispatched; ``hazards`` are sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[TapedCall] = []
        self.hazards: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (reason := hazard(func, args)) is not None:
            self.hazards.append(f"{func} {reason}")
        result = func(*args, **kwargs)
        self.calls.append(TapedCall(func, args, kwargs, result))
        return result


@dataclass(frozen=True, slots=True)
class Temporary:
    """A tensor in the workspace: where its storage starts, and which part of it the tensor is."""

    storage_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def resolve(self, workspace: Tensor) -> Tensor:
        """``workspace``: bytes."""
        typed = workspace[self.storage_bytes :]
        typed = typed[: typed.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return typed.as_strided(self.shape, self.strides, typed.storage_offset() + self.offset)


@dataclass(slots=True)
class Prepared:
    """A call to be made each step; arguments may be ``Temporary``. ``into``: where to copy what it returns."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    into: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Segment:
    """One record's calls. ``constant_bytes``: values that were computed once and stay."""

    calls: list[Prepared]
    workspace_bytes: int
    constant_bytes: int


def compile_calls(calls: list[TapedCall], known: set[int]) -> Segment:
    """``known``: storages (``storage_key``) that belong to the executor."""
    calls = [call for call in calls if not call.is_view]
    created: set[int] = set()
    for call in calls:
        created |= call.made - call.written - known
    for call in calls:
        known = known | (call.written - created)  # what a kernel keeps for itself from step to step
    varying = _varying(calls, known, created)
    kept = [call for call in calls if call.touched & varying and _name(call.op) not in _EMPTY]
    lives: dict[int, list[int]] = {}
    for i, call in enumerate(kept):
        for key in sorted(call.touched & varying & created):
            lives.setdefault(key, [i, i])[1] = i
    sizes = {storage_key(t): t.untyped_storage().nbytes() for call in kept for t in call.tensors()}
    offsets, total = pack([(first, last, sizes[key]) for key, (first, last) in lives.items()])
    place = dict(zip(lives, offsets, strict=True))

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or (start := place.get(storage_key(x))) is None:
            return x
        return Temporary(start, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))

    constants = {key for call in kept for key in call.given if key not in known and key not in place}
    return Segment(list(_prepare(kept, placed)), total, sum(sizes[key] for key in constants))


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name(op: OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


def _varying(calls: list[TapedCall], known: set[int], created: set[int]) -> set[int]:
    """Storages whose content may change from step to step, or in the course of the record."""
    varying = set(known)
    before = -1
    while before != len(varying):
        before = len(varying)
        read: set[int] = set()  # by calls that are made each step
        for call in calls:
            written = call.written | call.made
            if call.touched & varying:
                read |= call.touched
                varying |= written
            elif written & read:
                varying |= written  # it is made again after it was used: not one value
    return varying & (known | created)


def written_tensors(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that a call writes."""
    positions, names = _written_arguments(op)
    values = [args[i] for i in positions if i < len(args)] + [kwargs.get(name) for name in names]
    return list(tensors_in(values))


@lru_cache(maxsize=512)
def _written_arguments(op: OpOverload) -> tuple[tuple[int, ...], tuple[str, ...]]:
    positions: list[int] = []
    names: list[str] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            names.append(argument.name)
            if not argument.kwarg_only:
                positions.append(i)
    return tuple(positions), tuple(names)


@lru_cache(maxsize=512)
def _out_variant(op: OpOverload) -> tuple[OpOverload, tuple[str, ...], frozenset[str]] | None:
    """The overload that writes given results, the names of those, and the keywords that it takes."""
    packet = getattr(torch.ops.aten, _SYNONYMS.get(_name(op), _name(op)), None)
    if packet is None:
        return None
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in packet.overloads():
        other = getattr(packet, name)
        outs = [a.name for a in other._schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if a.name not in outs]
        if len(outs) != len(op._schema.returns) or not outs:
            continue
        if rest == [a for a in wanted if a in rest or a[0] not in _GEOMETRY]:
            return other, tuple(outs), frozenset(a.name for a in other._schema.arguments)
    return None


def _prepare(calls: list[TapedCall], placed: Callable[[Any], Any]) -> Iterator[Prepared]:
    skipped: set[int] = set()
    for i, call in enumerate(calls):
        if i in skipped:
            continue
        args, kwargs = _mapped(call.args, placed), _mapped(call.kwargs, placed)
        if call.written:
            yield Prepared(call.op, args, kwargs)
            continue
        targets = [placed(result) for result in call.results]
        variant = _out_variant(call.op)
        if _name(call.op) in _ZEROS:
            yield Prepared(aten.zero_.default, (targets[0],), {})
        elif _name(call.op) in _COPIES:
            yield Prepared(aten.copy_.default, (targets[0], args[0]), {})
        elif variant is not None:
            op, outs, accepted = variant
            given = {name: value for name, value in kwargs.items() if name in accepted}
            yield Prepared(op, args, given | dict(zip(outs, targets, strict=True)))
        else:
            # No ``out`` variant: what it returns is copied, straight to where the next calls would have copied it.
            for j in range(i + 1, len(calls)):
                source = calls[j].args[1] if _name(calls[j].op) == "copy_" else None
                position = next((k for k, result in enumerate(call.results) if result is source), None)
                if position is None or _used_elsewhere(call.results[position], calls, i, j):
                    break
                targets[position] = placed(calls[j].args[0])
                skipped.add(j)
            yield Prepared(call.op, args, kwargs, targets)


def _used_elsewhere(result: Tensor, calls: list[TapedCall], made: int, copied: int) -> bool:
    key = storage_key(result)
    return any(key in calls[j].given for j in range(made + 1, len(calls)) if j != copied)


def ready(call: Prepared, workspace: Tensor) -> Callable[[], Any]:
    """The call, bound to tensors."""

    def resolve(x: Any) -> Any:
        return x.resolve(workspace) if isinstance(x, Temporary) else x

    args, kwargs = _mapped(call.args, resolve), _mapped(call.kwargs, resolve)
    if call.into:
        return partial(_copied, call.op._op, args, kwargs, [resolve(x) for x in call.into])
    return _through_binding(call.op, args, kwargs) or partial(call.op._op, *args, **kwargs)


class _Destination(TorchDispatchMode):
    """Runs nothing: only notes which overload a call would reach, and with what."""

    reached: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert self.reached is None, "more than one call"
        self.reached = (func, args, kwargs or {})
        outs = [value for name, value in (kwargs or {}).items() if name in _written_arguments(func)[1]]
        return outs[0] if outs else args[0]


def _through_binding(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The same call through torch's Python binding, which costs half of the dispatcher's own; None: there is none.

    Believed only when it reaches the same overload with the same arguments.
    """
    name = _name(op)
    if name.endswith("_"):
        function = getattr(Tensor, name, None)
    else:
        function = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
    if function is None:
        return None
    destination = _Destination()
    try:
        with destination:
            function(*args, **kwargs)
    except (TypeError, RuntimeError, AssertionError):  # the binding takes other arguments, or does more than one thing
        return None
    if destination.reached is None or destination.reached[0] is not op:
        return None
    seen = (_bound(op, *destination.reached[1:]), _bound(op, args, kwargs))
    return partial(function, *args, **kwargs) if same(*seen) else None


def _bound(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those left out at their defaults."""
    names = [argument.name for argument in op._schema.arguments]
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _copied(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], into: list[Any]) -> None:
    made = function(*args, **kwargs)
    for target, value in zip(into, made if isinstance(made, (tuple, list)) else (made,), strict=True):
        target.copy_(value)


def same(a: Any, b: Any) -> bool:
    """Whether two prepared calls, or their arguments, would do the same thing."""
    if isinstance(a, Prepared) and isinstance(b, Prepared):
        return a.op is b.op and all(same(x, y) for x, y in ((a.args, b.args), (a.kwargs, b.kwargs), (a.into, b.into)))
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            return False
        return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)
