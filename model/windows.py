"""OverlappingWindows of a clip that is sampled piece by piece, and how much each says of a frame (torch-free).

Movie Gen 3.1.5: windows of 14 latent frames, 4 of which overlap with the next; where two overlap, what they say is
averaged in every step (MultiDiffusion, Bar-Tal et al. 2023). The paper gives no weights for video; its audio model
found triangular ones better than equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import CinemeshError

WINDOW, OVERLAP = 14, 4  # latent frames, 3.1.5
UPSAMPLING_STEPS = 20  # from noise to a clip, 3.1.5


@dataclass(frozen=True)
class OverlappingWindows:
    """Of a clip of ``frames`` latent frames: ``length`` each, ``overlap`` shared with the next; the last ends with it.

    Raises CinemeshError for a clip that is shorter than one, and where a window would begin no later than the one
    before.
    """

    frames: int
    length: int = WINDOW
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.length:
            raise CinemeshError(
                f"windows of {self.length} frames, of which {self.overlap} overlap: each begins "
                f"{self.length - self.overlap} frames after the one before",
                remedy=f"let 0 to {max(self.length - 1, 0)} frames overlap",
            )
        if self.frames < self.length:
            raise CinemeshError(
                f"a clip of {self.frames} frames is shorter than a window of {self.length}",
                remedy="take a longer clip, or shorter windows, of which the model knows less",
            )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First frames: every ``length - overlap``; the last window is moved back to end with the clip."""
        last = self.frames - self.length
        return (*range(0, last, self.length - self.overlap), last)

    @cached_property
    def shares(self) -> Sequence[Sequence[float]]:
        """Of every window, of each of its frames: its part of what is said there; 1 where no other says anything.

        In proportion to a triangle over the window, 1, 2, ..., 2, 1.
        """
        triangle = [min(at, self.length - 1 - at) + 1 for at in range(self.length)]
        said = [0] * self.frames
        for start in self.starts:
            for at, weight in enumerate(triangle, start):
                said[at] += weight
        return [[weight / said[at] for at, weight in enumerate(triangle, start)] for start in self.starts]
