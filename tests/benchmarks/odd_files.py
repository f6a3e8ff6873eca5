"""Every odd video and image of the tests read, and the memory that an hour of video costs beside a minute.

python tests/benchmarks/odd_files.py --json tests/benchmarks/results/odd_files.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from odd_images import check_image, odd_images
from odd_videos import check, noisy, odd_videos

from cinemesh.data.scenes import Scene
from cinemesh.data.settings import DataSettings
from cinemesh.data.video import look_through, read_windows
from cinemesh.errors import CinemeshError

FPS = 24
MINUTE_S, HOUR_S = 60, 3600


def write_long(path: Path, seconds: int) -> None:
    """Motion JPEG of one second's frames again and again."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mjpeg", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 96, 192, "yuvj420p"
        packets: list[bytes] = []
        for pixels in noisy(FPS):
            frame = av.VideoFrame.from_ndarray(pixels.copy(), format="rgb24").reformat(format="yuvj420p")
            packets += [bytes(packet) for packet in stream.encode(frame)]
        for index in range(seconds * FPS):
            packet = av.Packet(packets[index % len(packets)])
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.pts = packet.dts = index
            packet.duration, packet.is_keyframe = 1, True
            out.mux(packet)


def peak_bytes(path: Path, seconds: int, send: Any) -> None:
    """Read all windows of 64 frames; send their number and by how much this process grew since before, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # what imports took is not counted
    before = peak_rss_bytes()
    scene = Scene("it", path.name, 0, seconds * FPS - 1, "x")
    found = look_through(path, [scene])
    cuts = DataSettings(size=64, frames=64, stride=64, fps=FPS).cuts(found.spans)
    count = sum(1 for _ in read_windows(path, found, cuts, [scene]))
    send.send((count, peak_rss_bytes() - before))


def peak_rss_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def in_a_process(path: Path, seconds: int) -> tuple[int, int]:
    take, send = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=peak_bytes, args=(path, seconds, send))
    child.start()
    found = take.recv()
    child.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        came_to: dict[str, str] = {}

        def look(name: str, how: Callable[[], str]) -> None:
            try:
                came_to[name] = how()
            except (AssertionError, CinemeshError, pytest.fail.Exception) as error:  # the table shows it
                came_to[name] = f"WRONG: {error}"

        for odd in odd_videos():
            look(odd.name, lambda odd=odd: check(odd, folder))
        videos = len(came_to)
        for image in odd_images():
            look(image.name, lambda image=image: check_image(image, folder))
        grown: dict[str, Any] = {}
        for name, seconds in (("minute", MINUTE_S), ("hour", HOUR_S)):
            write_long(folder / f"{name}.mkv", seconds)
            windows, grew_bytes = in_a_process(folder / f"{name}.mkv", seconds)
            grown[name] = {"seconds": seconds, "windows": windows, "peak_rss_growth_bytes": grew_bytes}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "2-core x86-64, no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        "videos": videos,
        "images": len(came_to) - videos,
        "came_to": dict(Counter(said.split(":")[0] for said in came_to.values())),
        "memory": grown,
        "each": came_to,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
