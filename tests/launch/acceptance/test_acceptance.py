"""The acceptance run on gloo processes: all of it on one plan, its file as others read it, and planted faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance_job import accept, stages_of
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.kernels.reference import REFERENCE
from cinemesh.launch.acceptance import __main__ as entry
from cinemesh.launch.acceptance import basics, lanes, links, parity, predictions, replay, resume, supervisor
from cinemesh.launch.acceptance.__main__ import parser
from cinemesh.launch.acceptance.here import FAULTS, SAID, Here
from cinemesh.launch.acceptance.stages import STAGES, AcceptanceStage, StageJob
from cinemesh.launch.acceptance.steps import plans_of, proof_case, timed_case
from cinemesh.launch.cli import app
from cinemesh.launch.commands import measure_links
from cinemesh.launch.commands.measure_links import REPEATED, link_groups
from cinemesh.launch.health.groups import ranks_text
from cinemesh.launch.training.checkpoint import loading
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.nccl_stack import NcclStack
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.frozen import Frozen
from cinemesh.perf_model.acceptance import ACCEPTANCE_FILE, link_times, rows_of
from cinemesh.perf_model.calibration.links import LinkTest, group_on, scaled
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.network import Network

ROOT = Path(__file__).resolve().parents[3]
PLANS = (basics, lanes, links, parity, predictions, replay, resume)


def by_rank(rank: int) -> bool:
    """Whether this process is of that rank."""
    return os.environ.get("RANK") == str(rank)


def cut(patch: pytest.MonkeyPatch, **plans: Plan) -> None:
    """Fewer plans, sizes and steps: the stages are the same."""
    for module in PLANS:
        if hasattr(module, "plans_of"):
            patch.setattr(module, "plans_of", lambda world, local: plans)
    patch.setattr(links, "CPU_SIZES", (2**12,))
    patch.setattr(measure_links, "LOOPS", 1)
    patch.setattr(predictions, "STEPS", 3)
    patch.setattr(lanes, "STEPS", 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, FSDP=Plan(dp_shard=2))


# -- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[int | None], dict[str, Any]]]:
    out = tmp_path_factory.mktemp("acceptance")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, FSDP=Plan(dp_shard=2))
        codes, file = accept(out, STAGES)
    yield out, codes, file


def test_every_stage_runs_and_says_what_it_found(whole: tuple[Path, list[int | None], dict[str, Any]]) -> None:
    """Only here all stages meet: a key that one writes and nobody reads, or a stage that says ok of nothing."""
    out, codes, file = whole
    assert [(row["name"], row["ended"]) for row in file["stages"]] == [(stage.name, "ok") for stage in STAGES], file
    assert codes == [0, 0] and file["verdict"] == "well" and (file["device"], file["ranks"]) == ("cpu", 2)
    found = {row["name"]: row["found"] for row in file["stages"]}
    assert all(found[stage.name][SAID] and FAULTS not in found[stage.name] for stage in STAGES)
    assert found["basics"]["hosts"] == {basics.platform.node(): "0-1"} and found["basics"]["differences"] == {}
    (proof,) = found["parity"]["plans"]
    assert proof["ok"] and proof["ledger_equal"] and 0 < proof["worst"]["gradient"] < 1e-10
    assert found["replay"]["plans"] == [
        {"name": "FSDP", "plan": Plan(dp_shard=2).equation(), "failed": "", "bitwise": True, "worst": 0.0,
         "bound": found["replay"]["plans"][0]["bound"], "rank": 1}
    ]  # fmt: skip
    tests = found["links"]["tests"]
    assert [(t["kind"], t["ranks"], t["servers"], [*t["seconds"]]) for t in tests] == [
        (kind, group.ranks, group.servers, ["4096"]) for group in link_groups(2, 2) for kind in COLLECTIVES
    ]
    rows = found["lanes"]["lanes"]
    assert {"dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter"} <= {row["lane"] for row in rows}
    for row in rows:
        assert 0 <= row["least"] <= row["hidden"]["measured"] <= 1 and 0 <= row["hidden"]["predicted"] <= 1
        assert row["collectives"] >= 1 and 0 <= row["exposed_s"] <= row["ran_s"]
    again = found["resume"]
    assert again["whole"] == again["again"] and again["loss"] == again["loss_again"] and again["resumed_at"] == 3
    assert len({json.dumps(state) for state in again["whole"]}) == 2, "two shards"
    assert sorted(path.name for path in out.iterdir()) == ["acceptance.json", "acceptance.log"]
    log = (out / "acceptance.log").read_text()
    assert "resume: ok" in log and "killing itself" not in log and "FSDP" in log and "verdict: well" in log


def test_validate_and_calibrate_read_its_file(
    whole: tuple[Path, list[int | None], dict[str, Any]], tmp_path: Path
) -> None:
    """The same rows that the stage predicted; and links whose times are planted come out of them."""
    out, _, file = whole
    shown = CliRunner().invoke(app, ["validate", str(out / ACCEPTANCE_FILE), "--json"])
    (own,) = json.loads(shown.stdout)["own"]
    (beside,) = next(row for row in file["stages"] if row["name"] == "predictions")["found"]["beside"]
    assert own["predicted_s"] == beside["predicted_s"] and own["measured_s"] == beside["measured_s"]
    with pytest.raises(CinemeshError, match="is of 'cpu', and links are between GPUs; on CPUs, cinemesh calibrate"):
        link_times(out / ACCEPTANCE_FILE)
    base = load("dgx-h100-ib400")
    truth = scaled(base, True, 0.8, 1.2)
    planted = json.loads((out / ACCEPTANCE_FILE).read_text()) | {"device": "cuda"}
    tests = next(row for row in planted["stages"] if row["name"] == "links")["found"]
    for captured, speed in ((False, 1.0), (True, 0.5)):  # steps are captured: what was measured in a graph counts
        tests["captured" if captured else "tests"] = [
            {**asdict_of(test), "seconds": {str(size): speed * seconds for size, seconds in test.seconds.items()}}
            for test in planted_times(scaled(truth, True, 0.5, 2.0) if not captured else truth, 1 / speed)
        ]
    (tmp_path / "given.json").write_text(json.dumps(planted))
    made = tmp_path / "made.yaml"
    line = ["calibrate", "--acceptance", str(tmp_path / "given.json"), "--base", base.name, "--out", str(made)]
    assert CliRunner().invoke(app, line).exit_code == 0
    found = load(str(made)).topology.nvlink_bytes_per_s
    assert found == pytest.approx(truth.topology.nvlink_bytes_per_s, rel=0.05)
    assert "acceptance" in made.read_text() and planted["date"] in made.read_text()


def planted_times(cluster: Any, longer: float) -> list[LinkTest]:
    network, tests = Network(cluster), []
    for kind in COLLECTIVES:
        test = LinkTest("planted", kind, 8, 1, {})
        group = group_on(test, cluster)
        sizes = (2**14, 2**20, 2**28)
        tests.append(
            LinkTest("planted", kind, 8, 1, {s: longer * network.collective(kind, s, group).seconds for s in sizes})
        )
    return tests


def asdict_of(test: LinkTest) -> dict[str, Any]:
    return {"origin": test.origin, "kind": test.kind, "ranks": test.ranks, "servers": test.servers}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file["stages"].clear(), "stage links found nothing; run it again with --only links"),
        (lambda file: file.pop("stages"), "holds no list of stages"),
        (lambda file: file["stages"][0]["found"].update(tests=[]), "holds no times"),
        (lambda file: of(file).update(ranks=0), "ranks is 0"),
        (lambda file: of(file).update(servers=3), "8 ranks on 3 servers"),
        (lambda file: of(file).update(kind="send"), "kind is 'send'"),
        (lambda file: of(file)["seconds"].update({"4096": -1.0}), "seconds of 4096 bytes is -1.0"),
        (lambda file: of(file)["seconds"].update({"4 KiB": 1.0}), "bytes is '4 KiB'"),
    ],
)
def test_times_that_cannot_be_are_refused(change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    """Each would be a rate that no plan will ever see, or a traceback."""
    test = {"origin": "x", "kind": "all_gather", "ranks": 8, "servers": 1, "seconds": {"4096": 1e-5}}
    file = {"device": "cuda", "date": "2026-11-29", "stages": [{"name": "links", "found": {"tests": [test]}}]}
    path = tmp_path / ACCEPTANCE_FILE
    path.write_text(json.dumps(file))
    assert link_times(path) == ([test | {"seconds": {4096: 1e-5}}], "2026-11-29")
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(CinemeshError, match=re.escape(said)):
        link_times(path)


def of(file: Any) -> Any:
    return file["stages"][0]["found"]["tests"][0]


def test_a_file_without_steps_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / ACCEPTANCE_FILE
    path.write_text(json.dumps({"stages": [{"name": "predictions", "found": {}}]}))
    with pytest.raises(CinemeshError, match="stage predictions found nothing"):
        rows_of(path)


# -- planted faults ---------------------------------------------------------------------------------------------------


def hang(here: Here) -> None:
    with here.joined():
        here.at("working")
        if here.rank == 1:
            here.at("asleep")
            time.sleep(1000)
        basics_barrier()


def basics_barrier() -> None:
    from cinemesh.parallel.runtime.comm import barrier

    barrier()


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    """The file must say which ranks were where: the one that sleeps, not those that wait for it."""
    stages = [AcceptanceStage("hangs", 6, "", (StageJob(hang),)), *stages_of("basics")]
    codes, file = accept(tmp_path, stages, world=3, seconds=46)
    assert codes == [1, 1, 1] and file["verdict"] == "not well"
    hung, after = file["stages"]
    assert (hung["ended"], after["ended"]) == ("out of time", "ok")
    assert hung["where"] == {"working": "0, 2", "asleep": "1"}
    stacks = {failure["rank"]: failure["tail"] for failure in hung["failures"]}
    assert "in hang" in stacks[1] and "barrier" in stacks[0]
    assert all(failure["how"] == "out of time" for failure in hung["failures"])


def test_a_rank_that_dies_ends_its_stage_alone(tmp_path: Path) -> None:
    """Nothing but its supervisor tells the others: they wait in a collective."""

    def dies(here: Here) -> None:
        with here.joined():
            if here.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            basics_barrier()

    codes, file = accept(tmp_path, [AcceptanceStage("dies", 20, "", (StageJob(dies),)), *stages_of("basics")])
    died, after = file["stages"]
    assert codes == [1, 1] and (died["ended"], after["ended"]) == ("failed", "ok")
    first = next(failure for failure in died["failures"] if failure["rank"] == 1)
    assert first["signal"] == signal.SIGUSR1 and "killed by signal 10" in first["error"]


def test_a_rank_that_is_lost_ends_the_run_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor dies too, as with its host: the others may not wait for ever."""

    def lost(here: Here) -> None:
        if here.rank == 1:
            (tmp_path / "left").write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)

    monkeypatch.setattr(supervisor, "END_S", 0.3)
    stages = [AcceptanceStage("lost", 5, "", (StageJob(lost),)), *stages_of("basics")]
    codes, file = accept(tmp_path, stages, seconds=45)
    assert codes == [1, -signal.SIGKILL] and file["verdict"] == "not well"
    assert [row["ended"] for row in file["stages"]] == ["lost"]
    assert [(f["rank"], f["error"]) for f in file["stages"][0]["failures"]] == [(1, "does not answer")]
    with pytest.raises(ProcessLookupError):  # what it had started holds no GPU any more
        os.kill(int((tmp_path / "left").read_text()), 0)


def test_a_rank_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that could make no group together must still be told apart."""
    facts = basics.facts

    def planted(here: Here) -> dict[str, Any]:
        return facts(here) | ({"torch": "1.0"} if here.rank == 1 else {})

    monkeypatch.setattr(basics, "facts", planted)
    codes, file = accept(tmp_path, stages_of("basics"), world=3)
    (row,) = file["stages"]
    assert codes == [1, 1, 1] and row["ended"] == "wrong"
    assert row["found"]["differences"] == {"torch": {f'"{basics.torch.__version__}"': "0, 2", '"1.0"': "1"}}
    assert row["found"][FAULTS] == [f'torch differs: "{basics.torch.__version__}" on ranks 0, 2; "1.0" on ranks 1']


def test_a_wrong_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """A millionth of one operator's backward, on one rank of two."""
    backward = REFERENCE["swiglu_backward"]

    def planted(inputs: Any, outputs: Any, **attrs: Any) -> None:
        backward(inputs, outputs, **attrs)
        if by_rank(1):
            outputs[0].mul_(1 + 1e-6)

    monkeypatch.setitem(REFERENCE, "swiglu_backward", planted)
    codes, file = accept(tmp_path, [*stages_of("parity"), *stages_of("basics")])
    wrong, after = file["stages"]
    assert codes == [1, 1] and (wrong["ended"], after["ended"]) == ("wrong", "ok")
    (fault,) = wrong["found"][FAULTS]
    assert re.search(r"gradient error \S+e-0[678] > 1.0e-10 at blocks", fault) and "collectives" not in fault


def test_a_replay_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    run = Frozen.run

    def planted(self: Frozen, watch: Any = None) -> None:
        run(self, watch)
        if by_rank(1):
            next(t for name, t in self.executor.buffers.items() if "exp_avg" in name).mul_(1 + 1e-5)

    monkeypatch.setattr(Frozen, "run", planted)
    codes, file = accept(tmp_path, stages_of("replay"))
    (row,) = file["stages"]
    assert codes == [1, 1] and row["ended"] == "wrong" and "on rank 1" in row["found"][FAULTS][0]


def test_a_run_that_resumes_with_other_bits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """One bit of one moment, on one rank."""
    load_checkpoint = loading.load

    def planted(path: Path, runner: StepRunner) -> Any:
        found = load_checkpoint(path, runner)
        if by_rank(1):
            runner.buffers["exp_avg_sq"].view(-1)[:4] *= 1 + 1e-6
        return found

    monkeypatch.setattr(loading, "load", planted)
    codes, file = accept(tmp_path, stages_of("resume"))
    (row,) = file["stages"]
    assert codes == [1, 1] and row["ended"] == "wrong"
    assert re.match("the resumed run ended with other bits on ranks 1; losses", row["found"][FAULTS][0])


def test_a_job_that_nobody_breaks_proves_no_resume() -> None:
    ends = [supervisor.End(rank, "ok") for rank in range(2)]
    assert supervisor._how(ends, StageJob(resume.broken, dies=True)) == "failed"
    assert supervisor._how([*ends, supervisor.End(2, "failed", signal.SIGKILL)], StageJob(resume.broken, True)) == "ok"
    assert supervisor._how([*ends, supervisor.End(2, "failed", None)], StageJob(resume.broken, True)) == "failed"


# -- what is otherwise on GPUs ----------------------------------------------------------------------------------------


def test_supervisors_ask_nothing_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """A process that has asked CUDA anything cannot fork one that uses it; here only what they fork may ask."""
    test = os.getpid()
    for name in ("is_available", "device_count", "_lazy_init", "current_device", "mem_get_info"):
        asked = getattr(torch.cuda, name)

        def watched(*of: Any, asked: Any = asked, **more: Any) -> Any:
            if os.getppid() == test:
                os._exit(99)
            return asked(*of, **more)

        monkeypatch.setattr(torch.cuda, name, watched)
    codes, file = accept(tmp_path, stages_of("basics", "resume"))
    assert codes == [0, 0] and file["verdict"] == "well"
    monkeypatch.setattr(basics, "facts", lambda here: {})
    monkeypatch.setattr(supervisor, "processes_here", lambda world: int(torch.cuda.is_available()))
    with pytest.raises(FileNotFoundError):  # planted: rank 0 asked before it wrote anything
        accept(tmp_path / "asked", stages_of("basics"), world=1)


def test_one_rank_alone_can_try_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU has no links and no lanes, which is no fault."""
    cut(monkeypatch, **plans_of(1, 1))
    codes, file = accept(tmp_path, stages_of("basics", "links", "lanes", "resume"), world=1)
    found = {row["name"]: row["found"] for row in file["stages"]}
    assert codes == [0] and file["verdict"] == "well", file
    assert "no links" in found["links"][SAID] and "no lanes" in found["lanes"][SAID]
    assert found["lanes"]["lanes"] == [] and found["resume"]["resumed_at"] == 3


@pytest.mark.parametrize(("by", "ended"), [(1e-6, "ok"), (1e-2, "wrong")])
def test_on_gpus_a_replay_may_differ_by_rounding(
    by: float, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """NCCL may sum in another order in a graph; more than rounding is a fault there too. The driver's loss is told."""
    run = Frozen.run

    def planted(self: Frozen, watch: Any = None) -> None:
        run(self, watch)
        next(t for name, t in self.executor.buffers.items() if "exp_avg" in name).mul_(1 + by)

    monkeypatch.setattr(Frozen, "run", planted)
    monkeypatch.setattr(replay, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(replay, "nccl_stack", lambda: NcclStack((2, 28), (12, 8)))
    _, file = accept(tmp_path, stages_of("replay"))
    (row,) = file["stages"]
    assert row["ended"] == ended and not row["found"]["plans"][0]["bitwise"]
    assert not row["found"]["auto_captures"] and "one after another" in row["found"]["serial"]


def test_on_gpus_links_are_timed_in_a_graph_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None: ...

        def reset(self) -> None: ...

    monkeypatch.setattr(links, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(measure_links, "SIZES", (2**12,))
    monkeypatch.setattr(measure_links, "LOOPS", 1)
    monkeypatch.setattr(measure_links, "captured_loop", lambda loop: Graph())
    planted = {"loop": 1.0 * REPEATED, "replay": 2.0 * REPEATED}
    monkeypatch.setattr(measure_links, "_timed", lambda work, device: planted[work.__name__])
    codes, file = accept(tmp_path, stages_of("links"))
    found = file["stages"][0]["found"]
    assert codes == [0, 0] and len(found["captured"]) == len(found["tests"]) == len(COLLECTIVES)
    assert all(test["seconds"] == {"4096": 2.0} for test in found["captured"])
    assert all(test["seconds"] == {"4096": 1.0} for test in found["tests"])


def test_what_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fact is there, and a driver that tells nothing of its sensors stops nothing."""
    answers: dict[str, Any] = {"temperature": 41, "power_draw": RuntimeError("no"), "get_device_capability": (9, 0)}
    answers |= {"mem_get_info": (70 << 30, 80 << 30), "get_device_name": "NVIDIA H100", "clock_rate": 1980}

    def asked(name: str) -> Callable[..., Any]:
        def answer(*device: Any) -> Any:
            if isinstance(answers[name], Exception):
                raise answers[name]
            return answers[name]

        return answer

    for name in answers:
        monkeypatch.setattr(torch.cuda, name, asked(name))
    monkeypatch.setattr(basics, "nccl_stack", lambda: NcclStack((2, 28), (13, 0)))
    monkeypatch.setattr(basics, "number_of", lambda device: "a number")
    found = basics._gpu("cuda:0")
    assert (found["temperature_c"], found["power_w"], found["clock_mhz"]) == (41, None, 1980)
    assert (found["nccl"], found["driver"], found["nccl_loss"]) == ([2, 28], [13, 0], "")
    assert found["total_bytes"] == 80 << 30 and {*found} >= {"device", "gpu", "cudnn", "capability"}


# -- plans, help, the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "local"), [(2, 2), (2, 1), (3, 3), (4, 4), (8, 8), (16, 8), (12, 4), (256, 8)])
def test_plans_fill_the_job_and_can_run(world: int, local: int) -> None:
    """On GPUs too, where no test runs them: programs are built, and every way to split is there that ranks allow."""
    plans = plans_of(world, local)
    assert len({*plans.values()}) == len(plans)
    for plan in plans.values():
        assert plan.world_size == world and plan.tp <= local
        for device, backend in (("cpu", "gloo"), ("cuda", "nccl")):
            for case in (proof_case(plan, device, 2), timed_case(plan, device, 2)):
                prepare(build_step(case.config, case.plan, case.batch), backend=backend)
    if world % 2 == 0:
        sizes = {name: max(plan.size(name) for plan in plans.values()) for name in ("cp", "dp_shard", "dp_replicate")}
        assert min(sizes.values()) >= 2
    if world >= 16:
        assert all(size > 1 for size in (plans["all"].tp, plans["all"].cp, plans["all"].dp_shard))
        assert plans["all"].dp_replicate == 2 and plans["TP"].tp == min(local, 8)


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7")])
def test_ranks_are_told_in_few_words(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_the_help_says_all_that_one_needs() -> None:
    text = parser().format_help()
    for stage in STAGES:
        assert stage.name in text and stage.about in text
    for word in ("torchrun", "#SBATCH", "acceptance.json", "calibrate --acceptance", "validate", "Exit codes", "1800"):
        assert word in text
    assert sum(stage.share for stage in STAGES) == 1800


def test_outside_of_a_job_it_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    out = tmp_path / "out"
    with pytest.raises(CinemeshError, match=r"torchrun --nproc-per-node 8 -m cinemesh\.launch\.acceptance"):
        entry._main(parser().parse_args(["--out", str(out)]))
    with pytest.raises(CinemeshError, match="--seconds is 0"):
        entry._main(parser().parse_args(["--out", str(out), "--seconds", "0"]))
    assert not out.exists()


def command(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    here = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=580, env=here, cwd=ROOT, check=False
    )


@pytest.mark.slow
def test_all_of_it_under_torchrun(tmp_path: Path) -> None:
    """Every plan, uncut, as a user starts it."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    done = command(*torchrun, "-m", "cinemesh.launch.acceptance", "--out", str(tmp_path), "--seconds", "900")
    file = json.loads((tmp_path / ACCEPTANCE_FILE).read_text())
    assert done.returncode == 0, (done.stdout, file)
    assert [row["ended"] for row in file["stages"]] == ["ok"] * len(STAGES)
    assert done.stdout.count("ok in") == len(STAGES) and "verdict: well" in done.stdout
    assert len(file["stages"][1]["found"]["plans"]) == len(plans_of(4, 4))
