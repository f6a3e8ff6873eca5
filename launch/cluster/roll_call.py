"""Which ranks of a round are lost with the watchdogs beside them: a machine that lost its power says nothing.

One watchdog calls, all that are left answer. What holds the store may be what is lost: one of those left, on another
machine, is deputed when the round begins, and says so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from socket import gethostname

from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from ...documents import parse_json
from .meeting import Meeting

DEATH_S = 1.0  # what a rank that lost its connection waits to hear whether another died
DEATH = "watchdog/death"
POLL_S = 0.1
_CALLED, _OVER, _LOOPBACK = "roll/called", "roll/over", ("127.0.0.1", "localhost", "::1")


@dataclass
class RollCall:
    """A watchdog's part in the roll call of its round, of which there is one at most.

    ``store_held_by``: in words. ``deputy``: who tells when the store is gone. ``one_machine``: nobody else can.
    """

    meeting: Meeting
    store_held_by: str
    deputy: bool
    one_machine: bool
    answered: bool = False

    @classmethod
    def begin(cls, meeting: Meeting) -> RollCall:
        """Say on which machine this rank is."""
        node, local = (int(os.environ.get(name, "0")) for name in ("GROUP_RANK", "LOCAL_RANK"))
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        at, agents = os.environ["MASTER_ADDR"], os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = meeting.store
        store.set(f"roll/machine/{meeting.rank}", json.dumps([gethostname(), node]))
        holds = _matches_machine_hostname(at) if agents and at not in _LOOPBACK else node == 0
        deputy = local == 0 and not holds and store.compare_set("roll/deputy", "", str(meeting.rank)).decode()
        holder = "torchrun's agent" if agents else "rank 0"
        return cls(meeting, f"{holder} on {at}", deputy == str(meeting.rank), nodes == 1)

    def answer(self) -> None:
        """Where the roll is called."""
        if not self.answered and self.meeting.store.check([_CALLED]):
            self.here()

    def here(self) -> None:
        """Called or not: this watchdog is there, or was when its rank ended."""
        self.meeting.store.set(_here(self.meeting.rank), "")
        self.answered = True

    def calls(self) -> bool:
        """Whether it is for this watchdog to call the roll; the answer of its own is given."""
        self.here()
        return self.meeting.store.add("roll/callers", 1) == 1

    def lost(self, seconds: float) -> list[int]:
        """Call it: the ranks that do not answer so long."""
        store, world = self.meeting.store, range(self.meeting.world)
        store.set(_CALLED, "")
        wait_for(store, [_here(rank) for rank in world], seconds)
        return [rank for rank in world if not store.check([_here(rank)])]

    def over(self) -> None:
        """What was to be said of the roll has been."""
        self.meeting.store.set(_OVER, "")

    def present(self) -> list[int]:
        """The ranks that answered; all, where it was not called."""
        store, world = self.meeting.store, range(self.meeting.world)
        return [rank for rank in world if store.check([_here(rank)])] if store.check([_CALLED]) else [*world]

    def wait(self, seconds: float) -> None:
        """Until the roll call is over."""
        wait_for(self.meeting.store, [_OVER], seconds)

    def death(self) -> str | None:
        """Of a rank whose watchdog is left, if there was one."""
        return self.meeting.store.get(DEATH).decode() if wait_for(self.meeting.store, [DEATH], DEATH_S) else None

    def machines(self, ranks: Iterable[int]) -> dict[int, str]:
        """Of these ranks, where it is known: as ``node-3 (node 3)``."""
        return machines_of(self.meeting.store, ranks)


def machines_of(store: Store, ranks: Iterable[int]) -> dict[int, str]:
    """Of ranks whose watchdogs have said it, by the store of their round: as ``node-3 (node 3)``."""
    keys = {rank: f"roll/machine/{rank}" for rank in ranks}
    known = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
    said = {rank: parse_json(text, "where a rank is", "") for rank, text in known.items()}
    return {rank: f"{host} (node {node})" for rank, (host, node) in said.items()}


def _here(rank: int) -> str:
    return f"roll/here/{rank}"


def wait_for(store: Store, keys: list[str], seconds: float) -> bool:
    """Until all keys are there: whether they came so soon."""
    until = time.monotonic() + seconds
    while not (there := store.check(keys)) and time.monotonic() < until:
        time.sleep(POLL_S)
    return there
