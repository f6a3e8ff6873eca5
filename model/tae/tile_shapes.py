"""How long tiles are (torch-free). Movie Gen 3.1.1."""

TILE_FRAMES, OVERLAP_FRAMES = 32, 16  # raw frames; encoded without overlap, decoded with
