"""A cluster file from logs of nccl-tests: the links' rates and latencies, fitted over a shipped cluster (torch-free).

A log says its ranks and their hosts, and a table: size, count, type, redop, root, then time, algbw, busbw and wrong
values, out of place and in place (NVIDIA/nccl-tests, src/common.cu). Tests within one NVLink domain scale its rates and
its latencies, tests over several the NICs' rate and the latency of a hop between them, each until the prices of
``network.py`` meet the times. What no log shows stays the base's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from ...documents import file_text, quoted, write_yaml
from ...errors import CinemeshError
from ...files import atomic_file
from ..clusters.cluster import Cluster, load
from ..prices.network import Group, Network, ring_group
from .descent import descend

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
STEPS = (2.0, 1.3, 1.1, 1.03, 1.01, 1.003, 1.001)  # by which a scale is moved, one after the other
LEAST_GAIN = 1e-6  # of the error, for a step to be kept
LEAST_SHARE = 0.5  # of a time, that latency must be in some row for it to be told from the rate

_PREFIX = re.compile(r"^\[\d+,\d+\]<stdout>:\s?")  # of mpirun --tag-output
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s.*\bon\s+(\S+)\s+device\s")
_NAME = re.compile("|".join(PROGRAMS))
_BEGIN, _END = "# nThread", "# Avg bus bandwidth"
_COLUMNS = 13


@dataclass(frozen=True)
class LoggedTest:
    """One run of one program. ``seconds`` by bytes of the full side, the mean of out of place and in place."""

    path: Path
    kind: str
    ranks: int
    servers: int
    seconds: Mapping[int, float]

    @property
    def title(self) -> str:
        """In a line."""
        return f"{self.kind} over {self.ranks} ranks on {self.servers} server{'s' if self.servers > 1 else ''}"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[LoggedTest]:
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


def _test(path: Path, lines: Sequence[str], begin: int, end: int) -> LoggedTest:
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
    return LoggedTest(path, kind, len(hosts), len(each), seconds)


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


# -- fitting ----------------------------------------------------------------------------------------------------------

LATENCIES = {  # constants that latency scales, within a domain and between domains
    True: ("ring_base_s", "ring_hop_s", "tree_base_s", "tree_hop_s", "nvls_s"),
    False: ("ring_network_hop_s", "tree_network_hop_s", "nvls_tree_network_hop_s"),
}


def group_on(test: LoggedTest, cluster: Cluster) -> Group:
    """Where a test's ranks lie. Raises CinemeshError where the cluster's servers cannot hold them."""
    each, server = test.ranks // test.servers, cluster.gpus_per_server
    if server % each or test.servers > cluster.topology.servers:
        raise CinemeshError(
            f"the log {test.path}: {each} ranks on each of {test.servers} servers, and {cluster.name} has "
            f"{cluster.topology.servers} of {server} GPUs",
            remedy="name with --base the cluster that it was run on",
        )
    return ring_group(cluster, test.ranks, server // each if test.servers > 1 else 1)


def log_error(cluster: Cluster, tests: Sequence[LoggedTest]) -> float:
    """Mean of |log(predicted / measured)|."""
    network = Network(cluster)
    return fmean(
        abs(math.log(network.collective(test.kind, size, group_on(test, cluster)).seconds / seconds))
        for test in tests
        for size, seconds in test.seconds.items()
    )


def scaled(cluster: Cluster, inside: bool, rate: float, latency: float = 1.0) -> Cluster:
    """With the links within a domain, or between domains, that much faster, and their latencies that much longer."""
    changed = cluster.with_(**{"nvlink_scale" if inside else "nic_scale": rate})
    for name in LATENCIES[inside]:
        value = getattr(cluster.nccl, name)
        more = {k: v * latency for k, v in value.items()} if isinstance(value, Mapping) else value * latency
        changed = changed.with_(**{f"nccl.{name}": more})
    return changed


def _tells_latency(cluster: Cluster, tests: Sequence[LoggedTest]) -> bool:
    network = Network(cluster)
    costs = (network.collective(t.kind, size, group_on(t, cluster)) for t in tests for size in t.seconds)
    return any(cost.latency_s >= LEAST_SHARE * cost.seconds for cost in costs)


def fit(base: Cluster, tests: Sequence[LoggedTest]) -> Cluster:
    """The base with rates and latencies that follow the tests: those within a domain first, then the others."""
    cluster = base
    for inside in (True, False):
        own = [test for test in tests if (group_on(test, base).domains == 1) == inside]
        if own:
            cluster = _scaled_to(cluster, inside, own)
    return cluster


def _scaled_to(cluster: Cluster, inside: bool, tests: Sequence[LoggedTest]) -> Cluster:
    def error(scales: Sequence[float]) -> float:
        return log_error(scaled(cluster, inside, *scales), tests)

    start = [1.0, 1.0] if _tells_latency(cluster, tests) else [1.0]  # of rates, of latencies
    return scaled(cluster, inside, *descend(start, error, STEPS, gain=LEAST_GAIN))


# -- the file ---------------------------------------------------------------------------------------------------------


def _numbers(base: Cluster, made: Cluster) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(section, name, number) of every constant that the fit moved, in the unit that the base has it in."""
    paths = [f"topology.{name}" for name in ("nvlink_bytes_per_s", "nic_bytes_per_s")]
    paths += [f"nccl.{name}" for name in ("server_channel_bytes_per_s", "nvls_channel_bytes_per_s")]
    paths += [f"nccl.{name}" for names in LATENCIES.values() for name in names]
    for path in paths:
        section, name = path.split(".")
        before, after = (getattr(getattr(cluster, section), name) for cluster in (base, made))
        if before == after:
            continue
        fact = base.facts[path]
        if isinstance(after, Mapping):
            value: object = {k: _short(fact.value[k] * after[k] / before[k]) for k in after}
        else:
            value = _short(fact.value * after / before)
        yield section, name, {"value": value, "unit": fact.unit, "origin": "fitted", "source": "nccl-tests"}


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def write(logs: Sequence[Path], base_name: str, out: Path) -> tuple[Cluster, list[tuple[str, float]]]:
    """Read the logs, fit, write the cluster file. It as it is read back, and the mean error of its price by test.

    Raises CinemeshError for what is no such log, and for a base without GPUs or without such servers.
    """
    base, tests = load(base_name), [test for log in logs for test in read_log(log)]
    if base.nccl is None:
        raise CinemeshError(f"{base_name} is no GPU cluster", remedy="name with --base the one that the logs are of")
    made = fit(base, tests)
    newest = max(log.stat().st_mtime for log in logs)
    shown = "; ".join(dict.fromkeys(test.title for test in tests))
    values: dict[str, Any] = {
        "name": out.stem,
        "about": f"{base.about}; links as nccl-tests measured them",
        "base": [base_name],
        "sources": {"nccl-tests": {"title": f"nccl-tests: {shown}", "date": str(date.fromtimestamp(newest))}},
    }
    for section, name, number in _numbers(base, made):
        values.setdefault(section, {})[name] = number
    with atomic_file(out) as unfinished:
        unfinished.write_text(write_yaml(values), encoding="utf-8")
    cluster = load(str(out))
    return cluster, [(test.title, math.expm1(log_error(cluster, [test]))) for test in tests]
