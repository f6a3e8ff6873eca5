"""Steps of fewer samples, of a run that lost ranks: recorded, and what they leave is taken up by the next ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Pool
from training import STATES, recipe
from typer.testing import CliRunner

from cinemesh.data.batches import BATCHES, BatchHistory
from cinemesh.data.cache.samples import collate
from cinemesh.data.order import Stream, samples_of_a_read
from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import resolve
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.recipe import read_recipe, read_run
from cinemesh.launch.training.resolved import Resolved
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.steps import SAMPLES
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.inputs import BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import initial_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")


def test_steps_of_any_size_take_every_sample_of_an_epoch_once() -> None:
    """Two buckets of 60 and 35 samples, four eras: what steps take, one after the other, is the stream itself."""
    history = BatchHistory(((0, (4, 8)),)).going_on(3, (3, 7)).going_on(9, (4, 8)).going_on(12, (2, 5))
    buckets = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    sizes = [history.at(step)[bucket] for step, bucket in enumerate(buckets)]
    assert sizes[:13] == [4, 8, 8, 3, 3, 7, 3, 7, 7, 4, 4, 8, 5]
    for bucket, samples in ((0, 30), (1, 35)):
        stream, taken = Stream(3, bucket, samples, 4, sizes[0]), list[int]()
        for step, place in enumerate(history.places(buckets)):
            if buckets[step] == bucket:
                assert place == len(taken) == history.taken(buckets[:step])[bucket]
                taken += stream.take(place, sizes[step])
        assert len(taken) > samples and sorted(taken[:samples]) == list(range(samples))


def test_a_history_is_what_its_checkpoint_says_and_no_more() -> None:
    """A run that goes on from an earlier checkpoint forgets what came after; equal batches begin no era."""
    history = BatchHistory.of({}, (8, 4)).going_on(0, (8, 4)).going_on(10, (6, 3)).going_on(20, (8, 4))
    assert BatchHistory.of(json.loads(json.dumps(history.noted())), (1, 1)) == history
    assert history.going_on(25, (8, 4)) == history
    assert history.going_on(20, (6, 3)).eras == ((0, (8, 4)), (10, (6, 3)))
    assert history.going_on(15, (8, 4)).eras == ((0, (8, 4)), (10, (6, 3)), (15, (8, 4)))
    assert history.going_on(0, (2, 1)).eras == ((0, (2, 1)),)


@pytest.fixture
def path(clips: Path, tmp_path: Path) -> Path:
    """A recipe whose ranks each take one of 4 samples of a step, in float64."""
    values = recipe(clips, tmp_path) | {"plan": {"auto": True, "tp": 1, "cp": 1, "dtype": "float64"}}
    values |= {"cluster": "local-cpu", "schedule": {"steps": 9, "warmup_steps": 2, "decay": "constant"}}
    values["data"]["global_batch"] = 4
    values["logging"] |= {"every": 1, "validate_every": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def train_rank(path: Path, steps: int) -> int:
    config, batches = read_run(path, [f"schedule.steps={steps}"])
    setting, mesh = Setting.of(config, batches), Mesh(config.plan)
    place = Joined(mesh.rank, "cpu", mesh)
    runner = train_steps(setting, place, open_history(setting, place), StopSignal())
    mesh.close()
    return runner.samples


def losses_by_hand(path: Path, sizes: list[int]) -> list[float]:
    """Of steps of so many samples, each the next of the stream, taken by a process that knows no history."""
    setting = Setting.of(replace(read_recipe(path)[0], plan=Plan(dtype="float64")))
    config, cache = setting.config, open_history(setting, Joined(0, "cpu", None)).at(0)
    train, latent = cache.buckets[0].train, setting.latents[0]
    stream = Stream(config.seed, 0, len(train), samples_of_a_read(train.latent_bytes), sizes[0])
    options: dict[str, Any] = {"seed": config.seed, "caption_dropout": config.caption_dropout}
    runners = {
        size: StepRunner(setting.model, config.plan, BatchShape(size, latent), config.optimizer, None, **options)
        for size in dict.fromkeys(sizes)
    }
    runners[sizes[0]].initialise(initial_values(config.seed))
    state = {name: runners[sizes[0]].buffers[name].clone() for name in STATES}
    losses = list[float]()
    for step, size in enumerate(sizes):
        runner = runners[size]
        for name, value in state.items():
            runner.buffers[name].copy_(value)
        runner.load(0, collate(train.select(stream.take(sum(sizes[:step]), size)), 0, 1))
        runner.step(config.schedule.lr(config.optimizer.lr, step))
        losses.append(runner.loss.item())
        state = {name: runner.buffers[name].clone() for name in STATES}
    return losses


def test_a_run_of_fewer_ranks_takes_fewer_samples_until_the_others_are_back(
    path: Path, tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """4, 3 and 4 ranks: every loss is that of an independent computation of the same batches, to 1e-10."""
    run = tmp_path / "run"
    for ranks, steps in ((4, 3), (3, 6), (4, 9)):
        resolve.resolve(*read_recipe(path), ranks, rank=0)
        assert pool.run(ranks, train_rank, path, steps) == [ranks] * ranks
    said = capsys.readouterr().err
    assert said.count("WARNING: 3 of 4 processes are left: a step takes 3 samples in place of the recipe's 4") == 1
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [row["samples_per_step"] for row in rows] == [4] * 3 + [3] * 3 + [4] * 3
    expected = losses_by_hand(path, [4] * 3 + [3] * 3 + [4] * 3)
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-10)
    assert len({*expected}) == 9 and losses_by_hand(path, [4] * 9)[4] != pytest.approx(expected[4], rel=1e-6)
    newest = latest(run / FOLDER)
    assert newest is not None
    note = read_manifest(newest).note
    assert note[BATCHES] == [[0, [4]], [3, [3]], [6, [4]]] and note[SAMPLES] == [33]
    log = (run / "train.log").read_text()
    assert "from step 4 on a step takes 3 samples in place of the recipe's 4" in log
    assert "from step 7 on a step takes 4 samples\n" in log


def test_a_recipe_may_want_the_exact_batch_and_a_first_start_always_does(path: Path, tmp_path: Path) -> None:
    """A person who starts it on ranks that do not divide the batch is asked first."""
    with pytest.raises(CinemeshError, match=r"no plan of 3 GPUs"):
        resolve.resolve(*read_recipe(path), 3, rank=0)
    resolve.resolve(*read_recipe(path), 4, rank=0)
    with pytest.raises(CinemeshError, match=r"no plan of 3 GPUs"):
        resolve.resolve(*read_recipe(path, ["on_loss=exact"]), 3, rank=0)
    resolve.resolve(*read_recipe(path), 3, rank=0)
    known = Resolved.read(tmp_path / "run")
    assert known is not None and known.global_batches == (3,) and known.full_ranks == 4
    resolve.resolve(*read_recipe(path), 2, rank=0)  # two data ranks divide the batch: by micro-batches or more at once
    known = Resolved.read(tmp_path / "run")
    assert known is not None and known.global_batches == (4,) and known.full_ranks == 4


@pytest.mark.slow
def test_a_job_of_6144_ranks_that_loses_a_server_keeps_its_share_of_the_throughput() -> None:
    """Dry, of the 30B at 768 samples a step: 767 data ranks are left, each with its sample."""
    config = Path(__file__).parents[3] / "configs" / "movie-gen" / "7-t2iv-768.yaml"
    sets = ("start_from=null", "data.global_batch=768", "data.buckets=[{frames: 256}]")
    words = ["train", str(config), "--dry-run", "--plan", "auto", "--ranks", "6144", "--lost", "8", "--json"]
    done = CliRunner().invoke(app, [*words, *(word for value in sets for word in ("--set", value))])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ranks"] == 6136 and said["global_batch"] == 767
    assert said["after_loss"]["batches"] == "767 samples in place of the recipe's 768"
    assert said["after_loss"]["of_proportional"] >= 0.99
    share = said["after_loss"]["samples_per_s"] / said["after_loss"]["full_samples_per_s"]
    assert said["after_loss"]["of_proportional"] == pytest.approx(share * 6144 / 6136)
