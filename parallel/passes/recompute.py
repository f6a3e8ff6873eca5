"""Rematerialize: given the activations that are kept, clone exactly the forward ops that backward needs (torch-free).

A buffer that backward reads and that is not kept is made again just before its first reader, by clones of the forward
ops that made it, recursively, down to what is kept. FSDP gathers are never kept past forward, except the last unit's:
the gather in backward is the forward gather, cloned.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ...errors import CinemeshError
from ..ir.program import Buffer, Op, Program

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
_CLONE = "~"


def rematerialize(program: Program) -> Program:
    """Apply ``plan.recompute`` and, to the last blocks, ``plan.recompute_last``.

    Raises CinemeshError when the plan keeps an activation that no block has, or names more blocks than there are.
    """
    plan, layers = program.plan, program.facts["config"].layers
    if plan.last_blocks > layers:
        raise CinemeshError(
            f"plan: last_blocks is {plan.last_blocks}", remedy=f"the model has {layers} blocks, give at most that"
        )
    keep = [_kept_roles(program, "recompute")] * (layers - plan.last_blocks)
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
    return {role_of(name) for op in program.ops if op.region.endswith(".forward") for name in op.outputs}


def role_of(name: str) -> str:
    """``mb0/blocks.3.forward/kv_gathered.h1`` -> ``kv_gathered``; head slices of K and V count as ``kv``."""
    last = name.rpartition("/")[2].removesuffix(".issued")
    return re.sub(r"\.[htc]\d+$", "", last).replace("kv_slice", "kv")


class _Rematerializer:
    """``keep[layer]``: the roles that a block keeps; None: all."""

    def __init__(self, program: Program, keep: list[frozenset[str] | None]) -> None:
        self.program = program
        self.writer = {name: op for op in program.ops for name in op.outputs}
        self.recompute: dict[str, tuple[str, ...]] = program.facts["recompute"]
        self.keep: dict[str, frozenset[str] | None] = {}
        for regions in self.recompute.values():
            for region in regions:
                if match := re.search(r"blocks\.(\d+)\.forward$", region):
                    self.keep[region] = keep[int(match[1])]
        # The unit gathered last in forward is the first that backward needs: its weights stay.
        last_unit = f"blocks.{len(keep) - 1}.weights"
        self.kept_regions = {r for regions in self.recompute.values() for r in regions if r.endswith(last_unit)}
        self.slices = self._find_slices()
        self.extra: dict[str, Buffer] = {}
        self.ops: list[Op] = []

    def _find_slices(self) -> dict[str, list[Op]]:
        """Storage that no op writes as a whole -> the ops that write slices of it, in order."""
        slices: dict[str, list[Op]] = {}
        for op in self.program.ops:
            if op.region in self.keep:
                for name in op.outputs:
                    root = self.program.root(name)[0]
                    if root not in self.writer:
                        slices.setdefault(root, []).append(op)
        return slices

    def run(self) -> Program:
        region, made = "", {}
        for op in self.program.ops:
            if op.region in self.recompute:
                if op.region != region:
                    region, made = op.region, {}
                allowed = set(self.recompute[region]) - self.kept_regions
                inputs = tuple(self._resolve(name, allowed, made) for name in op.inputs)
                op = op if inputs == op.inputs else replace(op, inputs=inputs)
            self.ops.append(op)
        return self.program.with_ops(self.ops, self.extra)

    def _kept(self, name: str, region: str) -> bool:
        if region not in self.keep:
            return False
        roles = self.keep[region]
        return roles is None or role_of(name) in roles

    def _resolve(self, name: str, allowed: set[str], made: dict[str, str]) -> str:
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
            if writer.region in allowed and not self._kept(name, writer.region):
                self._clone(writer, allowed, made)
                return made[name]
        elif buffer.base is not None:
            base = self._resolve(buffer.base, allowed, made)
            if base != buffer.base:
                return self._copy(buffer, base, made)
        return name

    def _resolve_slices(self, root: str, allowed: set[str], made: dict[str, str]) -> None:
        """Make all slices of a storage again, unless they are kept."""
        writers = self.slices[root]
        region = writers[0].region
        if root in made or region not in allowed or self._kept(root, region):
            return
        self._copy(self.program.buffers[root], None, made)
        for op in writers:
            if op.outputs[0] not in made:
                self._clone(op, allowed, made)

    def _clone(self, op: Op, allowed: set[str], made: dict[str, str]) -> None:
        inputs = tuple(self._resolve(name, allowed, made) for name in op.inputs)
        for name in op.outputs:
            buffer = self.program.buffers[name]
            base = buffer.base
            if base is not None and base not in made and self.program.root(base)[0] in self.slices:
                self._copy_place(base, made)
            self._copy(buffer, base and self._resolve(base, allowed, made), made)
        attrs = op.attrs
        if op.kind == "wait":
            attrs = {**attrs, "issue": attrs["issue"] + _CLONE}
        outputs = tuple(made[name] for name in op.outputs)
        self.ops.append(replace(op, name=op.name + _CLONE, inputs=inputs, outputs=outputs, attrs=attrs, clone=True))

    def _copy_place(self, name: str, made: dict[str, str]) -> None:
        """A place for a clone to write a slice to that is kept: it makes something else that is not."""
        buffer = self.program.buffers[name]
        if buffer.base is not None and buffer.base not in made:
            self._copy_place(buffer.base, made)
        self._copy(buffer, made.get(buffer.base) if buffer.base else None, made)

    def _copy(self, buffer: Buffer, base: str | None, made: dict[str, str]) -> str:
        name = buffer.name + _CLONE
        self.extra[name] = replace(buffer, name=name, base=base)
        made[buffer.name] = name
        return name
