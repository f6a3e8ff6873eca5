"""``cinemesh upsample``: from a trained upsampler and a clip to a larger one, on one process and on two; bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import recipe, start, write_clips
from typer.testing import CliRunner

from cinemesh.data.clips import write_mp4
from cinemesh.data.video import look_at_clip, read_frames
from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands.upsample import size_asked
from cinemesh.launch.training import upsampling
from cinemesh.launch.training.checkpoint.choosing import FOLDER

pytestmark = pytest.mark.usefixtures("one_process")
FRAMES, WINDOW = 11, 5  # three windows: two data ranks take two rounds


def values_of(clips: Path, out: Path) -> dict[str, Any]:
    values = recipe(clips, out)
    values["model"] = {"preset": "tiny", "layers": 1}
    values["codec"] = {"kind": "frame-dct", "side": 4}
    values["data"] |= {"frames": WINDOW, "stride": 3, "low_resolution": {"scale": 2, "strength": 0.3}}
    values["schedule"] = {"steps": 3}
    values["logging"] |= {"validate_every": 2}
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of three steps."""
    folder = tmp_path_factory.mktemp("upsampler")
    write_clips(folder)
    assert start(values_of(folder, folder), folder) == 0
    return folder / "run"


def clip_of(path: Path, frames: int = FRAMES, height: int = 16, width: int = 16, rate: int = 12) -> Path:
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([12 * x + 5 * t, 14 * y + 3 * t, 6 * (x + y)], -1) % 256
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, pixels.to(torch.uint8), Fraction(rate))
    return path


def ran(*words: str | Path | int) -> Any:
    done = CliRunner().invoke(app, ["upsample", *map(str, words)])
    if isinstance(done.exception, CinemeshError):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done


def short(*words: str | Path | int) -> Any:
    return ran(*words, "--window", WINDOW, "--overlap", 2, "--steps", 3)


def test_a_clip_becomes_twice_as_large(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps frames and rate; the reply says what was made; another seed, another clip; the same, the same.

    Frames are compared as they are written: x264 has made two files of the same ones, once in some thousand.
    """
    frames: list[Tensor] = []

    def kept(path: Path, pixels: Tensor, rate: Fraction) -> None:
        frames.append(pixels)
        write_mp4(path, pixels, rate)

    monkeypatch.setattr(upsampling, "write_mp4", kept)
    clip, made = clip_of(tmp_path / "a.mp4"), [tmp_path / f"{n}.mp4" for n in range(4)]
    done = ran(trained, clip, "--out", made[0], "--steps", 3, "--json")  # windows as it was trained
    (told,) = json.loads(done.stdout)["clips"]
    assert (told["frames"], told["from"], told["to"], told["windows"]) == (FRAMES, "16x16", "32x32", 3)
    shown = look_at_clip(made[0])
    assert (shown.frames, shown.height, shown.width, shown.rate) == (FRAMES, 32, 32, 12)
    short(trained / FOLDER / "step-00000003", clip, "--out", made[1])
    short(trained, clip, "--out", made[2], "--seed", 1)
    short(trained, clip, "--out", made[3], "--prompt", "It moves.", "--guidance", 2)
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2]) and not torch.equal(frames[0], frames[3])
    written = read_frames(made[1], 32, 32)
    assert (written.float() - frames[1].float()).abs().mean() < 8


def test_two_processes_make_the_clip_of_one(trained: Path, tmp_path: Path) -> None:
    """Windows over data ranks; to the last bit: tests/model/test_windowed.py.

    x264 has made two files of one clip, half a level apart.
    """
    clip, made = clip_of(tmp_path / "a.mp4"), [tmp_path / f"{n}.mp4" for n in (1, 2)]
    short(trained, clip, "--out", made[0])
    short(trained, clip, "--out", made[1], "--nproc", 2)
    short(trained, clip, "--out", tmp_path / "other.mp4", "--seed", 1)
    one, two, other = (read_frames(path, 32, 32).float() for path in (*made, tmp_path / "other.mp4"))
    assert (one - two).abs().mean() < 2 < 20 < (one - other).abs().mean()


def test_sides_that_patches_do_not_divide_are_filled_up_and_cropped(trained: Path, tmp_path: Path) -> None:
    """As 1080 is to 1088: 26 rows of 13 are four patches of 8; and --size within reach of the scale."""
    out = tmp_path / "out.mp4"
    short(trained, clip_of(tmp_path / "a.mp4", height=14), "--out", out, "--size", "26x30")
    shown = look_at_clip(out)
    assert (shown.height, shown.width) == (26, 30)


def test_of_a_folder_what_is_there_stays(trained: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "clips", tmp_path / "larger"
    for name, height in (("a", 16), ("b", 12), ("c", 16)):
        clip_of(folder / f"{name}.mp4", height=height)
    (folder / "notes.txt").write_text("no clip")
    assert len(json.loads(short(trained, folder, "--out", out, "--json").stdout)["clips"]) == 3
    assert look_at_clip(out / "b.mp4").height == 24
    kept = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "b.mp4").unlink()
    done = short(trained, folder, "--out", out, "--json")
    assert [Path(each["out"]).name for each in json.loads(done.stdout)["clips"]] == ["b.mp4"]
    assert kept[out / "a.mp4"] == (out / "a.mp4").stat().st_mtime_ns
    assert json.loads(short(trained, folder, "--out", out, "--json").stdout) == {"clips": []}


Bad = Callable[[Path, Path], list[str | Path]]
BAD: dict[str, tuple[Bad, str]] = {
    "a wrong scale": (lambda run, at: [run, clip_of(at / "a.mp4"), "--size", "64x64"], "4 times as large, and .* 2 t"),
    "another shape": (lambda run, at: [run, clip_of(at / "a.mp4"), "--size", "32x64"], "its width is 4 times"),
    "an odd size": (lambda run, at: [run, clip_of(at / "a.mp4"), "--size", "31x32"], "half a pixel of colour"),
    "no size": (lambda run, at: [run, clip_of(at / "a.mp4"), "--size", "big"], "--size 'big' is no size"),
    "a clip shorter than a window": (
        lambda run, at: [run, clip_of(at / "a.mp4", frames=4)], "a clip of 4 frames is shorter .* add --window 4",
    ),
    "windows that do not move": (
        lambda run, at: [run, clip_of(at / "a.mp4"), "--overlap", "5"], "begins 0 frames after the one before",
    ),
    "a window longer than was learnt": (
        lambda run, at: [run, clip_of(at / "a.mp4", frames=12), "--window", "8"], "positions for 6 frames of 48x48",
    ),
    "a clip larger than was learnt": (
        lambda run, at: [run, clip_of(at / "a.mp4", height=32, width=32)], "windows of 5 frames of 64x64 pixels",
    ),
    "no clip": (lambda run, at: [run, at / "absent.mp4"], "absent.mp4 is not read"),
    "no video": (lambda run, at: [run, text(at / "a.mp4")], "cannot be decoded"),
    "a folder of none": (lambda run, at: [run, at], "no video file in"),
    "two of one name": (
        lambda run, at: [run, clip_of(clip_of(at / "c" / "a.mp4").with_name("a.mov")).parent], "two videos of .* a,",
    ),
    "the clip itself": (lambda run, at: [run, clip_of(at / "a.mp4"), "--out", at / "a.mp4"], "is the clip itself"),
    "guidance to nothing": (lambda run, at: [run, clip_of(at / "a.mp4"), "--guidance", "2"], "--guidance without"),
    "no checkpoint": (lambda run, at: [at, clip_of(at / "a.mp4")], "no checkpoint|has no cinemesh.json"),
}  # fmt: skip


def text(path: Path) -> Path:
    path.write_text("no video")
    return path


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(what: str, trained: Path, tmp_path: Path) -> None:
    words, said = BAD[what]
    given = [str(word) for word in words(trained, tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in given else ["--out", str(tmp_path / "out" / "x.mp4")]
    window = [] if "--window" in given else ["--window", str(WINDOW)]
    overlap = [] if "--overlap" in given else ["--overlap", "2"]
    with pytest.raises(CinemeshError, match=said):
        ran(*given, *out, *window, *overlap, "--steps", 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_a_small_clip_is_no_upsampler(tmp_path: Path) -> None:
    write_clips(tmp_path)
    values = recipe(tmp_path, tmp_path) | {"schedule": {"steps": 1}}
    values["logging"]["validate_every"] = 0
    assert start(values, tmp_path) == 0
    with pytest.raises(CinemeshError, match="is shown no low-resolution clip"):
        ran(tmp_path / "run", clip_of(tmp_path / "b.mp4"), "--out", tmp_path / "c.mp4")


def test_a_recipe_whose_data_make_no_small_clip_and_one_that_samples(tmp_path: Path) -> None:
    write_clips(tmp_path)
    values = recipe(tmp_path, tmp_path) | {"model": {"preset": "movie-gen-upsampler-7b"}}
    with pytest.raises(CinemeshError, match="is shown low_resolution latents, and the data make none"):
        start(values, tmp_path)
    with pytest.raises(CinemeshError, match="a spatial upsampler makes no clip of a caption alone"):
        start(values_of(tmp_path, tmp_path) | {"sample": {"steps": 2}}, tmp_path)


@pytest.mark.parametrize("given", ["x", "0x32", "32x", "9000x9000", "-1x3", "３２x32"])
def test_sizes_that_are_none(given: str) -> None:
    with pytest.raises(CinemeshError, match="--size"):
        size_asked(given)
    assert size_asked("1080X1920") == (1080, 1920)


def test_it_begins_with_a_model_of_images(trained: Path, tmp_path: Path) -> None:
    """Of a shorter table in time and no small clip; one of another width is refused."""
    write_clips(tmp_path)
    images = recipe(tmp_path, tmp_path / "images")
    images["model"] = {"preset": "tiny", "layers": 1, "position_lengths": [1, 4, 4]}
    images["codec"] = {"kind": "frame-dct", "side": 4}
    images["data"] |= {"frames": 1, "stride": 3}
    images |= {"schedule": {"steps": 4}}
    assert start(images, tmp_path) == 0
    values = values_of(tmp_path, tmp_path / "up")
    values["model"] |= {"position_lengths": [5, 4, 4]}
    base = tmp_path / "images" / "run" / FOLDER / "step-00000004"
    values["start_from"] = {"checkpoint": str(base), "positions": "expand"}
    assert start(values, tmp_path) == 0
    values["model"] |= {"width": 96, "heads": 6}
    values["logging"]["directory"] = str(tmp_path / "wider")
    with pytest.raises(CinemeshError, match="width is 48 there and 96 here"):
        start(values, tmp_path)
