"""Checkpoints: any plan reads what any plan wrote, and nothing half written passes for a checkpoint."""

import errno
import io
import json
import math
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cinemesh.errors import CinemeshError
from cinemesh.launch.training import checkpoint
from cinemesh.launch.training.chunks import ChunkSavePlanner, boxes
from cinemesh.model.config import ModelConfig, parameters, preset
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import collect, fill_shard, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import gather_objects
from cinemesh.parallel.runtime.mesh import Mesh

TINY = preset("tiny")
BATCH = BatchShape(1, (3, 4, 12))
COUNTERS = [7, 6]  # one update was skipped


def plan_of(text: str, dtype: str = "float64") -> Plan:
    return Plan.parse(text, dtype=dtype)


def runner_of(plan: Plan, mesh: Mesh | None = None, config: ModelConfig = TINY) -> StepRunner:
    return StepRunner(config, plan, BATCH, Optimizer(), mesh)


def fill(runner: StepRunner) -> None:
    """Every state gets values of its own: one read into another's place shows."""
    for seed, state in enumerate(checkpoint.STATES):
        fill_shard(runner.buffers[state], runner.units, runner.coordinates, probe_values(seed))
    runner.buffers["counters"].copy_(torch.tensor(COUNTERS))


def expected() -> dict[str, dict[str, Tensor]]:
    rows = parameters(TINY)
    return {state: full(rows, probe_values(seed), torch.float64) for seed, state in enumerate(checkpoint.STATES)}


def whole_states(runner: StepRunner) -> dict[str, dict[str, Tensor]]:
    """Full tensors of every state, from the shards of replica 0."""
    mine = (runner.coordinates, {state: runner.buffers[state].clone() for state in checkpoint.STATES})
    shards = gather_objects(mine) if runner.mesh else [mine]
    return {
        state: collect([(c, s[state]) for c, s in shards if c["dp_replicate"] == 0], runner.units)  # pyright: ignore
        for state in checkpoint.STATES
    }


def save_under(plan: Plan, directory: Path) -> Path:
    mesh = Mesh(plan)
    runner = runner_of(plan, mesh)
    fill(runner)
    return checkpoint.save(directory, runner, note={"data": "abc"})


def load_under(plan: Plan, path: Path) -> tuple[dict[str, dict[str, Tensor]], list[int], bool]:
    """Full states; counters; whether the padding is zero."""
    mesh = Mesh(plan)
    runner = runner_of(plan, mesh)
    for state in checkpoint.STATES:
        runner.buffers[state].fill_(torch.nan)
    checkpoint.load(path, runner)
    finite = all(bool(runner.buffers[state].isfinite().all()) for state in checkpoint.STATES)
    return whole_states(runner), runner.buffers["counters"].tolist(), finite


def assert_same(got: dict[str, dict[str, Tensor]]) -> None:
    for state, tensors in expected().items():
        for name, want in tensors.items():
            assert torch.equal(got[state][name], want), (state, name)


@given(st.data())
def test_boxes_tile_a_run_in_order(data: st.DataObject) -> None:
    """Read back to back, the boxes give exactly the elements of the run, and there are no more than 2 * ndim - 1."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = math.prod(shape)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    index = torch.arange(count).view(shape)
    found = list(boxes(shape, start, stop))
    read = [
        index[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in found
    ]
    assert torch.equal(torch.cat(read), torch.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        ("tp=2,dp_shard=2", ["cp=2", "", "tp=3,order=dp_shard:tp:cp:dp_replicate"]),
        ("cp=2,dp_replicate=2", ["tp=2,cp=2"]),
        ("", ["tp=2,dp_shard=2,order=dp_shard:cp:tp:dp_replicate"]),
    ],
)
def test_any_plan_reads_what_another_wrote(pool: Pool, tmp_path: Path, wrote: str, reads: list[str]) -> None:
    """Full tensors, bit by bit, against values drawn apart from any plan."""
    plan = plan_of(wrote)
    paths = pool.run(plan.world_size, save_under, plan, tmp_path)
    assert set(paths) == {tmp_path / "step-00000007"}
    files = [file for file in paths[0].glob("*.distcp") if file.stat().st_size]
    wrote_data = {int(file.name[2:].partition("_")[0]) for file in files}
    assert wrote_data == set(range(plan.world_size // plan.dp_replicate)), "replicas write nothing"
    for text in reads:
        other = plan_of(text)
        for states, counters, finite in pool.run(other.world_size, load_under, other, paths[0]):
            assert_same(states)
            assert counters == COUNTERS and finite
    alone = runner_of(plan_of(""))
    checkpoint.load(paths[0], alone)
    assert_same(whole_states(alone))


def test_one_process_resumes_bit_by_bit(tmp_path: Path) -> None:
    """A step after loading equals the step that was not interrupted: nothing that a step needs is left out."""
    plan = plan_of("")

    def load_batch(runner: StepRunner) -> None:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn((1, TINY.channels, *BATCH.latent), generator=generator, dtype=torch.float64)
        text = {text_input(e.name): torch.ones(e.tokens, 1, e.width, dtype=torch.float64) for e in TINY.encoders}
        mask = torch.ones(1, TINY.text_tokens, dtype=torch.bool)
        runner.load(0, {LATENTS: latents, IDS: torch.tensor([3]), PLACES: torch.tensor([0]), MASK: mask, **text})

    going = runner_of(plan)
    going.initialise(probe_values(0))
    load_batch(going)
    going.step(1e-2)
    path = checkpoint.save(tmp_path, going)
    resumed = runner_of(plan)
    checkpoint.load(path, resumed)
    load_batch(resumed)
    for runner in (going, resumed):
        runner.step(1e-2)
    for name in (*checkpoint.STATES, "counters", "loss"):
        assert torch.equal(going.buffers[name], resumed.buffers[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[StepRunner, Path]:
    runner = runner_of(plan_of(""))
    fill(runner)
    return runner, checkpoint.save(tmp_path, runner, note={"data": "abc"})


def test_manifest_says_what_it_is(saved: tuple[StepRunner, Path]) -> None:
    found = checkpoint.manifest(saved[1])
    assert found["step"] == COUNTERS[0] and found["note"] == {"data": "abc"} and found["torch"] == torch.__version__
    assert found["model"]["layers"] == TINY.layers and Plan.from_dict(found["plan"]) == saved[0].plan


def test_weights_alone(saved: tuple[StepRunner, Path]) -> None:
    """The sampler reads one state, in its own dtype and under its own plan."""
    runner, path = saved
    for seed, which in ((0, "master"), (3, "ema")):
        flat = torch.full_like(runner.buffers["ema"], torch.nan, dtype=torch.float32)
        checkpoint.load_weights(path, which, flat, runner.units, runner.coordinates)
        want = full(parameters(TINY), probe_values(seed), torch.float32)
        got = collect([(runner.coordinates, flat)], runner.units)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_newest_are_kept(tmp_path: Path) -> None:
    """And the one just written is never among the pruned, though later steps lie there from before."""
    runner = runner_of(plan_of(""))
    for step in (100_000_000, 20, 9, 30):
        runner.buffers["counters"][0] = step
        checkpoint.save(tmp_path, runner, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000000", "step-00000030"}
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"
    runner.buffers["counters"][0] = 5
    checkpoint.save(tmp_path, runner, keep=2)
    assert (tmp_path / "step-00000005").is_dir()


def test_same_step_again_replaces(saved: tuple[StepRunner, Path]) -> None:
    runner, path = saved
    runner.buffers["ema"].fill_(5)
    assert checkpoint.save(path.parent, runner) == path
    checkpoint.load_weights(path, "ema", runner.buffers["master"], runner.units, runner.coordinates)
    assert runner.buffers["master"].max() == 5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_latest_ignores_what_is_incomplete(saved: tuple[StepRunner, Path]) -> None:
    directory = saved[1].parent
    assert checkpoint.latest(directory / "absent") is None
    for name, missing in (("step-00000008", checkpoint.MANIFEST), ("step-00000009", checkpoint.METADATA)):
        shutil.copytree(saved[1], directory / name)
        (directory / name / missing).unlink()
    shutil.copytree(saved[1], directory / ".step-00000010.partial")
    shutil.copytree(saved[1], directory / "step-11")
    assert checkpoint.latest(directory) == saved[1]


def test_checkpoints_that_are_not_whole_are_no_step_0(saved: tuple[StepRunner, Path]) -> None:
    """A copy that was cut short, or a removal: a run that began again would overwrite what is left, and its metrics."""
    path = saved[1]
    later = path.with_name("step-00000009")
    shutil.copytree(path, later)
    (later / checkpoint.METADATA).unlink()
    assert checkpoint.latest(path.parent) == path and checkpoint.incomplete(path.parent) == [later]
    (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(
        CinemeshError, match=r"step-00000009 is not whole \(no \.metadata\) and there is no other; .*step 0"
    ):
        checkpoint.latest(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"format": "1", "step": 1, "model": {}, "files": {}}',
        '{"format": FORMAT, "step": 1, "model": {}, "files": {"a": null}}',
        '{"format": FORMAT, "step": 1, "model": {}, "files": {}}',
        '{"format": FORMAT, "step": 1, "model": {"encoders": [3]}, "files": {}}',
        '{"format": FORMAT, "step": 1, "model": {"encoders": 3}, "files": {}}',
        "[" * 100_000,
    ],
)
def test_a_malformed_manifest_is_one_message(saved: tuple[StepRunner, Path], text: str) -> None:
    runner, path = saved
    (path / checkpoint.MANIFEST).write_text(text.replace("FORMAT", str(checkpoint.FORMAT)))
    with pytest.raises(CinemeshError, match=path.name):
        checkpoint.load(path, runner)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.ENOENT, "a logging.directory of its own"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "its file system"),
    ],
)
def test_the_remedy_is_for_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """A file that another run removed is no lack of space."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "write_chunks", fail)
    with pytest.raises(CinemeshError) as caught:
        checkpoint.save(tmp_path, runner_of(plan_of("")))
    assert remedy in caught.value.remedy and os.strerror(number) in caught.value.problem


def test_torchs_advice_to_load_whatever_a_file_holds_is_not_passed_on(saved: tuple[StepRunner, Path]) -> None:
    """A pickle with a call in it, where tensors are wanted."""
    runner, path = saved
    data = (path / "__0_0.distcp").read_bytes()
    torch.save(print, buffer := io.BytesIO())
    (path / "__0_0.distcp").write_bytes((buffer.getvalue() * (len(data) // len(buffer.getvalue()) + 1))[: len(data)])
    with pytest.raises(CinemeshError) as caught:
        checkpoint.load(path, runner)
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)


@pytest.mark.parametrize("file", ["__0_0.distcp", checkpoint.METADATA, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "missing", "zeroed"])
def test_damage_is_an_error(saved: tuple[StepRunner, Path], file: str, damage: str) -> None:
    runner, path = saved
    size = (path / file).stat().st_size
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes(b"\0" * (size if damage == "zeroed" else size // 2))
    for read in (
        lambda: checkpoint.load(path, runner),
        lambda: checkpoint.load_weights(path, "ema", runner.buffers["ema"], runner.units, runner.coordinates),
    ):
        with pytest.raises(CinemeshError, match=path.name) as refused:
            read()
        if damage != "zeroed" and file == "__0_0.distcp":
            now = "is missing" if damage == "missing" else f"has {size // 2:,} bytes"
            assert f"damaged: {file} {now}, it was written with {size:,} bytes" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "layers is 2 there and 3 here"),
        ({"patch": (1, 1, 2)}, r"patch is \[1, 2, 2\] there and \[1, 1, 2\] here"),
        ({"encoders": TINY.encoders[:2]}, "width of text encoder byt5 is 24 there and absent here"),
    ],
)
def test_another_model_is_refused(saved: tuple[StepRunner, Path], change: dict, message: str) -> None:
    other = runner_of(plan_of(""), config=replace(TINY, **change))
    with pytest.raises(CinemeshError, match=message):
        checkpoint.load(saved[1], other)


def test_more_text_tokens_are_no_other_model(saved: tuple[StepRunner, Path]) -> None:
    checkpoint.load(saved[1], runner_of(plan_of(""), config=replace(TINY.with_text_tokens(9), name="renamed")))


def test_weights_of_another_shape_are_refused(saved: tuple[StepRunner, Path]) -> None:
    """The sampler has no recipe to compare: the table of tensors itself is."""
    other = runner_of(plan_of(""), config=replace(TINY, layers=1))
    with pytest.raises(CinemeshError, match=r"ema/blocks.1.\S+ is \[.*\] there and absent here"):
        checkpoint.load_weights(saved[1], "ema", other.buffers["ema"], other.units, other.coordinates)
    other = runner_of(plan_of(""), config=replace(TINY, ffn=48))
    with pytest.raises(CinemeshError, match=r"ema/blocks.0.gate is \[48, 96\] there and \[48, 48\] here"):
        checkpoint.load_weights(saved[1], "ema", other.buffers["ema"], other.units, other.coordinates)


def test_another_dtype_is_no_exact_resume(saved: tuple[StepRunner, Path]) -> None:
    with pytest.raises(CinemeshError, match=r"torch.float64, this plan as torch.float32"):
        checkpoint.load(saved[1], runner_of(plan_of("", "float32")))


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float64", 32), ("bf16", 16)])
def test_no_room_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_each: int
) -> None:
    elements = sum(row.elements for row in parameters(TINY))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: elements * bytes_each - 1)
    with pytest.raises(CinemeshError) as error:
        checkpoint.save(tmp_path, runner_of(plan_of("", dtype)))
    assert f"{elements * bytes_each:,}" in str(error.value) and f"{elements * bytes_each - 1:,}" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: elements * bytes_each)
    assert checkpoint.save(tmp_path, runner_of(plan_of("", dtype))).is_dir(), "just enough"


def save_with_one_full_disk(plan: Plan, directory: Path) -> tuple[str, str]:
    """The messages of a failed save and of a failed load, on this rank."""
    mesh = Mesh(plan)
    runner = runner_of(plan, mesh)
    fill(runner)
    first = checkpoint.save(directory, runner)
    runner.buffers["counters"][0] += 1
    whole = ChunkSavePlanner.lookup_object

    def full_disk(self: ChunkSavePlanner, index: object) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    if mesh.rank == 1:
        ChunkSavePlanner.lookup_object = full_disk
    try:
        with pytest.raises(CinemeshError) as failed:
            checkpoint.save(directory, runner)
    finally:
        ChunkSavePlanner.lookup_object = whole
    other = runner_of(plan, mesh, replace(TINY, layers=1))
    with pytest.raises(CinemeshError) as refused:
        checkpoint.load(first, other)
    return str(failed.value), str(refused.value)


def test_one_failed_rank_fails_all(pool: Pool, tmp_path: Path) -> None:
    """No rank waits for ever, none believes in a checkpoint, and what is left is the one before."""
    answers = pool.run(2, save_with_one_full_disk, plan_of("dp_shard=2"), tmp_path)
    for failed, refused in answers:
        assert "rank 1" in failed and "No space left on device" in failed and "step-00000008" in failed
        assert "layers is 2 there and 1 here" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_broken_saves_are_cleared_away(saved: tuple[StepRunner, Path]) -> None:
    runner, path = saved
    left = path.parent / ".step-00000099.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    checkpoint.save(path.parent, runner)
    assert not left.exists()


def plain() -> dict[str, Tensor]:
    """A whole checkpoint as another program would hold it: by key, without a plan."""
    states = {f"{state}/{name}": value for state, named in expected().items() for name, value in named.items()}
    return states | {"counters": torch.tensor(COUNTERS)}


def test_another_reader_finds_every_state_under_its_name(saved: tuple[StepRunner, Path]) -> None:
    """Names, shapes and values outlive every plan. States that save and load exchange alike show here alone."""
    stored = FileSystemReader(saved[1]).read_metadata().state_dict_metadata
    assert stored.keys() == plain().keys()
    found = {key: torch.zeros_like(value) for key, value in plain().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        dcp_load(found, checkpoint_id=saved[1], no_dist=True)
    for key, value in plain().items():
        assert torch.equal(found[key], value), key
    assert json.loads((saved[1] / checkpoint.MANIFEST).read_text())["format"] == 2


def test_what_another_writer_wrote_is_read_by_name(saved: tuple[StepRunner, Path], tmp_path: Path) -> None:
    path = tmp_path / "other" / "step-00000007"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save(plain(), checkpoint_id=path, no_dist=True)
    manifest = json.loads((saved[1] / checkpoint.MANIFEST).read_text())
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    runner = runner_of(plan_of(""))
    checkpoint.load(path, runner)
    assert_same(whole_states(runner))
    assert runner.buffers["counters"].tolist() == COUNTERS


def of_format(path: Path, number: int) -> None:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"format": number}))


def test_an_older_keying_gives_its_weights_and_no_resume(saved: tuple[StepRunner, Path]) -> None:
    """The steps that are left would draw other numbers than those that were done."""
    runner, path = saved
    of_format(path, 1)
    with pytest.raises(CinemeshError, match=r"format 1, and steps since format 2 draw other noise.* cinemesh sample"):
        checkpoint.load(path, runner)
    flat = torch.full_like(runner.buffers["ema"], torch.nan)
    checkpoint.load_weights(path, "ema", flat, runner.units, runner.coordinates)
    assert torch.equal(flat, runner.buffers["ema"])
    for number in (0, 3):
        of_format(path, number)
        with pytest.raises(CinemeshError, match=f"has format {number}, this version reads 1 to 2"):
            checkpoint.load_weights(path, "ema", flat, runner.units, runner.coordinates)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"files": {"../../../.bashrc": 3}}, "lists a file that is '../../../.bashrc', and files are called after it"),
        ({"files": {"/etc/passwd": 3}}, "lists a file that is '/etc/passwd'"),
        ({"files": []}, "the files []"),
        ({"model": "tiny"}, "the model 'tiny'"),
        ({"format": True}, "has format True"),
        ({"format": "2"}, "has format '2'"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_manifest_that_nothing_here_wrote_is_one_message(
    saved: tuple[StepRunner, Path], changes: dict[str, Any], told: str
) -> None:
    """Nothing that it says leads out of its folder."""
    path = saved[1]
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | changes))
    with pytest.raises(CinemeshError, match=re.escape(told)):
        checkpoint.manifest(path)
