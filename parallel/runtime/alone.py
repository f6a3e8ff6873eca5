"""Communicators of one process that stands for a whole plan: its programs run here, without the other ranks."""

from __future__ import annotations

from torch import Tensor

from ..ir.communicators import communicator_name
from ..ir.layout import Axes
from ..ir.plan import Plan
from ..ir.records import lane_name
from .comm import BoundCollective, Communicator
from .ledger import Entry


class Alone(Communicator):
    """Stands for all other ranks: shapes and order are theirs, values are this rank's own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ledger: list[Entry] = []
        self.record = True

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        """A gather repeats this rank's part, a reduction keeps it; both are done when they are issued."""
        payload = max(source.numel(), output.numel()) * source.element_size()
        entry = Entry(kind, lane_name(axes), communicator_name(axes, kind), payload)
        ranks = self.plan.size(axes)

        def issue() -> None:
            self.ledger.append(entry)
            if kind == "all_gather":
                output.view(ranks, -1).copy_(source.view(1, -1).expand(ranks, -1))
            elif kind == "reduce_scatter":
                output.view(-1).copy_(source.view(ranks, -1)[0])

        return BoundCollective(issue, lambda: None)

    def forget(self) -> None:
        """Nothing waits to be waited for."""


class Silent(Communicator):
    """Collectives that do nothing: one rank's compute, to be timed."""

    def __init__(self) -> None:
        self.record = False

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        return BoundCollective(lambda: None, lambda: None)
