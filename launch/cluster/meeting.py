"""How the ranks of a job meet, and that they have alike what must be, before they make a group.

[Note: rounds] torchrun starts a job's processes again when one of them died, and may keep one store over all rounds: in
it lie the addresses that the dead left. So the keys of a round begin with a token that its rank 0 draws. A rank says
hello with a number of its own, and the token is told to it under that number: what a dead process said is answered, but
nobody hears it, and rank 0 asks again until every rank of its round has heard.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ...documents import parse_json
from ...errors import CinemeshError, in_a_line

MEETING_S = 600.0  # how long ranks wait for one another when they start
HEAR = timedelta(seconds=60)  # between two looks whether the store is still there
FIRST_FAILURE = "cinemesh/first_failure"  # in the store: the rank that failed first, and its exit code
POLL_S = 0.05  # in which rank 0 asks who has heard
MOST_TOLD = 4  # keys of a difference that are told; the others are counted
MOST_KINDS = 8  # sets of values that are looked at: those of the ranks that came first


@dataclass(frozen=True)
class Meeting:
    """A round of a job: ``store`` is its own, ``job`` that of all rounds, where the launcher keeps one."""

    job: Store
    token: str
    rank: int
    world: int

    @property
    def store(self) -> Store:
        return PrefixStore(f"cinemesh/{self.token}", self.job)

    def again(self) -> Meeting:
        """The same over a connection of its own: for another process, or thread."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        job = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=MEETING_S))
        return replace(self, job=job)


def job_store() -> tuple[Store, int, int]:
    """That at which the ranks of this process's job meet, by the launcher's environment; this rank, and how many.

    Raises CinemeshError when it cannot be reached.
    """
    with _meeting():
        return next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING_S))))


def meet() -> Meeting:
    """Find the other ranks of this round. Raises CinemeshError when they do not come."""
    job, rank, world = job_store()
    with _meeting():
        return Meeting(job, token_of(job, rank, world), rank, world)


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except (dist.DistError, ValueError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        rank = os.environ["RANK"]
        if isinstance(error, dist.DistStoreError):
            remedy = "start all ranks of the job: what those that did not come print says why"
        elif rank == "0":
            remedy = "choose another MASTER_PORT, or end the job that holds it"
        else:
            remedy = "start rank 0, and look whether this machine reaches it there (MASTER_ADDR, MASTER_PORT)"
        raise CinemeshError(
            f"rank {rank} cannot meet the others at {at}: {in_a_line(error, lines=1)}", remedy=remedy
        ) from error


def token_of(job: Store, rank: int, world: int) -> str:
    """That of this round: see [Note: rounds]. Raises DistError where a rank does not come."""
    if rank:
        number = uuid.uuid4().hex
        job.set(f"cinemesh/hello/{rank}", number)
        token = job.get(f"cinemesh/welcome/{number}").decode()
        job.add(f"cinemesh/{token}/heard", 1)
    else:
        token = uuid.uuid4().hex
        answered = set[bytes]()
        until = time.monotonic() + MEETING_S
        hellos = [f"cinemesh/hello/{other}" for other in range(1, world)]
        while job.add(f"cinemesh/{token}/heard", 0) < world - 1:
            for key in hellos:
                if job.check([key]) and (number := job.get(key)) not in answered:
                    job.set(f"cinemesh/welcome/{number.decode()}", token)
                    answered.add(number)
            if time.monotonic() > until:
                raise dist.DistStoreError(f"{len(answered) + 1} of {world} ranks came in {MEETING_S:.0f} s")
            time.sleep(POLL_S)
    return token


def hear(meeting: Meeting, key: str) -> str:
    """What another rank sets, however long it takes. Raises CinemeshError when the store is gone."""
    while True:
        try:
            meeting.store.wait([key], HEAR)
            return meeting.store.get(key).decode()
        except dist.DistStoreError:
            continue  # not yet
        except dist.DistError as error:
            raise CinemeshError(
                f"rank {meeting.rank} waited for rank 0, which is gone: {in_a_line(error, lines=1)}",
                remedy="look to rank 0: it has stopped before",
            ) from error


# -- agreement --------------------------------------------------------------------------------------------------------


def agree(meeting: Meeting, about: str, facts: Mapping[str, str]) -> None:
    """Raise CinemeshError, the same on every rank, where the facts of the ranks differ.

    A rank asks the store a fixed number of times, whatever their number: one of each set of facts writes them down, the
    last to come compares them, and all hear what it found.
    """
    store = PrefixStore(f"agree/{about}", meeting.store)
    written = json.dumps(dict(sorted(facts.items())))
    digest = hashlib.sha256(written.encode()).hexdigest()
    if store.add(f"ranks/{digest}", 1) == 1:
        number = store.add("kinds", 1)
        store.set(f"kind/{number}", json.dumps([digest, meeting.rank, facts]))
    try:
        if store.add("came", 1) == meeting.world:
            store.set("found", _compared(store))
        found = store.get("found").decode()
    except dist.DistError as error:
        came = store.add("came", 0)
        raise CinemeshError(
            f"{came} of {meeting.world} ranks came to compare their {about} in {MEETING_S:.0f} s",
            remedy="look to the others: they have stopped before",
        ) from error
    if found:
        raise CinemeshError(found, remedy=f"give every rank the same {about}")


def _compared(store: Store) -> str:
    """What differs, or nothing. The facts of most ranks, of the lower rank among equals, are told first."""
    written = [store.get(f"kind/{n + 1}").decode() for n in range(min(store.add("kinds", 0), MOST_KINDS))]
    kinds = [parse_json(text, "what a rank wrote", "start the job again") for text in written]
    counted = sorted((-store.add(f"ranks/{digest}", 0), rank, facts) for digest, rank, facts in kinds)
    (most, first, usual), *others = counted
    told: list[str] = []
    for count, rank, facts in others:
        keys = [key for key in dict.fromkeys((*usual, *facts)) if usual.get(key) != facts.get(key)]
        for key in keys[:MOST_TOLD]:
            values = [_shown(usual.get(key), first, -most), _shown(facts.get(key), rank, -count)]
            told.append(f"{key} is {' and '.join(values)}")
        if len(keys) > MOST_TOLD:
            told.append(f"{len(keys) - MOST_TOLD} more of rank {rank}")
    return f"the ranks of this job differ: {'; '.join(told)}" if told else ""


def _shown(value: str | None, rank: int, ranks: int) -> str:
    alike = f" ({ranks} ranks)" if ranks > 1 else ""
    return f"{'absent' if value is None else value} on rank {rank}{alike}"
