"""Who rewrites prompts, and how, from a YAML file as ``configs/rewriting.yaml`` (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ...documents import quoted, read_yaml
from ...errors import CinemeshError
from ...ranges import integers, reals
from ...reading import read_record

REMEDY = "correct the rewriter; configs/rewriting.yaml is one"
OURS = ("messages", "model", "max_tokens", "stream", "n")  # fields of a request that are not the file's to set


@dataclass(frozen=True, kw_only=True)
class RewriterSettings:
    """``model``: as the endpoint calls it; with a ``directory``, what transformers saved there, and a name for it.

    ``device`` of a model in a directory: cpu, or cuda. ``guideline``: one that ships, or a .yaml file; ``examples``:
    how many of its are shown, None for all. ``cache``: a folder. ``request``: more fields of a request to the endpoint.
    Paths are from where the command runs, as a recipe's are.
    """

    model: str
    directory: str | None = None
    device: str = "cpu"
    guideline: str = "movie-gen"
    examples: Annotated[int | None, integers(0, 100, "more only take time", "examples")] = None
    cache: str = "runs/rewrites"
    answer_tokens: Annotated[int, integers(1, 100_000, "a caption has some 200", "tokens")] = 800
    timeout_s: Annotated[float, reals(0.1, 3600, "nobody waits longer for a caption", "s")] = 60.0
    tries: Annotated[int, integers(1, 10, "what fails ten times fails", "tries")] = 2
    request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("directory", self.directory or "."), ("cache", self.cache)):
            if not value.strip() or "\0" in value:
                raise CinemeshError(f"{name} is {quoted(value)}", remedy="name one")
        if self.device not in ("cpu", "cuda"):
            raise CinemeshError(f"device is {quoted(self.device)}", remedy="it is cpu or cuda")
        for name in OURS:
            if name in self.request:
                raise CinemeshError(f"request holds {name}, which is set for every request", remedy="leave it out")
        if self.directory is not None and not Path(self.directory).is_dir():
            raise CinemeshError(
                f"directory {self.directory} is no folder",
                remedy="name one that transformers saved; without it, the model is asked at an endpoint",
            )


def read_settings(path: Path) -> RewriterSettings:
    """The rewriter of a file. Raises CinemeshError."""
    return read_record(RewriterSettings, read_yaml(path, "the rewriter", REMEDY), f"the rewriter {path}")
