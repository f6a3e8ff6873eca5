"""Loading: any plan reads what any plan wrote, by the manifest alone; another model or format is one message."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    COUNTED,
    TINY,
    assert_same,
    batch_of,
    body_of,
    filled,
    plan_of,
    rewrite,
    runner_of,
    whole_states,
)
from harness import Pool
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.training.checkpoint.loading import load, load_weights, resume
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, SAVED_STATES, Damaged, sealed
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.model.config import parameters
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import collect, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh


@pytest.fixture
def saved(tmp_path: Path) -> tuple[StepRunner, Path]:
    runner = filled(runner_of(plan_of("")))
    return runner, save(tmp_path, runner, note={"data": "abc"})


def save_under(plan: Plan, directory: Path) -> Path:
    return save(directory, filled(runner_of(plan, Mesh(plan))))


def load_under(plan: Plan, path: Path) -> tuple[dict[str, dict[str, Tensor]], list[int], bool]:
    """Full states; counters; whether the padding is zero."""
    runner = runner_of(plan, Mesh(plan))
    for state in SAVED_STATES:
        runner.buffers[state].fill_(torch.nan)
    load(path, runner)
    finite = all(bool(runner.buffers[state].isfinite().all()) for state in SAVED_STATES)
    return whole_states(runner), runner.buffers["counters"].tolist(), finite


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        ("tp=2,dp_shard=2", ["cp=2", "tp=3,order=dp_shard:tp:cp:dp_replicate"]),
        ("cp=2,dp_replicate=2", ["tp=2,dp_replicate=2"]),
        ("", ["tp=2,dp_shard=2,order=dp_shard:cp:tp:dp_replicate"]),
    ],
)
def test_any_plan_reads_what_another_wrote(pool: Pool, tmp_path: Path, wrote: str, reads: list[str]) -> None:
    """On real ranks: full tensors, bit by bit, against values drawn apart from any plan."""
    plan = plan_of(wrote)
    paths = pool.run(plan.world_size, save_under, plan, tmp_path)
    assert set(paths) == {tmp_path / "step-00000007"}
    assert len(list(paths[0].glob("*.safetensors"))) == plan.world_size, "replicas share the writing"
    for text in reads:
        other = plan_of(text)
        for states, counters, finite in pool.run(other.world_size, load_under, other, paths[0]):
            assert_same(states)
            assert counters == COUNTED and finite
    alone = runner_of(plan_of(""))
    load(paths[0], alone)
    assert_same(whole_states(alone))


def test_one_process_resumes_bit_by_bit(tmp_path: Path) -> None:
    """A step after loading equals the step that was not interrupted: nothing that a step needs is left out."""
    going, resumed = runner_of(plan_of("")), runner_of(plan_of(""))
    going.initialise(probe_values(0))
    going.load(0, batch_of())
    going.step(1e-2)
    load(save(tmp_path, going), resumed)
    for runner in (going, resumed):
        runner.load(0, batch_of())
        runner.step(1e-2)
    for name in (*SAVED_STATES, "counters", "loss"):
        assert torch.equal(going.buffers[name], resumed.buffers[name]), name


def test_nothing_is_unpickled(saved: tuple[StepRunner, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from somebody else could run code."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    runner, path = saved
    load(path, runner)
    load_weights(path, "ema", runner.buffers["ema"], runner.units, runner.coordinates)
    assert resume(path.parent, runner)


def test_weights_alone(saved: tuple[StepRunner, Path]) -> None:
    """The sampler reads one state, in its own dtype and under its own plan."""
    runner, path = saved
    for seed, which in ((0, "master"), (3, "ema")):
        flat = torch.full_like(runner.buffers["ema"], torch.nan, dtype=torch.float32)
        load_weights(path, which, flat, runner.units, runner.coordinates)
        want = full(parameters(TINY), probe_values(seed), torch.float32)
        got = collect([(runner.coordinates, flat)], runner.units)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "layers is 2 there and 3 here"),
        ({"patch": (1, 1, 2)}, r"patch is \[1, 2, 2\] there and \[1, 1, 2\] here"),
        ({"encoders": TINY.encoders[:2]}, "width of text encoder byt5 is 24 there and absent here"),
    ],
)
def test_another_model_is_refused(saved: tuple[StepRunner, Path], change: dict, message: str) -> None:
    """And no older checkpoint is taken instead."""
    other = runner_of(plan_of(""), config=replace(TINY, **change))
    for read in (lambda: load(saved[1], other), lambda: resume(saved[1].parent, other)):
        with pytest.raises(CinemeshError, match=message) as refused:
            read()
        assert not isinstance(refused.value, Damaged)


def test_more_text_tokens_are_no_other_model(saved: tuple[StepRunner, Path]) -> None:
    """No weight has a row a token: all states are there."""
    other = runner_of(plan_of(""), config=replace(TINY.with_text_tokens(9), name="renamed"))
    load(saved[1], other)
    assert all(torch.equal(other.buffers[name], saved[0].buffers[name]) for name in SAVED_STATES)


def test_weights_of_another_shape_are_refused(saved: tuple[StepRunner, Path]) -> None:
    """The sampler has no recipe to compare: the table of parameters itself is."""
    other = runner_of(plan_of(""), config=replace(TINY, layers=1))
    with pytest.raises(CinemeshError, match=r"blocks.1.\S+ is \[.*\] there and absent here"):
        load_weights(saved[1], "ema", other.buffers["ema"], other.units, other.coordinates)
    other = runner_of(plan_of(""), config=replace(TINY, ffn=48))
    with pytest.raises(CinemeshError, match=r"blocks.0.gate is \[48, 96\] there and \[48, 48\] here"):
        load_weights(saved[1], "ema", other.buffers["ema"], other.units, other.coordinates)


def test_another_dtype_is_no_exact_resume(saved: tuple[StepRunner, Path]) -> None:
    with pytest.raises(CinemeshError, match=r"torch.float64, this plan as torch.float32"):
        load(saved[1], runner_of(plan_of("", "float32")))


def test_weights_alone_are_nothing_to_go_on_from(saved: tuple[StepRunner, Path]) -> None:
    """Of a checkpoint that has the average only: it can be sampled."""
    runner, path = saved
    body = body_of(path)
    for file in body["files"]:  # the EMA lies last
        for part in file["parts"]:
            part["blocks"] = {"ema": part["blocks"]["ema"]}
            part["begin"] = file["size_bytes"] - 8 * part["stop"]
    digests = {"ema": body["digests"]["ema"]}
    rewrite(path, body | {"states": {"ema": "float64"}, "digests": digests})
    with pytest.raises(CinemeshError, match=r"holds ema and no master, exp_avg, exp_avg_sq; .*cinemesh sample") as told:
        load(path, runner)
    assert not isinstance(told.value, Damaged)
    with pytest.raises(CinemeshError, match="holds ema and no master; take others"):
        load_weights(path, "master", runner.buffers["master"], runner.units, runner.coordinates)


@pytest.mark.parametrize("number", [1, 2])
def test_an_old_format_names_the_commit_that_reads_it(saved: tuple[StepRunner, Path], number: int) -> None:
    runner, path = saved
    (path / MANIFEST).write_text(json.dumps({"format": number, "step": 7, "files": {".metadata": 1}}))
    for read in (lambda: load(path, runner), lambda: resume(path.parent, runner)):
        with pytest.raises(
            CinemeshError,
            match=f"has format {number}, this version reads 3 and 4: commit f947c57 reads it; read",
        ):
            read()


def test_a_later_format_is_no_damage(saved: tuple[StepRunner, Path]) -> None:
    """A run that went on from an older checkpoint would lose what the later version did."""
    runner, path = saved
    for text in (sealed(5, "{}"), '{"format": 5}'):
        (path / MANIFEST).write_text(text)
        with pytest.raises(CinemeshError, match="has format 5, this version reads 3 and 4: a later version wrote it"):
            resume(path.parent, runner)
