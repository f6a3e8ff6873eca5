"""A chain of stages: runs, each begun with another's end, averages of them, and clips; as a file says it.

Whatever is done is not done again: a run has the checkpoint of its last step, an average its checkpoint, a clip its
file, and each of these appears whole or not at all. A chain that was stopped at any moment goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...documents import mapping, read_yaml
from ...errors import CinemeshError, did_you_mean
from ...files import file_name
from ...reading import read_record
from ..storage.places import Location
from .checkpoint.choosing import kept_in, latest
from .checkpoint.manifest import MANIFEST, step_folder, step_of
from .recipe import Config, read_config

KEYS = ("directory", "recipe", "set", "stages")
CHECKPOINT = "average"  # the folder of an average's checkpoint, in its stage's


@dataclass(frozen=True)
class ChainStage:
    """One stage: a run, unless it is an ``average`` of others' weights or a clip of the ``prompt``.

    ``after``: the stage with whose end a run begins, or whose weights a clip is sampled with. ``recipe``: the chain's,
    unless it has its own. ``greedy``: an average keeps what does not raise the held-out loss of the recipe's data.
    """

    name: str
    after: str | None = None
    recipe: str | None = None
    average: tuple[str, ...] = ()
    greedy: bool = False
    prompt: str | None = None


@dataclass(frozen=True)
class Link:
    """A stage as it is to be done: its recipe, with what the chain and the stage replace in it."""

    stage: ChainStage
    recipe: Path
    directory: Path
    overrides: tuple[str, ...]

    @property
    def is_run(self) -> bool:
        return not self.stage.average and self.stage.prompt is None

    @property
    def clip(self) -> Path:
        """What a stage with a prompt writes."""
        return self.directory / "clip.mp4"

    def config(self) -> Config:
        return read_config(self.recipe, self.overrides)

    def end(self) -> Location:
        """The checkpoint of its last step, or its average: there when the stage is done."""
        if self.stage.average:
            return self.directory / CHECKPOINT
        config = self.config()
        return step_folder(kept_in(config), config.schedule.steps)

    @property
    def done(self) -> bool:
        if self.stage.prompt is not None:
            return self.clip.exists()
        if self.stage.average:
            return (self.end() / MANIFEST).exists()
        config = self.config()
        newest = latest(kept_in(config))
        return newest is not None and (step_of(newest) or 0) >= config.schedule.steps


def is_chain(path: Path) -> bool:
    """Whether a file is of stages, and not a recipe. Raises CinemeshError for a file that is no YAML."""
    values = read_yaml(path, "the recipe or chain", "name a recipe or a chain of stages")
    return isinstance(values, dict) and "stages" in values


def read_chain(path: Path, overrides: Sequence[str] = ()) -> list[Link]:
    """The stages of a chain in their order. Raises CinemeshError for a file, or a recipe, that is none.

    A stage may name those before it alone. ``overrides`` are of every recipe, as ``cinemesh train`` takes them.
    """
    where = f"the chain {path}"
    values = mapping(read_yaml(path, "the chain", f"write the keys {', '.join(KEYS)}"), where, KEYS, required=KEYS[:1])
    directory, rows = values["directory"], values.get("stages")
    if not isinstance(directory, str) or not isinstance(rows, list) or not rows:
        raise CinemeshError(f"{where}: it needs a directory and a list of stages", remedy="see configs/chain.yaml")
    links: dict[str, Link] = {}
    for number, row in enumerate(rows):
        at = f"{where}: stages.{number}"
        given = dict(row) if isinstance(row, dict) else row
        own = given.pop("set", None) if isinstance(given, dict) else None
        stage = read_record(ChainStage, given, at)
        file_name(stage.name, f"{at}: name")
        _check(stage, at, links)
        recipe = stage.recipe or values.get("recipe")
        if not isinstance(recipe, str):
            raise CinemeshError(f"{at}: neither it nor the chain names a recipe", remedy="add recipe: PATH")
        folder = Path(directory) / stage.name
        replaced = _settings(values.get("set"), where) | _settings(own, at)
        if not stage.average and stage.prompt is None:
            replaced |= {"logging.directory": str(folder)}
            if stage.after is not None:
                replaced["start_from.checkpoint"] = str(links[stage.after].end())
            replaced |= _kept_apart(Path(recipe), replaced, overrides, stage)
        given = (f"{key}={json.dumps(value)}" for key, value in replaced.items())
        link = Link(stage, Path(recipe), folder, (*given, *overrides))
        config = link.config()  # told now, not in hours
        if stage.prompt is not None and config.sample is None:
            raise CinemeshError(
                f"{at}: a prompt, and its recipe has no section sample", remedy="set: {sample.steps: 50}"
            )
        links[stage.name] = link
    return list(links.values())


def _kept_apart(
    recipe: Path, replaced: Mapping[str, Any], overrides: Sequence[str], stage: ChainStage
) -> dict[str, Any]:
    """Where checkpoints are kept elsewhere: a stage's own folder there."""
    given = [*(f"{key}={json.dumps(value)}" for key, value in replaced.items()), *overrides]
    there = read_config(recipe, given).logging.checkpoints
    return {} if there is None else {"logging.checkpoints": str(there / stage.name)}


def _settings(value: object, where: str) -> dict[str, Any]:
    """``set`` of a chain or a stage: values by their keys in the recipe, ``optimizer.lr``."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CinemeshError(f"{where}: set is no mapping", remedy="write for example set: {optimizer.lr: 1e-3}")
    return dict(value)


def _check(stage: ChainStage, at: str, before: Mapping[str, Link]) -> None:
    if stage.name in before:
        raise CinemeshError(f"{at}: there are two stages {stage.name}", remedy="give each a name of its own")
    named = [*stage.average, *([stage.after] if stage.after is not None else [])]
    for name in named:
        if name not in before:
            raise CinemeshError(f"{at}: no stage before it is called {name!r}", remedy=did_you_mean(name, before))
        if before[name].stage.prompt is not None:
            raise CinemeshError(f"{at}: {name} samples a clip, and has no weights", remedy="name a stage that has some")
    if stage.average and (stage.prompt is not None or stage.after is not None):
        raise CinemeshError(f"{at}: an average has neither prompt nor after", remedy="make stages of their own")
    if stage.greedy and not stage.average:
        raise CinemeshError(f"{at}: greedy, and no average", remedy="name the stages to average")
    if stage.prompt is not None and stage.after is None:
        raise CinemeshError(f"{at}: a prompt, and no weights to sample it with", remedy="name a stage with after")
