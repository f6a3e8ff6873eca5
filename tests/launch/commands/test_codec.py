"""``cinemesh codec``: what the shipped decoder reaches on held-out windows; a decoder fitted to one's own clips."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from cinemesh.data.clips import write_mp4
from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app

pytestmark = pytest.mark.usefixtures("one_process")


def ran(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["codec", *map(str, words)])
    assert done.exit_code == 0, done.exception or done.output
    return done.stdout


def measured(*words: str | Path) -> dict[str, Any]:
    return json.loads(ran("eval", *words, "--json"))


def test_the_shipped_decoder_reaches_its_floor_on_windows_that_the_fit_did_not_see() -> None:
    """The floor that a learned codec must pass; a decoder of other latents, or of another order, falls far below."""
    found = measured("--codec", "dct-context")
    assert found["codec"] == "dct-context" and (found["scenes"], found["windows"]) == (6, 20)
    assert found["video_psnr_db"] >= 27.2 and found["video_ssim"] >= 0.82
    assert found["image_psnr_db"] >= 29 and found["image_ssim"] >= 0.86


def test_a_decoder_is_fitted_to_the_clips_of_a_recipe(tmp_path: Path) -> None:
    """A clip of slow blobs, its end held out: the fit never saw it, and decodes it better than the fixed one."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 16, 9, 9, generator=random).expand(-1, 3, -1, -1, -1)
    pixels = F.interpolate(coarse, size=(64, 64, 64), mode="trilinear")[0].permute(1, 2, 3, 0)
    write_mp4(tmp_path / "a.mp4", (pixels * 255).round().to(torch.uint8), Fraction(24))
    scene = '[{name: a, file: a.mp4, first_frame: 0, last_frame: 63, caption: "Blobs."}]'
    (tmp_path / "captions.yaml").write_text(scene, encoding="utf-8")
    given = {"clips": f"[{tmp_path}]", "captions": tmp_path / "captions.yaml", "size": 64, "fps": 24}
    own = [word for key, value in given.items() for word in ("--set", f"data.{key}={value}")]
    out = tmp_path / "ours.safetensors"
    ran("fit", *own, "--out", out)
    ours, fixed = (measured("--codec", name, *own) for name in (out, "block-dct"))
    assert ours["video_psnr_db"] > fixed["video_psnr_db"] + 0.5
    assert ours["codec"] == "dct-context" and ours["latents"] == fixed["latents"]
    with pytest.raises(CinemeshError, match=r"no scene of .* has held-out windows of bucket 16x64x64"):
        app(["codec", "eval", *own, "--set", "data.validation_share=0"], standalone_mode=False)


def test_clips_that_no_training_saw_are_measured_whole(tmp_path: Path) -> None:
    """A scene of less than two windows holds none out; unseen, both its windows count, and one by itself is itself."""
    ramp = torch.arange(24)[:, None, None, None] * 6 + torch.arange(32)[None, :, None, None] * 3
    frames = ramp.expand(24, 32, 32, 3).clone()
    frames[:8, ::2] = 0  # what only the first window sees, and the codec loses
    write_mp4(tmp_path / "a.mp4", frames.to(torch.uint8), Fraction(24))
    scene = '[{name: a, file: a.mp4, first_frame: 0, last_frame: 23, caption: "A ramp."}]'
    (tmp_path / "captions.yaml").write_text(scene, encoding="utf-8")
    given = {"clips": f"[{tmp_path}]", "captions": tmp_path / "captions.yaml", "size": 32, "fps": 24}
    own = [word for key, value in given.items() for word in ("--set", f"data.{key}={value}")]
    with pytest.raises(CinemeshError, match="that the codec was not trained on, all windows: --unseen"):
        app(["codec", "eval", *own], standalone_mode=False)
    both, first = (measured(*own, "--unseen", "--set", f"data.stride={stride}") for stride in (8, 16))
    assert (both["scenes"], both["windows"], first["windows"]) == (1, 2, 1)
    assert both["video_psnr_db"] > first["video_psnr_db"] + 3
    told = ran("eval", *own, "--unseen", "--set", "data.stride=8")
    assert " 2 windows 16x32x32 of 1 scenes" in told and "held-out" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "--codec", "dct-kontext"], "codec.kind is 'dct-kontext'; did you mean 'dct-context'?"),
        (["eval", "--set", "data.size=8"], "8x8 pixels, and SSIM looks at 11x11"),
        (["fit", "--set", "data.frames=12", "--out", "x"], "has a multiple of 8 frames"),
        (["fit", "--out", "/dev/null/x"], "--out"),
    ],
)
def test_what_cannot_be_measured_or_fitted_is_refused(words: Sequence[str], said: str) -> None:
    with pytest.raises(CinemeshError) as refused:
        app(["codec", *words], standalone_mode=False)
    assert said in str(refused.value)
