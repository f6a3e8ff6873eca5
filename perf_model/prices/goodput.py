"""What of a run's time is training, with failures: an event simulation, and when to write checkpoints (torch-free).

A run makes steps, pauses for a checkpoint every so many, and the checkpoint holds once it is written behind the steps
that follow. Failures come at random. One is noticed after a while, a lost node is replaced by a spare or waited for,
the job starts again from the last checkpoint that holds, and the steps since then are made once more. Not in it:
failures while a job starts, and of several nodes at once.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

DAY_S = 86400.0
DAYS = 60  # simulated, of each life
LIVES = 12  # as many seeds
FINEST = 1.15  # from one tried interval to the next
WIDEST = 12.0  # times the proposed interval, and its part: what is tried beside it


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What happens to a run on a job; seconds. ``mtbf_s``: of the job, between failures that nobody planned.

    ``pause_s``: of a checkpoint, in which nothing trains; ``write_s``: until it holds. ``notice_s``: of a failure that
    ends a process; ``hang_s``: of one that hangs, a share ``hang_fraction`` of them. ``restart_s``: from then to the
    next step, with a node for each rank. ``node_fraction``: of the failures, those that take a node out for
    ``repair_s``; ``spares``: nodes more than the job runs on. ``memory_s``: of training, from one copy of the states in
    the servers' memory to the next, 0: none; each takes ``memory_pause_s``. ``replicated``: another node has each too.
    """

    step_s: float
    mtbf_s: float
    pause_s: float
    write_s: float
    notice_s: float
    hang_s: float
    hang_fraction: float
    restart_s: float
    node_fraction: float
    repair_s: float
    spares: int = 0
    memory_s: float = 0.0
    memory_pause_s: float = 0.0
    replicated: bool = False


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of a run's time: what is training, and what is lost to each cause. They add up to one."""

    training: float
    pauses: float
    repeated: float
    noticing: float
    waiting: float
    restarting: float


def daly_s(pause_s: float, mtbf_s: float) -> float:
    """Training between two checkpoints that loses least (Daly, FGCS 22, 2006, equation 37)."""
    if pause_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = pause_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * pause_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - pause_s


def proposed_steps(conditions: Conditions) -> int:
    """Steps between checkpoints: Daly's, and no fewer than in which the one before is written."""
    step_s = conditions.step_s
    best = daly_s(conditions.pause_s, conditions.mtbf_s)
    return max(1, round(best / step_s), math.ceil(conditions.write_s / step_s))


def simulate(conditions: Conditions, steps: int, seed: int, days: float = DAYS) -> Shares:
    """One life with a checkpoint every ``steps`` steps. The same failures for one seed, whatever the interval."""
    draw, end = random.Random(seed), days * DAY_S
    interval_s = steps * conditions.step_s
    lost = dict.fromkeys((f.name for f in fields(Shares)), 0.0)
    away: list[float] = []  # when nodes that are out come back
    now = 0.0
    while now < end:
        until = min(end, now + draw.expovariate(1.0 / conditions.mtbf_s))
        hangs, node = draw.random() < conditions.hang_fraction, draw.random() < conditions.node_fraction
        trained, paused, kept = _stretch(until - now, interval_s, conditions)
        if conditions.memory_s and (conditions.replicated or not node):
            copied_s = trained - conditions.step_s  # a copy is whole a step later
            kept = max(kept, copied_s // conditions.memory_s * conditions.memory_s)
        failed = until < end
        if not failed:
            kept = trained
        lost["training"] += kept
        lost["repeated"] += trained - kept
        lost["pauses"] += paused
        now = until
        if not failed:
            break
        now = _spend(lost, "noticing", conditions.hang_s if hangs else conditions.notice_s, now, end)
        while away and away[0] <= now:
            heapq.heappop(away)
        if node:
            heapq.heappush(away, now + conditions.repair_s)
            if len(away) > conditions.spares:
                now = _spend(lost, "waiting", max(0.0, heapq.heappop(away) - now), now, end)
        now = _spend(lost, "restarting", conditions.restart_s, now, end)
    return Shares(**{cause: seconds / end for cause, seconds in lost.items()})


def _spend(lost: dict[str, float], cause: str, seconds: float, now: float, end: float) -> float:
    lost[cause] += min(seconds, end - now)
    return now + seconds


def _stretch(lasted_s: float, interval_s: float, conditions: Conditions) -> tuple[float, float, float]:
    """Of a stretch without failure: seconds of training, of pauses, and of training that a checkpoint holds."""
    each = conditions.memory_s + conditions.memory_pause_s
    share = conditions.memory_s / each if conditions.memory_s else 1.0  # between checkpoints: copies pause it evenly
    cycle_s = interval_s / share + conditions.pause_s
    cycles, rest = divmod(lasted_s, cycle_s)
    trained = cycles * interval_s + min(rest * share, interval_s)
    written = lasted_s - conditions.write_s  # a checkpoint whose pause ended before this holds
    held = max(0.0, written // cycle_s) * interval_s if written > 0.0 else 0.0
    return trained, lasted_s - trained, min(held, trained)


def mean_shares(conditions: Conditions, steps: int, lives: int = LIVES, days: float = DAYS) -> Shares:
    """Over several lives, seeds 0 and on."""
    found = [simulate(conditions, steps, seed, days) for seed in range(lives)]
    return Shares(**{f.name: sum(getattr(one, f.name) for one in found) / lives for f in fields(Shares)})


def tried_steps(conditions: Conditions) -> Iterator[int]:
    """Intervals around the proposed one, each ``FINEST`` times the one before."""
    middle, least = proposed_steps(conditions), math.ceil(conditions.write_s / conditions.step_s)
    count = math.ceil(math.log(WIDEST) / math.log(FINEST))
    yield from sorted({max(1, least, round(middle * FINEST**power)) for power in range(-count, count + 1)})


def best_simulated(conditions: Conditions, lives: int = LIVES) -> tuple[int, float]:
    """The interval of those tried that trains most, in steps, and its share of training."""
    shares = {steps: mean_shares(conditions, steps, lives).training for steps in tried_steps(conditions)}
    best = max(shares, key=lambda steps: shares[steps])
    return best, shares[best]


def worthwhile_spares(conditions: Conditions, nodes: int, most: int, lives: int = LIVES) -> int:
    """How many spare nodes give most training for all nodes that are paid: one more no longer pays for itself."""
    steps, best, found = proposed_steps(conditions), 0.0, 0
    for spares in range(most + 1):
        training = mean_shares(replace(conditions, spares=spares), steps, lives).training
        if (paid := training * nodes / (nodes + spares)) <= best:
            break
        best, found = paid, spares
    return found
