"""Short names by digest (torch-free)."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def short_digest(text: str) -> str:
    """64 bits of SHA-256, in hex: names of what a cache holds."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(values: Any) -> str:
    """The same of values that JSON has, and of what stands for itself as a text."""
    return short_digest(json.dumps(values, default=str))
