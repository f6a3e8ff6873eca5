"""What a command says of a file that it wrote: one line on stderr, with what to do next (torch-free)."""

from __future__ import annotations

import shlex
import sys

from .storage.places import Location


def wrote(path: Location, then: str, about: str = "") -> None:
    """Say that ``path`` is there, and what to do with it: a :func:`command`, or words where a person opens it."""
    print(f"wrote {path}{f' ({about})' if about else ''}; next: {then}", file=sys.stderr)


def command(*words: object, **options: object) -> str:
    """A line for a shell that runs cinemesh, ``command("plan", gpus=8)``; options that are None are left out."""
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return shlex.join(["cinemesh", *map(str, words), *(word for pair in given for word in pair)])
