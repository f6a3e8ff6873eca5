"""Logs of nccl-tests, read: the times of a collective by its bytes (torch-free). ``links.py`` fits a cluster to them.

A log says its ranks and their hosts, and a table: size, count, type, redop, root, then time, algbw, busbw and wrong
values, out of place and in place (NVIDIA/nccl-tests, src/common.cu).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean

from ...documents import file_text, quoted
from ...errors import CinemeshError
from ..clusters.cluster import Cluster
from . import links
from .links import LinkSource, LinkTest

# name of the program: (kind of collective, its redop, bus bandwidth over algorithm bandwidth of n ranks)
PROGRAMS: Mapping[str, tuple[str, bool, Callable[[int], float]]] = {
    "all_reduce_perf": ("all_reduce", True, lambda n: 2.0 * (n - 1) / n),
    "reduce_scatter_perf": ("reduce_scatter", True, lambda n: (n - 1) / n),
    "all_gather_perf": ("all_gather", False, lambda n: (n - 1) / n),
    "alltoall_perf": ("all_to_all", False, lambda n: (n - 1) / n),
    "sendrecv_perf": ("send_recv", True, lambda n: 1.0),
}
PRINTED = 0.011  # GB/s: bandwidths have two decimals
FACTOR = 0.03  # relative: of what two rounded bandwidths say of their ratio

_PREFIX = re.compile(r"^\[\d+,\d+\]<stdout>:\s?")  # of mpirun --tag-output
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s.*\bon\s+(\S+)\s+device\s")
_NAME = re.compile("|".join(PROGRAMS))
_BEGIN, _END = "# nThread", "# Avg bus bandwidth"
_COLUMNS = 13


def read_log(path: Path) -> list[LinkTest]:
    """The tests of a log. Raises CinemeshError, with the line, for what is none, is cut short, or cannot be."""
    remedy = "give what a program of nccl-tests printed"
    lines = [_PREFIX.sub("", line).strip() for line in file_text(path, "the log", remedy).splitlines()]
    starts, behind = [0], 0  # a test's lines begin behind those of the one before: some versions name it first
    for i, line in enumerate(lines):
        if line.startswith(_BEGIN) and behind:
            starts.append(behind)
            behind = 0
        elif line[:1].isdigit() or line.startswith(_END):
            behind = i + 1
    if not any(line.startswith(_BEGIN) for line in lines):
        raise _wrong(path, None, f"it has no line '{_BEGIN} ...'", remedy)
    return [_test(path, lines, start, end) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _wrong(path: Path, line: int | None, what: str, remedy: str) -> CinemeshError:
    return CinemeshError(f"the log {path}{f', line {line + 1}' if line is not None else ''}: {what}", remedy=remedy)


def _test(path: Path, lines: Sequence[str], begin: int, end: int) -> LinkTest:
    named = _NAME.search("\n".join(lines[begin:end]))
    hosts = [match.group(2) for line in lines[begin:end] if (match := _RANK.match(line))]
    each = Counter(hosts)
    if len(hosts) < 2:
        raise _wrong(path, begin, f"{len(hosts)} '# Rank' lines follow", "run it over two ranks or more")
    if len({*each.values()}) > 1:
        shown = ", ".join(f"{count} on {host}" for host, count in each.items())
        raise _wrong(path, begin, f"its ranks are {shown}", "run as many on every server")
    rows = [(i, _row(path, i, lines[i])) for i in range(begin, end) if lines[i][:1].isdigit()]
    if not rows:
        raise _wrong(path, begin, "no row of a table follows", "let the test run to its end")
    if not any(line.startswith(_END) for line in lines[begin:end]):
        raise _wrong(path, rows[-1][0], f"it ends without '{_END}'", "let the test run to its end")
    kind = _kind(path, rows, len(hosts), named.group() if named else None)
    seconds = {row.size: fmean(row.seconds) for _, row in rows if row.size}
    return LinkTest(f"the log {path}", kind, len(hosts), len(each), seconds)


@dataclass(frozen=True)
class _Row:
    size: int
    reduces: bool
    seconds: tuple[float, float]
    algorithm: tuple[float, float]
    bus: tuple[float, float]


def _row(path: Path, at: int, line: str) -> _Row:
    columns = line.split()
    if len(columns) != _COLUMNS:
        raise _wrong(path, at, f"{len(columns)} columns, not {_COLUMNS}", "give the table as nccl-tests prints it")
    try:
        size = int(columns[0])
        numbers = [float(columns[i]) for i in (5, 6, 7, 9, 10, 11)]
    except ValueError:
        raise _wrong(path, at, f"{quoted(line)} holds what is no number", "give the table as printed") from None
    times, algorithm, bus = numbers[0::3], numbers[1::3], numbers[2::3]
    for wrong in (columns[8], columns[12]):
        if wrong not in ("0", "0e+00", "N/A"):
            raise _wrong(path, at, f"{wrong} wrong values", "mend the network first: such times say nothing")
    for time_us, rate in zip(times, algorithm, strict=True):
        if not time_us > 0.0 or abs(size / time_us / 1e3 - rate) > PRINTED + FACTOR * rate:
            said = f"{size} bytes in {time_us:g} us are not {rate:g} GB/s"
            raise _wrong(path, at, said, "give the table as nccl-tests prints it, times in us")
    return _Row(size, columns[3] != "none", (times[0] * 1e-6, times[1] * 1e-6), tuple(algorithm), tuple(bus))  # type: ignore[arg-type]


def _kind(path: Path, rows: Sequence[tuple[int, _Row]], ranks: int, named: str | None) -> str:
    """Which collective it was: as named, or by the redop and by the two bandwidths of the largest row."""
    at, row = max(rows, key=lambda found: found[1].size)
    factor = row.bus[0] / row.algorithm[0] if row.algorithm[0] else 0.0

    def fits(name: str) -> bool:
        _, reduces, of = PROGRAMS[name]
        return reduces == row.reduces and abs(factor / of(ranks) - 1.0) <= FACTOR

    if named is not None:
        if fits(named):
            return PROGRAMS[named][0]
        said = f"busbw / algbw = {factor:.3g} and redop {'sum' if row.reduces else 'none'} are not those of {named}"
        raise _wrong(path, at, f"{said} over {ranks} ranks", "give the log of one program")
    likely = [name for name in PROGRAMS if fits(name)]
    if len(likely) != 1:
        could = " or ".join(likely) or f"none that is known, with busbw / algbw = {factor:.3g} over {ranks} ranks"
        raise _wrong(
            path, at, f"it may be of {could}", "put the program's name in a line at its head: # all_gather_perf"
        )
    return PROGRAMS[likely[0]][0]


def write(logs: Sequence[Path], base_name: str, out: Path) -> tuple[Cluster, list[tuple[str, float]]]:
    """Read the logs, fit, write the cluster file; as :func:`links.write`. Raises CinemeshError for what is no log."""
    tests = [test for log in logs for test in read_log(log)]
    newest = date.fromtimestamp(max(log.stat().st_mtime for log in logs))
    return links.write(tests, base_name, LinkSource("nccl-tests", "nccl-tests", str(newest)), out)
