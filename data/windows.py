"""Which frames of a scene are windows, on the time grid of each bucket (torch-free).

    scene   | train windows: every `stride` frames ............ | validation windows |

A bucket sees a scene at its own rate, as frames k / rate s after the scene's start. The last part of a scene is held
out: no training window of any bucket touches it. A scene too short for both, as is every scene that a bucket squeezes
whole into its frames, gives training windows only.
"""

from __future__ import annotations

import math
from fractions import Fraction

# Containers round time stamps, most to 1/1000 s, QuickTime's old clock to 1/600 s: an edge so near is the edge meant.
ROUNDING_S = Fraction(1, 1000)


def grid_frames(seconds: Fraction, rate: Fraction) -> int:
    """Frames of a grid of ``rate`` frames/s that are shown whole within ``seconds``."""
    return math.floor((seconds + ROUNDING_S) * rate)


def held_out(scene_frames: int, frames: int, validation_share: float) -> int:
    """Last frames of a scene that no training window touches; ``frames``: of the longest window that fits into it."""
    if not validation_share or scene_frames < 2 * frames:
        return 0
    return min(max(frames, round(validation_share * scene_frames)), scene_frames - frames)


def windows(scene_frames: int, border: Fraction, frames: int, stride: int, shown: Fraction) -> tuple[range, range]:
    """First frames, from the scene's start, of the train and of the validation windows; ``border``: between, in frames.

    At a rate that is not the border's own it may lie within a frame, which is in neither. ``shown``: for how many
    frames of the grid the video shows one of its own; above 1, the one shown at the border is in no validation window.
    """
    train = range(0, math.floor(border) - frames + 1, stride)
    first = border if shown <= 1 else border + shown
    return train, range(math.ceil(first), scene_frames - frames + 1, stride)
