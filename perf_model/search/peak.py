"""Peak bytes of a step in one space from a few of its blocks, under any shard group (torch-free)."""

from __future__ import annotations

import itertools

from ...kernels.counts import DTYPE_BYTES
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import BufferKind, Phase, Space
from ...parallel.passes.device_memory import Workspaces
from ...parallel.passes.liveness import lifetimes
from ..prices.footprint import FLAT, FROZEN_CLASS, UNIT, class_of
from .few_blocks import FewBlocks, blocks_of

SIZED = frozenset((*FLAT, *UNIT, FROZEN_CLASS))  # classes that the shard group sizes

# Of a buffer that the shard group sizes: its unit ("" or FROZEN_CLASS: a flat shard), and bytes of an element.
Sized = tuple[str, int]


class Peak:
    """What the peak of any shard group and depth follows from.

    ``marks``: the first record of every block. ``on``: workspaces of the kernels that run.
    ``kept_bytes``: what one more of the first, and of the last blocks keeps from forward to backward.
    """

    def __init__(
        self,
        program: Program,
        few: FewBlocks,
        marks: dict[tuple[int | None, Phase], list[int]],
        on: Workspaces,
        space: Space = Space.DEVICE,
    ) -> None:
        self.few = few
        lives = lifetimes(program, space, on.bytes)
        self.built = blocks_of(program.plan, few.blocks)
        self.kept_bytes = (0, 0)
        deeper: tuple[list[tuple[int, int]], ...] = ([], [])  # records during which those left out hold kept bytes
        cut = self.built[0]
        for (micro_batch, direction), starts in marks.items():
            if direction is not Phase.FORWARD:
                continue
            back, kept = marks[micro_batch, Phase.BACKWARD], [0, 0]
            # Forward begins of the blocks of a mode, and where backward begins the last one of them.
            for mode, (begun, ends) in enumerate(
                ((starts[:cut], back[-1]), (starts[cut:], back[few.blocks - cut - 1]))
            ):
                if len(begun) > 2:
                    kept[mode] = lives.live_bytes[begun[2]] - lives.live_bytes[begun[1]]
                    deeper[mode].append((begun[1], ends))
            self.kept_bytes = (kept[0], kept[1])
        first = {root: i for i, roots in enumerate(lives.allocate) for root in roots}
        last = {root: i for i, roots in enumerate(lives.free) for root in roots}
        starting: dict[int, list[Sized]] = {}
        stopping: dict[int, list[Sized]] = {}
        for name, buffer in program.buffers.items() if space is Space.DEVICE else ():
            class_ = class_of(program, name, set()) if buffer.base is None else ""
            if class_ in SIZED and (buffer.kind is not BufferKind.TEMPORARY or name in first):
                unit = "" if class_ in FLAT else class_ if class_ == FROZEN_CLASS else buffer.unit or ""
                sized = (unit, DTYPE_BYTES[buffer.dtype])
                starting.setdefault(first.get(name, 0), []).append(sized)
                stopping.setdefault(last.get(name, len(program.ops) - 1), []).append(sized)
        # The most live bytes among records that grow alike: with what is sized by the shard group, and by depth.
        self._highest: dict[tuple[tuple[Sized, ...], tuple[bool, ...]], int] = {}
        held: list[Sized] = []
        changes = {0, len(program.ops), *starting, *(i + 1 for i in stopping)}
        changes.update(i for spells in deeper for spell in spells for i in spell)
        for begin, end in itertools.pairwise(sorted(changes)):
            for gone in stopping.get(begin - 1, ()):
                held.remove(gone)
            held += starting.get(begin, ())
            holds = tuple([any(begun <= begin < ends for begun, ends in spells) for spells in deeper])
            key = (tuple(sorted(held)), holds)
            self._highest[key] = max(self._highest.get(key, 0), *lives.live_bytes[begin:end])
        self._workspace_bytes = max(lives.workspace_bytes, default=0)
        self._sharded: dict[int, dict[tuple[bool, ...], int]] = {}

    def bytes(self, plan: Plan) -> int:
        """Most bytes that the deep step's own buffers hold at once on one rank under a plan's shard group."""
        if plan.dp_shard not in self._sharded:
            self._sharded[plan.dp_shard] = self._under(plan)
        deep = blocks_of(plan, self.few.config.layers)
        grown_by = [(n - few) * kept for n, few, kept in zip(deep, self.built, self.kept_bytes, strict=True)]
        return self._workspace_bytes + max(
            bytes_ + sum(grown for grown, holding in zip(grown_by, holds, strict=True) if holding)
            for holds, bytes_ in self._sharded[plan.dp_shard].items()
        )

    def _under(self, plan: Plan) -> dict[tuple[bool, ...], int]:
        """The most live bytes under a shard group, among records that grow alike with depth."""
        ours, theirs = self.few.units, self.few.units_of(plan)
        grown_by = {unit.name: theirs.by_name[unit.name].elements - unit.elements for unit in ours.all}
        grown_by[""] = self.few.flat_elements(plan) - ours.flat_elements
        grown_by[FROZEN_CLASS] = self.few.flat_elements(plan, frozen=True) - ours.frozen_elements
        most: dict[tuple[bool, ...], int] = {}
        for (held, holds), live in self._highest.items():
            grown = live + sum(width * grown_by[unit] for unit, width in held)
            most[holds] = max(most.get(holds, 0), grown)
        return most
