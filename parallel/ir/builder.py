"""The builder: appends records to a program and refuses those that would compute something wrong (torch-free).

What the builder refuses, with the op's name and the placements at hand (``PlacementError``):

    - an op whose inputs break the placement rule of ``layout.infer``; an output that is not placed as it was declared
    - a collective that does not fit: a gather of axes that are not innermost, a reduction done twice or of nothing
    - a read of a buffer that an in-place op has overwritten, or whose collective nobody waited for
    - a sum in place of a term that was read before it
    - a gradient read before every use of its forward buffer contributed to it, or to which one use contributed twice
    - an output that nobody reads

[Note: contributions] Every read of a buffer that depends on parameters is a *use*, (forward op, operand). Each backward
record names the uses that it differentiates; the gradient that it writes carries them, sums carry the union, and the
backward record of the op that produced the buffer accepts only a gradient that carries all of its uses. What depends on
nothing that is trained has no uses, and no gradient: what a backward record makes of it nobody needs to read.

[Note: sums in place] A term that is added to in place becomes the sum, under whose name it is read from then on. The
gradient of either is that of the other, so the addition is no use of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ...kernels.ops import OPS, signature_of
from .fields import AXES
from .layout import Axes, Placement, PlacementError, infer, local_shape
from .plan import Plan
from .program import Program, contiguous_strides
from .records import WAIT, Buffer, BufferKind, Collective, Holds, Input, Op, Place, Slice, SliceOf, Wait

Use = tuple[str, int]
_NO_USES: frozenset[Use] = frozenset()
ISSUED = ".issued"  # ends the name of what a collective writes, until somebody has waited for it


class Builder:
    """Appends checked records. ``forward()`` and ``backward()`` phases decide what a read means."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sizes = {axis: plan.size(axis) for axis in AXES}
        self.buffers: dict[str, Buffer] = {}
        self.ops: list[Op] = []
        self.place = Place()
        self._scope = ""  # what names begin with
        self.training = False  # count uses and demand gradients
        self._in_backward = False
        self._unread: set[str] = set()
        self._consumed: set[str] = set()
        self._renamed: set[str] = set()  # aliases at which uses and contributions end
        self._writer: dict[str, Op] = {}
        self._children: dict[str, list[str]] = {}
        self._span: dict[str, tuple[int, int]] = {}  # of a view: its elements in its base, from the first to the last
        self._needs_grad: set[str] = set()
        self._uses: dict[str, set[Use]] = {}
        self._gradient_of: dict[str, frozenset[Use]] = {}
        self._settled: set[Use] = set()
        self._by_name: dict[str, Op] = {}
        self._wait_of: dict[str, Op] = {}  # of an issue
        self._inputs: list[Input] = []
        self._states: dict[str, str] = {}
        self.token_parts: dict[str, list[Buffer]] = {}  # of buffers that are written or read in slices of tokens

    # -- scopes -------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, title: str, place: Place) -> Iterator[None]:
        """Records and buffers made inside stand at ``place``, and are called after its title and micro-batch."""
        outer = self._scope, self.place
        number = place.micro_batch
        self._scope = "/".join(filter(None, ("" if number is None else f"mb{number}", title)))
        self.place = replace(place, title=title)
        yield
        self._scope, self.place = outer

    @contextmanager
    def backward(self) -> Iterator[None]:
        self._in_backward = True
        yield
        self._in_backward = False

    def _name(self, name: str) -> str:
        full = f"{self._scope}/{name}" if self._scope else name
        assert full not in self.buffers, f"two buffers named {full}"
        return full

    def _elements(self, shape: tuple[int, ...], placement: Placement) -> int:
        """What one rank holds."""
        return math.prod(local_shape(shape, placement, self.sizes))

    def _add(self, buffer: Buffer, *, renamed: bool = False) -> Buffer:
        self.buffers[buffer.name] = buffer
        if renamed:
            self._renamed.add(buffer.name)
        elif buffer.base is not None:
            self._children.setdefault(buffer.base, []).append(buffer.name)
        return buffer

    # -- buffers ------------------------------------------------------------------------------------------------

    def buffer(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        placement: Placement,
        *,
        holds: Holds = Holds.VALUES,
        unit: str | None = None,
    ) -> Buffer:
        """Storage that ops write through views or ``into``."""
        return self._storage(name, shape, dtype, placement, BufferKind.TEMPORARY, holds, unit)

    def input(
        self, name: str, shape: Sequence[int], dtype: str, placement: Placement, micro_batch: int | None = None
    ) -> Buffer:
        """Storage that is filled before a step, from what data call ``name``; listed in ``Program.inputs``."""
        buffer = self._storage(name, shape, dtype, placement, BufferKind.INPUT)
        self._inputs.append(Input(name, micro_batch, buffer.name))
        return buffer

    def state(
        self, name: str, shape: Sequence[int], dtype: str, placement: Placement, holds: Holds = Holds.VALUES
    ) -> Buffer:
        """Storage that persists from step to step; listed in ``Program.states``."""
        buffer = self._storage(name, shape, dtype, placement, BufferKind.STATE, holds)
        self._states[name] = buffer.name
        return buffer

    def _storage(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        placement: Placement,
        kind: BufferKind,
        holds: Holds = Holds.VALUES,
        unit: str | None = None,
    ) -> Buffer:
        local_shape(tuple(shape), placement, self.sizes)
        return self._add(self._buffer(name, tuple(shape), dtype, placement, kind=kind, holds=holds, unit=unit))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str, placement: Placement, **facts: Any) -> Buffer:
        """A buffer of this place; its role is its name here, unless it is given."""
        return Buffer(self._name(name), shape, dtype, placement, **{"role": name, "place": self.place, **facts})

    def view(
        self,
        base: Buffer,
        name: str,
        shape: Sequence[int],
        placement: Placement,
        offset: int = 0,
        role: str | None = None,
    ) -> Buffer:
        """A contiguous part of ``base``, from local element ``offset`` on, under another shape."""
        facts = {"role": role or name, "base": base.name, "offset": offset}
        view = self._buffer(name, tuple(shape), base.dtype, placement, **facts)
        if not placement.shares(base.placement):
            raise PlacementError(f"view {view.name} placed {placement} of {base.name} placed {base.placement}")
        size, room = self._elements(view.shape, placement), self._elements(base.shape, base.placement)
        if offset < 0 or offset + size > room:
            raise PlacementError(
                f"view {view.name}: elements {offset} to {offset + size} of {base.name}, which has {room}"
            )
        if base.strides is not None:
            raise PlacementError(f"view {view.name} of {base.name}, which is not contiguous")
        return self._add_view(view, base, size)

    def part(self, base: Buffer, name: str, dim: int, part: Slice, count: int, *, issued: bool = False) -> Buffer:
        """One of ``count`` parts of what each rank holds along ``dim``: rows are contiguous, else it is strided.

        Its global shape is that of a buffer whose ``dim`` is ``count`` times smaller. ``issued``: a place into which a
        collective writes.
        """
        shape = tuple(size // count if i == dim else size for i, size in enumerate(base.shape))
        local = local_shape(base.shape, base.placement, self.sizes)
        if local[dim] % count:
            raise PlacementError(
                f"part {name}: {count} parts of dim {dim} of {base.name}, of which a rank holds {local}"
            )
        strides = base.strides or contiguous_strides(local)
        first = part.index * (local[dim] // count) * strides[dim]
        kept = None if dim == 0 and base.strides is None else strides
        full = f"{name}{part}{ISSUED if issued else ''}"
        view = self._buffer(
            full, shape, base.dtype, base.placement, role=name, base=base.name, offset=first, strides=kept
        )
        own = local_shape(shape, base.placement, self.sizes)
        return self._add_view(view, base, 1 + sum((n - 1) * step for n, step in zip(own, strides, strict=True)))

    def slices(self, x: Buffer) -> list[Buffer]:
        """The rows of ``x`` in ``tp_slices`` parts, made once."""
        if x.name not in self.token_parts:
            name = x.role if x.place == self.place else f"{x.role}.in"  # of another layer
            count = self.plan.tp_slices
            self.token_parts[x.name] = [self.part(x, name, 0, Slice(SliceOf.TOKENS, i), count) for i in range(count)]
        return self.token_parts[x.name]

    def _add_view(self, view: Buffer, base: Buffer, extent: int) -> Buffer:
        self._span[view.name] = (view.offset, view.offset + extent)
        if base.name in self._needs_grad:
            self._needs_grad.add(view.name)
        return self._add(view)

    def parameter(self, view: Buffer) -> Buffer:
        """Mark a view of a gathered unit as a trained parameter: reads of it demand a gradient."""
        if self.training:
            self._needs_grad.add(view.name)
        return view

    def needs_gradient(self, buffer: Buffer) -> bool:
        """Whether it depends on anything that is trained."""
        return buffer.name in self._needs_grad

    def discard(self, buffer: Buffer) -> None:
        """Nobody needs to read it."""
        self._unread.discard(buffer.name)

    # -- reading ------------------------------------------------------------------------------------------------

    def _read(self, op: str, buffer: Buffer, operand: int) -> None:
        name = buffer.name
        if name in self._consumed:
            raise PlacementError(f"{op} reads {name}, which was overwritten in place, renamed, or never waited for")
        self._unread.difference_update(self._related(name))
        if self.training and not self._in_backward and name in self._needs_grad:
            self._uses.setdefault(name, set()).add((op, operand))

    def _read_sum(self, op: str, term: Buffer, addends: Sequence[Buffer]) -> None:
        """What ``addends`` make is added to ``term`` in place ([Note: sums in place])."""
        before = self._all_uses(term.name)
        self._read(op, term, -1)
        self._uses.get(term.name, set()).discard((op, -1))
        if before and any(map(self.needs_gradient, addends)):
            raise PlacementError(
                f"{op}: adds in place to {term.name}, which {', '.join(sorted(o for o, _ in before))} read before; "
                "make the sum a buffer of its own, op('residual', [a, b], ...)"
            )

    def _related(self, name: str) -> list[str]:
        """The buffer, what it is a view of, and every view that shares elements, up to where a rename ends it."""
        found: list[str] = []
        stack = [name]
        ancestor = name
        while ancestor not in self._renamed and (base := self.buffers[ancestor].base) is not None:
            if (span := self._span.get(ancestor)) is not None:
                begin, end = span
                for other in self._children[base]:
                    first, last = self._span.get(other, span)
                    if first < end and begin < last and other != ancestor:
                        stack.append(other)
            ancestor = base
            found.append(ancestor)
        children = self._children.get
        while stack:
            current = stack.pop()
            found.append(current)
            stack.extend(children(current, ()))
        return found

    def _all_uses(self, name: str) -> set[Use]:
        return set().union(*[self._uses[n] for n in self._related(name) if n in self._uses]) - self._settled

    def _contributions(self, name: str) -> frozenset[Use]:
        return _NO_USES.union(*[self._gradient_of[n] for n in self._related(name) if n in self._gradient_of])

    def _demand_complete(self, op: str, gradient: Buffer, *forward: str) -> None:
        """See [Note: contributions]. ``forward``: one buffer, or the slices that the gradient covers."""
        uses, got = set[Use]().union(*map(self._all_uses, forward)), self._contributions(gradient.name)
        if got != uses:
            missing = sorted(f"{o}:{i}" for o, i in uses - got)
            extra = sorted(f"{o}:{i}" for o, i in got - uses)
            raise PlacementError(
                f"{op}: {gradient.name} is not the whole gradient of {' and '.join(forward)}; "
                f"missing uses {missing or 'none'}, foreign uses {extra or 'none'}"
            )

    # -- records ------------------------------------------------------------------------------------------------

    def _record(  # noqa: PLR0913  the fields of a record
        self,
        kind: str,
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer],
        role: str,
        name: str,
        *,
        attrs: dict[str, Any] | None = None,
        comm: Collective | Wait | None = None,
        of: str | None = None,
        part: Slice | None = None,
    ) -> Op:
        op = Op(
            name,
            kind,
            tuple([b.name for b in inputs]),
            tuple([b.name for b in outputs]),
            attrs or {},
            comm,
            self.place,
            of,
            role=role,
            slice=part,
        )
        self.ops.append(op)
        self._by_name[name] = op
        self._writer.update((output, op) for output in op.outputs)
        return op

    def op(  # noqa: PLR0913  what one record may state; all but three have defaults
        self,
        kind: str,
        inputs: Sequence[Buffer],
        names: Sequence[str] | str,
        *,
        shapes: dict[int, Sequence[int]] | None = None,
        dtypes: Sequence[str] | str | None = None,
        into: dict[int, Buffer] | None = None,
        add_to: Buffer | None = None,
        place: dict[str, Axes] | None = None,
        of: Op | Sequence[Op] | None = None,
        gradient: Buffer | None = None,
        wrt: dict[int, int] | None = None,
        part: Slice | None = None,
        role: str | None = None,
        **attrs: Any,
    ) -> tuple[Buffer, ...]:
        """Append one compute record and return its outputs.

        ``into`` writes outputs to views made before; ``add_to`` adds output 0 into that buffer, in place. ``shapes``
        gives outputs whose labels no input has. A backward record has ``of``, ``gradient``, ``wrt`` {output: operand};
        ``of`` are several forward records where those made slices of what ``gradient`` covers whole. ``part``: which
        part of a whole the record makes. ``role``: of output 0, where it is not its name.
        """
        spec = OPS[kind]
        if isinstance(names, str):
            names = (names,)
        signature = signature_of(kind, attrs)
        roles = [role or names[0], *names[1:]]
        names = [f"{name}{part or ''}" for name in names]
        op_name = self._unique(names[0])
        placed = tuple((place or {}).items())
        try:
            placements = infer(kind, signature, tuple([b.placement for b in inputs]), spec.linear, spec.whole, placed)
        except PlacementError as error:
            raise PlacementError(f"{op_name}: {error}") from None
        extents: dict[str, int] = {}
        for labels, buffer in zip(signature.inputs, inputs, strict=True):
            for label, size in zip(labels, buffer.shape, strict=True):
                if extents.setdefault(label, size) != size:
                    raise PlacementError(
                        f"{op_name}: dim {label!r} is {extents[label]} in one input, {size} in {buffer.name}"
                    )
        for index, shape in (shapes or {}).items():
            extents.update(zip(signature.outputs[index], shape, strict=True))
        for index, buffer in enumerate(inputs):
            self._read(op_name, buffer, index)

        outputs: list[Buffer] = []
        reads = list(inputs)
        in_place = dict(spec.in_place)
        if add_to is not None:
            assert spec.adds, f"{kind} adds to nothing"
            self._read_sum(op_name, add_to, inputs)
            reads.append(add_to)
            in_place[0] = len(inputs)
        for index, labels in enumerate(signature.outputs):
            shape = tuple([extents[label] for label in labels])
            dtype = inputs[0].dtype if dtypes is None else dtypes if isinstance(dtypes, str) else dtypes[index]
            target = (into or {}).get(index)
            if index in in_place:
                old = reads[in_place[index]]
                _demand_fits(op_name, "added to", old, shape, placements[index])
                self._consumed.add(old.name)
                facts = {"role": roles[index], "base": old.name, "strides": old.strides}
                target = self._add(self._buffer(names[index], shape, old.dtype, old.placement, **facts))
            elif target is not None:
                _demand_fits(op_name, "written to", target, shape, placements[index])
            else:
                local_shape(shape, placements[index], self.sizes)
                target = self._add(self._buffer(names[index], shape, dtype, placements[index], role=roles[index]))
            if index not in spec.statistics:
                self._unread.add(target.name)
            outputs.append(target)
        forward = [of] if isinstance(of, Op) else list(of or ())
        backward_of = forward[0].name if forward else None
        record = self._record(kind, reads, outputs, roles[0], op_name, attrs=attrs, of=backward_of, part=part)
        self._track(record, inputs, outputs, forward, gradient, wrt or {}, add_to)
        return tuple(outputs)

    def _unique(self, name: str) -> str:
        full = f"{self._scope}/{name}" if self._scope else name
        assert full not in self._by_name, f"two ops named {full}"
        return full

    def _track(
        self,
        record: Op,
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer],
        of: list[Op],
        gradient: Buffer | None,
        wrt: dict[int, int],
        add_to: Buffer | None,
    ) -> None:
        """Needs-gradient in forward, contributions in backward ([Note: contributions])."""
        if not self.training:
            return
        if not self._in_backward:
            if any(b.name in self._needs_grad for b in inputs):
                for index, output in enumerate(outputs):
                    if index not in OPS[record.kind].statistics:
                        self._mark_needs_grad(output)
            return
        if not of:
            own = _NO_USES.union(*(self._contributions(b.name) for b in inputs))
            for index, output in enumerate(outputs):
                self._contribute(record.name, output, own, add_to if index == 0 else None)
            return
        if gradient is not None:
            self._demand_complete(record.name, gradient, *map(self.final_output, of))
        for index, operand in wrt.items():
            if self._differentiated(of, operand):
                self._contribute_to(record.name, outputs[index], of, operand, add_to if index == 0 else None)
            else:
                self._unread.discard(outputs[index].name)

    def _contribute(self, op: str, output: Buffer, uses: frozenset[Use], add_to: Buffer | None) -> None:
        """``output`` carries ``uses``, and those of what it was added to."""
        carried = _NO_USES if add_to is None else self._contributions(add_to.name)
        if uses & carried:
            raise PlacementError(f"{op}: {sorted(uses & carried)} would be counted twice")
        self._gradient_of[output.name] = uses | carried

    def _contribute_to(self, op: str, output: Buffer, of: Sequence[Op], operand: int, add_to: Buffer | None) -> None:
        """``output`` is the gradient of an operand of ``of``; where each of them read other rows, slice by slice."""
        if len({forward.inputs[operand] for forward in of}) < len(of) or len(of) == 1:
            self._contribute(op, output, frozenset((forward.name, operand) for forward in of), add_to)
            return
        targets = [None] * len(of) if add_to is None else self.slices(add_to)
        for forward, part, target in zip(of, self.slices(output), targets, strict=True):
            self._contribute(op, part, frozenset({(forward.name, operand)}), target)

    def _differentiated(self, of: Sequence[Op], operand: int) -> bool:
        """Whether an operand of forward records depends on anything that is trained."""
        return any(forward.inputs[operand] in self._needs_grad for forward in of)

    def _mark_needs_grad(self, buffer: Buffer) -> None:
        name: str | None = buffer.name
        while name is not None:
            self._needs_grad.add(name)
            name = self.buffers[name].base

    def producer(self, buffer: Buffer) -> Op:
        """The op that wrote ``buffer``; the issue record, for a collective."""
        op = self._writer[buffer.name]
        return self._by_name[op.waits_for] if op.is_wait else op

    def producers(self, buffer: Buffer) -> list[Op]:
        """The op that wrote ``buffer``, or those that wrote its slices of tokens."""
        whole = buffer.name in self._writer
        return [self.producer(part) for part in ([buffer] if whole else self.token_parts[buffer.name])]

    def pass_through(self, gradient: Buffer, of: Sequence[Op], names: dict[str, int]) -> tuple[Buffer, ...]:
        """The gradient of an addend is the gradient of the sum: the same storage under one name for each operand.

        ``names`` maps the new names to operands of ``of``, one op or those of all slices. ``gradient`` may not be read
        under its old name afterwards.
        """
        first = self._name(next(iter(names)))
        self._read(first, gradient, 0)
        if self.training:
            self._demand_complete(first, gradient, *map(self.final_output, of))
        aliases: list[Buffer] = []
        for name, operand in names.items():
            facts = {"kind": BufferKind.TEMPORARY, "base": gradient.name, "offset": 0}
            alias = replace(gradient, name=self._name(name), role=name, place=self.place, **facts)
            self._add(alias, renamed=True)
            if self._differentiated(of, operand):
                self._contribute_to(first, alias, of, operand, None)
                self._unread.add(alias.name)
            aliases.append(alias)
        self._consumed.add(gradient.name)
        return tuple(aliases)

    def join(self, base: Buffer, parts: Sequence[Buffer], name: str, placement: Placement) -> Buffer:
        """``base`` whole again, once all its parts were replaced in place: the same storage, placed as they are."""
        spans: list[tuple[int, int]] = []
        for part in parts:
            if not part.placement.shares(placement):
                raise PlacementError(f"join {name} placed {placement} of {part.name} placed {part.placement}")
            self._read(name, part, 0)
            self._consumed.add(part.name)
            offset, inner = 0, part
            while inner.name != base.name:
                if inner.base is None:
                    raise PlacementError(f"join {name}: {part.name} is no part of {base.name}")
                offset, inner = offset + inner.offset, self.buffers[inner.base]
            spans.append((offset, offset + self._elements(part.shape, part.placement)))
        spans.sort()
        size = self._elements(base.shape, base.placement)
        ends = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != size:
            raise PlacementError(
                f"join {name}: {len(parts)} parts do not cover the {size} elements of {base.name} once"
            )
        facts = {"role": name, "place": self.place, "base": base.name}
        joined = self._add(replace(base, name=self._name(name), placement=placement, **facts), renamed=True)
        self._gradient_of[joined.name] = _NO_USES.union(*(self._contributions(part.name) for part in parts))
        self._consumed.add(base.name)
        self._unread.add(joined.name)
        return joined

    def cast(self, x: Buffer, dtype: str, name: str, holds: Holds = Holds.VALUES) -> Buffer:
        """``x`` in another dtype; ``x`` itself when it already has it. ``holds``: what the result is for."""
        if x.dtype == dtype:
            return x
        labels = "abcdef"[: len(x.shape)]
        (made,) = self.op("cast", [x], name, dtypes=dtype, signature=f"{labels}->{labels}")
        made.holds = holds
        return made

    # -- collectives --------------------------------------------------------------------------------------------

    def all_gather(self, x: Buffer, axes: Axes, name: str, dim: int = 0, **kwargs: Any) -> Buffer:
        return self.collective("all_gather", x, axes, dim, name, **kwargs)

    def reduce_scatter(self, x: Buffer, axes: Axes, name: str, dim: int = 0, **kwargs: Any) -> Buffer:
        return self.collective("reduce_scatter", x, axes, dim, name, **kwargs)

    def all_reduce(self, x: Buffer, axes: Axes, name: str, **kwargs: Any) -> Buffer:
        return self.collective("all_reduce", x, axes, 0, name, **kwargs)

    def collective(  # noqa: PLR0913  as for op
        self,
        kind: str,
        x: Buffer,
        axes: Axes,
        dim: int,
        name: str,
        *,
        into: Buffer | None = None,
        of: Op | None = None,
        part: Slice | None = None,
        holds: Holds = Holds.VALUES,
        unit: str | None = None,
    ) -> Buffer:
        """Issue and wait. ``of`` makes it the backward of that forward collective; ``into`` writes to a view.

        ``part``: as in :meth:`op`. ``holds``, ``unit``: what the result is for.
        """
        full = f"{name}{part or ''}"
        op_name = self._unique(full)
        try:
            if kind == "all_gather":
                placement = x.placement.gathered(axes, dim)
            elif kind == "reduce_scatter":
                placement = x.placement.scattered(axes, dim)
            else:
                placement = x.placement.reduced(axes)
        except PlacementError as error:
            raise PlacementError(f"{op_name}: {error}") from None
        local_shape(x.shape, placement, self.sizes)
        if x.strides is not None:
            raise PlacementError(f"{op_name}: {kind} of {x.name}, which is not contiguous")
        if kind != "all_reduce" and math.prod(local_shape(x.shape, x.placement, self.sizes)[:dim]) > 1:
            raise PlacementError(f"{op_name}: {kind} of dim {dim} of {x.shape}: only the outermost dim is concatenated")
        self._read(op_name, x, 0)
        if into is not None:
            _demand_fits(op_name, "written to", into, x.shape, placement)
            if into.strides is not None:
                raise PlacementError(f"{op_name}: {kind} into {into.name}, which is not contiguous")
            issued = into
        else:
            base = x.name if kind == "all_reduce" else None  # an all-reduce works in place
            facts = {"role": name, "base": base, "holds": holds, "unit": unit}
            issued = self._buffer(f"{full}{ISSUED}", x.shape, x.dtype, placement, **facts)
            self._add(issued, renamed=True)
        if kind == "all_reduce":
            self._consumed.add(x.name)
        backward_of = of.name if of else None
        sent = Collective(axes, dim)
        issue = self._record(kind, (x,), (issued,), name, op_name, comm=sent, of=backward_of, part=part)
        self._consumed.add(issued.name)
        result = self._add(self._buffer(full, x.shape, x.dtype, placement, role=name, base=issued.name))
        self._wait_of[op_name] = self._record(
            WAIT,
            (issued, x),
            (result,),
            name,
            f"{op_name}.wait",
            comm=Wait(op_name, axes, dim),
            of=backward_of,
            part=part,
        )
        self._unread.add(result.name)
        if self.training and not self._in_backward and x.name in self._needs_grad:
            self._mark_needs_grad(result)
        elif self.training and self._in_backward and of is not None:
            self._demand_complete(issue.name, x, self.final_output(of))
            self._gradient_of[result.name] = frozenset({(of.name, 0)})
        elif self.training and self._in_backward:
            self._gradient_of[result.name] = self._contributions(x.name)
        return result

    def final_output(self, of: Op) -> str:
        """The buffer that readers of a forward op see: the waited one, for a collective."""
        if of.kind in OPS:
            return of.outputs[0]
        return self._wait_of[of.name].outputs[0]

    # -- parameters and the end ---------------------------------------------------------------------------------

    def demand_parameter_gradient(self, parameter: Buffer, gradient: Buffer) -> None:
        """Refuse a parameter's gradient that some use has not reached; called when its unit is reduced."""
        self._demand_complete(f"gradient of {parameter.name}", gradient, parameter.name)
        self._settled.update(self._contributions(gradient.name))

    def finish(self, outputs: dict[str, tuple[Buffer, Placement]], *, blocks: int = 0) -> Program:
        """Check the outputs' stated placements and that everything else was read. ``blocks``: of the model."""
        for name, (buffer, placement) in outputs.items():
            if buffer.placement != placement:
                raise PlacementError(
                    f"output {name}: {buffer.name} is placed {buffer.placement}; it was stated {placement}"
                )
            ancestor: str | None = buffer.name
            while ancestor is not None:
                self._unread.discard(ancestor)
                ancestor = self.buffers[ancestor].base
            self._unread.difference_update(self._related(buffer.name))  # its parts, where it was written in parts
        if self._unread:
            raise PlacementError(f"nobody reads {sorted(self._unread)[:5]} ({len(self._unread)} outputs)")
        made = {name: buffer.name for name, (buffer, _) in outputs.items()}
        return Program(self.plan, self.buffers, self.ops, made, tuple(self._inputs), self._states, blocks)


def _demand_fits(op: str, how: str, target: Buffer, shape: tuple[int, ...], placement: Placement) -> None:
    if target.placement != placement or target.shape != shape:
        raise PlacementError(
            f"{op}: result placed {placement} of shape {shape} {how} "
            f"{target.name} placed {target.placement} of shape {target.shape}"
        )
