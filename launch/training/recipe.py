"""The recipe of a run: a YAML file with sections, read and checked before anything else happens.

Sections are dataclasses that pydantic checks: frozen, no unknown keys. Whatever is wrong becomes one ``CinemeshError``
that names the key, the value and the rule. Relative paths are relative to the current directory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.dataclasses import dataclass

from ...data.buckets import Bucket
from ...data.cache import DataSettings
from ...data.encoding import BlockDCT, CodecSettings, Encoding, codec_kind
from ...documents import mapping, parse_yaml, quoted, read_yaml
from ...errors import CinemeshError, did_you_mean
from ...model.config import Encoder, ModelConfig, preset
from ...model.flow import CAPTION_DROPOUT
from ...model.sampler import GUIDANCE
from ...model.step import Optimizer
from ...parallel.ir.plan import Plan
from ..plans import held_fields, read_plan
from .resolved import FILE as RESOLVED
from .resolved import Resolved

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

AtLeastOne = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """A preset, and what is changed in it. Channels follow from the codec, text encoders from the data."""

    preset: str
    layers: AtLeastOne | None = None
    width: AtLeastOne | None = None
    heads: AtLeastOne | None = None
    ffn: AtLeastOne | None = None
    patch: tuple[AtLeastOne, AtLeastOne, AtLeastOne] | None = None
    position_lengths: tuple[AtLeastOne, AtLeastOne, AtLeastOne] | None = None

    def build(self, encoding: Encoding) -> ModelConfig:
        """The model for these latents and texts."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        changed = {name: value for name, value in changed.items() if value is not None}
        texts = tuple(Encoder(e.name, e.width, e.tokens) for e in encoding.encoders)
        return replace(preset(self.preset), channels=encoding.codec.channels, encoders=texts, **changed)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSection(DataSettings):
    """The data's settings, the directory of their cache, and what one optimizer step takes of them."""

    cache: Path
    global_batch: AtLeastOne  # samples of a step, whatever its bucket
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0  # of scenes: see order.balanced


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSection(Optimizer):
    """AdamW and its peak learning rate."""

    lr: Positive
    betas: tuple[Share, Share] = Optimizer.betas
    eps: Positive = Optimizer.eps
    weight_decay: Annotated[float, Field(ge=0)] = Optimizer.weight_decay
    clip_norm: Positive = Optimizer.clip_norm
    ema_decay: Share = Optimizer.ema_decay


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleSection:
    """``steps`` updates; the learning rate rises linearly over ``warmup_steps``, then falls or stays."""

    steps: AtLeastOne
    warmup_steps: CountOrNone = 0
    decay: Literal["cosine", "constant"] = "cosine"
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the peak, at the end of a cosine

    def lr(self, peak: float, step: int) -> float:
        """Learning rate of update ``step``, counted from 0: a function of nothing else, so a resumed run goes on."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return peak * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingSection:
    """Where a run writes, and how often, in steps. 0: never (a checkpoint is written at the end all the same)."""

    directory: Path
    every: AtLeastOne = 10
    validate_every: CountOrNone = 100
    validation_draws: AtLeastOne = 4  # fixed (t, noise) of every validation sample
    checkpoint_every: CountOrNone = 500
    keep: AtLeastOne = 2  # newest checkpoints that stay on disk


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleSection:
    """Clips sampled when training is done: of the named scenes' captions, or of every scene's."""

    scenes: tuple[str, ...] | None = None
    bucket: str | None = None  # FRAMESxHEIGHTxWIDTH, one of the data's; the first of them
    steps: AtLeastOne = 50
    guidance: Annotated[float, Field(ge=0)] = GUIDANCE
    seed: CountOrNone = 0


AUTO = "auto"


@dataclass(frozen=True)
class Auto:
    """``plan: auto``, or a plan with ``auto: true``: the planner chooses, for a cluster. ``held``: fields by hand."""

    cluster: str
    held: dict[str, Any]


def _plan(value: object) -> object:
    """A section of fields, or what ``--plan`` takes: a file that holds a plan, or a text."""
    if isinstance(value, str):
        return read_plan(value)
    return Plan.from_dict(value) if isinstance(value, dict) else value


def _codec(value: object) -> object:
    """The settings of the kind that is named, as strict as any section."""
    if not isinstance(value, dict):
        return value
    section: Any = create_model("CodecSection", __config__=STRICT, codec=codec_kind(value.get("kind", BlockDCT.kind)))
    try:
        return section(codec=value).codec
    except ValidationError as error:
        raise _refusal(error, section) from None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole recipe. Without ``sample``, nothing is sampled at the end."""

    model: ModelSection
    plan: Annotated[Plan, BeforeValidator(_plan)] = Plan()
    codec: Annotated[CodecSettings, BeforeValidator(_codec)] = BlockDCT()
    cluster: str | None = None  # whose devices the plan must fit, and for which ``plan: auto`` is chosen
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    logging: LoggingSection
    sample: SampleSection | None = None
    # Those that are validated and sampled: the running average, which has less of the noise of single steps, and by its
    # warm-up none of the random start; or the step's own.
    weights: Literal["ema", "master"] = "ema"
    seed: CountOrNone = 0
    caption_dropout: Share = CAPTION_DROPOUT
    capture: Literal["auto", "off", "required"] = "auto"  # steps replay: frozen calls, or a CUDA Graph
    kernels: dict[str, str] = field(default_factory=dict)  # op or "all" -> package, in place of the registry's choice

    @property
    def sampled(self) -> Bucket:
        """The bucket whose shape sampled clips have. Raises CinemeshError when ``sample.bucket`` names none."""
        shapes = {str(bucket): bucket for bucket in self.data.shapes}
        name = (self.sample and self.sample.bucket) or next(iter(shapes))
        if name not in shapes:
            raise CinemeshError(f"sample.bucket is {name!r}", remedy=f"the data have the buckets {', '.join(shapes)}")
        return shapes[name]


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The recipe at ``path`` with ``a.b=value`` overrides, checked; ``plan: auto`` as it was resolved.

    Raises CinemeshError for a file that cannot be read, for keys that are unknown, missing or given twice, for values
    that break a rule, and for a plan that nobody has chosen yet.
    """
    config, auto = read_recipe(path, overrides)
    if auto is None:
        return config
    resolved = Resolved.read(config.logging.directory)
    if resolved is None:
        raise CinemeshError(
            f"{path}: plan is auto, and {config.logging.directory / RESOLVED} does not say yet which",
            remedy="train with this recipe first, or give a plan",
        )
    return replace(config, plan=resolved.plan)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Auto | None]:
    """As ``read_config``; where the plan is left to the planner, with the plan of one process in its place."""
    sections = _keys(Config)
    values = read_yaml(path, "the recipe", f"a recipe is a YAML file with the sections {', '.join(sections)}")
    mapping(values, f"the recipe {path}", sections)
    _override(values, overrides)
    plan = values.get("plan")
    held = dict(plan) if isinstance(plan, dict) else {AUTO: True} if plan == AUTO else {}
    if held.pop(AUTO, False) is not True:
        return check_config(values, str(path)), None
    config = check_config(values | {"plan": {}}, str(path))
    if config.cluster is None:
        raise CinemeshError(
            f"{path}: plan is auto, and no cluster is named to choose it for",
            remedy="add cluster: grand-teton-h100, or the file that cinemesh calibrate wrote",
        )
    return config, Auto(config.cluster, held_fields(held))


def check_config(values: dict[str, Any], where: str) -> Config:
    """A recipe from plain values; ``where`` names their origin in errors."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise _refusal(error, Config, f"{where}: ") from None


def _override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    given: set[str] = set()
    for override in overrides:
        said = f"--set {quoted(override)}"
        key, equals, text = (part.strip() for part in override.partition("="))
        path = key.split(".")
        if not equals or not all(path):
            raise CinemeshError(f"{said} is not KEY=VALUE", remedy="write for example --set optimizer.lr=1e-3")
        if key in given:
            raise CinemeshError(f"{said}: {key} is given twice", remedy="leave one of them out")
        given.add(key)
        section: Any = values
        for name in path[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise CinemeshError(
                    f"{said}: {name} is {quoted(section)}, no section", remedy="--set replaces one value"
                )
        section[path[-1]] = parse_yaml(text, f"{said}: {quoted(text)}", "quote it")


def _refusal(error: ValidationError, section: Any, where: str = "") -> CinemeshError:
    """The first complaint of pydantic: key path, value, rule and, for an unknown key, the nearest known one.

    ``section``: the class that was to be filled.
    """
    complaints = error.errors(include_url=False)
    unknown = {"unexpected_keyword_argument", "extra_forbidden"}
    first = next((c for c in complaints if c["type"] in unknown), complaints[0])  # a typo also leaves a key missing
    path = tuple(first["loc"])
    key = ".".join(map(str, path))
    if first["type"] in unknown:
        known = _keys(_type_at(section, path[:-1]))
        return CinemeshError(f"{where}unknown key {key!r}", remedy=did_you_mean(path[-1], known))
    if first["type"] in ("missing", "missing_argument"):
        return CinemeshError(f"{where}the key {key!r} is missing", remedy="add it")
    rule = first["msg"][0].lower() + first["msg"][1:]
    return CinemeshError(f"{where}{key} is {quoted(first['input'])}: {rule}")


def _type_at(section: Any, path: tuple[int | str, ...]) -> Any:
    """The class at a key path below ``section``."""
    at = section
    for part in path:
        if isinstance(part, str):
            at = get_type_hints(at)[part]
        candidates = [a for a in (at, *get_args(at)) if is_dataclass(a)]
        at = candidates[0] if candidates else at
    return at


def _keys(section: Any) -> list[str]:
    return [f.name for f in fields(section)]
