"""A run that begins with the weights of another: every element by hand, under other plans; and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BATCH,
    COUNTED,
    TINY,
    batch_of,
    filled,
    held_under,
    plan_of,
    runner_of,
    whole_states,
    write_under,
)
from harness import Pool
from torch import Tensor
from torch.nn.functional import interpolate
from training import recipe, refusal, start, states

from cinemesh.errors import CinemeshError
from cinemesh.launch.training.base import BEGUN_WITH
from cinemesh.launch.training.checkpoint.choosing import FOLDER, VALIDATION_LOSS
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.launch.training.recipe import StartFrom, check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.start import begin, expanded
from cinemesh.launch.training.telemetry import LOG_FILE, read_metrics
from cinemesh.model.config import LatentCondition, ModelConfig, parameters
from cinemesh.model.inputs import LATENTS, BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")
SHORT = replace(TINY, position_lengths=(1, 2, 6))
SQUARES = "exp_avg_sq"


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_grows_as_by_hand() -> None:
    """Patch centres aligned: corners aligned instead, the middle rows of the first would be 1/3 and 2/3."""
    two = torch.tensor([[0.0, 8.0], [4.0, 0.0]], dtype=torch.float64)
    assert expanded(two, 4).tolist() == [[0, 8], [1, 6], [3, 2], [4, 0]]
    assert expanded(two, 4, squared=True).tolist() == [[0, 8], [4 / 16, 8 * 9 / 16], [4 * 9 / 16, 8 / 16], [4, 0]]
    assert expanded(two, 2).tolist() == two.tolist()
    assert expanded(two[:1], 3).tolist() == [[0, 8]] * 3  # a new temporal table: all frames alike


@pytest.mark.parametrize(("rows", "length"), [(16, 32), (32, 96), (3, 5), (1, 7), (5, 5)])
def test_a_table_grows_as_an_image_is_resized(rows: int, length: int) -> None:
    table = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    resized = interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T
    assert (expanded(table, length) - resized).abs().max() < 1e-13
    assert torch.equal(expanded(table, length)[0], table[0])  # frame 0: an image sees the table that it saw


# -- states, under any plan -------------------------------------------------------------------------------------------


def write(plan: Plan, directory: Path, config: ModelConfig) -> None:
    save(directory, filled(StepRunner(config, plan, BatchShape(1, (1, 4, 12)), Optimizer(), Mesh(plan))))


def begun(plan: Plan, section: StartFrom, config: ModelConfig) -> tuple[dict[str, Any], list[int]]:
    """The states of a run that began so."""
    runner = runner_of(plan, Mesh(plan) if plan.world_size > 1 else None, config=config)
    for state in ("master", "ema", "exp_avg", SQUARES):
        runner.buffers[state].fill_(7.0)  # nothing that was there stays
    begin(section, runner, 0)
    return whole_states(runner), runner.buffers["counters"].tolist()


def grown(name: str, value: Tensor, moment: str) -> Tensor:
    """A parameter of SHORT in TINY, by torch's own resize; squares of shares by its weights of a unit matrix."""
    wanted = next(row.shape for row in parameters(TINY) if row.name == name)
    if tuple(value.shape) == wanted:
        return value
    shares = interpolate(torch.eye(len(value)).double()[None], size=wanted[0], mode="linear", align_corners=False)[0].T
    return (shares.square() if moment == SQUARES else shares) @ value


@pytest.mark.parametrize("weights", ["master", "ema"])
@pytest.mark.parametrize("moments", ["keep", "drop"])
def test_every_element_is_the_checkpoints_and_tables_grow(
    pool: Pool, tmp_path: Path, weights: Any, moments: Any
) -> None:
    """A row, a rank's part or a state that goes elsewhere shows: written under one plan, read under two others."""
    pool.run(4, write, plan_of("tp=2,dp_shard=2"), tmp_path, SHORT)
    section = StartFrom(checkpoint=tmp_path / "step-00000007", weights=weights, positions="expand", moments=moments)
    one = begun(plan_of(""), section, TINY)
    (held, counters), *_ = pool.run(4, begun, plan_of("tp=2,cp=2"), section, TINY)
    assert counters == one[1] == [0, COUNTED[1] if moments == "keep" else 0]
    seeds = {"master": 0, "exp_avg": 1, SQUARES: 2, "ema": 3}  # as they were filled
    for state, source in {"master": weights, "ema": weights, "exp_avg": "exp_avg", SQUARES: SQUARES}.items():
        for name, value in full(parameters(SHORT), probe_values(seeds[source]), torch.float64).items():
            due = grown(name, value, state)
            if state in ("exp_avg", SQUARES) and moments == "drop":
                due = torch.zeros_like(due)
            for got in (one[0], held):
                assert (got[state][name] - due).abs().max() <= 1e-15 * max(1.0, float(due.abs().max())), (state, name)


def image_loss(runner: StepRunner) -> float:
    given = batch_of()
    runner.load(0, given | {LATENTS: given[LATENTS][:, :, :1, :4, :4].contiguous()})
    runner.step(0.0)
    return runner.loss.item()


@pytest.mark.parametrize(("lengths", "same"), [((6, 2, 2), True), ((6, 4, 4), False)])
def test_a_longer_temporal_table_leaves_the_loss_of_images(
    tmp_path: Path, lengths: tuple[int, int, int], same: bool
) -> None:
    """Of the step's own program; where the spatial tables grow too, an image's rows change, and so does its loss."""
    image, plan = BatchShape(1, (1, 4, 4)), plan_of("")
    before = filled(StepRunner(replace(TINY, position_lengths=(1, 2, 2)), plan, image, Optimizer(), None))
    save(tmp_path, before)
    after = StepRunner(replace(TINY, position_lengths=lengths), plan, image, Optimizer(), None)
    section = StartFrom(checkpoint=tmp_path / "step-00000007", weights="master", positions="expand")
    begin(section, after, 0)
    before.buffers["counters"].zero_()  # the same draws
    difference = abs(image_loss(before) - image_loss(after))
    assert difference <= 1e-12 if same else difference > 1e-6


def test_what_a_checkpoint_of_no_latent_condition_lacks_begins_as_zeros(tmp_path: Path) -> None:
    """The first step of an upsampler is that of the model it grew from."""
    save(tmp_path, filled(runner_of(plan_of(""))))
    wider = replace(TINY, latent_conditions=(LatentCondition("low", 2),))
    runner = StepRunner(wider, plan_of(""), BATCH, Optimizer(), None)
    begin(StartFrom(checkpoint=tmp_path / "step-00000007"), runner, 0)
    got = whole_states(runner)["master"]
    assert got.pop("patchify.low").count_nonzero() == 0
    for name, value in full(parameters(TINY), probe_values(3), torch.float64).items():
        assert torch.equal(got[name], value), name


# -- runs -------------------------------------------------------------------------------------------------------------


def chained(clips: Path, tmp_path: Path, **section: Any) -> dict[str, Any]:
    """A run of the first one's data that begins with its end."""
    values = recipe(clips, tmp_path / "second")
    values["data"]["cache"] = str(tmp_path / "cache")
    path = tmp_path / "run" / FOLDER / "step-00000006"
    return values | {"start_from": {"checkpoint": str(path), **section}}


def test_a_run_begins_where_another_ended(values: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    """The validation loss of step 0 is the last one there, to the last bit; log and checkpoints say where from.

    What it began with is carried through a resume, for which the first checkpoint may be gone.
    """
    assert start(values, tmp_path) == 0
    second = chained(clips, tmp_path)
    second["logging"]["checkpoint_every"] = 3
    assert start(second, tmp_path) == 0
    run = tmp_path / "second" / "run"
    last = read_metrics(tmp_path / "run")[-1]["validation_loss"]
    first_row = read_metrics(run)[0]
    assert (first_row["step"], first_row["validation_loss"]) == (0, last)
    assert f"begins with the ema weights of {second['start_from']['checkpoint']}" in (run / LOG_FILE).read_text()
    written = [read_manifest(path) for path in sorted((run / FOLDER).iterdir())]
    first = read_manifest(Path(second["start_from"]["checkpoint"]))
    for found in written:
        begun_with = found.note[BEGUN_WITH]
        assert (begun_with["step"], begun_with["weights"], begun_with["tables"]) == (6, "ema", {})
        assert begun_with["digest"] == first.digests["ema"] and begun_with[VALIDATION_LOSS] == last
    whole = states(run, second)
    for path in (run / FOLDER / "step-00000006", Path(second["start_from"]["checkpoint"])):
        path.rename(tmp_path / f"away-{path.parent.parent.parent.name}")
    assert start(second, tmp_path) == 0
    assert read_manifest(run / FOLDER / "step-00000006").note[BEGUN_WITH] == written[0].note[BEGUN_WITH]
    assert all(torch.equal(value, states(run, second)[name]) for name, value in whole.items())


def test_each_choice_is_obeyed(values: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    """By the weights after one step: each of the keys of ``start_from`` gives others."""
    values["model"]["position_lengths"] = [1, 6, 6]
    assert start(values, tmp_path) == 0
    ends: list[Tensor] = []
    for number, section in enumerate([{}, {"weights": "master"}, {"moments": "keep"}]):
        second = chained(clips, tmp_path, positions="expand", **section)
        second["schedule"]["steps"], second["schedule"]["warmup_steps"] = 1, 0
        second["logging"]["directory"] = str(tmp_path / f"run-{number}")
        assert start(second, tmp_path) == 0
        ends.append(states(tmp_path / f"run-{number}", second)["master"])
    assert not any(torch.equal(a, b) for a, b in ((ends[0], ends[1]), (ends[0], ends[2]), (ends[1], ends[2])))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "model", "said"),
    [
        ({}, {"position_lengths": [7, 6, 6]}, "position tables have [6, 6, 6] rows in checkpoint"),
        ({"positions": "expand"}, {"position_lengths": [6, 5, 4]}, "would shrink (h: 5 < 6, w: 4 < 6)"),
        ({"positions": "expand"}, {"width": 96}, "width is 48 there and 96 here"),
        ({}, {"layers": 3}, "layers is 2 there and 3 here"),
        ({"weights": "exp_avg"}, {}, "start_from.weights"),
        ({"positions": "shrink"}, {}, "start_from.positions"),
    ],
)
def test_a_run_that_cannot_begin_so_is_one_message(
    values: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    section: Any,
    model: Any,
    said: str,
    clips: Path,
) -> None:
    """Told before a process starts, with both values."""
    path = written(values, tmp_path_factory.mktemp("first"))
    values["model"] |= model
    message = refusal(values | {"start_from": {"checkpoint": str(path), **section}}, tmp_path)
    assert said in message


def written(values: dict[str, Any], folder: Path) -> Path:
    """A checkpoint of the recipe's model, of whatever values."""
    setting = Setting.of(check_config(copy.deepcopy(values), "test"))
    runner = StepRunner(setting.model, setting.config.plan, setting.batches[0], setting.config.optimizer, None)
    return save(folder, filled(runner))


def test_another_encoder_set_is_refused(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = written(values, tmp_path_factory.mktemp("first"))
    values["data"]["encoders"] = [{"name": "letters", "width": 12, "tokens": 17}]
    message = refusal(values | {"start_from": {"checkpoint": str(path)}}, tmp_path)
    assert "width of text encoder letters is absent there and 12 here" in message


def test_moments_of_another_list_of_parameters_are_refused(tmp_path: Path) -> None:
    save(tmp_path, filled(runner_of(plan_of(""))))
    wider = replace(TINY, latent_conditions=(LatentCondition("low", 2),))
    runner = StepRunner(wider, plan_of(""), BATCH, Optimizer(), None)
    with pytest.raises(CinemeshError, match=r"keep, but checkpoint .* conditions low: its list of parameters"):
        begin(StartFrom(checkpoint=tmp_path / "step-00000007", moments="keep"), runner, 0)


def test_moments_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """As a merged or an imported checkpoint has none; without them a run begins."""
    write_under(plan_of("", "float32"), tmp_path / "weights")
    runner = runner_of(plan_of(""))
    with pytest.raises(CinemeshError, match="holds master, ema and no exp_avg, exp_avg_sq"):
        begin(StartFrom(checkpoint=tmp_path / "weights", moments="keep"), runner, 0)
    begin(StartFrom(checkpoint=tmp_path / "weights"), runner, 0)
    assert torch.equal(runner.buffers["master"], held_under(plan_of("", "float32"), 0)["ema"].double().view(1, -1))


def test_a_checkpoint_that_is_not_there_is_told_before_anything_starts(values: dict[str, Any], tmp_path: Path) -> None:
    assert "absent" in refusal(values | {"start_from": {"checkpoint": str(tmp_path / "absent")}}, tmp_path)
