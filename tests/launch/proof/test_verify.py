"""``cinemesh verify`` as a user runs it, and how it shrinks what does not fit."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import environment
from cinemesh.launch.proof import bounds, parity, verify
from cinemesh.launch.proof.bounds import QUANTITIES, Worst, worst_of
from cinemesh.launch.proof.parity import RankRun, global_batch, run_rank
from cinemesh.launch.proof.verify import ProofOrder, Report, compare, small_case, verify_in
from cinemesh.model import weights as weights_by_name
from cinemesh.model.inputs import MASK
from cinemesh.model.step import build_step, check, unit_layout
from cinemesh.parallel.ir.fields import DtypePolicy
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare


def command(*args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the command forks workers, which must not inherit this one's."""
    return subprocess.run(
        [sys.executable, "-m", "cinemesh.launch.cli", "verify", *args], capture_output=True, text=True, timeout=120
    )


def test_a_plan_that_holds() -> None:
    done = command("--plan", "tp=2,cp=2", "--json", "--steps", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["ledger_equal"] is True and report["live_bytes_equal"] is True
    assert {"peak_bytes_predicted", "workspace_bytes", "peak_bytes_ran"} <= report.keys()
    assert (report["device"], report["dtype"]) == ("cpu", "float64")
    assert set(report["worst"]) == {"loss", "gradient", "weight"}
    assert 0 < max(report["worst"].values()) < 1e-10, "nothing at all would mean that nothing was compared"
    assert report["processes"] == 4 and report["remarks"] == []
    assert 0 < report["peak_bytes_ran"] <= report["peak_bytes_predicted"] + report["workspace_bytes"]


def test_text_says_what_was_shrunk_and_what_came_out() -> None:
    done = command("--plan", "dp_shard=96", "--model", "movie-gen-30b", "--max-procs", "2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    for said in (
        "plan tp(1) * cp(1) * dp_shard(2) = 2, on 2 processes (cpu, float32)",
        "dp_shard 96 -> 2: more than 2 processes",
        "movie-gen-30b: 48 layers of 6144 -> 2 layers of 48",
        "gradient",
        "equal to the program, on every rank",
    ):
        assert said in done.stdout, done.stdout
    assert done.stdout.rstrip().endswith("ok")


def test_the_largest_error_met_is_kept_with_its_place() -> None:
    """Over the largest value wanted; nothing where nothing is wanted and found, without end where something is."""
    worst = Worst()
    assert worst.error == {"loss": 0.0, "gradient": 0.0, "weight": 0.0}
    worst.note("gradient", "zeros", torch.zeros(2), torch.zeros(2))
    assert (worst.error["gradient"], worst.where["gradient"]) == (0.0, "")
    worst.note("gradient", "a", torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0]))
    worst.note("gradient", "smaller", torch.tensor([1.0, 4.25]), torch.tensor([1.0, 4.0]))
    worst.note("gradient", "as large", torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0]))
    assert (worst.error["gradient"], worst.where["gradient"]) == (0.125, "a")
    worst.note("gradient", "b", torch.tensor([0.0, -1.0]), torch.zeros(2))
    assert (worst.error["gradient"], worst.where["gradient"]) == (math.inf, "b")
    worst.note("gradient", "c", torch.tensor([math.nan]), torch.ones(1))
    assert math.isnan(worst.error["gradient"]) and worst.where["gradient"] == "c"
    assert worst.error["loss"] == worst.error["weight"] == 0.0


def test_what_all_but_vanishes_is_measured_against_its_step() -> None:
    """Against a hundredth of the largest, and no less; a larger tensor against itself."""
    worst = Worst()
    worst.note("gradient", "cancelled", torch.tensor([1e-15, 2e-13]), torch.tensor([1e-15, 0.0]), 4.0)
    assert worst.error["gradient"] == pytest.approx(2e-13 / 4e-2, rel=1e-6)
    worst.note("gradient", "as large as others", torch.tensor([0.0, 1.0 + 2**-20]), torch.tensor([0.0, 1.0]), 4.0)
    assert (worst.error["gradient"], worst.where["gradient"]) == (2**-20, "as large as others")


def ordered(plan: str, **changed: Any) -> ProofOrder:
    order = ProofOrder(plan, "tiny", None, max_procs=None, steps=1, head_dim=None, device="cpu", as_json=False)
    return replace(order, **changed)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ordered("tp=0"), "plan: tp is 0"),
        (ordered("tpp=2"), "unknown key 'tpp'; did you mean 'tp'?"),
        (ordered("tp=4,cp=4"), "tp(4) * cp(4) = 16 > --max-procs 8"),
        (ordered("tp=2", dtype="fp8"), "plan: dtype is 'fp8'"),
        (ordered("tp=2", model="movie-gen-30"), "did you mean 'movie-gen-30b'?"),
        (ordered("recompute=q:queries"), "recompute keeps ['queries'], which no block has"),
    ],
)
def test_an_illegal_plan_is_refused_before_any_process_starts(
    asked: ProofOrder, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(verify, "forked")
    with pytest.raises(CinemeshError, match=re.escape(message)):
        verify.run(asked)


def test_an_illegal_plan_is_one_line_and_exit_code_2() -> None:
    done = command("--plan", "tp=4,cp=4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: tp(4) * cp(4) = 16") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def report(case: verify.Case, runs: list[RankRun]) -> Report:
    program = prepare(build_step(case.config, case.plan, case.batch), backend="gloo")
    return compare(case, runs, program)


def test_exit_code_1_when_a_bound_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = small_case(Plan(dtype="float64"), steps=1)
    run = run_rank(case)
    run.gradients[0][7] += 1
    broken = report(case, [run])
    assert not broken.ok
    monkeypatch.setattr(verify, "forked", lambda ranks, work: [broken])
    assert verify.run(ordered("tp=1")) == 1
    assert capsys.readouterr().out.rstrip().endswith("NOT ok")
    assert verify.run(ordered("tp=1", as_json=True)) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_each_thing_that_is_compared_can_fail() -> None:
    """One number of a good run is spoilt at a time; a NaN is no exception."""
    case = small_case(Plan(dtype="float64"), steps=1)
    good = run_rank(case)
    assert report(case, [good]).ok
    nan = float("nan")
    spoilt = {
        "loss": replace(good, losses=[good.losses[0] * (1 + 1e-8)]),
        "loss is NaN": replace(good, losses=[nan]),
        "norm": replace(good, norms=[good.norms[0] * (1 + 1e-8)]),
        "gradient": replace(good, gradients=[good.gradients[0] * (1 + 1e-8)]),
        "weight": replace(good, weights=[good.weights[0], torch.lerp(good.weights[0], good.weights[1], 1 + 1e-8)]),
        "EMA": replace(good, ema=[good.ema[0], torch.lerp(good.ema[0], good.ema[1], 1 + 1e-8)]),
        "weight is NaN": replace(good, weights=[good.weights[0], good.weights[1] * nan]),
        "ledger": replace(good, ledger_difference="lane tp: ran 1 collectives; the program has 2"),
        "live bytes": replace(good, live_bytes_equal=False),
        "peak": replace(good, peak_bytes=10**9),
    }
    assert [what for what, run in spoilt.items() if report(case, [run]).ok] == []


def with_gradient(run: RankRun, case: verify.Case, name: str, step: int, by: float) -> RankRun:
    """The run with one element of a gradient of ``step`` off by that part of the step's largest."""
    units = unit_layout(case.config, case.plan)
    start = next(
        position
        for slot, _, _, position in weights_by_name.held_parts(units, run.coordinates)
        if slot.parameter.name == name
    )
    gradients = [gradient.clone() for gradient in run.gradients]
    gradients[step][start] += by * gradients[step].abs().max()
    return replace(run, gradients=gradients)


@pytest.mark.parametrize(("dtype", "fault"), [("float64", 1e-10), ("float32", 1e-3)])
def test_a_gradient_that_vanishes_is_right_and_its_faults_are_found(
    dtype: DtypePolicy, fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rounding over itself is no error. In the first step it is a gradient like any other.

    Large steps make the softmax of cross-attention one-hot in the third, and the gradient of its queries a sum that
    cancels; in float32 its exponentials err more than sums do, in plain autograd too.
    """
    monkeypatch.setattr(parity, "LR", 0.1)
    name, case = "blocks.1.cross.q", small_case(Plan(dtype=dtype), steps=3)
    run = run_rank(case)
    found = report(case, [run])
    assert found.ok, found
    reference = worst_of(case, [run])[1]
    sizes = [bounds.largest_of({name: g[name]}) / bounds.largest_of(g) for g in reference.gradients]
    assert sizes[0] > 1e-2 and sizes[2] < 1e-12 and found.bounds["gradient"] < 2e-3
    for step in (0, 2):
        assert not report(case, [with_gradient(run, case, name, step, fault)]).ok
    reference.gradients = reference.gradients[2:]
    assert name in bounds.unseen(reference, found.bounds["gradient"]), "seen in no step, it is not proven"


def test_a_loss_in_bf16_may_err_as_the_first_gradient_does() -> None:
    """Twice as much as it, and more is found: not what one rank's loss errs, which may be nothing by chance."""
    case = small_case(Plan(dtype="bf16"), steps=2)
    run = run_rank(case)
    found = report(case, [run])
    assert found.ok and 2**-8 < found.bounds["loss"] < 2**-5, found
    spoilt = replace(run, losses=[run.losses[0], run.losses[1] * (1 + 2**-5)])
    assert not report(case, [spoilt]).ok


def test_replicas_that_drift_apart_are_seen() -> None:
    """By one unit in the last place: far below any bound on errors, and yet the beginning of two models."""
    case = small_case(Plan(dp_replicate=2, dtype="float64"), steps=1)
    alone = run_rank(case.on_one_rank(), watched=False)
    runs = [replace(alone, coordinates={**alone.coordinates, "dp_replicate": i}) for i in range(2)]
    assert report(case, runs).ok
    drifted = alone.weights[1].clone()
    drifted[3] = torch.nextafter(drifted[3], torch.tensor(torch.inf, dtype=torch.float64))
    found = report(case, [runs[0], replace(runs[1], weights=[alone.weights[0], drifted])])
    assert not found.ok and not found.replicas_equal
    assert all(found.worst[what] <= found.bounds[what] for what in QUANTITIES)


# -- under torchrun, and on GPUs --------------------------------------------------------------------------------------


def under_torchrun(*agent: str, plan: str) -> list[str]:
    module = ["-m", "cinemesh.launch.verify", "--plan", plan, "--steps", "1", "--device", "cpu", "--json"]
    return [sys.executable, "-m", "torch.distributed.run", *agent, *module]


def told(agents: list[list[str]]) -> list[str]:
    """What agents of one job printed, each; all must end well."""
    started = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in agents]
    try:
        found = [agent.communicate(timeout=120) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    assert [agent.returncode for agent in started] == [0] * len(agents), [err[-2000:] for _, err in found]
    return [out for out, _ in found]


def test_a_plan_is_proven_by_the_ranks_that_torchrun_started() -> None:
    """A larger plan is shrunk to as many ranks as the job has; one of them answers."""
    (out,) = told([under_torchrun("--standalone", "--nproc-per-node", "4", plan="tp=2,dp_shard=96")])
    report = json.loads(out)
    assert report["ok"] and report["processes"] == 4 and report["device"] == "cpu"
    assert report["remarks"][0] == "dp_shard 96 -> 2: more than 4 processes"


@pytest.mark.slow
def test_a_plan_is_proven_by_the_agents_of_two_nodes() -> None:
    """Two agents of two processes: ranks of other nodes than rank 0's send it what they computed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    nodes = [["--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "2"] for i in range(2)]
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    first, second = told([under_torchrun(*node, *where, plan="tp=2,cp=2") for node in nodes])
    report = json.loads(first)
    assert report["ok"] and report["processes"] == 4 and report["ledger_equal"] and second == ""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ordered("tp=2", device="auto"), "error: tp(2) * cp(1) * dp_shard(1) = 2 != world size 4"),
        (ordered("tp=2,dp_shard=2", max_procs=4), "error: --max-procs 4 in a job whose processes are started already"),
    ],
)
def test_under_torchrun_what_does_not_suit_the_job_is_one_message(
    asked: ProofOrder, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first process of each node."""
    for local_rank in ("0", "1"):
        for name, value in {"RANK": local_rank, "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, value)
        assert verify.run(asked) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(message if local_rank == "0" else "")
        assert said.err.count("\n") == (local_rank == "0")


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        (ordered("tp=2,dp_shard=8", device="auto"), 4, ("cuda", 4, 128, "float32")),
        (ordered("tp=2,dp_shard=8", device="cuda", max_procs=2), 4, ("cuda", 2, 128, "float32")),
        (ordered("tp=2", device="cuda", head_dim=64, dtype="bf16"), 2, ("cuda", 2, 64, "bf16")),
        (ordered("dp_shard=8", device="cpu"), 4, ("cpu", 8, 8, "float64")),
        (ordered("dp_shard=8", device="auto"), 0, ("cpu", 8, 8, "float64")),
        (ordered("tp=4", device="auto"), 2, "4 processes on this machine, and GPUs visible: 2; .*--device cpu"),
        (ordered("tp=4", device="cuda"), 0, "device is cuda, and "),
    ],
)
def test_a_plan_runs_on_the_gpus_that_there_are(
    asked: ProofOrder, gpus: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shapes and a dtype that their kernels take; dp shrinks to their number, tp and cp never."""
    for module in (environment, verify):
        monkeypatch.setattr(module, "visible_gpus", lambda: gpus)
    if isinstance(expected, str):
        with pytest.raises(CinemeshError, match=expected):
            asked.case()
        return
    case, kind = asked.case()
    assert (kind, case.plan.world_size, case.config.width // case.config.heads, case.plan.dtype) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_step_on_a_gpu_is_the_reference(dtype: str, recompute: str, head_dim: int) -> None:
    """Its own kernels against autograd in float64 on the CPU; a bf16 run may err twice as much as one on the CPU."""
    plan = Plan.parse(f"recompute={recompute},micro_batches=2", dtype=dtype)
    found = verify_in(small_case(plan, head_dim=head_dim, steps=2), None, device="cuda")
    assert found is not None and found.ok, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_plan_over_all_gpus_of_a_machine_is_the_reference(dtype: str) -> None:
    gpus = min(8, torch.cuda.device_count())
    tp = 2 if gpus % 2 == 0 else 1
    done = command("--plan", f"tp={tp},dp_shard={gpus // tp}", "--dtype", dtype, "--device", "cuda", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["processes"] == gpus


# -- shrinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "max_procs", "degrees"),
    [
        ("tp=4,cp=2,dp_shard=768", 8, (4, 2, 1, 1)),
        ("tp=2,cp=2,dp_shard=96,dp_replicate=4", 16, (2, 2, 2, 2)),
        ("tp=2,cp=2,dp_shard=96,dp_replicate=4", 8, (2, 2, 2, 1)),
        ("tp=2,dp_shard=96", 8, (2, 1, 2, 1)),
        ("tp=7,dp_shard=5", 8, (7, 1, 1, 1)),
        ("dp_shard=8", 8, (1, 1, 8, 1)),
        ("dp_shard=8", 1, (1, 1, 1, 1)),
    ],
)
def test_dp_shrinks_and_tp_and_cp_never(text: str, max_procs: int, degrees: tuple[int, int, int, int]) -> None:
    plan = Plan.parse(text)
    case = small_case(plan, max_procs=max_procs)
    assert (case.plan.tp, case.plan.cp, case.plan.dp_shard, case.plan.dp_replicate) == degrees
    assert case.plan.world_size <= max_procs
    assert bool(case.remarks) == (case.plan != plan)
    check(case.config, case.plan, case.batch)


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("cp", [1, 2, 3, 5, 7])
def test_any_degrees_get_a_model_that_they_divide(tp: int, cp: int) -> None:
    case = small_case(Plan(tp=tp, cp=cp), max_procs=64)
    check(case.config, case.plan, case.batch)
    assert case.config.text_tokens == 7 and case.samples == 2


@pytest.mark.parametrize(("tp", "heads"), [(1, 6), (2, 6), (3, 6), (4, 4), (8, 8)])
def test_heads_of_a_case_are_six_or_what_the_plan_divides(tp: int, heads: int) -> None:
    """One head a rank would hide every mistake between heads."""
    assert small_case(Plan(tp=tp), max_procs=8).config.heads == heads


@pytest.mark.parametrize(("tp", "heads"), [(1, 2), (3, 3), (4, 4)])
def test_a_case_of_a_kernels_head_dim_has_few_heads(tp: int, heads: int) -> None:
    config = small_case(Plan(tp=tp), head_dim=64).config
    assert (config.heads, config.width, config.ffn) == (heads, 64 * heads, 128 * heads)


@pytest.mark.parametrize(
    ("model", "asked", "got"), [("tiny", 41, 1), ("tiny", 1, 1), ("tiny", 2, 2), ("movie-gen-30b", 41, 1),
                                ("movie-gen-30b", 2, 1), ("movie-gen-30b", 48, 2), ("movie-gen-30b", 0, 0)]
)  # fmt: skip
def test_some_blocks_kept_otherwise_stay_some(model: str, asked: int, got: int) -> None:
    """The planner's winners keep more in their last blocks: a plan that only fits 48 layers could not be proven."""
    text = f"recompute=full,recompute_last=selective,last_blocks={asked}" if asked else "recompute=full"
    case = small_case(Plan.parse(text), model)
    assert case.plan.last_blocks == got and case.config.layers == 2
    assert (f"last_blocks {asked} -> {got}: of 2 layers" in case.remarks) == (asked != got)


def test_more_last_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(CinemeshError, match=r"last_blocks\(49\) > layers\(48\) of movie-gen-30b"):
        small_case(Plan(recompute="full", recompute_last="selective", last_blocks=49), "movie-gen-30b")


def test_no_room_for_tp_and_cp_is_an_error() -> None:
    with pytest.raises(CinemeshError, match=r"tp\(3\) \* cp\(3\) = 9 > --max-procs 8, .* allow 9 processes"):
        small_case(Plan(tp=3, cp=3))


def test_the_batch_masks_text_but_never_all_of_it() -> None:
    mask = global_batch(small_case(Plan(dp_shard=4)), 0, 0)[MASK]
    assert mask.any(1).all() and not mask.all()


def test_the_check_knows_when_it_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a zero gate no gradient could be wrong: the report must not be content with that."""
    monkeypatch.setattr(parity.weights_by_name, "probe_values", weights_by_name.initial_values)
    case = small_case(Plan(dtype="float64"), steps=1)
    found = report(case, [run_rank(case)])
    assert not found.ok
    assert any("blind" in remark and "blocks.0.q" in remark for remark in found.remarks)
