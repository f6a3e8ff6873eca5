"""Every Triton kernel built for sm_90, at one shape of the 30B step; and the check itself, on planted faults.

A kernel that spills, lost its wide loads, or reads a tensor twice is right and slow: only the binary and the count of
loads and stores tell. Results are cached, so that only a changed kernel is built again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from cinemesh.errors import CinemeshError
from cinemesh.kernels import compile as compiling
from cinemesh.kernels.traffic import extrapolate, sample
from cinemesh.launch.commands.compile_check import sizes_of
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan

MODEL = "movie-gen-30b"
SIZES = sizes_of(preset(MODEL), Plan(tp=4, cp=2, dp_shard=768), BatchShape(1, USUAL_LATENTS[MODEL]))
REDUCTION = 1 << 20  # bytes: a second stage adds partial sums of a few programs, too small to matter
# Least share of wide accesses. Noise: two stores; three scalars are read. Merge: with each 16 bytes of a part, a thread
# reads the four of its row's log-sum-exp, out of L1 but for the first that does.
TRITON, NUMPY = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
WIDE = 0.7 if TRITON > (3, 6) else 0.6  # 3.6: gradients of keys 0.64
NARROW = {"noise.draw": 0.4, "merge.attention": 0.4}


@pytest.fixture(scope="module")
def reports() -> list[compiling.CompileReport]:
    if TRITON <= (3, 6) and NUMPY >= (2, 5):
        pytest.skip("bytes are counted by Triton's interpreter, and that of 3.6 takes NumPy below 2.5")
    return compiling.compile_check([SIZES], "sm_90", workers=2)


def test_every_kernel_of_the_30b_step_is_there(reports: list[compiling.CompileReport]) -> None:
    """A module whose kernels nobody lists would be built by nobody."""
    modules = {name for report in reports for name in (report.name.partition(".")[0],)}
    assert {"attention", "cross_attention", "modulate_norm", "swiglu", "adamw"} <= modules
    assert len({(report.name, report.shape) for report in reports}) == len(reports)


def test_no_kernel_spills(reports: list[compiling.CompileReport]) -> None:
    for report in reports:
        assert report.spilled_bytes == 0, report
        assert 0 < report.registers <= 255 and report.shared_bytes <= 227 * 1024 and report.occupancy > 0, report


def test_memory_bound_kernels_move_what_they_must(reports: list[compiling.CompileReport]) -> None:
    for report in (report for report in reports if report.memory_bound):
        assert 0.97 <= report.bytes_over_least <= 1.05, report
        wide = NARROW.get(report.name, 0.8)
        assert report.least_bytes < REDUCTION or report.wide_accesses >= wide, report


def test_attention_runs_on_wgmma(reports: list[compiling.CompileReport]) -> None:
    found = [report for report in reports if not report.memory_bound]
    assert len(found) >= 4  # self and cross, forward and backward
    for report in found:
        assert report.wgmma_instructions == report.tensor_core_instructions > 0, report
        assert report.wide_accesses >= WIDE, report  # a key mask is read byte by byte


def test_left_factors_of_attention_stay_where_they_were_put(reports: list[compiling.CompileReport]) -> None:
    """Shared memory gives 128 B a clock: a compiler that reads q from it again for every product makes dq slower.

    Forward 4 instructions of P V beside twice 8 of q k^T. dq: 8 of q k^T and 4 of ds k, beside 8 of do v^T and the 8
    that bring q into registers. dk and dv: 8 of p^T do and ds^T q beside 16.
    """
    held = {report.name: report.held_factors for report in reports}
    assert held["attention.forward"] == pytest.approx(4 / 20, abs=0.01)
    assert held["attention_backward.queries"] == pytest.approx(12 / 28, abs=0.01)
    assert held["attention_backward.keys"] == pytest.approx(8 / 24, abs=0.01)


def in_a_worker(code: str, *, interpret: bool) -> str:
    """What a fresh process prints: this one has imported its kernels for good."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_second_read_is_counted() -> None:
    """Reads of 2 N elements and a write of N / 2, masks at the edge included: 2.5 N, where 1.5 N would do."""
    code = (
        "import planted\nfrom cinemesh.kernels.traffic import count_bytes\nprint(count_bytes(planted.twice(600, 128)))"
    )
    assert int(in_a_worker(code, interpret=True)) == 4 * (2 * 600 + 300)


def test_counting_takes_no_memory_of_the_tensors_it_counts() -> None:
    """Two tensors of 4 GiB in 50 MB: their pages would show."""
    code = (
        "import planted, resource\nfrom cinemesh.kernels.traffic import count_bytes\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(count_bytes(planted.twice(1 << 30, 128)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    moved, kilobytes = map(int, in_a_worker(code, interpret=True).split())
    assert moved == pytest.approx(4 * 2.5 * 2**30, rel=0.01)  # of 65 programs, every second one stores
    assert kilobytes < 50_000


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_ctrl_c_is_heard_again_once_the_workers_run(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert compiling._work_through([], lambda spec: spec, 2, interpret=False) == []
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("look", "why"),
    [
        ("killed", "the process that looked at it was killed by SIGKILL"),
        ("raising", "ValueError: a fault; if Triton's"),
    ],
)
def test_a_worker_that_fails_names_its_kernel(look: str, why: str) -> None:
    code = (
        "import planted\nfrom cinemesh.kernels import compile as c\nfrom cinemesh.kernels.spec import Sizes\n"
        f"try:\n    c._work_through([('swiglu', {SIZES!r})], planted.{look}, 2, interpret=False)\n"
        "except c.CinemeshError as error:\n    print(error)"
    )
    assert in_a_worker(code, interpret=False).startswith(f"compile check, swiglu.forward T=36864 B=1 F=4096: {why}")


def test_counts_beyond_31_bits_are_taken() -> None:
    """Triton makes an int32 of an argument annotated as int, whatever its value; on a CPU nothing says so."""
    large = replace(SIZES, tokens=8 * SIZES.tokens, batch=64, tp=1, cp=1, shard_elements=3 << 30)
    code = (
        "import planted\nfrom cinemesh.kernels import compile as c\nfrom cinemesh.kernels.spec import Sizes\n"
        "for module in c.triton_modules():\n"
        f"    for spec in c._specs(module, {large!r}):\n"
        "        signature, *_ = c.specialise(spec)\n"
        "        print(spec.name, *(name for name, kind in signature.items() if kind == 'i64'))\n"
        "try:\n    c.specialise(planted.counted(1 << 31))\nexcept AssertionError as error:\n    print(error)"
    )
    *rows, planted = in_a_worker(code, interpret=False).split("\n")
    long = {name: counts for name, _, counts in (row.partition(" ") for row in rows)}
    assert long["adamw.update"] == "elements boundary" and long["swiglu.forward"] == "elements"
    assert planted == "planted.counted: n is annotated as i32, and its value is 2147483648"


def test_workers_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 cores and memory for two workers and a half: two; never none."""
    asked: list[int] = []

    def work_through(jobs: list[object], look: object, workers: int, **_: object) -> list[list[object]]:
        asked.append(workers)
        return [[] for _ in jobs]

    monkeypatch.setattr(compiling, "_work_through", work_through)
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 64)
    for free in (2.5, 0.1):
        monkeypatch.setattr(compiling, "available_bytes", lambda free=free: int(free * compiling.WORKER_BYTES))
        compiling.compile_check([SIZES], count=False, cache=tmp_path)
    assert asked == [2, 1]


def test_a_spill_is_seen() -> None:
    code = (
        "import planted\nfrom pathlib import Path\nfrom cinemesh.kernels import compile as c\nimport tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    for spec in (planted.spilling(), planted.twice()):\n"
        "        r = c._build(spec, 'sm_90', Path(folder))\n"
        "        print(r.registers, r.spilled_bytes)"
    )
    (registers, spilled), (few, none) = (
        map(int, row.split()) for row in in_a_worker(code, interpret=False).split("\n")
    )
    assert spilled > 0 and registers >= 64
    assert none == 0 and few < 64


def test_arguments_are_specialised_as_a_launch_does() -> None:
    code = (
        "import planted\nfrom dataclasses import replace\nfrom cinemesh.kernels.compile import specialise\n"
        "for n in (1024, 1000, 1, 1 << 31):\n"
        "    print(specialise(planted.twice(n)))"
    )
    whole, odd, one, long = in_a_worker(code, interpret=False).split("\n")
    sixteen = "[['tt.divisibility', 16]]"
    assert whole.endswith(f"{{(0,): {sixteen}, (1,): {sixteen}, (2,): {sixteen}}})")
    assert odd.endswith(f"{{(0,): {sixteen}, (1,): {sixteen}}})")
    assert "'n': 'constexpr'" in one and "'n': 1" in one
    assert "'n': 'i64'" in long and "'n': 'i32'" in whole


SASS = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0 */
        /*0020*/              @!P0 LDG.E R8, desc[UR4][R2.64] ;            /* 0x0 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0038*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0050*/             @P1   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/                   LDS.128 R4, [R1] ;
"""


def test_reading_a_binary() -> None:
    found = compiling.read_binary("Function kernel:\n REG:90 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:560", SASS)
    assert found == {
        "registers": 90,
        "spilled_bytes": 24,
        "tensor_core_instructions": 3,
        "wgmma_instructions": 2,
        "held_factors": 0.5,
        "wide_accesses": 0.667,
    }


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "wanted"),
    [
        (32, 0, 4, 1.0),  # 64 registers a warp row: 16 blocks of 4 warps
        (128, 0, 16, 0.25),  # 65,536 / (128 * 32) = 16 warps
        (255, 0, 8, 0.125),
        (33, 0, 4, 0.75),  # 40 registers are given for 33: 51 warps, 12 whole blocks
        (64, 227 * 1024, 8, 0.125),  # one block
        (64, 113 * 1024, 8, 0.25),
        (16, 0, 1, 0.5),  # 32 blocks of one warp
    ],
)
def test_occupancy(registers: int, shared_bytes: int, warps: int, wanted: float) -> None:
    assert compiling.occupancy(registers, shared_bytes, warps) == wanted


def test_sampled_programs_reach_both_ends() -> None:
    assert sample((132,), 5) == [(0, 0, 0), (33, 0, 0), (66, 0, 0), (98, 0, 0), (131, 0, 0)]
    assert sample((3,), 5) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert sample((4, 6, 2), 1) == [(3, 5, 0)]
    assert sample((4, 6, 2), 2)[-1] == (3, 5, 1)


def test_a_sample_stands_for_all_programs() -> None:
    """The first and the last, which is cut short, stand for themselves alone."""
    assert extrapolate([50, 90, 100, 110, 7], 1000) == 50 + 998 * 100 + 7
    assert extrapolate([100, 90, 7], 3) == 197
    assert extrapolate([50], 10) == 500


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(CinemeshError, match="compile target 'sm_9' is unknown; choose one of sm_80, sm_90, sm_100"):
        compiling.compile_check([SIZES], "sm_9")
