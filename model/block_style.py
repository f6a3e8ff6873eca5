"""Forms of a transformer block: what differs between the backbone's and that of its ablation (torch-free).

Movie Gen 3.6.2 and Table 9 compare the LLaMa3 block with DiT's (Peebles and Xie 2023), which has layer norms without
gain or bias, biases in its products and SiLU between two of them in place of SwiGLU's three. Where they stand in the
block, cross-attention, modulation and the final layer are the same. With 3/2 of the FFN width, the two have as many
weights in their products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BlockName = Literal["llama3", "dit"]


@dataclass(frozen=True)
class BlockStyle:
    """``gains``: the norms are RMS norms with a gain each; else layer norms without. ``eps``: None, the model's.

    ``gated``: the feed-forward part is SwiGLU, of gate, up and down; else up, SiLU, down.
    """

    gains: bool
    gated: bool
    biases: bool
    eps: float | None = None


BLOCK_STYLES: Mapping[BlockName, BlockStyle] = {
    "llama3": BlockStyle(gains=True, gated=True, biases=False),
    "dit": BlockStyle(gains=False, gated=False, biases=True, eps=1e-6),  # Table 9
}
