"""Logs of nccl-tests: the links that made the times are found again, and what is no such log is one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from nccl_log import printed
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.perf_model.calibration.links import LATENCIES, fit, scaled
from cinemesh.perf_model.calibration.nccl_logs import read_log, write
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.network import Network, ring_group

BASE = load("dgx-h100-ib400")
LOG = printed("all_gather_perf", BASE, 8, 8)


def logged(folder: Path, text: str, name: str = "nccl.log") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("program", ["all_gather_perf", "reduce_scatter_perf", "all_reduce_perf"])
@pytest.mark.parametrize(("inside", "ranks", "rate", "latency"), [(True, 8, 0.8, 1.5), (False, 32, 0.5, 2.0)])
def test_the_links_that_made_the_times_are_found(
    tmp_path: Path, program: str, inside: bool, ranks: int, rate: float, latency: float
) -> None:
    """Against known rates and latencies, through the printed text: two decimals of a microsecond are all it has."""
    truth = scaled(BASE, inside, rate, latency)
    found = fit(BASE, read_log(logged(tmp_path, printed(program, truth, ranks, 8))))
    ends = ("nvlink_bytes_per_s", "nic_bytes_per_s")
    for name in ends:
        assert getattr(found.topology, name) == pytest.approx(getattr(truth.topology, name), rel=0.005), name
    assert found.nccl is not None and truth.nccl is not None
    # Only what the test runs tells its latency: of a gather no tree, of a hop between servers none inside.
    name = LATENCIES[inside][0]
    assert getattr(found.nccl, name)["Simple"] == pytest.approx(getattr(truth.nccl, name)["Simple"], rel=0.02)


def test_the_file_keeps_all_else_and_says_where_it_is_from(tmp_path: Path) -> None:
    truth = scaled(scaled(BASE, True, 0.9, 1.2), False, 0.6, 1.5)
    near = logged(tmp_path, printed("all_gather_perf", truth, 8, 8), "near.log")
    far = logged(tmp_path, printed("all_gather_perf", truth, 64, 8), "far.log")
    made, errors = write([near, far], "dgx-h100-ib400", tmp_path / "mine.yaml")
    assert [title for title, _ in errors] == [
        "all_gather over 8 ranks on 1 server",
        "all_gather over 64 ranks on 8 servers",
    ]
    assert max(error for _, error in errors) < 0.01
    fitted = {path for path, fact in made.facts.items() if fact.source.startswith("nccl-tests: ")}
    assert {"topology.nic_bytes_per_s", "topology.nvlink_bytes_per_s", "nccl.ring_base_s"} <= fitted
    assert all(made.facts[path] == fact for path, fact in BASE.facts.items() if path not in fitted)
    group = ring_group(made, 64)
    for size in (2**20, 2**30):
        asked = ("all_gather", size, group)
        assert Network(made).collective(*asked).seconds == pytest.approx(
            Network(truth).collective(*asked).seconds, rel=0.02
        )


def test_large_sizes_alone_leave_the_latency_alone(tmp_path: Path) -> None:
    """A rate that is 10 % lower, and times of milliseconds: nothing there tells what a microsecond is."""
    truth = scaled(BASE, False, 0.9, 1.0)
    text = printed("all_gather_perf", truth, 32, 8, sizes=(2**30, 2**33))
    found = fit(BASE, read_log(logged(tmp_path, text)))
    assert found.topology.nic_bytes_per_s == pytest.approx(truth.topology.nic_bytes_per_s, rel=0.005)
    assert found.nccl == BASE.nccl


def test_a_rack_of_trays_is_one_domain(tmp_path: Path) -> None:
    rack = load("gb200-nvl72-ib400")
    truth = scaled(rack, True, 0.7, 1.0)
    found = fit(rack, read_log(logged(tmp_path, printed("all_reduce_perf", truth, 72, 4))))
    assert found.topology.nvlink_bytes_per_s == pytest.approx(truth.topology.nvlink_bytes_per_s, rel=0.005)
    assert found.topology.nic_bytes_per_s == rack.topology.nic_bytes_per_s


def test_tests_are_told_apart_in_one_file_and_without_their_names(tmp_path: Path) -> None:
    """By the operation and by the two bandwidths; mpirun's tags and a second test's header between them."""
    both = printed("all_reduce_perf", BASE, 8, 8, named=False) + printed(
        "reduce_scatter_perf", BASE, 16, 8, named=False
    )
    tagged = "".join(f"[1,0]<stdout>:{line}\n" for line in both.splitlines())
    tests = read_log(logged(tmp_path, tagged))
    assert [(test.kind, test.ranks, test.servers) for test in tests] == [
        ("all_reduce", 8, 1),
        ("reduce_scatter", 16, 2),
    ]
    named = printed("all_gather_perf", BASE, 8, 8) + printed("alltoall_perf", BASE, 8, 8)
    assert [test.kind for test in read_log(logged(tmp_path, named))] == ["all_gather", "all_to_all"]
    with pytest.raises(CinemeshError, match="it may be of all_gather_perf or alltoall_perf; put the program's name"):
        read_log(logged(tmp_path, printed("all_gather_perf", BASE, 8, 8, named=False)))


ROW = next(line for line in LOG.splitlines() if line.split()[:1] == ["2097152"])
WRONG = {
    "no log": ("hello\n", "it has no line '# nThread"),
    "no ranks": ("\n".join(line for line in LOG.splitlines() if "Rank" not in line), "0 '# Rank' lines follow"),
    "uneven": (LOG.replace("on host000 device  7", "on host001 device  7"), "its ranks are 7 on host000, 1 on host001"),
    "no table": ("\n".join(line for line in LOG.splitlines() if not line.strip()[:1].isdigit()), "no row of a table"),
    "cut short": (LOG[: LOG.index("# Out of bounds")], "it ends without '# Avg bus bandwidth'"),
    "a column less": (LOG.replace(ROW, ROW.removesuffix("    N/A")), r"line \d+: 12 columns, not 13"),
    "no number": (LOG.replace(ROW, ROW.replace(ROW.split()[5], "fast")), "holds what is no number"),
    "wrong values": (LOG.replace(ROW, ROW.replace("      0 ", "     12 ")), "12 wrong values"),
    "milliseconds": (LOG.replace(ROW, ROW.replace(ROW.split()[5], "0.05")), "bytes in 0.05 us are not"),
    "no time": (LOG.replace(ROW, ROW.replace(ROW.split()[5], "0.00")), "bytes in 0 us are not"),
    "another program": (
        LOG.replace("all_gather_perf", "all_reduce_perf"),
        "are not those of all_reduce_perf over 8 ranks",
    ),
}


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_what_is_no_such_log_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CinemeshError, match=says):
        write([logged(tmp_path, text)], "dgx-h100-ib400", tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_log_of_another_cluster_is_refused(tmp_path: Path) -> None:
    path = logged(tmp_path, LOG)
    with pytest.raises(CinemeshError, match=r"8 ranks on each of 1 servers, and gb200-nvl72-ib400 has 2304 of 4 GPUs"):
        write([path], "gb200-nvl72-ib400", tmp_path / "mine.yaml")
    with pytest.raises(CinemeshError, match="local-cpu is no GPU cluster"):
        write([path], "local-cpu", tmp_path / "mine.yaml")


def test_the_command_writes_a_file_that_plans(tmp_path: Path) -> None:
    slow = logged(tmp_path, printed("all_gather_perf", scaled(BASE, False, 0.5, 1.0), 32, 8))
    asked = ["calibrate", "--nccl-tests", str(slow), "--base", "dgx-h100-ib400", "--out", str(tmp_path / "mine.yaml")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "all_gather over 32 ranks on 4 servers" in done.stdout, done.output
    assert load(str(tmp_path / "mine.yaml")).topology.nic_bytes_per_s == pytest.approx(25e9, rel=0.005)
    both = CliRunner().invoke(app, [*asked, "--card", str(slow)])
    assert isinstance(both.exception, CinemeshError) and "--card and --nccl-tests are given" in str(both.exception)
