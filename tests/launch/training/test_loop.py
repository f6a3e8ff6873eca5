"""Training as a person runs it: exact resume, validation, and what is reported."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from harness import Pool
from torch import Tensor
from training import STATES, cinemesh, in_two_batches, in_two_buckets, recipe, start, states, stop_in_step

from cinemesh.data.cache import drawn
from cinemesh.data.cache.building import build_cache
from cinemesh.data.cache.samples import Sample, collate
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.order import Stream, drawn_buckets, samples_of_a_read
from cinemesh.data.video import frame_rate, read_frames
from cinemesh.errors import CinemeshError
from cinemesh.kernels.reference import Kernel
from cinemesh.launch.cluster.marks import Doing, Marks
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import feed, showcase
from cinemesh.launch.training import loop as train
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.feed import Feed
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.sample import FRAME_RATE
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import METRICS_FILE, Telemetry, read_metrics
from cinemesh.launch.training.validation import SEED, HeldOutLoss, Validation
from cinemesh.model import flow
from cinemesh.model.blueprint import Blueprint, PlacedStep
from cinemesh.model.config import parameters
from cinemesh.model.inputs import LATENTS, MASK, text_input
from cinemesh.model.reference import Reference
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import fill_shard, full, initial_values, probe_values
from cinemesh.parallel.runtime.comm import gather_objects
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in STATES:
        assert torch.equal(a[name], b[name]), name


# -- resume -----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(
    values: dict[str, Any], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Batch, noise, learning rate, moments, EMA or counters that restart show here; so do reports given twice."""
    assert start(values, tmp_path) == 0
    stopped = recipe(clips, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert start(stopped, tmp_path) == 128 + signal.SIGTERM
    assert "stopped after step 3; the same command goes on" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "stopped/run/checkpoints").iterdir()] == ["step-00000003"]
    assert start(stopped, tmp_path) == 0
    assert_same(states(tmp_path / "run", values), states(tmp_path / "stopped/run", values))
    whole, resumed = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "stopped/run")
    assert [row["step"] for row in whole] == [0, 2, 3, 4, 6, 6]
    at_the_stop = resumed.pop(3)  # of step 3, which no later report holds
    assert [row["step"] for row in resumed] == [0, 2, 3, 4, 6, 6] and at_the_stop["step"] == 3
    for a, b in zip(whole, resumed, strict=True):
        assert a.get("validation_loss") == b.get("validation_loss")
        reported = (at_the_stop["loss"] + b["loss"]) / 2 if b["step"] == 4 else b.get("loss")
        assert a.get("loss") == pytest.approx(reported, rel=1e-15) if reported else "loss" not in a
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    assert start(values, tmp_path) == 0  # a finished run has nothing to do
    assert read_metrics(tmp_path / "run") == whole


def test_what_is_read_ahead_is_what_would_be_read(
    values: dict[str, Any], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By threads, some steps before; a sample that cannot be read ends its own step, no other."""
    assert start(values, tmp_path) == 0
    read, step = Feed._read, StepRunner.step
    asked: list[int] = []
    stepped: list[int] = []

    def counted(self: StepRunner, *given: Any, **how: Any) -> None:
        stepped.append(max(asked))
        step(self, *given, **how)

    def watched(self: Feed, at: int) -> list[dict[str, Tensor]]:
        asked.append(at)
        return read(self, at)

    monkeypatch.setattr(Feed, "_read", watched)
    monkeypatch.setattr(StepRunner, "step", counted)
    assert start(recipe(clips, tmp_path / "again"), tmp_path) == 0
    again = recipe(clips, tmp_path / "again")
    assert_same(states(tmp_path / "run", values), states(tmp_path / "again/run", again))
    assert sorted(asked) == list(range(6)) and len(stepped) == 6  # each once, whatever thread came first

    def damaged(self: Feed, at: int) -> list[dict[str, Tensor]]:
        if at == 2:
            raise CinemeshError("sample 7 is damaged")
        return read(self, at)

    monkeypatch.setattr(Feed, "_read", damaged)
    stepped.clear()
    assert start(recipe(clips, tmp_path / "damaged"), tmp_path) == 2
    assert len(stepped) == 2


def test_steps_are_built_beside_a_run_where_it_has_cores(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two shapes the rank builds one, the process beside it the other: to the same bits as one core."""
    build, here = Blueprint.build, list[Blueprint]()

    def noted(self: Blueprint) -> PlacedStep:
        here.append(self)
        return build(self)

    monkeypatch.setattr(Blueprint, "build", noted)
    found = list[dict[str, Tensor]]()
    for cores, shapes in ((1, 2), (2, 1)):
        monkeypatch.setattr(train, "cores_each", lambda processes, cores=cores: cores)
        values = in_two_buckets(recipe(clips, tmp_path / str(cores)))
        assert start(values, tmp_path) == 0
        assert len(here) == shapes, [blueprint.batch for blueprint in here]
        here.clear()
        found.append(states(tmp_path / str(cores) / "run", values))
        here.clear()  # of the runner that reads them
    assert_same(*found)


def run_rank(values: dict[str, Any], stop_on: tuple[int, int] | None) -> dict[str, Any]:
    """One rank of a run in the pool; a signal reaches rank ``stop_on[0]`` alone, in step ``stop_on[1]``."""
    setting = Setting.of(check_config(values, "test"))
    mesh = Mesh(setting.config.plan)
    place, stop = Joined(mesh.rank, "cpu", mesh), StopSignal()
    step = StepRunner.step

    def interrupted(self: StepRunner, lr: float, *given: Any, **how: Any) -> None:
        if stop_on == (mesh.rank, self.steps_done + 1):
            stop.signum = signal.SIGTERM
        step(self, lr, *given, **how)

    StepRunner.step = interrupted
    try:
        runner = train_steps(setting, place, open_history(setting, place), stop)
    finally:
        StepRunner.step = step
        mesh.close()
    return {"steps": runner.steps_done, "states": {name: runner.buffers[name].clone() for name in STATES}}


def one_bucket(values: dict[str, Any]) -> dict[str, Any]:
    return values


@pytest.mark.parametrize(
    ("plan", "buckets"),
    [
        ({"dp_shard": 2, "cp": 2}, one_bucket),
        ({"tp": 2, "micro_batches": 2}, one_bucket),
        ({"dp_shard": 2}, in_two_buckets),
        ({"tp": 2, "micro_batches": 2}, in_two_batches),
    ],
)
def test_ranks_stop_after_the_same_step_and_resume_to_the_same_bits(
    pool: Pool,
    clips: Path,
    tmp_path: Path,
    plan: dict[str, int],
    buckets: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """A rank that stopped alone would leave the others waiting; resuming under shards must lose nothing either.

    With two buckets, the places in both streams must be found again; where one has more samples, at its own pace.
    """
    ranks = 4 if "cp" in plan else 2
    a, b = (buckets(recipe(clips, tmp_path / name, **plan)) for name in "ab")
    whole = pool.run(ranks, run_rank, a, None)
    stopped = pool.run(ranks, run_rank, b, (1, 2))
    assert [rank["steps"] for rank in stopped] == [2] * ranks
    resumed = pool.run(ranks, run_rank, b, None)
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a["states"], b["states"])


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_bits_and_torchrun_gives_them_too(clips: Path, tmp_path: Path) -> None:
    """SIGKILL of launcher and ranks at whatever moment, on two buckets; and the two ways of starting a job are one."""
    folders = [tmp_path / name for name in ("whole", "killed", "torchrun")]
    recipes: list[Path] = []
    for folder in folders:
        folder.mkdir()
        values = in_two_buckets(recipe(clips, folder, tp=2))
        values["schedule"]["steps"] = 60
        values["logging"]["checkpoint_every"] = 2
        recipes.append(folder / "recipe.yaml")
        recipes[-1].write_text(yaml.safe_dump(values))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    subprocess.run(cinemesh("train", recipes[0], "--nproc", 2), check=True, env=environment, timeout=300)

    killed = subprocess.Popen(
        cinemesh("train", recipes[1], "--nproc", 2), env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while latest(folders[1] / "run" / FOLDER) is None and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    for process in _tree(killed.pid):
        os.kill(process, signal.SIGKILL)
    killed.wait()
    newest = latest(folders[1] / "run" / FOLDER)
    assert newest is not None and newest.name < "step-00000060"
    subprocess.run(cinemesh("train", recipes[1], "--nproc", 2), check=True, env=environment, timeout=300)

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "cinemesh.launch.train", str(recipes[2])]
    subprocess.run(command, check=True, env=environment, timeout=300)
    values = recipe(clips, tmp_path, tp=2)
    whole = states(folders[0] / "run", values)
    for folder in folders[1:]:
        assert_same(whole, states(folder / "run", values))


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(process for child in below for process in _tree(child))]


# -- buckets ----------------------------------------------------------------------------------------------------------


def steps_by_hand(values: dict[str, Any]) -> dict[str, Tensor]:
    """The states after the recipe's steps, each taken by a plain runner of its bucket's shape that knows no other."""
    setting = Setting.of(check_config(values, "test"))
    config, cache = setting.config, open_history(setting, Joined(0, "cpu", None)).at(0)
    buckets = drawn_buckets(config.seed, config.schedule.steps, [bucket.weight for bucket in config.data.shapes])
    place = [0 for _ in cache.buckets]
    options: dict[str, Any] = {"seed": config.seed, "caption_dropout": config.caption_dropout}
    runners = [StepRunner(setting.model, config.plan, b, config.optimizer, None, **options) for b in setting.batches]
    runners[0].initialise(initial_values(config.seed))
    state = {name: runners[0].buffers[name].clone() for name in STATES}
    for step, bucket in enumerate(buckets.tolist()):
        runner = runners[bucket]
        for name, value in state.items():
            runner.buffers[name].copy_(value)
        train, size = cache.buckets[bucket].train, setting.batches[bucket].samples
        stream = Stream(config.seed, bucket, len(train), samples_of_a_read(train.latent_bytes), size)
        batch = collate(train.select(stream.take(place[bucket], size)), 0, 1)
        place[bucket] += size
        runner.load(0, batch)
        runner.step(config.schedule.lr(config.optimizer.lr, step))
        state = {name: runner.buffers[name].clone() for name in STATES}
    return state


@pytest.mark.parametrize("buckets", [one_bucket, in_two_buckets, in_two_batches])
def test_a_run_is_the_steps_of_plain_runners(
    values: dict[str, Any], tmp_path: Path, buckets: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Bit by bit: a step loaded into the wrong bucket, or a bucket with states of its own, shows here."""
    values = buckets(values)
    assert start(values, tmp_path) == 0
    assert_same(states(tmp_path / "run", values), steps_by_hand(values))


def test_a_bucket_s_own_samples_are_captured_counted_and_of_the_same_mean(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take buckets 1, 0, 0, 1, 1, 1. A sum, or a mean over the other bucket's samples, would be off by 2.

    In the first step weights are equal to those of a run in which every step takes 4 samples: the same losses there.
    """
    wide = in_two_buckets(values)
    wide["data"]["global_batch"] = 4
    loaded = list[int]()
    load = StepRunner.load

    def noted(self: StepRunner, micro_batch: int, batch: Any) -> None:
        loaded.append(len(batch[LATENTS]))
        load(self, micro_batch, batch)

    monkeypatch.setattr(StepRunner, "load", noted)
    first: list[float] = []
    for name, run in (("own", in_two_batches(values)), ("wide", wide)):
        run["logging"] |= {"every": 1, "directory": str(tmp_path / name)}
        assert start(run | {"capture": "required"}, tmp_path) == 0
        first.append(read_metrics(tmp_path / name)[1]["loss"])
    assert loaded == [4, 2, 2, 4, 4, 4] + [4] * 6 and first[0] == first[1] < 10
    assert "2 buckets, 2 captured steps; one arena of " in capsys.readouterr().out
    tokens = [row["tokens_per_step"] for row in read_metrics(tmp_path / "own") if "loss" in row]
    assert tokens == [32, 8, 8, 32, 32, 32]


def test_every_bucket_is_captured_counted_and_validated(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps take buckets 1, 0, 0, 1, 1, 1 of 8 and 4 tokens, 2 samples each; weights are 2 and 1."""
    values = in_two_buckets(values) | {"capture": "required", "sample": {"steps": 2, "bucket": "8x32x64"}}
    assert start(values, tmp_path) == 0
    out = capsys.readouterr().out
    assert "2 buckets, 2 captured steps; one arena of " in out
    assert "bucket 8x32x32: 6 training and 1 validation windows" in out
    assert "bucket 8x32x64: 6 training and 1 validation windows" in out
    rows = read_metrics(tmp_path / "run")
    reports = [row for row in rows if "loss" in row]
    assert [row["tokens_per_step"] for row in reports] == [12, 12, 16]
    for row in reports:
        assert row["tokens_per_s"] == pytest.approx(row["tokens_per_step"] / row["step_s"], rel=1e-12)
    assert [{name for name in row if name.startswith("step_s/")} for row in reports] == [
        {"step_s/8x32x32", "step_s/8x32x64"},
        {"step_s/8x32x32", "step_s/8x32x64"},
        {"step_s/8x32x64"},
    ]
    validated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validated] == [0, 3, 6], "before the first step, every 3, and the last"
    for row in validated:
        a, b = row["validation_loss/8x32x32"], row["validation_loss/8x32x64"]
        assert a != b and row["validation_loss"] == pytest.approx((a + 2 * b) / 3, rel=1e-12)
        assert row["validation_loss/ema"] == row["validation_loss"]
        assert (row["validation_loss/master"] != row["validation_loss"]) == (row["step"] > 0)
        of_t = [name for name in row if name.startswith("validation_loss/ema, t ")]
        assert of_t and {name.replace("ema", "master") for name in of_t} < row.keys()
    clip = read_frames(tmp_path / "run/samples/left.mp4", 32, 64)
    assert clip.shape == (8, 32, 64, 3) and (tmp_path / "run/samples/right.mp4").exists()


def faulty_rank(values: dict[str, Any], fault: str) -> str:
    """The error of one rank of two, of which rank 1 alone has the fault."""
    rank = dist.get_rank()
    drawn_as_they_are, collate_as_it_is = drawn.drawn_buckets, feed.collate

    def other_buckets(seed: int, steps: int, weights: Sequence[float]) -> Tensor:
        buckets = drawn_as_they_are(seed, steps, weights)
        return 1 - buckets

    def narrow(*given: Any) -> dict[str, Tensor]:
        batch = collate_as_it_is(*given)
        return batch | {LATENTS: batch[LATENTS][..., :2]}

    if rank == 1:
        drawn.drawn_buckets = other_buckets if fault == "draw" else drawn.drawn_buckets
        feed.collate = narrow if fault == "shape" else feed.collate
    mesh = Mesh(check_config(values, "test").plan)
    try:
        setting, place = Setting.of(check_config(values, "test")), Joined(rank, "cpu", mesh)
        train.train_steps(setting, place, open_history(setting, place), StopSignal())
    except CinemeshError as error:
        return str(error)
    finally:
        drawn.drawn_buckets, feed.collate = drawn_as_they_are, collate_as_it_is
        mesh.close()
    return "nothing was found"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("draw", "step 1: the ranks loaded batches of several buckets (1 of bucket 8x32x32, 1 of bucket 8x32x64)"),
        ("shape", "a batch of latents 1x4x2 has no bucket; buckets are 1x4x8, 1x4x4: steps are captured"),
    ],
)
def test_a_rank_that_goes_astray_is_told_on_all_ranks(
    pool: Pool, clips: Path, tmp_path: Path, fault: str, expected: str
) -> None:
    """Its step would have other collectives than the others', which then wait for ever."""
    messages = pool.run(2, faulty_rank, in_two_buckets(recipe(clips, tmp_path, dp_shard=2)), fault)
    assert messages[0] == messages[1] and expected in messages[0]
    assert not list(tmp_path.rglob("step-*"))


def other_on_rank_1(values: dict[str, Any], other: dict[str, Any], meeting: str) -> str:
    """What one of two ranks hears before the first step, of which rank 1 has another recipe."""
    rank = dist.get_rank()
    config = check_config(other if rank else values, "test")
    mesh, store = Mesh(config.plan), dist.FileStore(meeting, 2)  # pyright: ignore[reportPrivateImportUsage]
    try:
        setting, place = Setting.of(config), Joined(rank, "cpu", mesh, Meeting(store, "a", rank, 2))
        train.train_steps(setting, place, open_history(setting, place), StopSignal())
    except CinemeshError as error:
        return str(error)
    finally:
        mesh.close()
    return "nothing was found"


def test_ranks_of_other_programs_are_told_before_the_first_step(pool: Pool, clips: Path, tmp_path: Path) -> None:
    values = recipe(clips, tmp_path, dp_shard=2)
    other = values | {"optimizer": {"lr": 1e-2, "betas": [0.9, 0.98]}}
    heard = pool.run(2, other_on_rank_1, values, other, str(tmp_path / "meeting"))
    assert heard[0] == heard[1] and "the ranks of this job differ: program of 1x4x4 is " in heard[0], heard
    assert " on rank 0 and " in heard[0] and " on rank 1; give every rank the same code and latent cache" in heard[0]


def test_a_rank_that_has_other_latents_at_the_same_path_is_told(clips: Path, tmp_path: Path) -> None:
    """Each machine may have folders of its own there; a version's name is what it holds."""
    recipes = (recipe(clips, tmp_path, dp_shard=2), recipe(clips, tmp_path / "other", dp_shard=2))
    recipes[1]["data"]["stride"] = 3
    settings = [Setting.of(check_config(values, "test")) for values in recipes]
    for setting in settings:
        build_cache(setting.config.data, setting.encoding, Path(setting.config.data.cache), progress=False)
    store = dist.FileStore(str(tmp_path / "meeting"), 2)  # pyright: ignore[reportPrivateImportUsage]
    first = open_history(settings[0], Joined(0, "cpu", None, Meeting(store, "a", 0, 2)))
    with pytest.raises(CinemeshError, match=first.at(0).name):
        open_history(settings[1], Joined(1, "cpu", None, Meeting(store, "a", 1, 2)))
    assert not (tmp_path / "run").exists()


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_runs_on_the_kernels_of_the_run_its_draws_too(clips: Path, tmp_path: Path) -> None:
    """Noise of the whole latent was drawn on every rank's CPU, and ``kernels`` of a recipe did not reach validation."""
    setting = Setting.of(check_config(recipe(clips, tmp_path), "test"))
    ran: list[str] = []

    def noting(op: str, kernel: Kernel) -> Kernel:
        return lambda inputs, outputs, **attrs: (ran.append(op), kernel(inputs, outputs, **attrs))[1]

    kernels = {op: noting(op, kernel) for op, kernel in setting.kernels("cpu").items()}
    config = setting.config
    runner = StepRunner(setting.model, config.plan, setting.batches[0], config.optimizer, None, kernels=kernels)
    cache = open_history(setting, Joined(0, "cpu", None)).at(0)
    Validation(runner, cache.buckets[0].validation, config).measure()
    assert {"draw_noise", "patchify", "attention", "matmul"} <= set(ran)


def validated(values: dict[str, Any]) -> HeldOutLoss:
    """With weights that are nowhere zero, in the pool or alone."""
    setting = Setting.of(check_config(values, "test"))
    mesh = Mesh(setting.config.plan) if setting.config.plan.world_size > 1 else None
    cache = open_history(setting, Joined(mesh.rank if mesh else 0, "cpu", mesh)).at(0)
    runner = StepRunner(setting.model, setting.config.plan, setting.batches[0], setting.config.optimizer, mesh)
    shown = runner.buffers[setting.config.weights]  # the others stay zero
    fill_shard(shown, runner.units, runner.coordinates, probe_values(3))
    measured = Validation(runner, cache.buckets[0].validation, setting.config).measure()
    if mesh:
        gather_objects(None)  # nobody leaves early
        mesh.close()
    return measured[setting.config.weights]


def test_validation_loss_is_the_plain_models_on_every_plan(pool: Pool, clips: Path, tmp_path: Path) -> None:
    """3 windows * 3 draws = 9 items in batches of 4: what fills the last batch must not count."""
    values = recipe(clips, tmp_path, dtype="float64")
    values["data"] |= {"global_batch": 4, "stride": 1, "validation_share": 0.5}
    values["logging"]["validation_draws"] = 3
    setting = Setting.of(check_config(values, "test"))
    cache = open_history(setting, Joined(0, "cpu", None)).at(0)
    model = Reference(setting.model).double()
    model.load_state_dict(full(parameters(setting.model), probe_values(3), torch.float64))
    assert len(cache.buckets[0].validation) == 3
    errors: list[float] = []
    bands: list[int] = []
    for draw in range(3):
        for sample in [cache.buckets[0].validation[index] for index in range(3)]:
            assert isinstance(sample, Sample)
            ids, step = torch.tensor([sample.id]), torch.tensor(draw)
            x1 = sample.latent.double()[None]
            place = torch.tensor([0])
            t = flow.draw_time(SEED, step, ids, place)
            x_t, v = flow.interpolate(x1, flow.draw_noise(SEED, step, ids, place, tuple(x1.shape[1:])), t)
            given = {text_input(name): value.double()[:, None] for name, value in sample.text.items()}
            given[MASK] = torch.cat(list(sample.mask.values()))[None]
            with torch.no_grad():
                errors.append((model(x_t, t, given) - v).square().mean().item())
                bands.append(int(10 * t.item()))
    of = {band: [e for e, b in zip(errors, bands, strict=True) if b == band] for band in set(bands)}
    assert len(errors) > len(of) > 2, "bands of several, and of one"
    within = sum((error - sum(each) / len(each)) ** 2 for each in of.values() for error in each)
    due = [sum(errors) / 9, (within / (9 - len(of)) / 9) ** 0.5]
    due += [sum(of[band]) / len(of[band]) for band in sorted(of)]

    def found(held: HeldOutLoss) -> list[float]:
        assert [band for band, loss in enumerate(held.bands) if loss is not None] == sorted(of)
        return [held.loss, held.error, *(loss for loss in held.bands if loss is not None)]

    assert found(validated(values)) == pytest.approx(due, rel=1e-12)
    assert found(validated(values | {"weights": "master"})) == pytest.approx(due, rel=1e-12)
    for plan in ({"tp": 2, "cp": 2}, {"dp_shard": 2, "dp_replicate": 2}):
        values["plan"] = {"dtype": "float64", **plan}
        for held in pool.run(4, validated, values):
            assert found(held) == pytest.approx(due, rel=1e-10)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_killed_run_are_read_and_cut_to_where_it_resumes(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=9, first=0)
    for step in (2, 4, 6):
        telemetry.scalars(step, {"validation_loss": step / 2})
    telemetry.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "los')  # the kill
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6]
    Telemetry(tmp_path, steps=9, first=4).close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [2, 4]


def test_a_finished_run_shows_a_clip_of_each_scene(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["sample"] = {"steps": 2, "guidance": 1.5}
    values["schedule"]["steps"] = 2
    assert start(values, tmp_path) == 0
    folder = tmp_path / "run/samples"
    names = {"left.mp4", "right.mp4", showcase.CONTACT_SHEET, showcase.SCORES}
    assert {path.name for path in folder.iterdir()} == names
    scores = json.loads((folder / showcase.SCORES).read_text())
    assert [score["scene"] for score in scores] == ["left", "right"]
    assert frame_rate(folder / "left.mp4") == frame_rate(folder / "right.mp4") == 24  # the bucket's, of 23.976
    newest = latest(tmp_path / "run/checkpoints")
    assert newest and read_manifest(newest).note[FRAME_RATE] == "24"
    out = capsys.readouterr().out
    assert "left: " in out and showcase.reading([showcase.Score(**score) for score in scores], BlockDCTCodec()) in out


def test_a_contact_sheet_says_why_its_worst_scenes_look_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """In the picture, which is shown without what was printed beside it."""
    scores = [showcase.Score(name, db, 0.0, 0.0, 0) for name, db in zip("abcd", (21.0, 17.5, 19.0, 18.0), strict=True)]
    text = showcase.reading(scores, BlockDCTCodec())
    assert "so most broken: b (17.5 dB), d (18.0 dB), c (19.0 dB);" in text
    assert "16 numbers for a block of 8 frames of 8 x 8 pixels" in text
    written = list[str]()
    monkeypatch.setattr(showcase, "write_contact_sheet", lambda path, clips, note: written.append(note))
    cache = open_history((setting := Setting.of(check_config(values, "test"))), Joined(0, "cpu", None)).at(0)
    train, codec = cache.buckets[0].train, setting.encoding.codec
    shown = showcase.show(tmp_path / "samples", {"left": codec.decode(train[0].latent)}, train, codec, marks := Marks())
    assert marks.place[:3] == (len(train) - 1, Doing.DECODING, len(train))
    assert written == [showcase.reading(shown, codec)]


def test_pictures_stand_beside_one_another_over_those_that_they_are_nearest_to() -> None:
    """Ten of them: a row of eight, one of two, each above its own."""
    scores = [showcase.Score(f"scene-{n}", 20.0 + n, 0.0, 0.0, 0) for n in range(10)]
    pairs = [(torch.full((1, 2, 2, 3), n), torch.full((1, 2, 2, 3), 100 + n)) for n in range(10)]
    rows = showcase.image_rows(scores, pairs)
    first, below, second, last = rows
    assert [rows[row][:, 0, 0, 0].tolist() for row in rows] == [
        [*range(8)], [*range(100, 108)], [8, 9], [108, 109],
    ]  # fmt: skip
    assert first.startswith("sampled (dB): scene-0 20, scene-1 21") and second.endswith("scene-9 29")
    assert (below, last) == (
        "training images that 1 to 8 are nearest to",
        "training images that 9 to 10 are nearest to",
    )


def test_a_sampled_clip_is_compared_with_its_own_scene(values: dict[str, Any], tmp_path: Path) -> None:
    """A training clip itself must be found, at its frame, and not among the other scene's."""
    setting = Setting.of(check_config(values, "test"))
    cache = open_history(setting, Joined(0, "cpu", None)).at(0)
    window = cache.buckets[0].train[1]
    assert isinstance(window, Sample)
    clip = setting.encoding.codec.decode(window.latent)
    shown, train = {"left": clip, "right": clip}, cache.buckets[0].train
    own, other = showcase.show(tmp_path / "samples", shown, train, setting.encoding.codec, Marks())
    assert own.psnr_db == float("inf") and own.nearest_frame == window.first_frame == 2
    assert other.psnr_db < 40 and other.other_scenes_db == float("inf")
    assert own.noise_db < 15
