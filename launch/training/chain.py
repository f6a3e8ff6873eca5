"""A chain of stages: runs, each begun with another's end, averages of them, clips, larger clips; as a file says it.

Whatever is done is not done again: a run has the checkpoint of its last step, an average its checkpoint, a clip its
file, and each of these appears whole or not at all. A chain that was stopped at any moment goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """One stage: a run, unless it is an ``average`` of others' weights, a clip of the ``prompt``, or a larger clip.

    ``after``: the stage with whose end a run begins, or whose weights a clip is sampled with. ``recipe``: the chain's,
    unless it has its own. ``greedy``: an average keeps what does not raise the held-out loss of the recipe's data.
    ``upsample``: the stage whose clip is made larger, by the upsampler of ``after``.
    """

    name: str
    after: str | None = None
    recipe: str | None = None
    average: tuple[str, ...] = ()
    greedy: bool = False
    prompt: str | None = None
    upsample: str | None = None

    @property
    def makes_clip(self) -> bool:
        return self.prompt is not None or self.upsample is not None

    @property
    def is_run(self) -> bool:
        return not self.average and not self.makes_clip

    @property
    def begins_with(self) -> tuple[str, ...]:
        """The stages that are done before it."""
        named = (*self.average, self.after, self.upsample)
        return tuple(name for name in named if name is not None)


@dataclass(frozen=True)
class MadeClip:
    """What a stage makes clips of: its own ``prompt`` or another's, as many frames and pixels."""

    prompt: str
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Link:
    """A stage as it is to be done: its recipe, with what the chain and the stage replace in it.

    That of a clip that is made larger is the upsampler's. ``made``: of a stage that makes a clip.
    """

    stage: ChainStage
    recipe: Path
    directory: Path
    overrides: tuple[str, ...]
    made: MadeClip | None = None

    @property
    def clip(self) -> Path:
        """What a stage that makes a clip writes."""
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
        if self.stage.makes_clip:
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
        if stage.upsample is not None:
            links[stage.name] = _upsampling(stage, at, links, Path(directory), own)
            continue
        recipe = stage.recipe or values.get("recipe")
        if not isinstance(recipe, str):
            raise CinemeshError(f"{at}: neither it nor the chain names a recipe", remedy="add recipe: PATH")
        folder = Path(directory) / stage.name
        replaced = _settings(values.get("set"), where) | _settings(own, at)
        if stage.is_run:
            replaced |= {"logging.directory": str(folder)}
            if stage.after is not None:
                replaced["start_from.checkpoint"] = str(links[stage.after].end())
            replaced |= _kept_apart(Path(recipe), replaced, overrides, stage)
        given = (f"{key}={json.dumps(value)}" for key, value in replaced.items())
        link = Link(stage, Path(recipe), folder, (*given, *overrides))
        config = link.config()  # told now, not in hours
        if stage.prompt is not None:
            link = replace(link, made=_sampled(stage, config, at, links))
        links[stage.name] = link
    return list(links.values())


def _sampled(stage: ChainStage, config: Config, at: str, before: Mapping[str, Link]) -> MadeClip:
    """Raises CinemeshError for a recipe that samples nothing, and for the weights of an upsampler."""
    assert stage.prompt is not None and stage.after is not None
    if before[stage.after].config().data.low_resolution is not None:
        raise CinemeshError(
            f"{at}: {stage.after} is an upsampler, and makes no clip of a prompt alone",
            remedy="name a clip with upsample",
        )
    if config.sample is None:
        raise CinemeshError(f"{at}: a prompt, and its recipe has no section sample", remedy="set: {sample.steps: 50}")
    shape = config.sampled
    return MadeClip(stage.prompt, shape.frames, shape.height, shape.width)


def _upsampling(stage: ChainStage, at: str, before: Mapping[str, Link], directory: Path, own: object) -> Link:
    """``own``: the stage's ``set``. Raises CinemeshError for no upsampler, and for a clip that one does not take."""
    assert stage.after is not None and stage.upsample is not None
    if stage.recipe is not None or own is not None:
        raise CinemeshError(
            f"{at}: a clip is made larger as the upsampler's recipe says, and this has a recipe or set of its own",
            remedy=f"set it in the stage {stage.after}",
        )
    upsampler, shown = before[stage.after], before[stage.upsample].made
    config = upsampler.config()
    small = config.data.low_resolution
    if small is None:
        raise CinemeshError(
            f"{at}: {stage.after} is no upsampler: its recipe has no data.low_resolution",
            remedy="name a run of one, as of configs/upsampler.yaml",
        )
    assert shown is not None
    height, width, windows = small.scale * shown.height, small.scale * shown.width, config.data.shapes
    length, learnt = max(window.frames for window in windows), ", ".join(window.shape for window in windows)
    if shown.frames < length or all(window.height < height or window.width < width for window in windows):
        raise CinemeshError(
            f"{at}: {stage.upsample} makes {shown.frames} frames of {shown.height}x{shown.width} pixels, {small.scale} "
            f"times as large {height}x{width}, and {stage.after} learns of windows {learnt}",
            remedy="train it on windows as large, and no longer than the clip",
        )
    made = MadeClip(shown.prompt, shown.frames, height, width)
    return Link(stage, upsampler.recipe, directory / stage.name, upsampler.overrides, made)


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
    for name in stage.begins_with:
        if name not in before:
            raise CinemeshError(f"{at}: no stage before it is called {name!r}", remedy=did_you_mean(name, before))
        if before[name].stage.makes_clip and name != stage.upsample:
            raise CinemeshError(f"{at}: {name} makes a clip, and has no weights", remedy="name a stage that has some")
    if stage.average and (stage.makes_clip or stage.after is not None):
        raise CinemeshError(
            f"{at}: an average has neither prompt nor upsample nor after", remedy="make stages of their own"
        )
    if stage.prompt is not None and stage.upsample is not None:
        raise CinemeshError(f"{at}: a prompt, and a clip to make larger", remedy="make stages of their own")
    if stage.greedy and not stage.average:
        raise CinemeshError(f"{at}: greedy, and no average", remedy="name the stages to average")
    if stage.prompt is not None and stage.after is None:
        raise CinemeshError(f"{at}: a prompt, and no weights to sample it with", remedy="name a stage with after")
    if stage.upsample is not None and stage.after is None:
        raise CinemeshError(f"{at}: a clip, and no upsampler to make it larger", remedy="name its stage with after")
    if stage.upsample is not None and not before[stage.upsample].stage.makes_clip:
        raise CinemeshError(f"{at}: {stage.upsample} makes no clip", remedy="name a stage with a prompt")
