"""A loss that jumps: the run goes back to a checkpoint from before it, and never takes those samples again."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import Pool
from torch import Tensor
from training import STATES, recipe, refusal, start

from cinemesh.data.batches import BATCHES, PASSED_OVER, BatchHistory
from cinemesh.data.cache.samples import collate
from cinemesh.data.order import Stream, samples_of_a_read
from cinemesh.launch.cluster.processes import USER_ERROR, Joined, StopSignal
from cinemesh.launch.training import spikes
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest, published
from cinemesh.launch.training.checkpoint.loading import load
from cinemesh.launch.training.checkpoint.manifest import read_manifest, step_of
from cinemesh.launch.training.checkpoint.publishing import remove
from cinemesh.launch.training.feed import Feed
from cinemesh.launch.training.goodput import LossCause
from cinemesh.launch.training.in_memory.recovery import CopiesInMemory
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.recipe import SpikesSection, check_config, read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.spikes import LOSSES, SPIKES, LossWatch
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.inputs import LATENTS
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import initial_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process", "written_at_once")

POISONED = range(26, 30)  # places of the stream, of steps 14 and 15, where nothing was passed over
SIZE = 2  # samples of a step


def test_what_is_passed_over_is_taken_by_no_step_and_the_rest_in_order() -> None:
    """40 random runs of two buckets that go back up to four times, over eras and versions, beside a list of places."""
    draw = random.Random(4)
    for _ in range(40):
        buckets = [draw.randrange(2) for _ in range(60)]
        eras = [(0, (3, 5)), (draw.randrange(1, 20), (2, 4)), (draw.randrange(20, 40), (3, 5))]
        versions = sorted(draw.sample(range(1, 60), 2))
        sizes = [next(size for first, size in reversed(eras) if first <= step)[b] for step, b in enumerate(buckets)]
        at, history, places = [0, 0], BatchHistory.always((3, 5)), list[int]()
        # Of every version, what was taken of each bucket in it: streams begin anew there.
        for end in [*sorted(draw.sample(range(1, 60), 4)), 60]:
            for step in range(len(places), end):
                history = history.going_on(step, next(size for first, size in reversed(eras) if first <= step))
                places.append(at[buckets[step]])
                at[buckets[step]] += sizes[step]
            assert history.places(buckets[:end]) == places
            assert history.taken(buckets[:end]) == at
            assert BatchHistory.of(json.loads(json.dumps(history.noted())), (0, 0)) == history
            if end == 60:
                break
            to = draw.randrange(end)
            version = [v for v in versions if v < end]
            if not any(to < v for v in version):  # else places move by version: the next test
                history, places = history.rolled_back(to, buckets[:end], versions), places[:to]


def test_samples_of_a_later_version_are_passed_over_in_it() -> None:
    """Steps 4 to 9 are taken back, and from step 6 on another version is drawn from: of each, what was taken of it."""
    history = BatchHistory.always((2,)).rolled_back(4, [0] * 10, [0, 6, 30])
    assert history.passed == ((4, (4,)), (6, (8,)))
    begin = history.taken([0] * 6)[0]  # where the version's stream begins
    assert history.places([0] * 8)[4:6] == [12, 14] and begin == 16
    assert [place - begin for place in history.places([0] * 8)[6:]] == [8, 10]


def test_high_losses_in_a_row_are_a_spike() -> None:
    """Of a bucket whose losses are usual, by its own median: other buckets have other losses."""
    section = SpikesSection(deviations=6, window=9, steps=3)
    watch, draw = LossWatch(section, 2, {}), random.Random(1)
    for step in range(1, 200):
        bucket = step % 3 == 0
        assert watch.add(step, int(bucket), (40 if bucket else 1) + draw.gauss(0, 0.1)) is None
    high = [(200, 2.5), (201, math.nan), (202, 1.0), (203, 2.5), (204, math.inf)]
    assert [watch.add(step, 0, loss) for step, loss in high] == [None] * 5
    watch = LossWatch(section, 2, json.loads(json.dumps(watch.noted())))  # killed here, and gone on from its note
    spike = watch.add(205, 1, 44.0)
    assert spike is not None and (spike.first, spike.step) == (203, 205)
    assert spike.usual == pytest.approx(40, abs=0.1) and spike.deviation < 0.5
    assert "losses are high since step 203: 44, usual 40" in str(spike)


def test_usual_losses_are_no_spike() -> None:
    """A slow rise, one high loss, a run without the section, equal losses with the next 5 % above them."""
    section = SpikesSection(deviations=8, window=20, steps=1)
    assert all(LossWatch(None, 1, {}).add(step, 0, math.inf) is None for step in range(9))
    rising = LossWatch(section, 1, {})
    assert all(rising.add(step, 0, 1 + 0.01 * step) is None for step in range(500))
    equal = LossWatch(section, 1, {})
    assert all(equal.add(step, 0, 1.0) is None for step in range(20))
    assert equal.add(21, 0, 1.05) is None and equal.add(22, 0, 1.09) is not None


@pytest.fixture
def values(clips: Path, tmp_path: Path) -> dict[str, Any]:
    """24 steps of one data rank in float64; a checkpoint every 4 of them."""
    values = recipe(clips, tmp_path, dtype="float64")
    values["schedule"] = {"steps": 24, "warmup_steps": 2, "decay": "constant"}
    values["logging"] |= {"every": 1, "validate_every": 0, "checkpoint_every": 4, "keep": 9}
    return values | {"spikes": {"deviations": 40.0, "window": 5, "steps": 2}}


def poison(places: range = POISONED) -> None:
    """Samples at these places of the stream are 30 times as large as they should be."""
    read = Feed._read

    def poisoned(self: Feed, step: int) -> list[dict[str, Tensor]]:
        batches = read(self, step)
        if self.drawn.places[step] in places:
            for batch in batches:
                batch[LATENTS] = batch[LATENTS] * 30
        return batches

    Feed._read = poisoned


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "_read", Feed._read)  # put back
    poison()


def by_hand(values: dict[str, Any], tmp_path: Path, taken: list[int]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and states of steps that take the stream from these places on, by a process that knows no history."""
    (tmp_path / "hand.yaml").write_text(yaml.safe_dump(values))
    setting = Setting.of(replace(read_config(tmp_path / "hand.yaml"), plan=Plan(dtype="float64")))
    config, cache = setting.config, open_history(setting, Joined(0, "cpu", None)).at(0)
    train, batch = cache.buckets[0].train, setting.batches[0]
    stream = Stream(config.seed, 0, len(train), samples_of_a_read(train.latent_bytes), SIZE)
    runner = StepRunner(
        setting.model,
        config.plan,
        batch,
        config.optimizer,
        None,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
    )
    runner.initialise(initial_values(config.seed))
    losses = list[float]()
    for step, place in enumerate(taken):
        runner.load(0, collate(train.select(stream.take(place, SIZE)), 0, 1))
        runner.step(config.schedule.lr(config.optimizer.lr, step))
        losses.append(runner.loss.item())
    return losses, {name: runner.buffers[name].clone() for name in STATES}


CLEAN = [*range(0, 24, 2), *range(30, 54, 2)]  # places of 24 steps: the samples of steps 13 to 15 are passed over


@pytest.mark.usefixtures("poisoned")
def test_a_run_goes_back_and_ends_as_one_that_never_met_them(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bitwise; its checkpoints, reports, log and account of time say what was done."""
    assert start(values, tmp_path) == 0
    losses, expected = by_hand(values, tmp_path, CLEAN)
    run = tmp_path / "run"
    newest = latest(run / FOLDER)
    assert newest is not None
    note = read_manifest(newest).note
    assert note[BATCHES] == [[0, [2]]] and note[PASSED_OVER] == [[12, [6]]]
    assert [(one["first"], one["step"]) for one in note[SPIKES]] == [(14, 15)]
    assert note[LOSSES]["usual"][0] == losses[-5:]
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-12)
    log = (run / "train.log").read_text()
    assert "WARNING: step 15: losses are high since step 14" in log
    assert "resumed from" in log and "back at step 12; the samples of steps 13 to 15 are passed over" in log
    assert log.count("captured step") == 1  # not captured anew
    lost = json.loads((run / "goodput.json").read_text())["lost_s"]
    assert lost[LossCause.REDONE] > 0
    found = states_in64(run, values)
    for name in STATES:
        assert torch.equal(found[name], expected[name]), name


def states_in64(run: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    setting = Setting.of(check_config({**values, "plan": {"dtype": "float64"}}, "test"))
    runner = StepRunner(setting.model, setting.config.plan, setting.batches[0], setting.config.optimizer, None)
    newest = latest(run / FOLDER)
    assert newest is not None
    load(newest, runner)
    return {name: runner.buffers[name].clone() for name in STATES}


@pytest.mark.usefixtures("poisoned")
def test_a_run_that_is_killed_before_its_next_checkpoint_decides_alike(values: dict[str, Any], tmp_path: Path) -> None:
    """It meets the samples again, goes back again, and ends with the same bits; so does one that goes back two."""
    assert start(values, tmp_path) == 0
    whole = states_in64(tmp_path / "run", values)
    for path in published(tmp_path / "run" / FOLDER):
        if (step_of(path) or 0) > 12:
            remove(path)
    assert start(values, tmp_path) == 0
    again = states_in64(tmp_path / "run", values)
    for name in STATES:
        assert torch.equal(again[name], whole[name]), name
    two = values | {"spikes": values["spikes"] | {"checkpoints": 2}}
    two["logging"] = values["logging"] | {"directory": str(tmp_path / "two")}
    assert start(two, tmp_path) == 0
    _, expected = by_hand(two, tmp_path, [*range(0, 16, 2), *range(30, 62, 2)])
    found = states_in64(tmp_path / "two", two)
    for name in STATES:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.usefixtures("poisoned")
def test_copies_in_memory_are_forgotten_before_checkpoints_go(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that is killed meanwhile would go on from steps that are not its any more."""
    values["logging"] |= {"memory_every": 1, "memory_folder": str(tmp_path / "memory")}
    values["spikes"]["checkpoints"] = 2
    copied = list[int]()

    def removed(path: Path) -> None:
        copied.append(len([*(tmp_path / "memory").glob("*/*/*.json")]))
        remove(path)

    monkeypatch.setattr(spikes, "remove", removed)
    monkeypatch.setattr(CopiesInMemory, "close", lambda self: None)
    assert start(values, tmp_path) == 0
    assert copied and not any(copied)
    steps = [json.loads(path.read_text())["step"] for path in (tmp_path / "memory").glob("*/*/*.json")]
    assert len(steps) == 2 and max(steps) == 23, "and are taken again"
    _, expected = by_hand(values, tmp_path, [*range(0, 16, 2), *range(30, 62, 2)])
    found = states_in64(tmp_path / "run", values)
    assert all(torch.equal(found[name], expected[name]) for name in STATES)


@pytest.mark.usefixtures("poisoned")
def test_without_a_checkpoint_before_the_spike_the_run_begins_anew(values: dict[str, Any], tmp_path: Path) -> None:
    values["logging"]["checkpoint_every"] = 20
    assert start(values, tmp_path) == 0
    losses, _ = by_hand(values, tmp_path, list(range(30, 78, 2)))
    rows = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rows == pytest.approx(losses, rel=1e-12)


def test_a_run_that_goes_back_too_often_ends(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All samples from step 14 on are bad: 3 times back, each time to step 12, then one message."""
    monkeypatch.setattr(Feed, "_read", Feed._read)
    poison(places=range(26, 10**6))
    values["spikes"]["limit"] = 3
    assert start(values, tmp_path) == USER_ERROR
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "rolled back 3 times already (spikes.limit)" in error
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("back at step 12") == 3
    newest = latest(tmp_path / "run" / FOLDER)
    assert newest is not None and step_of(newest) == 12


def test_what_a_run_could_not_go_back_to_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["logging"]["keep"] = 1
    assert "keep one more than it goes back" in refusal(values, tmp_path)
    values["logging"] |= {"keep": 2, "checkpoint_every": 0}
    assert "logging.checkpoint_every(0)" in refusal(values, tmp_path)


def poisoned_rank(path: Path) -> int:
    read = Feed._read
    poison()
    try:
        setting = Setting.of(read_config(path))
        mesh = Mesh(setting.config.plan)
        place = Joined(mesh.rank, "cpu", mesh)
        runner = train_steps(setting, place, open_history(setting, place), StopSignal())
        mesh.close()
    finally:
        Feed._read = read  # the process is used again
    return runner.steps_done


def test_ranks_go_back_together(values: dict[str, Any], tmp_path: Path, pool: Pool) -> None:
    """Two data ranks, of which each has one of the bad samples of a step."""
    values["plan"] |= {"dp_shard": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert pool.run(2, poisoned_rank, tmp_path / "recipe.yaml") == [24, 24]
    losses, _ = by_hand(values, tmp_path, CLEAN)
    rows = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rows == pytest.approx(losses, rel=1e-10)
