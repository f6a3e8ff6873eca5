"""What torch's flight recorder knows of a rank's collectives, told by the rank itself and joined into a verdict.

The recorder is on where ``TORCH_FR_BUFFER_SIZE`` is above 0, for NCCL and gloo; what a CUDA Graph replays it does not
see. It is asked for JSON (torch 2.11 to 2.13: ``_dump_nccl_trace_json``, ``_dump_fr_trace_json``), by a thread of the
rank, which waits for a byte from the watchdog: a rank that holds Python's lock says nothing.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch._C._distributed_c10d as c10d  # pyright: ignore[reportMissingModuleSource]

from ...documents import parse_json
from ...errors import CinemeshError
from ...parallel.ir.communicators import communicators
from ...parallel.ir.plan import Plan
from ...parallel.runtime.mesh import group_ranks

BUFFER = "TORCH_FR_BUFFER_SIZE"
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # the first that this torch has
MOST_TOLD = 2  # communicators: where one stands still, those behind it do too
ISSUED, FINISHED = "last_enqueued_collective", "last_completed_collective"
POLL_S = 0.05


class CommunicatorState(NamedTuple):
    """Collectives of one communicator that a rank issued, and that were finished; ``last``: the kind of the last."""

    issued: int
    finished: int
    last: str


def read_flight(text: str) -> dict[str, CommunicatorState]:
    """By communicator, of a recorder's JSON. Raises CinemeshError for one that is not as torch writes it."""
    found = parse_json(text, "the flight recorder's dump", "")
    try:
        names = {str(entry["pg_id"]): entry["process_group"][1] for entry in found["entries"]}  # the name, description
        last = {str(entry["pg_id"]): entry["profiling_name"].rpartition(":")[2] for entry in found["entries"]}
        status = {name: found["pg_status"][name] for name in names}
        return {names[pg]: CommunicatorState(int(of[ISSUED]), int(of[FINISHED]), last[pg]) for pg, of in status.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CinemeshError(f"the flight recorder's dump is not as torch 2.11 to 2.13 write it: {error!r}") from error


def joined_flights(flights: Mapping[int, Mapping[str, CommunicatorState]], plan: Plan) -> str:
    """What tells ranks of one group apart, in a sentence; nothing where nothing does."""
    told = list(_told(flights, plan))
    return f"flight recorder: {'; '.join(told[:MOST_TOLD])}" if told else ""


def _told(flights: Mapping[int, Mapping[str, CommunicatorState]], plan: Plan) -> Iterator[str]:
    for one in communicators(plan):
        for ranks in dict.fromkeys(tuple(group_ranks(plan, one.axes, rank)) for rank in flights):
            of = {rank: flights[rank][one.name] for rank in ranks if one.name in flights.get(rank, {})}
            if len(of) < 2:
                continue
            ahead = max(of, key=lambda rank: of[rank].issued)
            behind = [rank for rank in of if of[rank].issued < of[ahead].issued]
            slow = [rank for rank in of if of[rank].finished < of[rank].issued]
            if behind:
                issued, late = of[ahead], of[behind[0]]
                yield (
                    f"{_ranks(behind)} issued {late.issued} collectives of {one.name}, and rank {ahead} "
                    f"{issued.issued}, the last of them {issued.last}"
                )
            elif slow and len(slow) < len(of):
                late = of[slow[0]]
                yield f"{_ranks(slow)} finished {late.finished} of {late.issued} collectives of {one.name}, others all"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:4]))}"


@dataclass
class FlightRecorder:
    """Of a rank and its watchdog, made before the one forks the other."""

    asks: int
    hears: int
    answer: BinaryIO

    @classmethod
    def made(cls) -> FlightRecorder:
        asks, hears = os.pipe()
        return cls(hears, asks, tempfile.TemporaryFile())

    def close(self) -> None:
        """The rank's part; again, as where a rank ends inside what ends it, nothing."""
        if not self.answer.closed:
            os.close(self.asks)
            os.close(self.hears)
            self.answer.close()

    def listen(self) -> None:
        """On the rank, where a recorder is on: a thread answers."""
        dump = next((getattr(c10d, name) for name in DUMPS if hasattr(c10d, name)), None)
        if dump is not None and int(os.environ.get(BUFFER, "0") or 0) > 0:
            threading.Thread(target=self._answer, args=(dump,), name="flight recorder", daemon=True).start()

    def _answer(self, dump: Any) -> None:
        with suppress(OSError, ValueError):  # it was closed: the rank has ended
            if os.read(self.hears, 1):
                os.pwrite(self.answer.fileno(), bytes(dump()) + b"\n", 0)

    def ask(self, seconds: float) -> dict[str, CommunicatorState]:
        """By the watchdog: what the rank answers so soon, else nothing."""
        os.write(self.asks, b"?")
        until = time.monotonic() + seconds
        text = b""
        while not text.endswith(b"\n") and time.monotonic() < until:
            time.sleep(POLL_S)
            text = os.pread(self.answer.fileno(), os.fstat(self.answer.fileno()).st_size, 0)
        try:
            return read_flight(text.decode(errors="replace")) if text.endswith(b"\n") else {}
        except CinemeshError:  # another torch: the verdict is told without it
            return {}
