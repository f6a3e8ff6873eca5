"""What one process writes shard by shard, and reads parameter by parameter, is what ranks of any plan hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import TINY, assert_read_under, body_of, plain_states, plan_of, write_under
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.training.checkpoint import alone
from cinemesh.launch.training.checkpoint.alone import write_alone
from cinemesh.launch.training.checkpoint.layout import Coordinates, Layout
from cinemesh.launch.training.checkpoint.loading import read_parameter, read_states
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.model.config import parameters


@pytest.mark.parametrize("text", ["", "tp=2,dp_shard=2,dp_replicate=2", "tp=3,cp=2,order=dp_shard:tp:cp:dp_replicate"])
def test_a_parameter_is_read_whole_from_any_plan(tmp_path: Path, text: str) -> None:
    """Against the twenty lines that put a checkpoint together without the package."""
    path = tmp_path / "step-00000007"
    write_under(plan_of(text, "float32"), path)
    found, want = read_manifest(path), plain_states(path)
    for state in found.states:
        for row in parameters(TINY):
            assert torch.equal(read_parameter(path, found, state, row.name), want[state][row.name]), (state, row.name)


def test_any_plan_reads_what_one_process_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In more than two files, each of another shard of every unit."""
    monkeypatch.setattr(alone, "SHARD_BYTES", 130_000)
    plan, path = plan_of("tp=2,dp_shard=3", "float32"), tmp_path / "step-00000007"
    write_under(plan, path)
    found = read_manifest(path)

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        read_states(path, found, layout, at, flats)

    again = tmp_path / "again"
    write_alone(again, TINY, found.states, fill, step=found.step, updates=found.updates, note={"from": "here"})
    assert len(body_of(again)["files"]) == len(list(again.glob("*.safetensors"))) > 3
    copied = read_manifest(again)
    assert copied.digests == found.digests, "no plan changes them"
    assert (copied.step, copied.updates, copied.note) == (7, 6, {"from": "here"})
    for text in ("", "tp=3,cp=2"):
        assert_read_under(plan_of(text, "float32"), again)


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    """Nor is a checkpoint that is there written over."""

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        raise CinemeshError("no values")

    def write(name: str) -> None:
        write_alone(tmp_path / name, TINY, {"ema": "float32"}, fill, step=1, updates=1, note={})

    with pytest.raises(CinemeshError, match="no values"):
        write("new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".hidden").touch()
    with pytest.raises(CinemeshError, match="old exists"):
        write("old")
    (tmp_path / "file").write_text("")
    with pytest.raises(CinemeshError, match="cannot write checkpoint"):
        write("file/below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
    assert (tmp_path / "old" / ".hidden").exists()
