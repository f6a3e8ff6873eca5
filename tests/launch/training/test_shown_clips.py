"""Clips that a run samples while it trains: in TensorBoard, of the weights as they are; and training is the same."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor
from training import recipe, start, states, stop_in_step

from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.video import read_frames
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr
from cinemesh.launch.training.telemetry import LOG_FILE

pytestmark = pytest.mark.usefixtures("one_process")

SAMPLE = {"scenes": ["left"], "steps": 3, "guidance": 2.0}


def shown(run: Path) -> Iterator[tuple[str, int, bytes]]:
    """(tag, step, GIF) of every image, over all starts of a run."""
    for path in sorted((run / "tensorboard").glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:  # images are told as tensors: width, height, picture
                if value.metadata.plugin_data.plugin_name == "images":
                    yield value.tag, event.step, value.tensor.string_val[2]


def frames_of(gif: bytes) -> Tensor:
    with Image.open(io.BytesIO(gif)) as image:
        return torch.stack([torch.from_numpy(np.array(f.convert("RGB"))) for f in ImageSequence.Iterator(image)])


def test_clips_are_shown_every_so_many_steps_and_change_nothing(
    values: dict[str, Any], clips: Path, tmp_path: Path
) -> None:
    """The last step's is the clip that the run ends with; the first steps' are others."""
    plain = values | {"sample": SAMPLE}
    assert start(plain, tmp_path) == 0
    watched = recipe(clips, tmp_path / "watched") | {"sample": SAMPLE | {"every": 2}}
    assert start(watched, tmp_path) == 0
    a, b = states(tmp_path / "run", plain), states(tmp_path / "watched/run", watched)
    assert all(torch.equal(a[name], b[name]) for name in a)
    found = [*shown(tmp_path / "watched/run")]
    assert [(tag, step) for tag, step, _ in found] == [
        ("held out/left", 0),
        *(("clips/left", step) for step in (2, 4, 6)),
    ]
    made = [frames_of(gif) for _, _, gif in found]
    assert {frames.shape for frames in made} == {(8, 32, 32, 3)}
    ended = read_frames(tmp_path / "watched/run/samples/left.mp4", 32, 32)
    assert psnr(made[3], ended) > 22 > psnr(made[1], ended), "a palette and H.264 are between them"
    assert psnr(made[0], made[3]) < 22
    assert not [*shown(tmp_path / "run")]


def test_a_run_that_was_stopped_shows_each_clip_once(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = values | {"sample": SAMPLE | {"every": 2}}
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert start(watched, tmp_path) == 128 + signal.SIGTERM
    assert start(watched, tmp_path) == 0
    told = [(tag, step) for tag, step, _ in shown(tmp_path / "run")]
    assert told == [("held out/left", 0), ("clips/left", 2), ("clips/left", 4), ("clips/left", 6)]


def test_a_clip_that_decodes_to_no_picture_is_told_and_the_run_goes_on(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, left = BlockDCTCodec.decode, [False, False, True]  # the held-out clip; those of steps 2 and 4

    def diverged(self: BlockDCTCodec, latent: Tensor) -> Tensor:
        if left and left.pop(0):
            raise CinemeshError("3 latent values are not finite")
        return decode(self, latent)

    monkeypatch.setattr(BlockDCTCodec, "decode", diverged)
    assert start(values | {"sample": SAMPLE | {"every": 2}}, tmp_path) == 0
    assert [step for _, step, _ in shown(tmp_path / "run")] == [0, 2, 6]
    log = (tmp_path / "run" / LOG_FILE).read_text()
    assert "WARNING: step 4: clips/left: 3 latent values are not finite" in log


@pytest.mark.slow
def test_two_ranks_show_what_one_does(values: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    """Each makes a part of a clip's tokens; rank 0 shows it."""
    one = values | {"sample": SAMPLE | {"every": 3}}
    assert start(one, tmp_path) == 0
    two = recipe(clips, tmp_path / "two", cp=2) | {"sample": SAMPLE | {"every": 3}}
    assert start(two, tmp_path, nproc=2) == 0
    first, second = ([*shown(run)] for run in (tmp_path / "run", tmp_path / "two/run"))
    assert (
        [at[:2] for at in first]
        == [at[:2] for at in second]
        == [("held out/left", 0), ("clips/left", 3), ("clips/left", 6)]
    )
    for (_, _, a), (_, _, b) in zip(first, second, strict=True):
        assert psnr(frames_of(a), frames_of(b)) > 40
