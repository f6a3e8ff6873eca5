"""Videos as people see them: pixels, time and damage."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_videos import HEIGHT, WIDTH, Odd, check, encode, level, odd_videos, picture, woven

from cinemesh.data import clips, pixels, video
from cinemesh.data.buckets import BucketSettings
from cinemesh.data.clips import write_mp4
from cinemesh.data.scenes import Scene
from cinemesh.data.settings import Cut, DataSettings
from cinemesh.data.video import BadClip, frame_rate, look_through, read_frames, read_windows
from cinemesh.errors import CinemeshError
from cinemesh.evaluation.reconstruction import psnr

NTSC = Fraction(30000, 1001)
# One of each kind; the benchmark tries all.
CUT = (
    "h264.mp4", "h264.avi", "vp9.webm", "GREY.MKV", "with cover.mp4", "turned by 90.mp4", "mirrored.mp4",
    "askew.mp4", "pixels of 2 to 1.mp4", "turned pixels.mp4", "12 a second.mp4", "25 a second.mkv", "60 a second.mp4",
    "uneven.mkv", "late start.mkv", "matrix 1 full yuv420p10le.mkv", "matrix 5 limited yuv420p.mkv",
    "untagged hd.mkv", "pq.mkv", "bt2020.mkv", "ycgco.mkv", "see-through.mkv", "161 by 97.mkv", "0 bytes.mp4",
    "no link.mp4", "song with cover.mp4", "no time stamps.h264", "capitals.MP4", "new\nline.mp4", "http:__colon.mp4",
    "a frame lost.ts",
    "cut short.mxf", "libx264 flipped bits.mp4", "libx264 cut short.mkv", "libx264 cut out.ts", "mpeg4 zeroed.avi",
    "ffv1 overwritten.mkv",
)  # fmt: skip
ODD = {odd.name: odd for odd in odd_videos()}


@pytest.mark.parametrize("odd", [pytest.param(ODD[name], id=name.encode("ascii", "replace").decode()) for name in CUT])
def test_an_odd_video_comes_to_its_pixels_or_a_skip(tmp_path: Path, odd: Odd) -> None:
    """What a decoder gives and what people see are not the same; nothing else looks at the difference."""
    assert check(odd, tmp_path) == ("pixels" if odd.seen is not None else "skipped")


@pytest.mark.parametrize(
    ("name", "where", "what", "planted"),
    [
        ("turned by 90.mp4", pixels, "turned", lambda frame: (False, False, False)),
        ("pixels of 2 to 1.mp4", video, "fitted", lambda frame, _, *size: pixels.fitted(frame, Fraction(1), *size)),
        ("matrix 1 full yuv420p10le.mkv", pixels, "MATRICES", dict.fromkeys(pixels.MATRICES, pixels.MATRICES[5])),
        ("untagged hd.mkv", pixels, "HD_LINES", 9999),
        ("pq.mkv", pixels, "TRANSFERS", set(range(20))),
        ("60 a second.mp4", video._Grid, "until", lambda grid, now, until=video._Grid.until: until(grid, now + 1)),
        ("a frame lost.ts", video, "BROADCAST", ()),
        ("cut short.mxf", video, "CUT_SHORT_S", 9),
    ],
)
def test_an_odd_video_fails_without_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: object, what: str, planted: object
) -> None:
    """Each rule taken away, as it was before there was one: the check above must see it."""
    monkeypatch.setattr(where, what, planted)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(ODD[name], tmp_path)


def moving_square(frames: int = 12, height: int = 48, width: int = 64) -> torch.Tensor:
    """A red square that moves right over a grey ramp."""
    clip = torch.linspace(60, 180, height).to(torch.uint8)[None, :, None, None]
    clip = clip.repeat(frames, 1, width, 3)
    for index in range(frames):
        clip[index, 16:32, 2 * index + 16 : 2 * index + 32] = torch.tensor([200, 30, 30]).byte()
    return clip


def test_frames_are_scaled_and_cropped_about_the_centre(tmp_path: Path) -> None:
    clip = moving_square(1, 48, 96)[:, :, -1:].repeat(4, 1, 96, 1)  # the ramp alone
    clip[:, :, :20] = 0  # outside the centre square, columns 24 to 71
    clip[:, :, 76:] = 0
    write_mp4(tmp_path / "wide.mp4", clip, NTSC)
    frames = read_frames(tmp_path / "wide.mp4", 24, 24)
    assert frames.shape == (4, 24, 24, 3) and frames.dtype == torch.uint8
    assert frames[:, :, [0, -1]].min() > 40  # a squeezed, uncropped frame has black sides
    ramp = frames[0, :, 20].float().mean(-1)
    assert ramp[0] == pytest.approx(61, abs=6) and ramp[-1] == pytest.approx(179, abs=6)


def test_interlaced_fields_are_taken_apart(tmp_path: Path) -> None:
    """Woven, a moving edge is a comb: every other line is of another time."""
    rate = Fraction(25)
    woven_frames, first_fields = woven(rate)
    flags = {"flags": "+ildct+ilme"}
    encode(tmp_path / "a.mpg", codec="mpeg2video", frames=woven_frames, rate=rate, options=flags)
    found = look_through(tmp_path / "a.mpg")
    assert found.interlaced and found.frames == len(woven_frames)
    frames = read_frames(tmp_path / "a.mpg", HEIGHT, WIDTH).float()[2:-2]
    combed = torch.from_numpy(np.stack(woven_frames)).float()[2:-2]
    whole = torch.from_numpy(np.stack(first_fields)).float()[2:-2]

    def comb(clip: torch.Tensor) -> float:
        """How far the lines stand off those above and below, in levels."""
        return float((clip[:, 1:-1] - (clip[:, :-2] + clip[:, 2:]) / 2).abs().mean())

    assert comb(frames) < 0.15 * comb(combed)
    assert float((frames - whole).abs().mean()) < 4  # of the time of the first field, not the second


def windows_of(path: Path, settings: DataSettings, *scenes: Scene) -> list[tuple[str, Cut, bool, int, np.ndarray]]:
    """Scene, cut, whether of validation, first frame, and the numbers of the frames, of every window."""
    found = look_through(path, scenes)
    read = read_windows(path, found, settings.cuts(found.spans), scenes)
    return [
        (scene.name, cut, held, first, np.round((frames[:, -6, -6].float().mean(-1).numpy() - level(0)) / 12))
        for scene, cut, held, first, frames in read
    ]


@pytest.mark.parametrize("rate", [12, 25, 60])
def test_a_window_lasts_as_long_whatever_the_rate_of_its_video(tmp_path: Path, rate: int) -> None:
    """By index, 8 frames of these are 0.67, 0.32 and 0.13 s."""
    encode(tmp_path / "a.mp4", rate=Fraction(rate), times=[Fraction(k, rate) for k in range(rate // 2)])
    scene = Scene("it", "a.mp4", 0, rate // 2 - 1, "x")
    settings = DataSettings(size=48, frames=8, stride=1, fps=24)
    windows = windows_of(tmp_path / "a.mp4", settings, scene)
    assert len(windows) >= 4
    assert [first for _, _, _, first, _ in windows] == [k * rate // 24 for k in range(len(windows))]
    for k, (_, cut, held, _, numbers) in enumerate(windows):
        assert cut.rate == 24 and not held
        assert numbers.tolist() == [(k + j) * rate // 24 % 16 for j in range(8)]


def test_scenes_begin_and_end_where_they_are_said_to(tmp_path: Path) -> None:
    """Both in one pass, the second in the middle of the file; a frame too many is of the next shot."""
    encode(tmp_path / "a.mkv", rate=Fraction(30))
    scenes = Scene("late", "a.mkv", 7, 14, "x"), Scene("early", "a.mkv", 0, 6, "x")
    windows = windows_of(tmp_path / "a.mkv", DataSettings(size=48, frames=4, stride=1, fps=30), *scenes)
    assert [(name, first, numbers.tolist()) for name, _, _, first, numbers in windows] == [
        *(("early", k, [k, k + 1, k + 2, k + 3]) for k in range(4)),
        *(("late", 7 + k, [7 + k, 8 + k, 9 + k, 10 + k]) for k in range(5)),
    ] or [held for _, _, held, *_ in windows].count(True)


def test_a_scene_is_squeezed_whole_into_a_bucket(tmp_path: Path) -> None:
    """Its frames are spread over its length, and its rate is its own."""
    encode(tmp_path / "a.mp4", rate=Fraction(30), times=None)
    scene = Scene("it", "a.mp4", 0, 11, "x")  # 0.4 s
    bucket = BucketSettings(frames=8, squeeze_from_s=0.3)
    ((_, cut, held, first, numbers),) = windows_of(tmp_path / "a.mp4", DataSettings(size=48, buckets=(bucket,)), scene)
    assert (cut.rate, held, first) == (20, False, 0)
    assert numbers.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    for other in (Scene("short", "a.mp4", 0, 7, "x"), Scene("long", "a.mp4", 0, 14, "x")):  # 0.267 s; 0.5 s is 16 a s
        found = look_through(tmp_path / "a.mp4", [other])
        fits = DataSettings(size=48, buckets=(bucket,))._cut(found.spans[0])
        assert bool(fits) == (other.name == "long")
    with pytest.raises(CinemeshError, match=r"squeeze_from_s\(0\.6 s\) \* 16 frames/s > frames\(8\)"):
        DataSettings(size=48, buckets=(BucketSettings(frames=8, squeeze_from_s=0.6),))
    with pytest.raises(CinemeshError, match="one rule for its rate"):
        BucketSettings(fps=24, squeeze_from_s=0.3)


@pytest.mark.parametrize("rate", [10, 15, 24, 30, 60])
def test_no_frame_is_trained_on_and_validated_with(tmp_path: Path, rate: int) -> None:
    """Buckets of other rates cut other grids, and a slow video shows one frame on both sides of a border."""
    encode(tmp_path / "a.mp4", times=[Fraction(k, rate) for k in range(2 * rate)], rate=Fraction(rate))
    scene = Scene("it", "a.mp4", 0, 2 * rate - 1, "x")
    buckets = BucketSettings(frames=8, fps=24), BucketSettings(frames=10, fps=16, width=16)
    found = look_through(tmp_path / "a.mp4", [scene])
    cuts = DataSettings(size=8, stride=1, buckets=buckets, validation_share=0.3).cuts(found.spans)
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for cut in cuts["it"]:
        for held, firsts in ((False, cut.train), (True, cut.validation)):
            times = {(first + j) / cut.rate for first in firsts for j in range(cut.bucket.frames)}
            seen[held] |= {int((time + Fraction(1, 1000)) * rate) for time in times}
    assert seen[False] and seen[True] and not seen[False] & seen[True]


def test_rates_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(4, 32, 32), NTSC)
    assert frame_rate(tmp_path / "a.mp4") == NTSC
    monkeypatch.setattr(clips, "MOST_FRAMES_PER_S", 29)
    with pytest.raises(CinemeshError, match=r"a\.mp4 plays at 29\.97 frames/s, and a rate is above 0 and at most 29"):
        frame_rate(tmp_path / "a.mp4")


def test_a_bad_clip_says_where_and_a_scene_past_the_end_what_there_is(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(5, 32, 32), NTSC)
    with pytest.raises(CinemeshError, match=r"ends at frame 5, .* 5 frames"):
        look_through(tmp_path / "a.mp4", [Scene("x", "a.mp4", 0, 5, "x")])
    ODD["libx264 cut short.mkv"].write(tmp_path / "b.mkv")
    with pytest.raises(BadClip, match=r".*b\.mkv is not read at 0\.\d{3} s: .+; replace it") as bad:
        read_frames(tmp_path / "b.mkv", 8, 8)
    assert bad.value.time_s is not None and 0 <= bad.value.time_s < 1


def test_an_mp4_of_ours_is_read_as_it_was_written(tmp_path: Path) -> None:
    clip = moving_square(6, 48, 48)
    write_mp4(tmp_path / "a.mp4", clip, Fraction(24))
    assert psnr(read_frames(tmp_path / "a.mp4", 48, 48), clip) > 28
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).expand(3, 32, 32, 3).contiguous()
    write_mp4(tmp_path / "g.mp4", green, Fraction(24))
    assert (read_frames(tmp_path / "g.mp4", 32, 32).int() - green.int()).abs().max() <= 2


def test_pictures_are_not_guessed_from() -> None:
    """The truth's own greys are further apart than what is allowed to a quarter."""
    assert min(abs(level(k) - level(k + 1)) for k in range(15)) > ODD["h264.mp4"].off
    assert picture().shape == (HEIGHT, WIDTH, 3)
