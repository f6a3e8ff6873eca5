"""``judge score``: what people's votes say of the systems (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...errors import CinemeshError
from ...evaluation.votes import KEY_FILE, read_key, read_votes
from ...files import check_output_file
from ..tables import new_console, plain_table
from ..written import wrote

if TYPE_CHECKING:  # numpy loads with it
    from ...evaluation.against_loss import AxisAgainstLoss
    from ...evaluation.net_win import NetWin
    from ...evaluation.score import Comparison, JudgedScore

NUMBERS = (
    *("prompts", "votes", "won", "tied", "lost", "net win", "95 %", "deviation", "side bias", "alpha", "more prompts"),
    *("rating", "decided", "left", "identical", "repeated"),
)


def run(
    *,
    votes: Path,
    key: Path | None,
    deviation: float,
    losses: Sequence[str] = (),
    plot: Path | None = None,
    as_json: bool,
) -> None:
    """Print the table of ``votes``. ``deviation``: points that the net win's shall come down to.

    ``losses``: ``SYSTEM=LOSS`` each, to compare with net wins, and ``plot`` where. Raises CinemeshError for files that
    cannot be read or do not fit together, and where no vote is left to count.
    """
    from ...evaluation.against_loss import against_loss, draw_against_loss
    from ...evaluation.score import score_votes

    given = _losses(losses)
    if plot is not None:
        _check_plot(plot, given)
    judgement = read_key(key or votes.with_name(KEY_FILE))
    found = score_votes(read_votes(votes, judgement), judgement)
    compared = against_loss(found, given) if given else []
    if plot is not None:
        draw_against_loss(plot, compared, given)
        wrote(plot, "open it", "validation losses against net wins")
    if as_json:
        values = _values(found, deviation) | {"against_loss": [asdict(of) for of in compared]}
        print(json.dumps(values, indent=1, ensure_ascii=False))
        return
    console = new_console()
    for name, picked in found.systems.items():
        if picked > 1:
            console.print(f"{name}: the best of {picked} clips of every prompt, as its folder was said to hold")
    _print_comparisons(console, found, deviation)
    _print_groups(console, found, deviation)
    _print_ratings(console, found)
    _print_against_loss(console, compared)
    _print_raters(console, found)


def _losses(texts: Sequence[str]) -> dict[str, float]:
    """Raises CinemeshError for a text that is no SYSTEM=LOSS, and for a system twice."""
    losses: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            loss = float(number)
        except ValueError:
            loss = None
        if not name or loss is None:
            raise CinemeshError(f"--loss {text!r} is no SYSTEM=LOSS", remedy="write for example --loss new=0.93")
        if name in losses:
            raise CinemeshError(f"--loss says twice what the loss of {name} is", remedy="leave one of them out")
        losses[name] = loss
    return losses


def _check_plot(plot: Path, losses: Mapping[str, float]) -> None:
    if not losses:
        raise CinemeshError(f"--plot {plot} draws losses against net wins", remedy="add --loss SYSTEM=LOSS of two")
    if plot.suffix != ".png":
        raise CinemeshError(f"--plot {plot} is no .png file", remedy="name one, losses.png")
    check_output_file(plot, "--plot")


def _values(found: JudgedScore, deviation: float) -> dict[str, Any]:
    values = asdict(found)
    for row, comparison in zip(values["comparisons"], found.comparisons, strict=True):
        row["more_prompts"] = comparison.net.more_prompts(deviation / 100)
        for name, net in comparison.groups.items():
            row["groups"][name]["more_prompts"] = net.more_prompts(deviation / 100)
    return values


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def _interval(net: NetWin) -> str:
    return "" if net.low is None else f"{_points(net.low)} to {_points(net.high)}"


def _reasons(comparison: Comparison) -> str:
    return ", ".join(f"{name} {first}:{second}" for name, (first, second) in comparison.reasons.items())


def _print_comparisons(console: Console, found: JudgedScore, deviation: float) -> None:
    columns = (
        *("axis", "of", "over", "prompts", "votes", "won", "tied", "lost", "net win", "95 %", "deviation"),
        *("side bias", "alpha", "more prompts", "reasons"),
    )
    table = plain_table(*columns, right=NUMBERS, breaks=("side bias",))
    for c in found.comparisons:
        net = c.net
        table.add_row(
            c.axis,
            c.first,
            c.second,
            *map(str, (net.prompts, c.votes, net.wins, net.ties, net.losses)),
            _points(net.value),
            _interval(net),
            "" if net.deviation is None else f"{100 * net.deviation:.1f}",
            _points(net.side_bias),
            "" if c.agreement is None else f"{c.agreement:.2f}",
            "" if (more := net.more_prompts(deviation / 100)) is None else f"{more:,}",
            _reasons(c),
        )
    console.print(table)
    console.print(
        "won, tied, lost: prompts by the majority of their votes, a tie where no answer has the most. Net win: won "
        "less lost, of 100 prompts, side bias removed; its interval and deviation by bootstrap over prompts, within "
        "each concept and level of motion. Side bias: points by which left is pressed too often. Alpha: "
        "Krippendorff's, 1 where all raters agree, 0 as by chance. More prompts: until the deviation is "
        f"{deviation:g}. Reasons: of votes for the one and for the other."
    )
    for c in found.comparisons:
        if c.short or c.unjudged:
            console.print(
                f"{c.axis}, {c.first} and {c.second}: {c.short} prompts have fewer votes than the axis wants and count "
                f"as they are; {c.unjudged} have none"
            )


def _group(net: NetWin, deviation: float) -> str:
    more = net.more_prompts(deviation / 100)
    return f"{_points(net.value)} ({net.prompts}{'' if more is None else f', {more:,} more'})"


def _print_groups(console: Console, found: JudgedScore, deviation: float) -> None:
    names = [*dict.fromkeys(name for c in found.comparisons for name in c.groups)]
    if not names:
        return
    console.print()
    table = plain_table("net win by", "of", "over", *names, right=names, breaks=names[:1])
    for c in found.comparisons:
        cells = [_group(c.groups[name], deviation) if name in c.groups else "" for name in names]
        table.add_row(c.axis, c.first, c.second, *cells)
    console.print(table)
    console.print(f"in brackets: prompts, and how many more until the deviation of that group's is {deviation:g}")


def _print_ratings(console: Console, found: JudgedScore) -> None:
    if not found.ratings:
        return
    console.print()
    table = plain_table("axis", "system", "rating", "95 %", right=NUMBERS)
    for axis in found.ratings:
        for each in axis.ratings:
            table.add_row(axis.axis, each.system, f"{each.rating:.0f}", f"{each.low:.0f} to {each.high:.0f}")
    console.print(table)
    console.print("rating: Bradley and Terry's on the scale of Elo, mean 1000; 400 points are odds of ten to one")
    for axis in found.ratings:
        if axis.why:
            console.print(f"{axis.axis}: no rating, since {axis.why}")


def _print_against_loss(console: Console, found: Sequence[AxisAgainstLoss]) -> None:
    if not found:
        return
    console.print()
    table = plain_table("axis", "lower loss", "than", "by", "net win", "95 %", right=("by", *NUMBERS))
    for of in found:
        for pair in of.pairs:
            ends = "" if pair.low is None else f"{_points(pair.low)} to {_points(pair.high)}"
            table.add_row(of.axis, pair.lower, pair.higher, f"{pair.gap:.4g}", _points(pair.net_win), ends)
    console.print(table)
    for of in found:
        if of.rank_correlation is not None:
            console.print(
                f"{of.axis}: rank correlation of gaps in loss and net wins {of.rank_correlation:+.2f}, of pairs that "
                "share systems"
            )


def _print_raters(console: Console, found: JudgedScore) -> None:
    console.print()
    table = plain_table("rater", "votes", "decided", "left", "identical", "repeated", "audit", right=NUMBERS)
    for rater in found.raters:
        said = f"LEFT OUT: {rater.left_out}" if rater.left_out else ", ".join(rater.notes) or "nothing found"
        table.add_row(
            rater.name,
            str(rater.votes),
            str(rater.decided),
            str(rater.left),
            f"{rater.preferred}/{rater.identical}",
            f"{rater.changed}/{rater.repeated}",
            said,
        )
    console.print(table)
    console.print(
        "decided: votes that are no tie, and how many were for the left side. Identical: preferences between the same "
        "clip twice. Repeated: other answers when a pair came again."
    )
