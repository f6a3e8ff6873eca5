"""Rematerialize: given the activations that are kept, clone exactly the forward ops that backward needs (torch-free).

A buffer that backward reads and that is not kept is made again just before its first reader, by clones of the forward
ops that made it, recursively, down to what is kept. FSDP gathers are never kept past forward, except the last unit's:
the gather in backward is the forward gather, cloned.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import CinemeshError
from .program import Buffer, Op, Program

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
    """Apply ``plan.recompute``. Raises CinemeshError when the plan keeps an activation that no block has."""
    keep = _kept_roles(program)
    return _Rematerializer(program, keep).run()


def _kept_roles(program: Program) -> set[str] | None:
    """Roles that are kept; None: everything."""
    recompute = program.plan.recompute
    if recompute == "none":
        return None
    roles = KEPT[recompute] if isinstance(recompute, str) else recompute
    known = {_role(name) for op in program.ops if op.region.endswith(".forward") for name in op.outputs}
    if known and not isinstance(recompute, str) and (unknown := set(roles) - known):
        raise CinemeshError(
            f"plan: recompute keeps {sorted(unknown)}, which no block has; activations are {', '.join(sorted(known))}"
        )
    return set(roles)


def _role(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".issued")


class _Rematerializer:
    def __init__(self, program: Program, keep: set[str] | None) -> None:
        self.program = program
        self.keep = keep
        self.writer = {name: op for op in program.ops for name in op.outputs}
        self.recompute: dict[str, tuple[str, ...]] = program.facts["recompute"]
        # The unit gathered last in forward is the first that backward needs: its weights stay.
        last_unit = f"blocks.{program.facts['config'].layers - 1}.weights"
        self.kept_regions = {r for regions in self.recompute.values() for r in regions if r.endswith(last_unit)}
        self.extra: dict[str, Buffer] = {}
        self.ops: list[Op] = []

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
        return region.endswith(".forward") and (self.keep is None or _role(name) in self.keep)

    def _resolve(self, name: str, allowed: set[str], made: dict[str, str]) -> str:
        """The name under which backward finds ``name``: itself when kept, else its clone, emitted now if need be."""
        if name in made:
            return made[name]
        writer = self.writer.get(name)
        buffer = self.program.buffers[name]
        if writer is not None and writer.region in allowed and not self._kept(name, writer.region):
            self._clone(writer, allowed, made)
            return made[name]
        if buffer.base is not None and writer is None:
            base = self._resolve(buffer.base, allowed, made)
            if base != buffer.base:
                return self._copy(buffer, base, made)
        return name

    def _clone(self, op: Op, allowed: set[str], made: dict[str, str]) -> None:
        inputs = tuple(self._resolve(name, allowed, made) for name in op.inputs)
        for name in op.outputs:
            buffer = self.program.buffers[name]
            base = buffer.base
            if base is not None:
                base = made.get(base) or self._resolve(base, allowed, made)
            self._copy(buffer, base, made)
        attrs = op.attrs
        if op.kind == "wait":
            attrs = {**attrs, "issue": attrs["issue"] + _CLONE}
        outputs = tuple(made[name] for name in op.outputs)
        self.ops.append(replace(op, name=op.name + _CLONE, inputs=inputs, outputs=outputs, attrs=attrs, clone=True))

    def _copy(self, buffer: Buffer, base: str | None, made: dict[str, str]) -> str:
        name = buffer.name + _CLONE
        self.extra[name] = replace(buffer, name=name, base=base)
        made[buffer.name] = name
        return name
