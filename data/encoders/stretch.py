"""A position table for more tokens than it was trained with (Movie Gen, A.1: MetaCLIP's 77 become 256).

The paper tunes its longer table, and does not say what it began with. Here the first rows, which nearly every caption
trained, stay, and the others are read off the rest linearly (Long-CLIP, arXiv 2403.15378, 3.1, whose 77 become 248). A
table that was tuned since is in a directory of its own and is as long as it says: nothing is stretched then.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_ROWS = 20  # rows: Long-CLIP's count of those that are well trained


def stretched(table: Tensor, length: int) -> Tensor:
    """[length, width] of a table [n, width], n <= length."""
    n = len(table)
    kept = min(KEPT_ROWS, n - 1) if length > n else n
    at = torch.linspace(kept, n - 1, length - kept, dtype=torch.float64)
    low = at.floor().long().clamp(max=max(n - 2, 0))
    share = (at - low)[:, None]
    wide = table.double()
    grown = (1 - share) * wide[low] + share * wide[(low + 1).clamp(max=n - 1)]
    return torch.cat([table[:kept], grown.to(table.dtype)])
