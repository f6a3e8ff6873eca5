"""What all servers hold, compared: the steps that a job can go on from, and who gives whom a shard (torch-free).

A step will do when every shard of the plan has a holder, and the holders of each are of one mind about its bytes: of
two that differ none is believed, of more those that are alike and more than half.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shard = tuple[int, ...]  # coordinates on the axes of SHARDING


@dataclass(frozen=True)
class HeldCopy:
    """A copy that rank ``by`` can reach, in the file ``name`` of its server. ``note``: digest of the run's.

    ``since``: the newest checkpoint in storage when it was taken.
    """

    by: int
    name: str
    step: int
    updates: int
    shard: Shard
    digests: tuple[str, ...]
    note: str
    since: int


@dataclass(frozen=True)
class HandedOn:
    """Rank ``source`` gives its file ``name`` to ``ranks``, of which it may be one."""

    source: int
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Agreed:
    """What a job goes on from. ``digests``: of every shard's states; ``note_of``: a rank and the file with the note."""

    step: int
    updates: int
    digests: Mapping[Shard, tuple[str, ...]]
    note_of: tuple[int, str]
    handed_on: tuple[HandedOn, ...]


def steps_agreed(copies: Sequence[HeldCopy], shard_of: Sequence[Shard]) -> tuple[list[Agreed], list[str]]:
    """The steps that will do, the newest first; and of each step that will not, why.

    ``shard_of``: by rank of this job.
    """
    by_step: dict[int, list[HeldCopy]] = defaultdict(list)
    for copy in copies:
        by_step[copy.step].append(copy)
    agreed: list[Agreed] = []
    refused: list[str] = []
    for step in sorted(by_step, reverse=True):
        found = _agreed(by_step[step], shard_of)
        if isinstance(found, str):
            refused.append(f"step {step}: {found}")
        else:
            agreed.append(found)
    return agreed, refused


def _agreed(copies: list[HeldCopy], shard_of: Sequence[Shard]) -> Agreed | str:
    holders: dict[Shard, list[HeldCopy]] = {shard: [] for shard in shard_of}
    for copy in copies:
        if copy.shard in holders:
            holders[copy.shard].append(copy)
    if missing := sum(not held for held in holders.values()):
        return f"{missing:,} of {len(holders):,} shards have no holder"
    believed: dict[Shard, list[HeldCopy]] = {}
    for shard, held in holders.items():
        ((said, count),) = Counter((one.digests, one.note, one.updates) for one in held).most_common(1)
        if 2 * count <= len(held):
            return f"{_names(held)} hold shard {shard}, and differ"
        believed[shard] = [one for one in held if (one.digests, one.note, one.updates) == said]
    firsts = [held[0] for held in believed.values()]
    if len({(one.note, one.updates) for one in firsts}) > 1:
        return "the shards are not of one run"
    digests = {shard: held[0].digests for shard, held in believed.items()}
    note_of = firsts[0].by, firsts[0].name
    return Agreed(firsts[0].step, firsts[0].updates, digests, note_of, _handed_on(believed, shard_of))


def _names(held: Sequence[HeldCopy]) -> str:
    return " and ".join(f"rank {one.by}" for one in held)


def _handed_on(believed: Mapping[Shard, list[HeldCopy]], shard_of: Sequence[Shard]) -> tuple[HandedOn, ...]:
    """A rank takes what it can reach itself; else whoever of the holders gives to fewest gives to it."""
    own = {(one.by, shard): one for shard, held in believed.items() for one in reversed(held)}
    ranks: dict[tuple[int, str], list[int]] = {}
    for rank, shard in sorted(enumerate(shard_of), key=lambda pair: pair not in own):
        held = [own[rank, shard]] if (rank, shard) in own else believed[shard]
        one = min(held, key=lambda one: len(ranks.get((one.by, one.name), ())))
        ranks.setdefault((one.by, one.name), []).append(rank)
    return tuple(HandedOn(source, name, tuple(to)) for (source, name), to in sorted(ranks.items()))
