"""What NCCL makes of collectives of different communicators: side by side, or one after another (torch-free).

It keeps the order in which the host issued them (``NCCL_LAUNCH_ORDER_IMPLICIT``). Where it can, it orders their starts;
else each starts when the one before has ended, and overlaps with compute alone (src/enqueue.cc, ``getImplicitOrder``,
v2.26.2 to v2.30.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Capture = Literal["auto", "off", "required"]  # of steps, as a recipe asks

OLDEST = (2, 26)  # NCCL that keeps the order: with an older one, two collectives may wait for each other
STARTS = (12, 3)  # CUDA of the driver from which starts are ordered
CAPTURED = (2, 27), (12, 9)  # NCCL, and CUDA of the driver, from which they are in a capture, too


@dataclass(frozen=True)
class NcclStack:
    """NCCL's release, and the CUDA release that the driver is of: (2, 28), (12, 8)."""

    nccl: tuple[int, int]
    driver: tuple[int, int]

    def serial(self, captured: bool) -> str:
        """Why collectives of different communicators run one after another; empty where they run side by side."""
        nccl, driver = CAPTURED if captured else (OLDEST, STARTS)
        if self.nccl >= nccl and self.driver >= driver:
            return ""
        here, kind = f"NCCL {_text(self.nccl)} on a driver of CUDA {_text(self.driver)}", "captured " * captured
        return (
            f"{here} runs {kind}collectives of different axes one after another, from NCCL {_text(nccl)} and CUDA "
            f"{_text(driver)} on side by side"
        )

    def captures(self, asked: Capture) -> bool:
        """Whether steps are captured: ``auto`` leaves it where a capture alone would lose the overlap."""
        return asked == "required" or (asked == "auto" and (not self.serial(True) or bool(self.serial(False))))

    def told(self) -> str:
        """What is lost, and which capture loses it; empty where nothing is."""
        if always := self.serial(captured=False):
            return always
        only = self.serial(captured=True)
        return only and f"{only}: steps are captured only where capture is required"


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
