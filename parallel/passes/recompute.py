"""Rematerialize: given the activations that are kept, clone exactly the forward ops that backward needs (torch-free).

A buffer that backward reads and that is not kept is made again just before its first reader, by clones of the forward
ops that made it, recursively, down to what is kept. FSDP gathers are never kept past forward, except the last unit's:
the gather in backward is the forward gather, cloned.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ...errors import CinemeshError
from ..ir.program import Program
from ..ir.records import Buffer, Op, Phase, Place, Wait, altered

# Names inside a block. ``full`` keeps nothing but the block's input. ``selective`` redoes norms, the SwiGLU product and
# all gathers: y1, y2 and y3 (what the branches add to the stream) stand for the stream itself, which is their sum.
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "selective": (
        "q",
        "kv",
        "o",
        "lse",
        "y1",
        "cross_q",
        "cross_kv",
        "cross_o",
        "cross_lse",
        "y2",
        "gate",
        "up",
        "y3",
    ),
}
_CLONE = "~"  # ends the name of a clone

Places = frozenset[Place]


def rematerialize(program: Program) -> Program:
    """Apply ``plan.recompute`` and, to the last blocks, ``plan.recompute_last``.

    Raises CinemeshError when the plan keeps an activation that no block has, or names more blocks than there are.
    """
    plan, blocks = program.plan, program.blocks
    if plan.last_blocks > blocks:
        raise CinemeshError(
            f"plan: last_blocks is {plan.last_blocks}", remedy=f"the model has {blocks} blocks, give at most that"
        )
    keep = [_kept_roles(program, "recompute")] * (blocks - plan.last_blocks)
    if plan.last_blocks:
        keep += [_kept_roles(program, "recompute_last")] * plan.last_blocks
    return _Rematerializer(program, keep).run()


def _kept_roles(program: Program, field: str) -> frozenset[str] | None:
    """Roles that are kept; None: everything."""
    recompute: str | tuple[str, ...] = getattr(program.plan, field)
    if recompute == "none":
        return None
    roles = KEPT[recompute] if isinstance(recompute, str) else recompute
    known = activations(program)
    if known and not isinstance(recompute, str) and (unknown := set(roles) - known):
        raise CinemeshError(
            f"plan: {field} keeps {sorted(unknown)}, which no block has",
            remedy=f"activations are {', '.join(sorted(known))}",
        )
    return frozenset(roles)


def activations(program: Program) -> set[str]:
    """Roles of everything that forward makes: what a plan may keep."""
    forward = (op for op in program.ops if op.place.phase is Phase.FORWARD)
    return {program.buffers[name].role for op in forward for name in op.outputs}


class _Rematerializer:
    """``keep[block]``: the roles that a block keeps; None: all."""

    def __init__(self, program: Program, keep: list[frozenset[str] | None]) -> None:
        self.program = program
        self.keep = keep
        self.writer = {name: op for op in program.ops for name in op.outputs}
        places = (op.place for op in program.ops if op.is_issue)
        self.gathered_once = {p.unit for p in places if p.phase is Phase.WEIGHTS and p.micro_batch is None}
        self.slices = self._find_slices()
        self.extra: dict[str, Buffer] = {}
        self.ops: list[Op] = []

    def _find_slices(self) -> dict[str, list[Op]]:
        """Storage of a block that no op writes as a whole -> the ops that write slices of it, in order."""
        slices: dict[str, list[Op]] = {}
        for op in self.program.ops:
            if op.place.phase is Phase.FORWARD and op.place.block is not None:
                for name in op.outputs:
                    root = self.program.root(name)[0]
                    if root not in self.writer:
                        slices.setdefault(root, []).append(op)
        return slices

    def run(self) -> Program:
        place, made = None, {}
        again = cache(self._again)
        for op in self.program.ops:
            if op.place.phase is Phase.BACKWARD and (allowed := again(op.place)):
                if op.place != place:
                    place, made = op.place, {}
                inputs = tuple(self._resolve(name, allowed, made) for name in op.inputs)
                op = op if inputs == op.inputs else altered(op, inputs=inputs)
            self.ops.append(op)
        return self.program.with_ops(self.ops, self.extra)

    def _again(self, backward: Place) -> Places:
        """What backward may run again: the gather of its unit and, in a block, the block's forward.

        The unit gathered last in forward is the first that backward needs: its weights stay. What all blocks share is
        gathered once a step.
        """
        again = set[Place]()
        if backward.unit not in self.gathered_once and backward.block != self.program.blocks - 1:
            again.add(replace(backward, phase=Phase.WEIGHTS))
        if backward.block is not None:
            again.add(replace(backward, phase=Phase.FORWARD))
        return frozenset(again)

    def _kept(self, name: str, place: Place) -> bool:
        if place.phase is not Phase.FORWARD or place.block is None:
            return False
        roles = self.keep[place.block]
        return roles is None or self.program.buffers[name].role in roles

    def _resolve(self, name: str, allowed: Places, made: dict[str, str]) -> str:
        """The name under which backward finds ``name``: itself when kept, else its clone, emitted now if need be."""
        if name in made:
            return made[name]
        root = self.program.root(name)[0]
        if root in self.slices:
            self._resolve_slices(root, allowed, made)
        writer = self.writer.get(name)
        buffer = self.program.buffers[name]
        if name in made:
            return made[name]
        if root not in self.slices and writer is not None:
            if writer.place in allowed and not self._kept(name, writer.place):
                self._clone(writer, allowed, made)
                return made[name]
        elif buffer.base is not None:
            base = self._resolve(buffer.base, allowed, made)
            if base != buffer.base:
                return self._copy(buffer, base, made)
        return name

    def _resolve_slices(self, root: str, allowed: Places, made: dict[str, str]) -> None:
        """Make all slices of a storage again, unless they are kept."""
        writers = self.slices[root]
        place = writers[0].place
        if root in made or place not in allowed or self._kept(root, place):
            return
        self._copy(self.program.buffers[root], None, made)
        for op in writers:
            if op.outputs[0] not in made:
                self._clone(op, allowed, made)

    def _clone(self, op: Op, allowed: Places, made: dict[str, str]) -> None:
        inputs = tuple(self._resolve(name, allowed, made) for name in op.inputs)
        for name in op.outputs:
            buffer = self.program.buffers[name]
            base = buffer.base
            if base is not None and base not in made and self.program.root(base)[0] in self.slices:
                self._copy_place(base, made)
            self._copy(buffer, base and self._resolve(base, allowed, made), made)
        comm = replace(op.comm, issue=op.comm.issue + _CLONE) if isinstance(op.comm, Wait) else op.comm
        outputs = tuple(made[name] for name in op.outputs)
        facts = {"inputs": inputs, "outputs": outputs, "comm": comm, "clone_of": op.name}
        self.ops.append(altered(op, name=op.name + _CLONE, **facts))

    def _copy_place(self, name: str, made: dict[str, str]) -> None:
        """A place for a clone to write a slice to that is kept: it makes something else that is not."""
        buffer = self.program.buffers[name]
        if buffer.base is not None and buffer.base not in made:
            self._copy_place(buffer.base, made)
        self._copy(buffer, made.get(buffer.base) if buffer.base else None, made)

    def _copy(self, buffer: Buffer, base: str | None, made: dict[str, str]) -> str:
        name = buffer.name + _CLONE
        self.extra[name] = altered(buffer, name=name, base=base, clone_of=buffer.name)
        made[buffer.name] = name
        return name
