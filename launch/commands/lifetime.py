"""What a plan's run lives through, as a record and as text (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ...errors import CinemeshError
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.lifetime import Lifetime, lifetime, operations_of
from ...perf_model.prices.restart import SHAPE_RECORDS
from ...perf_model.search.planner import Search
from ...perf_model.search.request import Request
from ..tables import plain_table

NUMBERS = ("failures", "more failures")
CAUSES = {
    "pauses": "pauses for checkpoints",
    "repeated": "steps made again",
    "noticing": "until a failure is noticed",
    "waiting": "waiting for a node",
    "restarting": "starting again",
}


def check_asked(cluster: Cluster, goodput: bool, price: float | None) -> None:
    """Raise CinemeshError for a price without hours, and for a cluster file that says nothing of failures."""
    if goodput:
        operations_of(cluster)
    elif price is not None:
        raise CinemeshError("--price is of a GPU hour, and hours are told with failures", remedy="add --goodput")


@dataclass(frozen=True)
class Lives:
    """Of the best plan of a search; and the places of it and its near-ties, by samples a day where failures are rare.

    Near-ties cannot be told apart by their steps: what a failure costs may tell them.
    """

    best: Lifetime | None
    order: list[int]

    @classmethod
    def of(cls, request: Request, found: Search, asked: bool) -> Lives:
        """None and none where they were not ``asked`` for."""
        if not asked:
            return cls(None, [])
        ties = {id(choice) for choice in found.near_ties()}
        places = [place for place, choice in enumerate(found.choices) if place == 0 or id(choice) in ties]
        lives = {place: _lifetime(request, found, place) for place in places}
        order = sorted(places, key=lambda place: -lives[place].usual.samples_per_day)
        return cls(lives[0], order)

    def print(self, console: Console, price: float | None) -> None:
        """With the ``price`` of a GPU hour, where there is one."""
        if self.best is not None:
            print_lifetime(console, "the best plan", self.best, price)
        if len(self.order) > 1:
            console.print(
                f"near-ties by samples a day with failures: {', '.join(str(place + 1) for place in self.order)}"
            )


def _lifetime(request: Request, found: Search, place: int) -> Lifetime:
    choice = found.choices[place]
    samples = choice.samples_per_s * choice.step_s  # of a step: the mean over latents
    records = [SHAPE_RECORDS] * len(request.buckets)
    return lifetime(request.config, choice.plan, request.cluster, choice.step_s, samples, records)


def print_lifetime(console: Console, what: str, lives: Lifetime, price: float | None) -> None:
    """Two columns: failures as rare, and as often, as the cluster file says. ``price``: of a GPU hour."""
    console.print(
        f"\n{what} with failures, simulated: a checkpoint of {lives.checkpoint_bytes / 1e9:,.0f} GB, "
        f"{lives.rank_bytes / 1e9:.2f} GB of a rank, pauses the run for {lives.pause_s:.2g} s and holds "
        f"{lives.write_s:.2g} s later; from a failure that is noticed to the next step {lives.restart_s:.0f} s"
    )
    told = ", ".join(f"{part.name} {part.seconds:.1f}" for part in lives.restart)
    console.print(f"from a failure to the next step, s: {told}")
    table = plain_table("", *NUMBERS, right=NUMBERS)
    both = (lives.usual, lives.low)

    def row(what: str, *said: str) -> None:
        table.add_row(what, *said)

    row("one every", *(f"{one.mtbf_s / 3600:.1f} h" for one in both))
    row("checkpoint every, steps", *(f"{one.steps:,}" for one in both))
    row("  that is", *(f"{one.interval_s / 60:.1f} min" for one in both))
    row("  best simulated, steps", *(f"{one.best_steps:,}" for one in both))
    row("spare nodes worth having", *(str(one.spares) for one in both))
    row("goodput", *(f"{one.shares.training:.1%}" for one in both))
    for cause, told in CAUSES.items():
        row(f"  lost: {told}", *(f"{getattr(one.shares, cause):.2%}" for one in both))
    row("samples a day", *(f"{one.samples_per_day:,.0f}" for one in both))
    row("GPU hours of a million samples", *(f"{one.gpu_hours:,.0f}" for one in both))
    if price is not None:
        row(f"  at {price:g} each", *(f"{one.gpu_hours * price:,.0f}" for one in both))
    copies = lives.in_memory
    if copies is not None:
        with_them = copies.training, copies.training_low
        row(f"goodput with logging.memory_every: {copies.steps}", *(f"{one:.1%}" for one in with_them))
    console.print(table)
    if copies is not None:
        costs = "no more: another has its shards" if copies.replicated else "the steps since the last checkpoint"
        console.print(
            f"copies in the servers' memory every {copies.steps:,} steps take {copies.server_bytes / 1e9:,.0f} GB of "
            f"each and a pause of {copies.pause_s:.2g} s; a server that is lost costs {costs}"
        )
