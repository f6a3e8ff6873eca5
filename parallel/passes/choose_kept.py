"""Which activations to keep: least time to make the others again, within a memory bound (torch-free).

A block's forward makes storages; backward reads some. One that is not kept is made again by the records that made it,
which in turn need their inputs, kept or made again. Weighing a byte against ``w`` seconds, the best choice of one block
is a minimum cut, hence exact:

    r = 1    the records are run again               costs their seconds
    n = 1    the storage is needed: by backward, or by a record that is run again
    n = 1 and r = 0 of its records: it is kept       costs w * bytes

As ``w`` falls the choices trace the lower convex hull of (bytes, seconds). Equal blocks then share a budget by taking
two neighbours of that hull, the last blocks the one that keeps more. No choice for all blocks is faster than the hull
at the budget's mean, so what this loses is less than the difference of the two neighbours for ONE block; the bound
comes with the answer. It is never worse than ``none``, ``selective`` or ``full`` where those fit: they are tried too.

A byte that goes to the host (``plan.offload``) weighs nothing on the device: what it costs is the link's time, beside
the block that is computed meanwhile. So the choices stay those of the hull, and those that do not fit are tried: with
as much of each block on the host as they lack, and all of it on the device in as many last blocks as do fit.

Prior art: torch's min-cut partitioner (functorch) weighs bytes the same way; Checkmate (Jain et al., arXiv 1910.02653)
solves the constrained problem as an integer program.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from ...errors import CinemeshError
from ..ir.plan import Plan
from ..ir.program import Program
from ..ir.records import Op, Phase, Place
from .elide import elide
from .prices import Price
from .recompute import KEPT, activations

Roles = tuple[str, ...]

_BISECTIONS = 12


@dataclass(frozen=True)
class Activation:
    """Storage of one block's forward, all slices together. ``roles``: its names, several where they are one storage.

    ``maker`` is the index of the records that make it, ``needed`` whether backward reads it.
    """

    roles: Roles
    bytes: int
    maker: int
    needed: bool


@dataclass(frozen=True)
class Maker:
    """Records that run together when any of their outputs is made again; ``reads``: indices of activations."""

    seconds: float
    reads: tuple[int, ...]


@dataclass(frozen=True)
class KeptPoint:
    """One choice for one block: what is kept, its bytes, and the seconds of what is made again."""

    keep: Roles
    kept_bytes: int
    seconds: float


@dataclass(frozen=True)
class KeptChoice:
    """For all blocks: the ``first`` ones keep less than the ``last_blocks`` last ones.

    ``seconds`` and ``kept_bytes`` are sums over the blocks of one micro-batch; no choice takes less than
    ``bound_seconds``.
    """

    first: KeptPoint
    last: KeptPoint
    last_blocks: int
    seconds: float
    kept_bytes: int
    bound_seconds: float

    @classmethod
    def uniform(cls, point: KeptPoint, blocks: int, bound_seconds: float) -> KeptChoice:
        """The same for all blocks."""
        return cls(point, point, 0, blocks * point.seconds, blocks * point.kept_bytes, bound_seconds)

    def applied(self, plan: Plan) -> Plan:
        """``plan`` with this choice."""
        mixed = {"recompute_last": self.last.keep, "last_blocks": self.last_blocks} if self.last_blocks else {}
        return replace(plan, **{"recompute_last": None, "last_blocks": 0, "recompute": self.first.keep, **mixed})


# -- one block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCosts:
    """What the choice is made from."""

    activations: tuple[Activation, ...]
    makers: tuple[Maker, ...]

    def point(self, keep: Sequence[str] | str) -> KeptPoint:
        """What a choice costs: a list of roles, or ``none``, ``selective``, ``full``. Needless roles are dropped."""
        everything = keep == "none"
        roles = set(KEPT.get(keep, ()) if isinstance(keep, str) else keep)
        pending = [i for i, a in enumerate(self.activations) if a.needed]
        needed: set[int] = set()
        again: set[int] = set()
        while pending:
            i = pending.pop()
            if i in needed:
                continue
            needed.add(i)
            activation = self.activations[i]
            if not everything and not roles.intersection(activation.roles):
                again.add(activation.maker)
                pending.extend(self.makers[activation.maker].reads)
        kept = [a for i, a in enumerate(self.activations) if i in needed and (everything or roles & set(a.roles))]
        return KeptPoint(
            tuple(role for a in kept for role in a.roles),
            sum(a.bytes for a in kept),
            sum(self.makers[m].seconds for m in again),
        )

    def best(self, seconds_per_byte: float) -> KeptPoint:
        """The choice that minimises seconds + bytes * ``seconds_per_byte``."""
        count, source, sink = len(self.activations), -1, -2
        cut = _Network()
        for m, maker in enumerate(self.makers):
            cut.add(count + m, sink, maker.seconds)
            for i in maker.reads:
                cut.add(count + m, i, float("inf"))
        for i, activation in enumerate(self.activations):
            cut.add(i, count + activation.maker, activation.bytes * seconds_per_byte)
            if activation.needed:
                cut.add(source, i, float("inf"))
        inside = cut.source_side(source, sink)
        kept = [a for i, a in enumerate(self.activations) if i in inside and count + a.maker not in inside]
        return self.point([role for a in kept for role in a.roles])

    def largest(self, point: KeptPoint) -> list[tuple[str, int]]:
        """Role and bytes of what a choice keeps, the largest first: large copies are few."""
        kept = [a for a in self.activations if a.bytes and set(a.roles) & set(point.keep)]
        return [(a.roles[0], a.bytes) for a in sorted(kept, key=lambda a: -a.bytes)]

    @cached_property
    def hull(self) -> list[KeptPoint]:
        """All choices that are best for some weight, from the fewest bytes to the least time."""

        def between(low: KeptPoint, high: KeptPoint) -> list[KeptPoint]:
            if low.kept_bytes >= high.kept_bytes or low.seconds <= high.seconds:
                return []
            weight = (low.seconds - high.seconds) / (high.kept_bytes - low.kept_bytes)
            found = self.best(weight)
            gained = low.seconds + weight * low.kept_bytes - found.seconds - weight * found.kept_bytes
            if gained <= 1e-9 * low.seconds:
                return []
            return [*between(low, found), found, *between(found, high)]

        fewest, fastest = self.point("full"), self.point("none")
        return [fewest, *between(fewest, fastest), fastest]


class _Network:
    """Maximum flow by shortest augmenting paths: a block has some fifty nodes."""

    def __init__(self) -> None:
        self.capacity: dict[int, dict[int, float]] = {}

    def add(self, a: int, b: int, capacity: float) -> None:
        edges = self.capacity.setdefault(a, {})
        edges[b] = edges.get(b, 0.0) + capacity
        self.capacity.setdefault(b, {}).setdefault(a, 0.0)

    def _reach(self, source: int, least: float) -> dict[int, int]:
        """Node -> the one before it on a shortest path from the source."""
        parent, queue = {source: source}, [source]
        for node in queue:
            for other, capacity in self.capacity[node].items():
                if capacity > least and other not in parent:
                    parent[other] = node
                    queue.append(other)
        return parent

    def source_side(self, source: int, sink: int) -> set[int]:
        """Nodes on the source's side of the minimum cut; of several, the one with the fewest nodes there."""
        finite = [c for edges in self.capacity.values() for c in edges.values() if c < float("inf")]
        least = 1e-12 * max(finite)  # below rounding
        while sink in (parent := self._reach(source, least)):
            path = [sink]
            while path[-1] != source:
                path.append(parent[path[-1]])
            steps = [(b, a) for a, b in pairwise(path)]
            flow = min(self.capacity[a][b] for a, b in steps)
            for a, b in steps:
                self.capacity[a][b] -= flow
                self.capacity[b][a] += flow
        return set(parent)


def block_of(program: Program, price: Price) -> BlockCosts:
    """A middle block of a training step that no pass has touched. ``price`` gives the seconds of a record."""
    known = activations(program)
    program = elide(program)
    middle = program.blocks // 2

    def here(place: Place, phase: Phase) -> bool:
        return place.phase is phase and place.block == middle and not place.micro_batch

    forward = [op for op in program.ops if here(op.place, Phase.FORWARD)]
    backward = [op for op in program.ops if here(op.place, Phase.BACKWARD)]

    def roots(names: Iterable[str]) -> set[str]:
        return {program.root(name)[0] for name in names}

    made = roots(name for op in forward for name in op.outputs) - roots(forward[-1].outputs)
    roles: dict[str, list[str]] = {}  # role -> storages: several when sliced; one storage may have several roles
    for name, buffer in program.buffers.items():
        if here(buffer.place, Phase.FORWARD) and buffer.role in known and program.root(name)[0] in made:
            roles.setdefault(buffer.role, []).append(program.root(name)[0])
    unit_of = _connected(roles.values())
    units = list(dict.fromkeys(unit_of.values()))
    outputs = {op.name: sorted({unit_of[root] for root in roots(op.outputs) & made}) for op in forward}
    maker_of = _connected(units_made for units_made in outputs.values() if units_made)
    makers = list(dict.fromkeys(maker_of.values()))

    records: list[list[Op]] = [[] for _ in makers]
    for op in forward:
        if outputs[op.name]:
            records[makers.index(maker_of[outputs[op.name][0]])].append(op)
    read_by_backward = roots(name for op in backward for name in op.inputs)
    read_by = [roots(name for op in ops for name in op.inputs) & made for ops in records]
    found: list[Activation] = []
    for unit in units:
        maker = makers.index(maker_of[unit])
        storages = {root for root in unit_of if unit_of[root] == unit}
        outside = read_by_backward.union(*(read for m, read in enumerate(read_by) if m != maker))
        names = tuple(role for role, stored in roles.items() if unit_of[stored[0]] == unit)
        size = sum(program.bytes(root) for root in storages & outside)
        found.append(Activation(names, size, maker, bool(storages & read_by_backward)))
    reads = [
        tuple(i for i, unit in enumerate(units) if any(unit_of[root] == unit for root in read) and found[i].maker != m)
        for m, read in enumerate(read_by)
    ]
    seconds = [sum(price(program, op) for op in ops) for ops in records]
    return BlockCosts(tuple(found), tuple(Maker(s, r) for s, r in zip(seconds, reads, strict=True)))


def _connected(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Member -> the first member of its group; groups that share_budget one are one group."""
    first: dict[str, str] = {}
    for group in groups:
        known = {first[member] for member in group if member in first}
        target = min(known, default=group[0])
        first.update({member: target for member, other in first.items() if other in known})
        first.update(dict.fromkeys(group, target))
    return first


# -- all blocks -------------------------------------------------------------------------------------------------------


def share_budget(block: BlockCosts, blocks: int, budget_bytes: int) -> KeptChoice | None:
    """The best use of a budget for the kept activations of ``blocks`` blocks; None when even ``full`` needs more."""
    hull = block.hull
    if blocks * hull[0].kept_bytes > budget_bytes:
        return None
    mean = budget_bytes / blocks
    low = max((p for p in hull if p.kept_bytes <= mean), key=lambda p: p.kept_bytes)
    high = next((p for p in hull if p.kept_bytes > mean), low)
    bound, many = blocks * low.seconds, 0
    if high is not low:
        step = high.kept_bytes - low.kept_bytes
        bound -= blocks * (mean - low.kept_bytes) / step * (low.seconds - high.seconds)
        many = (budget_bytes - blocks * low.kept_bytes) // step
    mixed = KeptChoice(
        low,
        high,
        many,
        (blocks - many) * low.seconds + many * high.seconds,
        (blocks - many) * low.kept_bytes + many * high.kept_bytes,
        bound,
    )
    uniform = [KeptChoice.uniform(block.point(name), blocks, bound) for name in ("none", "selective", "full")]
    return min((c for c in (mixed, *uniform) if c.kept_bytes <= budget_bytes), key=lambda c: (c.seconds, c.kept_bytes))


def choose_kept(
    plan: Plan,
    program: Program,
    price: Price,
    limit_bytes: int,
    peak_bytes: Callable[[Plan], int],
    *,
    blocks: int | None = None,
) -> tuple[Plan, KeptChoice]:
    """The plan with the fastest choice whose peak is at most ``limit_bytes``, and that choice.

    ``program`` is the step as it was built, ``peak_bytes`` the peak of a plan after all passes: what a choice keeps and
    what backward needs besides depend on each other, so the budget is found by bisection. ``blocks``: those of the
    model, where the program has fewer. Raises CinemeshError when even ``full`` does not fit.
    """
    block = block_of(program, price)
    if blocks is None:
        blocks = program.blocks
    full = replace(plan, recompute="full", recompute_last=None, last_blocks=0)
    least = peak_bytes(full)
    if least > limit_bytes:
        raise CinemeshError(
            f"recompute full peaks at {least:,} B > {limit_bytes:,} B allowed",
            remedy=f"use more ranks (tp, cp, dp_shard), or allow {least - limit_bytes:,} B more",
        )
    best = share_budget(block, blocks, blocks * block.point("full").kept_bytes)
    assert best is not None
    low, high = best.kept_bytes, blocks * block.point("none").kept_bytes
    guess = min(high, low + limit_bytes - least)  # exact where the transients do not change
    for _ in range(_BISECTIONS):
        tried = share_budget(block, blocks, guess)
        assert tried is not None
        if peak_bytes(tried.applied(plan)) <= limit_bytes:
            if tried.seconds <= best.seconds:
                best = tried
            low = guess
        else:
            high = guess
        if high - low <= block.point("none").kept_bytes // 64:
            break
        guess = (low + high) // 2
    for name in ("none", "selective"):
        uniform = KeptChoice.uniform(block.point(name), blocks, best.bound_seconds)
        if uniform.seconds < best.seconds and peak_bytes(uniform.applied(plan)) <= limit_bytes:
            best = uniform
    return best.applied(plan), best


def offloads(
    plan: Plan,
    block: BlockCosts,
    blocks: int,
    limit_bytes: int,
    host_bytes: float,
    peak_bytes: Callable[[Plan], int],
    seconds: float,
) -> Iterator[Plan]:
    """Plans that make less again than ``seconds`` in all blocks, since a part of what they keep is on the host.

    Those that make least again, and copy most, come first: whether the link hides behind compute is for prices to say.
    ``host_bytes``: what a rank may take there.
    """
    for point in (p for p in reversed(block.hull) if blocks * p.kept_bytes <= limit_bytes + host_bytes):
        if blocks * point.seconds >= seconds:
            return
        kept = replace(plan, recompute=point.keep, recompute_last=point.keep, last_blocks=1)
        lacks = (peak_bytes(kept) - limit_bytes) / max(blocks - 2, 1)  # of each block that offloads
        roles, sent = (), 0
        for role, size in block.largest(point):
            roles, sent = (*roles, role), sent + size
            away = replace(kept, offload=roles)
            if sent < lacks or peak_bytes(away) > limit_bytes:
                continue
            tried = [replace(away, last_blocks=last) for last in range(1, blocks)]
            fitting = bisect_left(tried, True, key=lambda plan: peak_bytes(plan) > limit_bytes)
            if (blocks - fitting) * sent <= host_bytes:
                yield tried[fitting - 1]
            break
