"""Video files, frame by frame: what they hold in time, whether they are whole, and windows of them on a time grid.

A file is decoded twice: by :func:`look_through`, which finds where its scenes lie in time and whether it can be shown
as it is meant, then by :func:`read_windows`. Both hold a few frames and the windows at hand, however long the file is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import av.filter
import av.logging
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import CinemeshError, in_a_line
from .clips import playable
from .pixels import RgbPixels, aspect, fitted, looks, turned, unshowable
from .scenes import Scene, SceneTime
from .settings import Cut
from .sources import FFMPEG_PROTOCOLS, Source, address
from .windows import ROUNDING_S

# A decoder stops at what it would otherwise conceal: smeared blocks are no picture of anything.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
MOST_LOOKS = 64  # of frames that were looked at: no video has more kinds of them
CUT_SHORT_S = Fraction(1, 2)  # a file that ends so long before its own header says was cut
BROADCAST = ("mpegts", "mpeg")  # their frames follow one another: a gap is what a receiver lost
GAP = Fraction(3, 4)  # of a frame; repeated fields make some frames half as long again
DEINTERLACE = "yadif", "mode=send_frame:deint=interlaced"  # a frame for a frame; those that are whole pass

SeenFrame = Callable[[av.VideoFrame, Fraction, Fraction], None]  # a frame, when it begins in s, its pixels' aspect
Window = tuple[Scene, Cut, bool, int, Tensor]  # whether of validation, first frame in the file, uint8 [T, H, W, 3]


class BadClip(CinemeshError):
    """A file that is damaged, or that cannot be shown as it is meant. ``time_s``: where in it, None: as a whole."""

    def __init__(self, path: Source, reason: str, time_s: Fraction | None = None) -> None:
        at = "" if time_s is None else f" at {float(time_s):.3f} s"
        super().__init__(f"{path} is not read{at}: {reason}", remedy="replace it, or leave it out")
        self.file, self.reason, self.time_s = path, reason, time_s


@dataclass
class Survey:
    """What a file holds: its scenes in time, its frames, their average rate a second, whether any is interlaced.

    ``begins``, ``ends``: of its first and last frame, in s of its own clock.
    """

    spans: list[SceneTime] = field(default_factory=list)
    frames: int = 0
    rate: Fraction = Fraction(0)
    interlaced: bool = False
    begins: Fraction = Fraction(0)
    ends: Fraction = Fraction(0)


def look_through(path: Source, scenes: Sequence[Scene] = (), watch: SeenFrame | None = None) -> Survey:
    """Decode a file to its end; ``watch`` is called with every frame and when it begins, in s.

    Raises BadClip, and CinemeshError for a scene that ends after its last frame.
    """
    found, seen, decoded = Survey(), set[tuple[object, ...]](), Decoded(path)
    timed: dict[str, SceneTime] = {}
    waiting = deque(sorted(scenes, key=lambda scene: (scene.first_frame, scene.from_s or 0)))
    open_scenes: list[Scene] = []
    begins: list[Fraction] = []  # of the first frame and of the one before
    with _logged() as said:
        for frame in decoded:
            now = decoded.now
            if said:
                raise BadClip(path, in_a_line(Exception(said[0][2])), now)
            if begins and now <= begins[-1]:
                raise BadClip(path, "its time stamps do not rise", now)
            for scene in open_scenes:
                timed[scene.name] = _longer(timed[scene.name], now - begins[-1])
            at = found.frames, now - (begins or [now])[0]
            for scene in [scene for scene in open_scenes if scene.is_over(*at)]:
                open_scenes.remove(scene)
                timed[scene.name] = _ended(timed[scene.name], found.frames - 1)
            while waiting and waiting[0].begins(*at):
                scene = waiting.popleft()
                if not scene.is_over(*at):
                    open_scenes.append(scene)
                    begun = replace(scene, first_frame=found.frames)
                    timed[scene.name] = SceneTime(begun, Fraction(0), Fraction(0), aspect(frame, decoded.pixel_aspect))
            if (look := looks(frame)) not in seen:
                seen = {look} if len(seen) > MOST_LOOKS else {*seen, look}
                if reason := unshowable(frame):
                    raise BadClip(path, reason, now)
            found.interlaced |= frame.interlaced_frame
            if found.interlaced and len({(height, width) for _, height, width, *_ in seen}) > 1:
                raise BadClip(path, "it is interlaced and changes its size", now)
            found.frames, begins = found.frames + 1, [*begins[:1], now]
            if watch is not None:
                watch(frame, now, decoded.pixel_aspect)
        if said:
            raise BadClip(path, in_a_line(Exception(said[0][2])), decoded.now)
    if not begins:
        raise BadClip(path, "it holds no frame")
    for scene in open_scenes:
        timed[scene.name] = _ended(_longer(timed[scene.name], decoded.ends - begins[-1]), found.frames - 1)
    for scene in scenes:
        if scene.last_frame >= found.frames:
            raise CinemeshError(
                f"scene {scene.name} ends at frame {scene.last_frame}, but {path} decodes to {found.frames} frames "
                f"(0 to {found.frames - 1}): correct the captions file, or replace the video if it is cut short"
            )
        if scene.name not in timed:  # given in seconds
            reason = f"no frame of it begins within scene {scene.name}, from {float(scene.from_s or 0):.3f} s on"
            raise BadClip(path, reason, decoded.ends)
    found.spans = [timed[scene.name] for scene in scenes]
    found.begins, found.ends = begins[0], decoded.ends
    found.rate = playable(found.frames / (found.ends - found.begins), f"the video {path}")
    return found


def _longer(span: SceneTime, seconds: Fraction) -> SceneTime:
    return replace(span, seconds=span.seconds + seconds, longest_shown=max(span.longest_shown, seconds))


def _ended(span: SceneTime, last: int) -> SceneTime:
    """With the last frame of a scene that was given in seconds."""
    return span if span.scene.from_s is None else replace(span, scene=replace(span.scene, last_frame=last))


def read_windows(
    path: Source, found: Survey, cuts: Mapping[str, Sequence[Cut]], scenes: Sequence[Scene]
) -> Iterator[Window]:
    """The windows of a file's ``scenes``, as they end in time; each is scaled and cropped to its bucket.

    A frame of a grid is the one that the video shows at its time. Raises BadClip where the file is not as surveyed.
    """
    waiting = deque(sorted(scenes, key=lambda scene: scene.first_frame))
    grids: list[_Grid] = []
    decoded = Decoded(path, interlaced=found.interlaced)
    for index, frame in enumerate(decoded):
        for grid in grids:
            yield from grid.until(decoded.now)
        grids = [grid for grid in grids if grid.scene.last_frame >= index]
        while waiting and waiting[0].first_frame == index:
            scene = waiting.popleft()
            grids += [_Grid(scene, cut, decoded.now) for cut in cuts[scene.name]]
        if grids:
            fitting = _Fitting(frame, decoded.pixel_aspect)
            for grid in grids:
                grid.shown, grid.index = fitting, index
        if not grids and not waiting:
            return
    for grid in grids:
        yield from grid.until(decoded.ends)


@dataclass
class _Fitting:
    """A frame, fitted to each size once it is asked for."""

    frame: av.VideoFrame
    pixel_aspect: Fraction
    made: dict[tuple[int, int], RgbPixels] = field(default_factory=dict)

    def of(self, height: int, width: int) -> RgbPixels:
        if (height, width) not in self.made:
            self.made[height, width] = fitted(self.frame, self.pixel_aspect, height, width)
        return self.made[height, width]


class _Grid:
    """The frames of one bucket in one scene, and the last of them, which a window may still need."""

    def __init__(self, scene: Scene, cut: Cut, begins: Fraction) -> None:
        self.scene, self.index = scene, 0  # of the frame that is shown
        self.shown: _Fitting | None = None
        self._cut, self._begins, self._next = cut, begins, 0
        self._kept: deque[tuple[int, RgbPixels]] = deque(maxlen=cut.bucket.frames)
        self._last = max((firsts[-1] for firsts in (cut.train, cut.validation) if firsts), default=-1)

    def until(self, now: Fraction) -> Iterator[Window]:
        """The windows that end before ``now``, when the frame at hand is shown no more."""
        bucket, cut = self._cut.bucket, self._cut
        while self._next < self._last + bucket.frames and self._begins + self._next / cut.rate + self._slack < now:
            assert self.shown is not None  # the scene's first frame came with it
            self._kept.append((self.index, self.shown.of(bucket.height, bucket.width)))
            self._next += 1
            first = self._next - bucket.frames
            for validation, firsts in ((False, cut.train), (True, cut.validation)):
                if first in firsts:
                    frames = torch.from_numpy(np.stack([pixels for _, pixels in self._kept]))
                    yield self.scene, cut, validation, self._kept[0][0], frames

    @property
    def _slack(self) -> Fraction:
        """A time stamp may be rounded up, and its frame is meant to be shown at its own time."""
        return min(ROUNDING_S, 1 / (4 * self._cut.rate))


def read_frames(path: Source, height: int, width: int) -> Tensor:
    """All frames of a video, whatever their rate, each upright, scaled and centre-cropped; all in memory.

    Returns uint8 [T, height, width, 3]. Raises BadClip.
    """
    decoded = Decoded(path, interlaced=look_through(path).interlaced)
    return torch.from_numpy(np.stack([fitted(frame, decoded.pixel_aspect, height, width) for frame in decoded]))


def frame_rate(path: Source) -> Fraction:
    """Frames/s of a video, the average where they vary. Raises BadClip, and CinemeshError where no player keeps it."""
    return look_through(path).rate


@contextmanager
def _logged() -> Iterator[list[tuple[int, str, str]]]:
    """What FFmpeg logs as an error, meanwhile: some decoders conceal damage and tell it nowhere else."""
    level, once = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # two files may have one fault
    try:
        with av.logging.Capture(local=False) as said:
            yield said
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(once)


class Decoded:
    """The frames of a file's video as they are shown.

    While it is iterated, of the frame at hand: ``now``, when it begins, ``ends``, when it ends, and ``pixel_aspect``,
    its pixels' width over height. ``told``: how long the file says it is, in s; None: it does not say.
    """

    told: Fraction | None = None
    now = ends = Fraction(0)
    pixel_aspect = Fraction(1)

    def __init__(self, path: Source, *, interlaced: bool = False) -> None:
        self._path, self._interlaced = path, interlaced

    def __iter__(self) -> Iterator[av.VideoFrame]:
        try:
            with av.open(address(self._path), container_options={"protocol_whitelist": FFMPEG_PROTOCOLS}) as container:
                yield from self._of(container)
        except (FFmpegError, OSError, ValueError) as error:
            raise BadClip(self._path, f"it cannot be decoded ({in_a_line(error)})", self.ends or None) from error

    def _of(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # cover art
        if not videos:
            raise BadClip(self._path, "it holds no video")
        stream = next((s for s in videos if s.disposition & Disposition.default), videos[0])
        stream.codec_context.options = STRICT
        self.told = Fraction(container.duration, av.time_base) if container.duration else None
        filtered = _deinterlacer(stream) if self._interlaced else lambda frame: [frame] if frame else []
        reached, stored = Fraction(0), 0  # by any stream; in an AVI, by this one
        for packet in container.demux():
            if packet.is_corrupt:
                raise BadClip(self._path, "a part of it is missing or damaged", self.ends)
            if packet.stream is not stream:
                if packet.pts is not None and packet.time_base:
                    reached = max(reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                continue
            for frame in stream.decode(packet):
                if frame.is_corrupt:
                    raise BadClip(self._path, "a frame is damaged", self.ends)
                if container.format.name == "avi":  # which numbers its frames as they are stored and shows them evenly
                    stored = stored + 1 if frame.dts is None else frame.dts
                    frame.pts = stored
                for whole in filtered(frame):
                    yield self._at(whole, stream)
        for whole in filtered(None):
            yield self._at(whole, stream)
        if self.told is not None and max(reached, self.ends) + CUT_SHORT_S < self.told:
            raise BadClip(self._path, f"it ends there, and was written to end at {float(self.told):.3f} s", self.ends)

    def _at(self, frame: av.VideoFrame, stream: VideoStream) -> av.VideoFrame:
        if frame.pts is None or frame.time_base is None:
            raise BadClip(self._path, "it has no time stamps", None)
        before, self.now = self.now, frame.pts * frame.time_base
        length = (frame.duration or 0) * frame.time_base
        if stream.container.format.name in BROADCAST and 0 < self.ends < self.now - GAP * length:
            raise BadClip(self._path, "frames are missing", self.ends)
        if not length:  # as long as the one before, or as most
            length = self.now - before if self.now > before and before else 1 / (stream.average_rate or Fraction(25))
        self.ends = self.now + length
        self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        return frame


def _deinterlacer(stream: VideoStream) -> Callable[[av.VideoFrame | None], list[av.VideoFrame]]:
    """Of a frame, or None at the end, the frames that are now whole; those that are no fields pass unchanged."""
    graph = av.filter.Graph()
    source, sink = graph.add_buffer(template=stream, time_base=stream.time_base), graph.add("buffersink")
    deinterlace = graph.add(*DEINTERLACE)
    source.link_to(deinterlace)
    deinterlace.link_to(sink)
    graph.configure()

    def filtered(frame: av.VideoFrame | None) -> list[av.VideoFrame]:
        graph.vpush(frame)  # the graph, not its parts: they do not keep it alive, and crash without it
        made: list[av.VideoFrame] = []
        while True:
            try:
                made.append(graph.vpull())
            except (BlockingIOError, EOFError):
                return made

    return filtered


@dataclass(frozen=True)
class ShownClip:
    """A whole video as it is to be seen: upright, of square pixels."""

    frames: int
    rate: Fraction  # frames/s, the average where they vary
    height: int
    width: int


def look_at_clip(path: Source) -> ShownClip:
    """Decode a file to its end. Raises BadClip, and CinemeshError where no player keeps its rate."""
    sizes: list[tuple[int, int]] = []

    def watch(frame: av.VideoFrame, now: Fraction, pixel_aspect: Fraction) -> None:
        if not sizes:
            turn = turned(frame)
            wide, high = round(frame.width * pixel_aspect), frame.height
            sizes.append((wide, high) if turn is not None and turn[0] else (high, wide))

    found = look_through(path, watch=watch)
    return ShownClip(found.frames, found.rate, *sizes[0])
