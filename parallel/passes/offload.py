"""Offload: activations that wait for backward in host memory (torch-free).

What ``plan.offload`` names of a block is copied to the host when its forward has used it last, and back before its
backward uses it first. Both copies run beside the neighbouring block, which hides them:

    to_host      issued behind the last use in forward; waited for where the next block issues its own of the same role
    from_host    issued where the block behind, whose backward comes first, begins to use its own; waited for at the use

So at most one copy a role is on its way, and what a device holds of offloaded activations is those of about one block.
The last block keeps its own: backward begins there. So do the last ``last_blocks``.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import CinemeshError
from ..ir.program import Program
from ..ir.records import HOST_LANES, WAIT, Buffer, Op, Phase, Place, Space, Transfer, Wait

_BACK = "^"  # ends the name of what a copy brought back
_Line = tuple[int | None, str, int]  # micro-batch, role and, of several storages, which: one in every block


def offload(program: Program) -> Program:
    """Move what ``plan.offload`` names to the host and back; a forward alone, as a sampler's, keeps nothing.

    Raises CinemeshError where something named could not be moved.
    """
    return _Offloader(program).run()


class _Offloader:
    """``last``, ``first``: of a storage, the position of its last use in forward and of its first in backward.

    ``again``: of one that backward makes again, the first use of that.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.plan = program, program.plan
        self.blocks = min(program.blocks - program.plan.last_blocks, program.blocks - 1)
        self.last: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.again: dict[str, int] = {}
        self.begin: dict[tuple[int | None, int | None], int] = {}  # of a block's backward
        for i, op in enumerate(program.ops):
            forward = op.place.phase is Phase.FORWARD and not op.clone
            for root in program.storages(op):
                if forward:
                    self.last[root] = i
                elif (clone_of := program.buffers[root].clone_of) is not None:
                    self.again.setdefault(clone_of, i)
                else:
                    self.first.setdefault(root, i)
            if op.place.phase is Phase.BACKWARD:
                self.begin.setdefault((op.place.micro_batch, op.place.block), i)
        self.lines: dict[_Line, dict[int, str]] = {}  # the storage of every block
        counts: dict[tuple[int | None, int, str], int] = {}
        for name, buffer in program.buffers.items():
            place = buffer.place
            made = place.phase is Phase.FORWARD and buffer.clone_of is None and buffer.base is None
            if made and place.block is not None and name in self.last:
                key = (place.micro_batch, place.block, buffer.role)
                counts[key] = counts.get(key, 0) + 1
                self.lines.setdefault((place.micro_batch, buffer.role, counts[key]), {})[place.block] = name
        self.extra: dict[str, Buffer] = {}
        self.before: dict[int, list[Op]] = {}
        self.behind: dict[int, list[Op]] = {}

    def run(self) -> Program:
        if not self.begin:
            return self.program
        self._check()
        named = {
            self.program.root(name)[0]
            for name, buffer in self.program.buffers.items()
            if buffer.role in self.plan.offload and buffer.place.block is not None
        }
        moved: set[str] = set()
        for storages in self.lines.values():
            for block, root in storages.items():
                if root in named and block < self.blocks and root in self.first:
                    self._move(root, storages[block + 1], block)
                    moved.add(root)
        self._refuse_what_stays(moved)
        ops: list[Op] = []
        for i, op in enumerate(self.program.ops):
            if op.clone or op.place.phase is not Phase.FORWARD:
                inputs, outputs = (tuple(self._back(n, moved) for n in names) for names in (op.inputs, op.outputs))
                if (inputs, outputs) != (op.inputs, op.outputs):
                    op = replace(op, inputs=inputs, outputs=outputs)
            ops += [*self.before.get(i, ()), op, *self.behind.get(i, ())]
        return self.program.with_ops(ops, self.extra)

    def _move(self, root: str, following: str, block: int) -> None:
        """Both copies of a storage; ``following``: the same of the next block."""
        made, ops = self.program.buffers[root].place, self.program.ops
        leave, leave_wait = self._copy(root, f"{root}.host", Space.HOST, made)
        self.behind.setdefault(self.last[root], []).append(leave)
        self.behind.setdefault(self.last[following], []).append(leave_wait)
        used = self.first[root]
        reader = ops[self.begin[made.micro_batch, block]].place
        back, back_wait = self._copy(f"{root}.host", root + _BACK, Space.DEVICE, reader)
        behind = self.begin.get((made.micro_batch, (ops[used].place.block or 0) + 1), used)
        ahead = self.first.get(following, self.again.get(following, behind))
        self.before.setdefault(ahead, []).insert(0, back)
        self.before.setdefault(used, []).append(back_wait)

    def _copy(self, source: str, target: str, to: Space, place: Place) -> tuple[Op, Op]:
        """Issue and wait of a copy for the block at ``place``. See [Note: collectives]."""
        whole = self.extra.get(source) or self.program.buffers[source]
        facts = {"clone_of": whole.clone_of or whole.name, "space": to, "place": place}
        issued, name = f"{target}.issued", f"{target}.{HOST_LANES[to]}"
        self.extra[issued] = replace(whole, name=issued, base=None, **facts)
        self.extra[target] = replace(whole, name=target, base=issued, **facts)
        role = f"{whole.role}.{HOST_LANES[to]}"
        issue = Op(name, HOST_LANES[to], (source,), (issued,), comm=Transfer(to), place=place, role=role)
        wait = Op(f"{name}.wait", WAIT, (issued, source), (target,), comm=Wait(name, to=to), place=place, role=role)
        return issue, wait

    def _back(self, name: str, moved: set[str]) -> str:
        """Under what name backward finds a buffer: itself, or where a copy brought it."""
        if self.program.root(name)[0] not in moved:
            return name
        back, buffer = name + _BACK, self.program.buffers[name]
        if back not in self.extra:
            assert buffer.base is not None  # the storage itself was copied
            self.extra[back] = replace(
                buffer, name=back, base=self._back(buffer.base, moved), clone_of=buffer.clone_of or name
            )
        return back

    def _check(self) -> None:
        buffers = (buffer for buffer in self.program.buffers.values() if buffer.place.block is not None)
        known = {buffer.role for buffer in buffers if buffer.place.phase is Phase.FORWARD}
        if unknown := set(self.plan.offload) - known:
            raise self._wrong(f"names {sorted(unknown)}, which no block has", f"choose from {', '.join(sorted(known))}")
        if self.blocks < 1:
            shown = f"last_blocks({self.plan.last_blocks}) of {self.program.blocks} blocks"
            raise self._wrong(f"with {shown} leaves no block whose activations could go", "lower last_blocks")

    def _refuse_what_stays(self, moved: set[str]) -> None:
        buffers = self.program.buffers
        gone = {buffer.role for name, buffer in buffers.items() if self.program.root(name)[0] in moved}
        if idle := [role for role in self.plan.offload if role not in gone]:
            remedy = "keep it (recompute), or take it out of offload"
            raise self._wrong(f"names {idle[0]}, which no block keeps for backward", remedy)

    def _wrong(self, what: str, remedy: str) -> CinemeshError:
        return CinemeshError(f"plan: offload {what}", remedy=remedy, what="offload", value=self.plan.offload)
