"""The GPUs of a job while it trains: every machine's first rank asks NVML, rank 0 reads what all said.

Through the job's store, between steps, with no collective and no wait: what a machine said last counts.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from torch.distributed.distributed_c10d import Store

from ...documents import parse_json
from ...reading import read_record
from ..cluster.cards import CardFacts, cards_here
from ..cluster.environment import processes_here
from ..cluster.processes import Joined

KEY = "cinemesh/cards"  # in the store, by machine


@dataclass
class CardWatch:
    """``ranks``: of the job, ``local`` of them on each machine. ``store``: None in a job of one process."""

    rank: int
    ranks: int
    local: int
    store: Store | None
    slowed: tuple[str, ...] = ()  # GPUs that were named last

    @classmethod
    def of(cls, place: Joined) -> CardWatch | None:
        """That of a rank; None where the job computes on CPUs."""
        if place.device == "cpu":
            return None
        ranks = place.meeting.world if place.meeting else 1
        store = place.meeting.store if place.meeting else None
        return cls(place.rank, ranks, processes_here(ranks), store)

    def tell(self) -> None:
        """What this machine's GPUs are now, if this rank speaks for it."""
        if self.store is not None and self.rank % self.local == 0:
            told = {"host": socket.gethostname(), "cards": [*map(asdict, cards_here()[0])]}
            self.store.set(f"{KEY}/{self.rank // self.local}", json.dumps(told))

    def read(self) -> dict[str, list[CardFacts]]:
        """By host, once all machines have said something. On rank 0."""
        if self.store is None:
            return {socket.gethostname(): cards_here()[0]}
        keys = [f"{KEY}/{machine}" for machine in range(-(-self.ranks // self.local))]
        if not self.store.check(keys):
            return {}
        said = [parse_json(text.decode(), "what a machine said of its GPUs", "") for text in self.store.multi_get(keys)]
        return {one["host"]: [read_record(CardFacts, card, "a GPU") for card in one["cards"]] for one in said}

    def told_of(self, rank: int) -> str:
        """What the GPU of a rank said last, in words."""
        machines = list(self.read().values())
        machine, index = divmod(rank, self.local)
        if machine >= len(machines) or index >= len(machines[machine]):
            return ""
        card = machines[machine][index]
        told = {"MHz": card.clock_mhz, "W": card.power_w, "degrees": card.temperature_c}
        numbers = [f"{value:.0f} {unit}" for unit, value in told.items() if value is not None]
        return f"GPU {card.index}: {', '.join([*numbers, *card.slowed])}" if numbers or card.slowed else ""

    def values(self, of: Mapping[str, Sequence[CardFacts]]) -> dict[str, float]:
        """Numbers of a report; none where no GPU is told of."""
        cards = [card for cards in of.values() for card in cards]
        found: dict[str, Sequence[float]] = {
            "gpu_power_w": [card.power_w for card in cards if card.power_w is not None],
            "gpu_clock_mhz": [card.clock_mhz for card in cards if card.clock_mhz is not None],
            "gpu_temperature_c": [card.temperature_c for card in cards if card.temperature_c is not None],
            "gpu_ecc_errors": [card.ecc_errors for card in cards if card.ecc_errors is not None],
            "gpus_slowed": [float(bool(card.slowed)) for card in cards],
        }
        of_all = {"gpu_power_w": fmean, "gpu_clock_mhz": min, "gpu_temperature_c": max}
        return {name: float(of_all.get(name, sum)(numbers)) for name, numbers in found.items() if numbers}

    def news(self, of: Mapping[str, Sequence[CardFacts]]) -> str | None:
        """Which GPUs' clocks are held down, and why, when that changed."""
        slowed = tuple(
            f"GPU {card.index} of {host}: {', '.join(card.slowed)}"
            for host, cards in of.items()
            for card in cards
            if card.slowed
        )
        if slowed == self.slowed:
            return None
        self.slowed = slowed
        return f"WARNING: clocks are held down: {'; '.join(slowed)}" if slowed else "no clock is held down any more"
