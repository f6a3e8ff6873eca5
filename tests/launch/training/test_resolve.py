"""``plan: auto``: chosen once, before the mesh, kept by a resume on as many processes, chosen again on others."""

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from harness import Pool
from training import in_two_batches, recipe

from cinemesh.errors import CinemeshError
from cinemesh.kernels import selection
from cinemesh.launch import train as entry
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import resolve, resolved
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.predicted import Predicted
from cinemesh.launch.training.recipe import read_config, read_recipe
from cinemesh.launch.training.resolved import Resolved
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.perf_model.prices.compute import Compute

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def auto(clips: Path, tmp_path: Path) -> Path:
    """The file of a recipe whose plan is left to the planner; float32 is held."""
    values = recipe(clips, tmp_path) | {"plan": {"auto": True, "dtype": "float32"}, "cluster": "local-cpu"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_planner_is_asked_for_every_bucket_s_own_samples(auto: Path, tmp_path: Path) -> None:
    """By the plays of whole steps that stand beside the run: 2 samples of one bucket, 4 of the other, 1 to 2."""
    auto.write_text(yaml.safe_dump(in_two_batches(yaml.safe_load(auto.read_text()))))
    resolve.resolve(*read_recipe(auto), 2, rank=0)
    known, predicted = Resolved.read(tmp_path / "run"), Predicted.read(tmp_path / "run")
    assert known is not None and predicted is not None
    setting = Setting.of(read_config(auto))
    assert [batch.samples * known.plan.data_ranks * known.plan.micro_batches for batch in setting.batches] == [2, 4]
    first, second = predicted.step_s.values()
    assert known.step_s == pytest.approx((first + 2 * second) / 3, rel=1e-3)


def train_rank(path: Path, steps: int) -> tuple[int, Plan]:
    """One rank of a run in the pool, as the loop reads its recipe: steps done, and the plan that did them."""
    setting = Setting.of(read_config(path, [f"schedule.steps={steps}"]))
    mesh = Mesh(setting.config.plan)
    place = Joined(mesh.rank, "cpu", mesh)
    runner = train_steps(setting, place, open_history(setting, place), StopSignal())
    mesh.close()
    return runner.steps_done, runner.plan


def test_a_run_is_resolved_once_kept_by_a_resume_and_resolved_again_on_another_world_size(
    auto: Path, tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model on two gloo processes, resumed on two, then on one by the entry of training."""
    run = tmp_path / "run"
    resolve.resolve(*read_recipe(auto), 2, rank=0)
    known = Resolved.read(run)
    assert known is not None and known.plan.world_size == 2 and known.plan.dtype == "float32"
    assert known.cluster == "local-cpu" and known.step_s > 0 and known.peak_bytes > 0
    said = capsys.readouterr().err
    assert f"plan: auto: {resolve.describe(known.plan)}, predicted " in said and "again" not in said
    assert " s a step with attention on torch; written to " in said
    assert pool.run(2, train_rank, auto, 2) == [(2, known.plan)] * 2
    text = (run / resolved.FILE).read_text()

    resolve.resolve(*read_recipe(auto), 2, rank=0)
    assert "plan: auto: keeps " in capsys.readouterr().err
    assert (run / resolved.FILE).read_text() == text
    assert pool.run(2, train_rank, auto, 4) == [(4, known.plan)] * 2

    entry.run(config=auto, nproc=None, overrides=["schedule.steps=6"])
    assert f"{run / resolved.FILE} is of 2 processes, this job of 1: planned again" in capsys.readouterr().err
    other = Resolved.read(run)
    assert other is not None and other.plan.world_size == 1
    newest = latest(run / FOLDER)
    assert newest is not None and read_manifest(newest).plan == other.plan.to_dict()
    rows = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert rows == sorted(rows) and rows[-1] == 6  # it went on from step 4


def test_every_reader_of_the_recipe_reads_the_resolved_plan(auto: Path, tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"plan is auto, and .*resolved\.yaml does not say yet which; train with"):
        read_config(auto)
    plan = Plan(cp=2, dp_shard=1, dtype="float32")
    Resolved(plan, "local-cpu", 1.0, 1, 2, (2,)).write(tmp_path / "run")
    assert read_config(auto).plan == plan


def asked(path: Path) -> tuple[Any, Any, Setting]:
    config, auto = read_recipe(path)
    assert auto is not None
    return config, auto, Setting.of(config)


def test_the_plan_is_the_planners_own_for_the_recipes_batch_and_buckets(auto: Path) -> None:
    """The fields that are held stay; the batch is the recipe's; the plan runs it."""
    _, wanted, setting = asked(auto)
    found = resolve.planned(2, wanted, setting)
    assert found.plan.world_size == 2 and found.plan.dtype == "float32"
    assert found.plan.data_ranks * found.plan.micro_batches * setting.under(found.plan).batches[0].samples == 2
    held = replace(wanted, held={"dtype": "float32", "cp": 2, "recompute": "full"})
    plan = resolve.planned(2, held, setting).plan
    assert (plan.cp, plan.recompute) == (2, "full")


def test_the_planner_counts_on_what_is_installed_or_stated(auto: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is FlashAttention 3 and an old torch; a recipe may say otherwise, and ask other kernels."""
    here = {"flash-attn": "not here", "apex": "not here", "cudnn": "too old", "triton": "not here"}
    monkeypatch.setattr(selection, "missing", lambda: here)

    def attention(*overrides: str) -> list[str]:
        config, _ = read_recipe(auto, overrides)
        compute = Compute(resolve.cluster_under(config, "grand-teton-h100"))
        return [compute.kernel(op).package for op in ("attention", "attention_backward", "cross_attention")]

    assert attention() == ["flash-attn-3", "flash-attn-3", "triton"]
    assert attention("packages=[]") == ["cudnn", "cudnn", "triton"]
    assert attention("packages=[]", "deterministic=true") == ["cudnn", "triton", "triton"]
    assert attention("packages=[fa2]", "kernels={attention_backward: flash-attn}") == ["cudnn", "flash-attn", "triton"]
    with pytest.raises(CinemeshError, match="package 'fa33' is none"):
        attention("packages=[fa33]")


def test_only_rank_0_asks_the_planner_and_the_others_wait_for_it(
    auto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a plan of another job: one of more processes, or one that the recipe no longer allows."""
    config, wanted, _ = asked(auto)
    calls: list[int] = []
    ask = resolve.planned

    def counted(world: int, *args: Any) -> Resolved:
        calls.append(world)
        return ask(world, *args)

    monkeypatch.setattr(resolve, "planned", counted)
    for stale in (Plan(dp_shard=4, dtype="float32"), Plan(dp_shard=2), Plan(dp_replicate=2, micro_batches=2)):
        Resolved(stale, "local-cpu", 1.0, 1, 2, (2,)).write(tmp_path / "run")
        monkeypatch.setattr(resolve, "MEETING_S", 0.3)
        with pytest.raises(CinemeshError, match="rank 0 wrote no plan of 2 processes"):
            resolve.resolve(config, wanted, 2, rank=1)
    monkeypatch.setattr(resolve, "MEETING_S", 60.0)
    waiting = Thread(target=resolve.resolve, args=(config, wanted, 2, 1))
    waiting.start()
    resolve.resolve(config, wanted, 2, rank=0)
    waiting.join(60)
    assert not waiting.is_alive() and calls == [2]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cluster": None}, "plan is auto, and no cluster is named to choose it for; add cluster"),
        ({"cluster": "local-gpu"}, "cluster: 'local-gpu' is unknown"),
        ({"plan": {"auto": True, "ttp": 2}}, "did you mean 'tp'"),
        ({"plan": {"auto": "yes"}}, "unknown key 'auto'"),
        ({"plan": {"auto": True, "tp": 4}}, r"gpus\(2\) % tp\(4\) = 2; fix degrees whose product divides"),
        ({"plan": {"recompute": "none", "dp_shard": 2, "dtype": "float32"}, "model": {"preset": "movie-gen-5b"}}, "GB"),
    ],
)
def test_what_cannot_be_resolved_is_refused_before_anything_is_written(
    changes: dict[str, Any], told: str, auto: Path, tmp_path: Path
) -> None:
    """A plan that is given must fit the cluster, too, where the recipe names one."""
    auto.write_text(yaml.safe_dump(yaml.safe_load(auto.read_text()) | changes))
    with pytest.raises(CinemeshError, match=told):
        entry.run(config=auto, nproc=2, overrides=[])
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_a_damaged_file_says_what_to_do(auto: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for text in ("", "plan: {", "plan: {tp: 2}", "[1]"):
        (tmp_path / "run" / resolved.FILE).write_text(text)
        with pytest.raises(CinemeshError, match=r"resolved\.yaml .*; remove it, and the plan is chosen again"):
            read_config(auto)


def test_a_recipe_without_a_cluster_never_loads_the_planner(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the planner was asked")

    monkeypatch.setattr(resolve, "resolve", refuse)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    entry.run(config=path, nproc=None, overrides=["schedule.steps=1", "schedule.warmup_steps=0"])
    assert not (tmp_path / "run" / resolved.FILE).exists()
