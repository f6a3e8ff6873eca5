"""What must still hold after a pass: the builder's rules on records that have been moved, cloned, fused (torch-free).

    types       every record's outputs are placed as its inputs and its op say, every rename keeps its placement; only
                copies between spaces, and marks, touch the host's
    order       every collective is waited for once, after its issue, before it is read
    same        nothing reads what nobody has written; and against the program that was built: every record is still
                there, and reads what it read then. Not the same names: the same values, told by the records that wrote
                them last (reaching definitions)
    marks       where a program is marked, a mark stands before every record that needs one, and writes its position
    arena       storages that live together share no byte of the arena, from the first record that touches one to the
                last, the wait of a collective included

A pass may reorder records, run one again (``clone_of``), take several as one (``Fused``, or one record with the outputs
of several), turn collectives over one rank into aliases, copy storages between spaces and add marks. Nothing else is
the same program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...kernels.ops import OPS
from .layout import Axes, Placement, PlacementError, infer
from .marks import mark_faults
from .program import Program
from .records import MARK, Buffer, BufferKind, Collective, Op, Space, Transfer, Wait


@dataclass(frozen=True)
class Finding:
    """One thing that may not be; ``op`` is the record's name and kind."""

    check: str
    op: str
    what: str

    def __str__(self) -> str:
        return f"{self.op}: {self.what}"


def finding(check: str, op: Op, what: str) -> Finding:
    return Finding(check, f"{op.name} ({op.kind})", what)


def check(program: Program, built: Program | None = None) -> list[Finding]:
    """All that is wrong with a program, as it stands and against the program that was ``built``."""
    found = [*_types(program), *_waits(program)]
    values = _Values(program, built)
    found += values.unwritten
    found += [finding("marks", op, what) for op, what in mark_faults(program)]
    if built is not None:
        found += _same(values, _Values(built, None))
    return found


class BrokenProgram(Exception):
    """A pass has changed what a program means: a bug."""


def refuse_broken(name: str, program: Program, built: Program) -> None:
    """Raise BrokenProgram when the program behind the pass ``name`` is no more the one that was built."""
    if found := check(program, built):
        raise BrokenProgram(f"behind {name}: {found[0]} ({len(found)} findings)")


def records(program: Program) -> Iterator[Op]:
    """The program's records, fused ones taken apart."""
    for op in program.ops:
        yield from op.parts


# -- types ------------------------------------------------------------------------------------------------------------


def _types(program: Program) -> Iterator[Finding]:
    for op in records(program):
        try:
            wanted = _placements(program, op)
        except PlacementError as error:
            yield finding("types", op, str(error))
            continue
        for name, placement in zip(op.outputs, wanted, strict=False):
            if _live(program, placed := program.buffers[name].placement) != _live(program, placement):
                yield finding("types", op, f"{name} is placed {placed}; the record makes {placement}")
        far = (name for name in (*op.inputs, *op.outputs) if program.buffers[name].space is not Space.DEVICE)
        if op.to is None and op.kind != MARK and (name := next(far, None)) is not None:
            yield finding("types", op, f"{name} lies in host memory")


def _live(program: Program, placement: Placement) -> Placement:
    """Without the axes of one rank, over which collectives have become aliases."""
    dims = tuple(tuple(axis for axis in axes if program.sizes[axis] > 1) for axes in placement.dims)
    return Placement(dims, frozenset(axis for axis in placement.partial if program.sizes[axis] > 1))


def _placements(program: Program, op: Op) -> Sequence[Placement]:
    """How a record's outputs must be placed."""
    inputs = [program.buffers[name].placement for name in op.inputs]
    if isinstance(op.comm, Collective):
        gathered = {"all_gather": Placement.gathered, "reduce_scatter": Placement.scattered}.get(op.kind)
        return [gathered(inputs[0], op.axes, op.comm.dim) if gathered else inputs[0].reduced(op.axes)]
    if isinstance(op.comm, (Transfer, Wait)):
        return inputs[:1]
    spec, signature = OPS[op.kind], program.label_signature(op)
    read = {label for labels in signature.inputs for label in labels}
    made: dict[str, Axes] = {}  # labels that only outputs have: each rank makes its own slice
    for labels, name in zip(signature.outputs, op.outputs, strict=False):
        placed = program.buffers[name].placement.dims
        made.update((label, axes) for label, axes in zip(labels, placed, strict=True) if label not in read and axes)
    operands = tuple(inputs[: len(signature.inputs)])
    wanted = infer(op.kind, signature, operands, spec.linear, spec.whole, tuple(made.items()))
    for extra in inputs[len(signature.inputs) :]:  # what output 0 is added to
        if extra != wanted[0]:
            raise PlacementError(f"adds a result placed {wanted[0]} to one placed {extra}")
    return wanted


# -- waits ------------------------------------------------------------------------------------------------------------


def _waits(program: Program) -> Iterator[Finding]:
    flying: dict[str, Op] = {}
    storages: dict[str, Op] = {}  # being written
    for op in records(program):
        if op.is_wait:
            issue = flying.pop(op.waits_for, None)
            if issue is None:
                yield finding("order", op, f"{op.waits_for} is not in flight here")
            else:
                storages.pop(issue.outputs[0], None)
            continue
        for name in op.inputs:
            if name in storages:
                yield finding("order", op, f"reads {name}, which {storages[name].name} still writes")
        if op.is_issue:
            flying[op.name] = storages[op.outputs[0]] = op
    yield from (finding("order", op, "nobody waits for it") for op in flying.values())


# -- values -----------------------------------------------------------------------------------------------------------

Value = str  # what somebody wrote: the output of the record that was built; the storage itself, before the step


@dataclass(frozen=True)
class _Part:
    """Elements of a storage: ``run`` of every ``period`` from ``first`` on, up to ``last``; period 0: all of them."""

    first: int
    last: int
    run: int
    period: int

    def meets(self, other: _Part) -> bool:
        if self.last <= other.first or other.last <= self.first:
            return False
        if not self.period or self.period != other.period:
            return True
        apart = (other.first - self.first) % self.period
        return apart < self.run or self.period - apart < other.run

    def covers(self, other: _Part) -> bool:
        return self == other or (not self.period and self.first <= other.first and other.last <= self.last)


def _part(program: Program, name: str) -> tuple[str, _Part]:
    """The storage of a buffer, and which elements of it."""
    root, first, last = program.span(name)
    strides = program.buffers[name].strides
    if strides is None:
        return root, _Part(first, last, last - first, 0)
    run = 1
    for size, stride in zip(reversed(program.local_shape(name)), reversed(strides), strict=True):
        if stride != run:
            return root, _Part(first, last, run, stride)
        run *= size
    return root, _Part(first, last, run, 0)


@dataclass(frozen=True)
class _Made:
    """What a record makes, and of which values: one set an operand."""

    op: Op
    values: tuple[Value, ...]
    operands: tuple[frozenset[Value], ...]


class _Values:
    """Which values every record reads: for each of its operands, those that were written last where it looks.

    A value is named after the output of the record that was built, whoever makes it now. Collectives over one rank are
    passed through: they move nothing, with or without a record.
    """

    def __init__(self, program: Program, built: Program | None) -> None:
        self.program = program
        issues = (op for op in records(built or program) if op.is_issue)
        self._alone = {op.name for op in issues if program.plan.size(op.axes) == 1}
        self._passing: set[str] = set()  # issues of this program that are passed through
        self.made: list[_Made] = []
        self.unwritten: list[Finding] = []
        self._written: dict[str, list[tuple[_Part, frozenset[Value]]]] = {}
        for name, buffer in program.buffers.items():
            if buffer.base is None and buffer.kind is not BufferKind.TEMPORARY:
                root, part = _part(program, name)
                self._written[root] = [(part, frozenset({name}))]
        for op in records(program):
            self._step(op)
        self.outputs = {key: self._at(name) for key, name in program.outputs.items()}

    def _at(self, name: str) -> frozenset[Value]:
        root, here = _part(self.program, name)
        return frozenset().union(*(values for part, values in self._written.get(root, ()) if part.meets(here)))

    def _covered(self, name: str) -> bool:
        root, here = _part(self.program, name)
        reached = here.first
        for part, _ in sorted(self._written.get(root, ()), key=lambda written: written[0].first):
            if part.first <= reached:
                reached = max(reached, part.last)
        return reached >= here.last

    def _write(self, name: str, values: frozenset[Value]) -> None:
        root, here = _part(self.program, name)
        kept = [held for held in self._written.get(root, ()) if not here.covers(held[0])]
        self._written[root] = [*kept, (here, values)]

    def _step(self, op: Op) -> None:
        if op.is_wait and (op.waits_for in self._passing or op.to is not None):
            return
        operands = tuple(self._at(name) for name in op.inputs)
        if not op.is_wait:  # it reads for the collective, which has looked
            self._look_for_unwritten(op)
        if op.to is not None:  # a whole storage, whatever was written into its parts
            source, target = (self.program.root(name)[0] for name in (op.inputs[0], op.outputs[0]))
            self._written[target] = list(self._written.get(source, ()))
            return
        if (op.clone_of or op.name) in self._alone:
            self._passing.add(op.name)
            self._write(op.outputs[0], operands[0])
            return
        values = self._values(op)
        self.made.append(_Made(op, values, operands))
        for name, value in zip(op.outputs, values, strict=False):
            self._write(name, frozenset({value}))

    def _values(self, op: Op) -> tuple[Value, ...]:
        if op.is_issue:  # until somebody has waited its storage holds nothing else
            return (f"what {op.clone_of or op.name} sends",)
        buffers = self.program.buffers
        return tuple(buffers[name].clone_of or name for name in op.outputs)

    def _look_for_unwritten(self, op: Op) -> None:
        fresh = not op.comm and OPS[op.kind].fresh
        for name in op.inputs:
            if not fresh and not self._covered(name):
                self.unwritten.append(finding("same", op, f"reads {name}, of which not all is written"))


def _same(now: _Values, then: _Values) -> Iterator[Finding]:
    """Every value that was made is made, of the same values, by whatever record; so are the outputs."""
    built = {value: made for made in then.made for value in made.values}
    found = {value for made in now.made for value in made.values}
    for made in then.made:
        if not found.issuperset(made.values):
            yield finding("same", made.op, "no record makes what it made")
    for made in now.made:
        parts = {id(part): part for value in made.values if (part := built.get(value))}
        wanted = [part.operands for part in parts.values()]
        if len(wanted) == 1:
            got = made.operands[: len(wanted[0])]
            right = got == wanted[0]
        else:  # one record for several: it reads what they read, less what they make for each other
            got = made.operands
            right = _union(got) == _union([sets for part in wanted for sets in part]) - set(made.values)
        if wanted and not right:
            told = " and ".join(map(_tell, wanted))
            yield finding("same", made.op, f"is made of {_tell(got)}; it was built of {told}")
    for key, wanted in then.outputs.items():
        if (got := now.outputs.get(key, frozenset())) != wanted:
            yield Finding("same", f"output {key}", f"is {_tell([got])}; it was {_tell([wanted])}")


def _union(sets: Iterable[frozenset[Value]]) -> frozenset[Value]:
    return frozenset().union(*sets)


def _tell(operands: Iterable[frozenset[Value]]) -> str:
    return "; ".join(", ".join(sorted(values)) or "nothing" for values in operands)


# -- the arena --------------------------------------------------------------------------------------------------------


def disjoint(program: Program, offsets: dict[str, int], total_bytes: int, space: Space = Space.DEVICE) -> list[Finding]:
    """Temporary storages of a space that live together and share a byte of its arena, or lie outside of it.

    Counted from the records alone, not from the lifetimes by which the arena was packed.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        for part in op.parts:
            for name in (*part.inputs, *part.outputs, *op.inputs, *op.outputs):
                root, _ = program.root(name)
                first.setdefault(root, i)
                last[root] = i
    starting: dict[int, list[str]] = {}
    for root, i in first.items():
        if _is_temporary(program.buffers[root]) and program.buffers[root].space is space:
            starting.setdefault(i, []).append(root)
    found: list[Finding] = []
    alive: list[str] = []
    for i in sorted(starting):
        alive = [root for root in alive if last[root] >= i]
        for root in starting[i]:
            start = offsets.get(root, -1)
            if start < 0 or start + program.bytes(root) > total_bytes:
                found.append(finding("arena", program.ops[i], f"{root} lies outside of the arena"))
                continue
            found += [
                finding("arena", program.ops[i], f"{root} overlaps {other}, which lives until record {last[other]}")
                for other in alive
                if start < offsets[other] + program.bytes(other) and offsets[other] < start + program.bytes(root)
            ]
            alive.append(root)
    return found


def _is_temporary(buffer: Buffer) -> bool:
    return buffer.kind is BufferKind.TEMPORARY and math.prod(buffer.shape) > 0
