"""A fixed codec that takes frame by frame: what images and the spatial upsampler want of one (Movie Gen 3.1.5, 3.7).

It needs no training and stands where a learned image autoencoder would: the cosines of ``BlockDCTCodec`` in height and
width alone, 16 of each block of one frame. Of blocks of 8 x 8 pixels latents have the paper's stride; of 4 x 4, a third
of all values are kept, and hardly anything is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

from .codec import BlockDCTCodec, Coefficient

# By the side of a block, the 16 coefficients with most energy over the training frames of the seven quick-start scenes
# (configs/captions.yaml) at 128 px, each scene weighing the same. Mean and std are measured over those frames, for
# pixels in [-1, 1]; a mean within 0.1 std of zero is taken as zero.
FRAME_COEFFICIENTS: Mapping[int, tuple[Coefficient, ...]] = {
    8: (
        Coefficient(0, (0, 0, 0), -2.18, 5.931),
        Coefficient(0, (0, 0, 1), 0.0, 1.374),
        Coefficient(0, (0, 1, 0), 0.0, 1.233),
        Coefficient(0, (0, 0, 2), 0.0, 0.6333),
        Coefficient(0, (0, 2, 0), 0.0, 0.6263),
        Coefficient(0, (0, 1, 1), 0.0, 0.6187),
        Coefficient(0, (0, 2, 1), 0.0, 0.3862),
        Coefficient(0, (0, 1, 2), 0.0, 0.3729),
        Coefficient(0, (0, 0, 3), 0.0, 0.3586),
        Coefficient(0, (0, 3, 0), 0.0, 0.3547),
        Coefficient(0, (0, 2, 2), 0.0, 0.2851),
        Coefficient(0, (0, 0, 4), 0.0, 0.2334),
        Coefficient(0, (0, 3, 1), 0.0, 0.23),
        Coefficient(1, (0, 0, 0), 0.4142, 1.175),
        Coefficient(1, (0, 1, 0), 0.0, 0.237),
        Coefficient(2, (0, 0, 0), -0.2208, 0.6644),
    ),
    4: (
        Coefficient(0, (0, 0, 0), -1.09, 3.096),
        Coefficient(0, (0, 0, 1), 0.0, 0.4957),
        Coefficient(0, (0, 1, 0), 0.0, 0.4802),
        Coefficient(0, (0, 1, 1), 0.0, 0.2113),
        Coefficient(0, (0, 0, 2), 0.0, 0.2005),
        Coefficient(0, (0, 2, 0), 0.0, 0.1996),
        Coefficient(0, (0, 2, 1), 0.0, 0.1096),
        Coefficient(0, (0, 1, 2), 0.0, 0.1079),
        Coefficient(0, (0, 0, 3), 0.0, 0.09305),
        Coefficient(0, (0, 3, 0), 0.0, 0.08764),
        Coefficient(0, (0, 2, 2), 0.0, 0.06925),
        Coefficient(1, (0, 0, 0), 0.2071, 0.6072),
        Coefficient(1, (0, 1, 0), 0.0, 0.08148),
        Coefficient(1, (0, 0, 1), 0.0, 0.07539),
        Coefficient(2, (0, 0, 0), -0.1104, 0.3431),
        Coefficient(2, (0, 1, 0), 0.0, 0.05299),
    ),
}


class FrameDCTCodec(BlockDCTCodec):
    """Sixteen normalised coefficients of each block of ``side`` x ``side`` pixels of a frame; ``side`` is 8 or 4."""

    name = "frame-dct"
    temporal_stride = 1

    def __init__(self, side: int = 8) -> None:
        self.spatial_stride = side
        self.errors = (
            f"A latent holds {self.channels} numbers for a block of {side} x {side} pixels of a frame, so an error in "
            "one of them shows on the whole block as a square."
        )
        self._keep(FRAME_COEFFICIENTS[side])
