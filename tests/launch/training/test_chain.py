"""A chain of stages: done once each, stopped and gone on with to the same bits, and refused before it begins."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import plain_states
from training import recipe, stop_in_step

from cinemesh.data.video import look_at_clip
from cinemesh.errors import CinemeshError
from cinemesh.launch.commands.stages import run
from cinemesh.launch.training.base import BEGUN_WITH
from cinemesh.launch.training.chain import read_chain
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.checkpoint.publishing import begin_folder

pytestmark = pytest.mark.usefixtures("one_process")


CLIP = {"name": "b", "after": "a", "prompt": "x"}
SAMPLED = {**CLIP, "set": {"sample.steps": 2, "data.size": 16}}
FRAMES = {"codec": {"kind": "frame-dct", "side": 4}, "data.size": 32, "model.position_lengths": [5, 4, 4]}
UPSAMPLER = {"name": "up", "set": FRAMES | {"data.frames": 5, "data.low_resolution": {"scale": 2, "strength": 0.3}}}
LARGER = {"name": "larger", "after": "up", "upsample": "b"}


def written(clips: Path, folder: Path, stages: list[dict[str, Any]] | None = None) -> Path:
    """Images, then video with longer tables; two ends, their average, a clip of it, a larger one; a few steps each."""
    folder.mkdir(exist_ok=True)
    base = recipe(clips, folder)
    base["schedule"] |= {"steps": 3, "warmup_steps": 1}
    base["logging"] |= {"validate_every": 3, "every": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base))
    cache = {"data.cache": str(folder / "video")}
    stages = stages or [
        {"name": "images", "set": {"data.frames": 1, "data.stride": 8, "model.position_lengths": [1, 2, 2]}},
        {"name": "video", "after": "images", "set": cache | {"start_from.positions": "expand"}},
        {"name": "a", "after": "video", "set": cache | {"optimizer.lr": 1e-3, "start_from.moments": "keep"}},
        {"name": "b", "after": "video", "set": cache | {"seed": 5, "cluster": "local-cpu"}},
        {"name": "mean", "average": ["a", "b"], "set": cache},
        {"name": "clip", "after": "mean", "prompt": "It moves.", "set": {"sample.steps": 2, "data.size": 16}},
        {**UPSAMPLER, "set": UPSAMPLER["set"] | {"data.cache": str(folder / "upsampler")}},
        {**LARGER, "upsample": "clip"},
    ]
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({
        "directory": str(folder / "runs"), "recipe": str(folder / "recipe.yaml"), "stages": stages,
    }))  # fmt: skip
    return path


def test_a_chain_that_was_stopped_goes_on_to_the_same_bits(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in two of its runs, and killed while the average was written, which left a part of it."""
    whole, stopped = written(clips, tmp_path / "whole"), written(clips, tmp_path / "stopped")
    run(path=whole, nproc=None)
    said = capsys.readouterr().err
    assert "before: tiny under recompute=none, batch 2, lr 0.01" in said and "s a step at its end (measured)" in said
    assert (
        "now: tiny under recompute=none, batch 2, lr 0.01, predicted" in said and "neutral group (predicted): " in said
    )
    assert "the average has held-out loss" in said
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        for _ in range(2):  # in the first run, and in the second
            with pytest.raises(SystemExit) as end:
                run(path=stopped, nproc=None)
            assert end.value.code == 128 + signal.SIGTERM
    begin_folder(tmp_path / "stopped/runs/mean/average")  # the chain was killed over it
    run(path=stopped, nproc=None)
    ends = [plain_states(tmp_path / name / "runs" / "mean" / "average") for name in ("whole", "stopped")]
    assert all(torch.equal(ends[0][s][name], ends[1][s][name]) for s in ends[0] for name in ends[0][s])
    made = [{s: (tmp_path / name / "runs" / s / "clip.mp4").read_bytes() for s in ("clip", "larger")} for name in
            ("whole", "stopped")]  # fmt: skip
    assert made[0] == made[1]
    shown = [look_at_clip(tmp_path / "whole/runs" / stage / "clip.mp4") for stage in ("clip", "larger")]
    assert [(one.frames, one.height, one.width, one.rate) for one in shown] == [
        (8, size, size, shown[0].rate) for size in (16, 32)
    ]
    began = read_manifest(tmp_path / "whole/runs/video/checkpoints/step-00000003").note[BEGUN_WITH]
    assert began["tables"] == {"position.t": [1, 6], "position.h": [2, 6], "position.w": [2, 6]}
    capsys.readouterr()
    run(path=whole, nproc=None)
    assert capsys.readouterr().err.count("done before") == 8, "nothing is done twice"
    (tmp_path / "whole/runs/larger/clip.mp4").unlink()
    run(path=whole, nproc=None)
    assert (tmp_path / "whole/runs/larger/clip.mp4").read_bytes() == made[0]["larger"]
    assert capsys.readouterr().err.count("done before") == 7, "what is not there is made, and nothing else"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "a", "after": "b"}], "no stage before it is called 'b'"),
        ([{"name": "a"}, {"name": "a"}], "there are two stages a"),
        ([{"name": "a/b"}], "a/b"),
        ([{"name": "a", "set": {"optimizer.rl": 1}}], "unknown key 'optimizer.rl'"),
        ([{"name": "a", "stpes": 3}], "unknown key 'stpes'"),
        ([{"name": "a", "greedy": True}], "greedy, and no average"),
        ([{"name": "a", "prompt": "A cat."}], "no weights to sample it with"),
        ([{"name": "a"}, {"name": "b", "average": ["a", "a"], "prompt": "A cat."}], "neither prompt nor upsample"),
        ([{"name": "a"}, SAMPLED, {"name": "c", "after": "b"}], "b makes a clip, and has no weights"),
        ([{"name": "a"}, CLIP], "a prompt, and its recipe has no section sample"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "upsample": "c"}], "no stage before it is called 'c'"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "upsample": "a"}], "a makes no clip"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "after": "a"}], "a is no upsampler"),
        ([{"name": "a"}, SAMPLED, {"name": "larger", "upsample": "b"}], "a clip, and no upsampler"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "prompt": "x"}], "a prompt, and a clip to make larger"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "set": {"seed": 1}}], "has a recipe or set of its own"),
        ([{"name": "a"}, SAMPLED, UPSAMPLER, {**LARGER, "average": ["a", "up"]}], "neither prompt nor upsample nor"),
        ([UPSAMPLER, {**SAMPLED, "after": "up"}], "up is an upsampler, and makes no clip of a prompt alone"),
        (
            [{"name": "a"}, {**CLIP, "set": {"sample.steps": 2}}, UPSAMPLER, LARGER],
            "b makes 8 frames of 32x32 pixels, 2 times as large 64x64, and up learns of windows 5x32x32",
        ),
        (
            [{"name": "a"}, {**SAMPLED, "set": SAMPLED["set"] | {"data.frames": 4}}, UPSAMPLER, LARGER],
            "b makes 4 frames of 16x16 pixels",
        ),
    ],
)
def test_a_chain_that_is_none_is_told_before_it_begins(
    clips: Path, tmp_path: Path, stages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(CinemeshError) as refused:
        read_chain(written(clips, tmp_path, stages))
    assert said in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_one_stage_alone_waits_for_those_before_it(clips: Path, tmp_path: Path) -> None:
    """What each task of a job array does: it must neither do another's stage nor begin with half of one."""
    path = written(clips, tmp_path, [{"name": "a"}, {"name": "b", "after": "a"}, {"name": "c", "average": ["a", "b"]}])
    for name, before in (("b", "a"), ("c", "a")):
        with pytest.raises(CinemeshError, match=f"{name} begins with {before}, which is not done"):
            run(path=path, only=name, nproc=None)
    with pytest.raises(CinemeshError, match="has no stage 'd'"):
        run(path=path, only="d", nproc=None)
    run(path=path, only="a", nproc=None)
    assert [link.done for link in read_chain(path)] == [True, False, False]
    with pytest.raises(CinemeshError, match="c begins with b"):
        run(path=path, only="c", nproc=None)
