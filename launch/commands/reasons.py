"""Why a plan takes as long as it does, as text or JSON: of ``plan --explain`` and ``cinemesh explain`` (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.marks import marks_cost
from ...perf_model.prices.played import PlayedStep
from ...perf_model.prices.startup import hosts_start, start_up
from ...perf_model.report import explain
from ...perf_model.report.exchanges import Exchange, exchanges
from ...perf_model.report.explain import Sensitivity, describe
from ...perf_model.report.float8 import Float8, float8
from ...perf_model.report.waterfall import told, waterfall
from ...perf_model.search.request import Request
from ..tables import plain_table
from .reply import Changed, StartUpCost, Why

DISAGREES = 0.01  # relative difference between the search's step time and the whole step's that is told
EXPOSED, DUPLICATES = 12, 8  # rows shown
NUMBERS = (  # right-aligned
    *("ranks", "MB", "s", "of the step", "MFU so far", "sent GB", "alone s", "exposed s", "step s", "samples/s"),
    *("in bf16 s", "in fp8 s", "casts s"),
)


@dataclass(frozen=True)
class Reasons:
    """A plan's whole step, and what it is held against.

    ``step``: on the first of the buckets; ``whole_s``: the mean over all of them. ``searched_s``: the search's own step
    time of the plan, if it has one. ``rival``: the plan that lost to it, or that it loses to.
    """

    step: PlayedStep
    whole_s: float
    cluster: Cluster
    searched_s: float | None
    rival: PlayedStep | None
    sensitivities: list[Sensitivity]
    exchanges: list[Exchange]
    float8: list[Float8]

    @classmethod
    def of(
        cls, request: Request, step: PlayedStep, rival: PlayedStep | None, sensitivities: list[Sensitivity]
    ) -> Reasons:
        """Of a plan that no search found, on one bucket; its alternatives are priced here."""
        ways = exchanges(step, request.config, request.cluster), float8(step, request.cluster)
        return cls(step, step.step_s, request.cluster, None, rival, sensitivities, *ways)

    @property
    def won(self) -> bool:
        """Whether the plan takes less of every GPU for a sample than its rival."""
        return self.rival is None or self.step.gpu_s_per_sample <= self.rival.gpu_s_per_sample

    def against_rival(self) -> list[str]:
        """Term by term, where the slower of the two spends more."""
        if self.rival is None:
            return []
        winner, loser = (self.step, self.rival) if self.won else (self.rival, self.step)
        return explain.why_lost(winner, loser)

    @property
    def told(self) -> Why:
        """As ``--json`` prints it."""
        step = self.step
        return Why(
            whole_step_s=self.whole_s,
            searched_step_s=self.searched_s,
            hfu=explain.hfu(step, self.cluster),
            utilisation=explain.utilisation(step),
            binds=explain.binds(step),
            exposed=[row for row in explain.exposures(step) if row.exposed_s > 0],
            duplicates=explain.duplicates(step),
            runner_up=self.against_rival(),
            sensitivities=[
                Changed(
                    change=row.change,
                    plan=row.plan.to_dict() if row.plan else None,
                    samples_per_s=row.samples_per_s,
                    gain=row.gain,
                    note=row.note,
                )
                for row in self.sensitivities
            ],
            waterfall=waterfall(step, self.cluster),
            exchanges=self.exchanges,
            float8=self.float8,
            marks=marks_cost(step, self.cluster),
        )

    def print(self, console: Console) -> None:
        """As text."""
        step = self.step
        if self.searched_s is not None:
            difference = self.whole_s / self.searched_s - 1.0
            told = "" if abs(difference) <= DISAGREES else ": trust the whole step"
            console.print(
                f"\nbest plan, every record played: {self.whole_s:.3f} s, {difference:+.2%} from the search{told}"
            )
        print_waterfall(console, step, self.cluster)
        _lines(console, "what binds", explain.binds(step))
        busy = "  ".join(f"{lane} {share:.1%}" for lane, share in explain.utilisation(step).items())
        _lines(console, "busy share of the step", [busy])
        _lines(
            console,
            "exposed communication",
            [
                f"{e.name} ({e.kind}, {e.lane}): {e.exposed_s:.4f} s of {e.alone_s:.4f} s"
                for e in explain.exposures(step)[:EXPOSED]
                if e.exposed_s > 0
            ],
        )
        _lines(
            console,
            "duplicates: what every rank of an axis does or holds identically",
            [
                f"{d.name} on {d.axis} ({d.ranks} ranks, {d.count} times): {d.flops / 1e9:.1f} GFLOP, "
                f"{d.bytes / 1e9:.2f} GB written, {d.saved_s * 1e3:.2f} ms could be saved"
                for d in explain.duplicates(step)[:DUPLICATES]
            ],
        )
        if self.rival is not None:
            title = "why the runner-up lost" if self.won else f"where it loses to {describe(self.rival.plan)}"
            _lines(console, title, self.against_rival())
        changes = [f"{row.change}: {row.gain:+.1%} samples/s; {row.note}" for row in self.sensitivities]
        title = "what would change it" + (" (searched anew, not tuned, on both sides)" if self.searched_s else "")
        _lines(console, title, changes)
        print_alternatives(console, self.exchanges, self.float8)
        if (marks := marks_cost(step, self.cluster)) is not None:
            console.print(f"\n{marks.told()}")
        print_start_up(console, start_up_cost(step.plan, self.cluster))


def _lines(console: Console, title: str, rows: list[str]) -> None:
    if rows:
        console.print(f"\n{title}")
        for row in rows:
            console.print(f"  {row}")


def print_waterfall(console: Console, step: PlayedStep, cluster: Cluster) -> None:
    """Every loss between the chip's peak and the MFU, as a table."""
    console.print("\nwhere the time goes: from the chip's peak down, each loss on top of those above it")
    table = plain_table("", "s", "of the step", "MFU so far", "set by", right=NUMBERS, breaks=("", "set by"))
    for loss in told(waterfall(step, cluster)):
        table.add_row(loss.name, f"{loss.seconds:.3f}", f"{loss.share:.1%}", f"{loss.ceiling:.1%}", loss.set_by)
    left = explain.mfu(step, cluster)
    table.add_row("left: the MFU", f"{step.step_s * left:.3f}", f"{left:.1%}", "", "the model's FLOPs at the peak")
    console.print(table)


def print_alternatives(console: Console, over_cp: list[Exchange], in_float8: list[Float8]) -> None:
    """What the design gives away: other exchanges over cp, and fp8, as tables."""
    console.print(
        "\nalternatives, priced but not runnable here: other exchanges over cp than the plan's own, the first"
    )
    if over_cp:
        table = plain_table("", "sent GB", "alone s", "exposed s", "step s", "samples/s", right=NUMBERS)
        for row in over_cp:
            if not row.problem:
                seconds = (f"{value:.3f}" for value in (row.alone_s, row.exposed_s, row.step_s))
                table.add_row(row.name, f"{row.sent_bytes / 1e9:.1f}", *seconds, f"{row.gain:+.1%}")
        console.print(table)
    else:
        console.print("  none: cp is 1")
    if any(not one.problem for one in in_float8):
        console.print("alternatives, priced but not runnable here: products of the blocks in fp8")
        table = plain_table("", "in bf16 s", "in fp8 s", "casts s", "step s", "samples/s", right=NUMBERS)
        for one in in_float8:
            seconds = (f"{value:.3f}" for value in (one.linear_s, one.float8_s, one.cast_s, one.step_s))
            table.add_row(one.name, *seconds, f"{one.gain:+.1%}")
        console.print(table)
    for one in (*over_cp, *in_float8):
        if one.problem:
            console.print(f"  no {one.name}: {one.problem}")
    for rates in dict.fromkeys(one.rates for one in in_float8 if one.rates):
        console.print(f"  fp8 rates: {rates}")


def start_up_cost(plan: Plan, cluster: Cluster) -> StartUpCost:
    """The communicators that a rank holds, with their bytes and seconds, each and in all."""
    rows = start_up(plan, cluster)
    return StartUpCost(
        communicators=len(rows),
        bytes=sum(row.bytes for row in rows),
        seconds=sum(row.seconds for row in rows),
        each=rows,
        hosts=hosts_start(plan, cluster),
    )


def print_start_up(console: Console, cost: StartUpCost) -> None:
    """The same as a table."""
    if cost.hosts is None:
        return
    console.print(
        f"\ncommunicators of a rank: {cost.communicators}, {cost.bytes / 1e9:.2f} GB, {cost.seconds:.1f} s to make "
        "when the job starts (from what is published of whole jobs)"
    )
    columns = ("communicator", "ranks", "thread blocks", "priority", "MB", "s")
    table = plain_table(*columns, right=NUMBERS, breaks=("ranks",))
    for row in cost.each:
        table.add_row(
            row.name,
            f"{row.ranks:,}",
            str(row.ctas) if row.ctas else "NCCL's",
            "high" if row.high_priority else "normal",
            f"{row.bytes / 1e6:.0f}",
            f"{row.seconds:.1f}",
        )
    console.print(table)
    console.print(cost.hosts.told())
