"""What a terminal cannot show does not end a command (torch-free)."""

from __future__ import annotations

import io
import sys


def show_what_it_can() -> None:
    """Standard output and error show a question mark for a sign that their encoding lacks: under ``LC_ALL=C``, a ±."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
