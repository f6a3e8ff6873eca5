"""``cinemesh plan``: what it prints is what was computed."""

from __future__ import annotations

import gc
import json
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands import plan as command
from cinemesh.launch.options import On
from cinemesh.launch.tables import new_console
from cinemesh.model.config import preset
from cinemesh.parallel.ir.communicators import communicators
from cinemesh.parallel.ir.fields import AXES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.startup import hosts_start, start_up
from cinemesh.perf_model.report.report import explain
from cinemesh.perf_model.search.evaluator import BuiltPlan, Evaluator, PlanCost
from cinemesh.perf_model.search.planner import Nearby, search
from cinemesh.perf_model.search.request import LatentBucket, PricedPlan, Request


def printed(capsys: pytest.CaptureFixture[str], **asked: object) -> str:
    defaults: dict[str, object] = {
        "on": On(model="tiny", samples=1),
        "gpus": 16,
        "latents": ["2x8x8"],
        "top": 1,
        "tune": False,
        "explain_it": False,
        "paper": False,
        "report": None,
        "out": None,
        "as_json": False,
    }
    command.run(**(defaults | asked))  # pyright: ignore[reportArgumentType]
    return capsys.readouterr().out


def test_communicators_are_told_with_their_bytes_and_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As keys of the JSON and as a table, of the plan that was chosen; a field alone is enough for --fix."""
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(explain, "sensitivities", lambda *_: iter(()))
    values = json.loads(printed(capsys, fix="cp=2,unit_ctas=4", as_json=True))
    plan, told = Plan.from_dict(values["plans"][0]["plan"]), values["start_up"]
    assert plan.unit_ctas == 4
    assert told["each"] == [asdict(row) for row in start_up(plan, load("grand-teton-h100"))]
    assert told["communicators"] == len(communicators(plan))
    assert told["bytes"] == sum(row["bytes"] for row in told["each"])
    assert told["seconds"] == sum(row["seconds"] for row in told["each"])
    text = printed(capsys, fix="cp=2,unit_ctas=4", explain_it=True)
    said = f"communicators of a rank: {told['communicators']}, {told['bytes'] / 1e9:.2f} GB, {told['seconds']:.1f} s to"
    assert said in text and "unit_ctas=4" in text
    hosts = hosts_start(plan, load("grand-teton-h100"))
    assert hosts is not None and told["hosts"] == asdict(hosts) and hosts.told() in " ".join(text.split())
    for row in told["each"]:
        assert any(line.startswith(f"{row['name']} ") for line in text.splitlines()), row["name"]


def test_the_kernels_that_are_priced_are_told_and_what_others_would_give(capsys: pytest.CaptureFixture[str]) -> None:
    """The step that is told of a package is the one that the command tells where it is stated."""
    asked: dict[str, object] = {"latents": ["8x48x48"], "gpus": 8, "fix": "tp=8"}
    on = [On(model="movie-gen-5b", samples=1, packages=packages) for packages in (None, "fa3")]
    plain, stated = (json.loads(printed(capsys, as_json=True, on=one, **asked)) for one in on)
    assert [row["package"] for row in plain["kernels"]][:1] == ["cudnn"]
    assert [row["package"] for row in stated["kernels"]][:1] == ["flash-attn-3"]
    assert plain["plans"][0]["plan"] == stated["plans"][0]["plan"]
    offered = {other["name"]: other["step_s"] for other in plain["other_software"]}
    now, there = plain["plans"][0]["step_s"], stated["plans"][0]["step_s"]
    assert offered["flash-attn-3"] == pytest.approx(there, rel=1e-3) and there < now < offered["deterministic"]
    text = printed(capsys, on=on[0], **asked)
    assert "cudnn (cuDNN's attention, in torch's CUDA builds): attention" in text
    assert f"flash-attn-3: step {now:.3f} s -> {offered['flash-attn-3']:.3f} s" in text


def test_a_mixture_is_told_by_latent(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own samples, which fill its step; the mean of the steps by share is the step of the table."""
    asked: dict[str, object] = {"on": On(model="movie-gen-5b"), "latents": ["16x24x44:3", "1x24x44"]}
    asked |= {"gpus": 8, "fix": "tp=4,cp=1,recompute=selective"}
    best = (told := json.loads(printed(capsys, as_json=True, **asked)))["plans"][0]
    video, image = best["latents"]
    assert (video["latent"], video["share"], image["share"]) == ("16x24x44", 0.75, 0.25)
    assert image["samples"] > video["samples"] == best["samples"] and video["global_batch"] == best["global_batch"]
    assert best["step_s"] == pytest.approx(0.75 * video["step_s"] + 0.25 * image["step_s"])
    samples = 0.75 * video["global_batch"] + 0.25 * image["global_batch"]
    assert best["samples_per_s"] == pytest.approx(samples / best["step_s"])
    busy = sum(latent["share"] * latent["mfu"] * latent["step_s"] for latent in best["latents"])
    assert best["mfu"] == pytest.approx(busy / best["step_s"])
    assert {one["latent"] for one in told["samples_tried"]} == {"16x24x44", "1x24x44"}
    text = printed(capsys, **asked)
    row = next(line.split() for line in text.splitlines() if line.startswith("1x24x44 "))
    assert row[2:6] == ["25%", str(image["samples"]), str(image["global_batch"]), f"{image['step_s']:.3f}"]
    assert f"{video['global_batch']} + {image['global_batch']}" in text
    assert f"samples of a data rank of 1x24x44: {image['samples']}, the fewest" in text


def test_help_says_what_is_searched_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all plans that brute force plays, what ever differs is in the help; prefetch, named there as fixed, never."""
    played: list[Plan] = []
    cost = Evaluator.cost

    def noted(self: Evaluator, built: BuiltPlan) -> PlanCost:
        played.append(built.plan)
        return cost(self, built)

    monkeypatch.setattr(Evaluator, "cost", noted)
    cluster = load("grand-teton-h100").with_(memory_bytes=24e9)
    bucket = LatentBucket((16, 24, 44))
    search(Request(preset("movie-gen-5b"), (bucket,), cluster, 16, global_batch=8, prune=False))
    differ = {f.name for f in fields(Plan) if len({getattr(plan, f.name) for plan in played}) > 1}
    assert {"tp", "cp", "dp_shard", "dp_replicate", "order", "recompute", "micro_batches"} <= differ
    # With one rank no unit gradient is reduced, so none can be while the next is computed.
    assert differ <= {*AXES, "order", "recompute", "recompute_last", "last_blocks", "micro_batches", "grad_units"}
    assert {plan.prefetch for plan in played} == {1}
    shown = " ".join(CliRunner().invoke(app, ["plan", "--help"]).stdout.split())
    assert "(prefetch 1, nothing sliced)" in shown and "prefetch 2" in shown


def test_the_plan_that_is_written_is_read_and_checked_as_the_line_on_stderr_says(tmp_path: Path) -> None:
    """The JSON on stdout stays alone."""
    out = tmp_path / "best plan.yaml"
    asked = ["--model=tiny-video", "--gpus=4", "--top=1", f"--out={out}", "--json"]
    done = CliRunner().invoke(app, ["plan", *asked])
    assert done.exit_code == 0, done.output
    assert Plan.from_yaml(out.read_text()).to_dict() == json.loads(done.stdout)["plans"][0]["plan"]
    line = done.stderr.splitlines()[-1]
    head, told, train = (part.strip() for part in re.split("; next:|, then ", line))
    assert head == f"wrote {out}" and train == f"cinemesh train CONFIG --plan '{out}'"
    program, *words = shlex.split(told)
    assert program == "cinemesh" and CliRunner().invoke(app, words).exit_code == 0


def test_a_plan_file_that_no_command_would_read_is_refused_before_the_search() -> None:
    done = CliRunner().invoke(app, ["plan", "--gpus=8", "--out=best"])
    assert isinstance(done.exception, CinemeshError) and "a plan file ends in .yaml" in str(done.exception)


def test_what_is_close_by_is_said_with_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Another batch keeps all GPUs, fewer GPUs say how many servers are free; a person plans a job by these lines."""
    request = Request(preset("tiny"), (LatentBucket((2, 8, 8)),), load("grand-teton-h100"), 1040)
    best = PricedPlan(Plan(tp=2), 1, 0.5, 0.4, 0.3, 10**9, 256)
    others = [Nearby(1024, best, 0.145), Nearby(1040, best, 24.5)]
    command._print_nearby(new_console(), request, others)  # pyright: ignore[reportPrivateUsage]
    fewer, batch = capsys.readouterr().out.splitlines()
    assert fewer.startswith(
        "close by: 1,024 GPUs, with 16 left out (2 servers), would give 512.0 samples/s, 14.5% more"
    )
    assert batch.startswith("close by: a global batch of 256 would give 512.0 samples/s, 2450.0% more: tp=2")


@pytest.mark.parametrize("command_line", ["plan --gpus 8 --samples 1", "explain tp=2,dp_shard=4"])
def test_headroom_stays_free(command_line: str) -> None:
    """Of what a GPU may use, in every command that says what fits: plans fill what they are given to the last byte."""
    limits: list[float] = []
    for headroom in ("0", "60"):
        asked = [*command_line.split(), "--model", "movie-gen-5b", "--latent", "4x32x32", "--headroom", headroom]
        told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
        best = told["plans"][0] if "plans" in told else told
        limits.append(best["limit_bytes"])
        assert best["peak_bytes"] <= best["limit_bytes"]
    assert limits[0] - limits[1] == 60e9


def test_headroom_of_all_there_is_is_refused() -> None:
    with pytest.raises(CinemeshError, match=r"^headroom 100 GB >= 84.9 GB usable of a GPU of grand-teton-h100; leave"):
        load("grand-teton-h100", headroom_gb=100.0)


def test_a_cluster_on_which_captured_collectives_wait_is_priced_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Uncaptured, as a run there is; the JSON and the text say it, and what another driver or a capture would give."""
    path = tmp_path / "old.yaml"
    path.write_text('base: grand-teton-h100\nstack: {nccl: "2.28", driver: "12.8"}\n')
    asked: dict[str, object] = {"latents": ["8x48x48"], "gpus": 8, "fix": "tp=4,cp=2"}
    on = On(model="movie-gen-5b", samples=1, cluster=str(path))
    told = json.loads(printed(capsys, as_json=True, on=on, **asked))
    assert told["order"].endswith("where capture is required; priced side by side, launched by the host")
    step_s = told["plans"][0]["step_s"]
    others = {row["name"]: row["step_s"] for row in told["other_software"]}
    assert others["capture: required"] > step_s >= others["NCCL 2.27 and a driver of CUDA 12.9"]
    text = " ".join(printed(capsys, on=on, **asked).split())
    assert told["order"] in text and "capture: required: step" in text
