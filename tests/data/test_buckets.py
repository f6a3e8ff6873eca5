"""Which buckets take a scene by its shape, buckets of one shape, and what weights are shares of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from training import in_two_buckets, recipe, start

from cinemesh.data.batches import BatchHistory
from cinemesh.data.buckets import Bucket, BucketSettings
from cinemesh.data.cache.building import LEFT_OUT_FILE, build_cache
from cinemesh.data.cache.version import Version
from cinemesh.data.clips import write_mp4
from cinemesh.data.encoding import Encoding
from cinemesh.data.order import drawn_buckets
from cinemesh.data.scenes import Scene, SceneTime
from cinemesh.data.settings import DataSettings
from cinemesh.data.video import look_through
from cinemesh.errors import CinemeshError
from cinemesh.launch.training.feed import run_order
from cinemesh.launch.training.recipe import Config, check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics

RATIOS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9))  # width to height
DURATIONS: tuple[dict[str, Any], ...] = (
    {"frames": 256, "fps": 24},
    {"frames": 256, "fps": 16},
    {"frames": 256, "squeeze_from_s": 12.0},
    {"frames": 192, "squeeze_from_s": 8.0},
    {"frames": 128, "squeeze_from_s": 4.0},
)  # Movie Gen, Table 2


def of_the_paper() -> DataSettings:
    """Five durations (Table 2) times five ratios, and an image of every ratio: 30 buckets."""
    buckets = [
        BucketSettings(width=64 * w, height=64 * h, name=f"d{number}-{w}-{h}", **duration)
        for number, duration in enumerate((*DURATIONS, {"frames": 1}))
        for w, h in RATIOS
    ]
    return DataSettings(buckets=tuple(buckets), crop_limit=0.25)


def scene(seconds: float, aspect: Fraction) -> SceneTime:
    return SceneTime(Scene("x", "x.mp4", 0, 1, "It moves."), Fraction(seconds), Fraction(1, 24), aspect)


@pytest.mark.parametrize("seconds", [0, 6.0, 9.5, 13.0])
def test_a_scene_goes_to_the_nearest_shape_of_every_duration_that_takes_it(seconds: float) -> None:
    """50 aspects from 1:2.3 to 2.3:1, beside the least |log ratio|; and what it cuts off, counted in pixels."""
    settings = of_the_paper()
    for number in range(50):
        wide, high = 1000, round(1000 * 2.3 ** (number / 24.5 - 1))
        found = settings.cut(span := scene(seconds, Fraction(wide, high)))
        nearest = min(RATIOS, key=lambda ratio: abs(np.log(wide / high) - np.log(ratio[0] / ratio[1])))
        w, h = nearest
        kept = min(wide, high * w / h) * min(high, wide * h / w) / (wide * high)
        if 1 - kept > 0.25:
            assert not found and "cuts off" in settings.no_shape(span)
        else:
            assert {(cut.bucket.width, cut.bucket.height) for cut in found} == {(64 * w, 64 * h)}
            assert len({cut.bucket.timing for cut in found}) == len(found) > 0
            assert found[0].bucket.cropped(span.aspect) == pytest.approx(1 - kept, abs=1e-9)


def test_thirty_buckets_of_the_paper_share_at_most_twenty_shapes() -> None:
    """A shape has one captured step, whatever rules of time its buckets have."""
    values: dict[str, Any] = {
        "model": {"preset": "tiny-video", "patch": [1, 4, 4], "position_lengths": [256, 64, 64]},
        "codec": {"kind": "block-dct"},
        "data": {"cache": "x", "global_batch": 4, "encoders": [{"name": "bytes"}], "buckets": []},
        "optimizer": {"lr": 1e-3}, "schedule": {"steps": 9}, "logging": {"directory": "run"},
    }  # fmt: skip
    for bucket in of_the_paper().buckets:
        told = {name: value for name, value in vars(bucket).items() if value is not None}
        values["data"]["buckets"].append(told | {"width": bucket.width, "height": bucket.height})
    setting = Setting.of(check_config(values, "test"))
    assert len(setting.latents) == 30
    assert len(setting.shapes) == len({*setting.latents}) == 20  # 256, 192, 128 and 1 frames of five ratios


def test_the_shape_of_a_scene_is_that_of_its_frames_as_they_are_shown(tmp_path: Path) -> None:
    """Turned on its side, of pixels that are no squares, neither."""
    frames = torch.randint(0, 255, (9, 48, 96, 3), dtype=torch.uint8)
    write_mp4(tmp_path / "a.mp4", frames, Fraction(24))
    plain = Scene("a", "a.mp4", 0, 8, "It moves.")
    assert look_through(tmp_path / "a.mp4", [plain]).spans[0].aspect == 2
    wide = tmp_path / "wide.mkv"
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(wide), "w") as target:
        stream = target.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in source.decode(video=0):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        target.mux(stream.encode(None))
    assert look_through(wide, [replace(plain, file="wide.mkv")]).spans[0].aspect == Fraction(8, 3)


def clips_of_two_shapes(folder: Path) -> dict[str, Any]:
    """A wide clip, a square one and a tall one, of a frame's number each; a bucket of each of the first two shapes."""
    told = ""
    for name, height, width in (("wide", 32, 64), ("square", 32, 32), ("tall", 96, 32)):
        frames = torch.stack([torch.full((height, width, 3), 20 * t, dtype=torch.uint8) for t in range(12)])
        write_mp4(folder / f"{name}.mp4", frames, Fraction(24))
        told += f'- {{name: {name}, file: {name}.mp4, first_frame: 0, last_frame: 11, caption: "It is {name}."}}\n'
    (folder / "captions.yaml").write_text(told)
    return {
        "clips": (str(folder),), "captions": folder / "captions.yaml", "frames": 4, "size": 32, "stride": 1,
        "validation_share": 0.0, "buckets": (BucketSettings(), BucketSettings(width=64)),
    }  # fmt: skip


def rows_of(root: Path, name: str) -> dict[str, int]:
    return {bucket.bucket: bucket.rows for bucket in Version.of(root, name).buckets}


def test_what_is_cropped_is_told_and_what_has_no_bucket_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a limit every bucket takes all three; with one the tall clip is nobody's, and that is said."""
    made = clips_of_two_shapes(tmp_path)
    root = tmp_path / "cache"
    encoding = Encoding.of(check_config(recipe(tmp_path, tmp_path), "test").codec, DataSettings(**made).encoders)
    every = build_cache(DataSettings(**made), encoding, root, progress=False)
    assert rows_of(root, every) == {"4x32x32": 27, "4x32x64": 27}
    limited = DataSettings(**made, crop_limit=0.5)
    name = build_cache(limited, encoding, root, progress=False)
    assert rows_of(root, name) == {"4x32x32": 9, "4x32x64": 9}
    said = capsys.readouterr().err
    assert "of 2 scenes buckets cut off 0.0% of the pixels on average, 0.0% at most (data.crop_limit 0.5)" in said
    (left,) = json.loads((root / LEFT_OUT_FILE).read_text())
    assert left["file"] == "tall.mp4" and "4x32x32, the nearest, cuts off 66.7%" in left["reason"]
    with pytest.raises(CinemeshError, match=r"4x32x64 has no scene: those of .* that are long enough have a nearer"):
        two = tmp_path / "two"
        two.mkdir()
        build_cache(
            replace(limited, captions=_only(tmp_path, "square", "tall"), crop_limit=0.7), encoding, two, progress=False
        )


def _only(folder: Path, *names: str) -> Path:
    told = [row for row in yaml.safe_load((folder / "captions.yaml").read_text()) if row["name"] in names]
    (folder / "only.yaml").write_text(yaml.safe_dump(told))
    return folder / "only.yaml"


def shared_shape(values: dict[str, Any]) -> dict[str, Any]:
    """Two rules of time for one shape: what scenes play at 24 frames/s, and at 12."""
    data = values["data"] | {"buckets": [{"name": "fast"}, {"name": "slow", "fps": 12, "weight": 2}]}
    return values | {"data": data, "seed": 11}


@pytest.mark.usefixtures("one_process")
def test_buckets_of_one_shape_train_through_one_captured_step(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with windows of its own, reported by its name; the planner's and the report's steps are theirs together."""
    values = shared_shape(recipe(clips, tmp_path))
    values["logging"] |= {"every": 1}
    assert start(values, tmp_path) == 0
    said = capsys.readouterr().out
    assert "1 bucket, 1 captured step" in said
    assert re.search(r"bucket fast: \d+ training", said) and re.search(r"bucket slow: \d+ training", said)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len({row["loss"] for row in rows}) == 6
    assert any("step_s/fast" in row or "fast" in str(row) for row in rows)


def test_two_buckets_of_one_name_or_of_one_shape_and_other_batches_are_refused(clips: Path, tmp_path: Path) -> None:
    values = recipe(clips, tmp_path)
    values["data"]["buckets"] = [{}, {"fps": 12}]
    with pytest.raises(CinemeshError, match="2 are called 8x32x32"):
        check_config(values, "test")
    values["data"]["buckets"] = [{"name": "a"}, {"name": "b", "fps": 12, "global_batch": 4}]
    with pytest.raises(CinemeshError, match="come in steps of 4 and of 2 samples"):
        Setting.of(check_config(values, "test")).check_training()
    for name in ("../x", "", "a/b", "x" * 42):
        values["data"]["buckets"] = [{"name": name}]
        with pytest.raises(CinemeshError, match="letters, digits"):
            check_config(values, "test")


def config_of(values: dict[str, Any]) -> Config:
    return check_config(values, "test")


def test_weights_of_samples_make_images_one_in_eleven(clips: Path, tmp_path: Path) -> None:
    """The paper's joint stage: images to videos 1:10 by samples, where a step of images has eight times as many."""
    values = in_two_buckets(recipe(clips, tmp_path))
    values["data"]["buckets"] = [{"weight": 10}, {"width": 64, "weight": 1, "global_batch": 16}]
    values["schedule"] = {"steps": 40_000, "warmup_steps": 1}
    for weigh, share in (("samples", 1 / 11), ("steps", 8 / 18)):
        values["data"]["weigh"] = weigh
        config = config_of(values)
        order = run_order(config, BatchHistory.always((2, 16)))
        drawn: Tensor = drawn_buckets(order.seed, order.steps, order.weights)
        videos, images = (int((drawn == bucket).sum()) * size for bucket, size in ((0, 2), (1, 16)))
        assert images / (images + videos) == pytest.approx(share, rel=0.05), weigh


def test_a_bucket_counts_what_its_crop_leaves_out() -> None:
    square = Bucket(4, 32, 32, 1.0)
    assert [square.cropped(Fraction(a, b)) for a, b in ((1, 1), (2, 1), (1, 4))] == [0, Fraction(1, 2), Fraction(3, 4)]
