"""Which frames of a scene are windows (torch-free).

    scene   | train windows: every `stride` frames ............ | validation windows |

The last frames of a scene are held out: no training window of any bucket touches them. A scene too short for
both gives training windows only.
"""

from __future__ import annotations


def held_out(scene_frames: int, frames: int, validation_share: float) -> int:
    """Last frames of a scene that no training window touches; ``frames``: of the longest bucket that fits into it."""
    if not validation_share or scene_frames < 2 * frames:
        return 0
    return min(max(frames, round(validation_share * scene_frames)), scene_frames - frames)


def windows(scene_frames: int, held_out: int, frames: int, stride: int) -> tuple[range, range]:
    """First frames, from the scene's start, of the train and of the validation windows."""
    border = scene_frames - held_out
    return range(0, border - frames + 1, stride), range(border, scene_frames - frames + 1, stride)
