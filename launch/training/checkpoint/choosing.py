"""Choosing among the checkpoints of a directory: the newest, and those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ....errors import CinemeshError
from ...storage.places import AnyLocation, Location, children, size_of
from .manifest import Damaged, Manifest, check_size, read_manifest, step_folder, step_of
from .publishing import is_unfinished, remove

if TYPE_CHECKING:
    from ..recipe import Config

FOLDER = "checkpoints"  # where a run keeps them, below its directory
VALIDATION_LOSS = "validation_loss"  # of a note: at the step of the checkpoint, where it was validated then


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``newest`` so many, those of every ``every`` steps (0: none), the ``best``.

    The best is that of the lowest validation loss, of those that were validated at their step.
    """

    newest: int = 2
    every: int = 0
    best: bool = False


def kept_in(config: Config) -> Location:
    """Where a recipe's run keeps its checkpoints."""
    return config.logging.checkpoints or config.logging.directory / FOLDER


def published(directory: AnyLocation) -> list[AnyLocation]:
    """All checkpoints, whole or not, the newest first; none whose save was broken off."""
    found = cast(Sequence[AnyLocation], children(directory))
    steps = {path: step for path in found if (step := step_of(path)) is not None and not is_unfinished(path)}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def check_files(path: Location, found: Manifest) -> None:
    """Raise Damaged for a file that is missing or of another size; their contents are not looked at."""
    for file in found.files:
        check_size(path, file, size_of(path / file.name))


def latest(directory: AnyLocation) -> AnyLocation | None:
    """The newest checkpoint whose manifest is good and whose files have their sizes; None where there is none at all.

    Raises CinemeshError where there are only others: that is no reason to begin from step 0.
    """
    damaged: list[Damaged] = []
    for path in published(directory):
        try:
            check_files(path, read_manifest(path))
            return path
        except Damaged as error:
            damaged.append(error)
    if damaged:
        raise none_whole(damaged)
    return None


def none_whole(damaged: list[Damaged]) -> CinemeshError:
    """Of all checkpoints of a directory, the newest first."""
    others = f", and {len(damaged) - 1} before it are not either" if len(damaged) > 1 else " and there is no other"
    return CinemeshError(
        f"checkpoint {damaged[0].path} is not whole ({damaged[0].damage}){others}",
        remedy="restore one, or move them away to begin from step 0",
    )


def prune(directory: Location, step: int, keep: Keep) -> None:
    """Remove checkpoints up to ``step`` that need not stay; later ones, of a run that went back, wait for their step.

    Never that of ``step``. Damaged ones count as any: they may be restored.
    """
    upto = [path for path in published(directory) if (step_of(path) or 0) <= step]
    stay = {step_folder(directory, step), *upto[: keep.newest]}
    if keep.every:
        stay |= {path for path in upto if (step_of(path) or 0) % keep.every == 0}
    if keep.best:
        losses = {path: loss for path in upto if (loss := _validation_loss(path)) is not None}
        stay |= {min(losses, key=lambda path: losses[path])} if losses else set()
    for path in upto:
        if path not in stay:
            remove(path)


def _validation_loss(path: Location) -> float | None:
    try:
        loss = read_manifest(path).note.get(VALIDATION_LOSS)
    except CinemeshError:
        return None
    return float(loss) if isinstance(loss, (int, float)) else None
