"""Models as a person names them: a preset, or a file with fields of the configuration (torch-free)."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ..documents import mapping, quoted, read_yaml
from ..errors import CinemeshError, did_you_mean
from ..model.config import PRESETS, USUAL_LATENTS, ModelConfig
from ..reading import read_value
from .plans import SUFFIXES

PRESET, LATENT = "preset", "latent"  # keys of a file that are no fields: whose fields it changes; the usual sample


@dataclass(frozen=True)
class NamedModel:
    """A model as it was asked for. ``usual_latent``: the (T, H, W) that it is usually run at, where that is said."""

    given: str
    config: ModelConfig
    usual_latent: tuple[int, int, int] | None

    def latent(self, text: str | None = None) -> tuple[int, int, int]:
        """The latent of ``text``, ``32x96x96``, else the usual one. Raises CinemeshError where there is neither."""
        if text:
            return parse_latent(text)
        if self.usual_latent is None:
            raise CinemeshError(
                f"model {self.given} says no usual latent", remedy="give --latent 32x96x96, or add latent: 32x96x96"
            )
        return self.usual_latent


def parse_latent(text: str) -> tuple[int, int, int]:
    """``32x96x96`` -> (32, 96, 96)."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text.strip())
    if not match:
        raise CinemeshError(
            f"latent {quoted(text)} is not TxHxW", remedy="write frames, height and width, for example 32x96x96"
        )
    return int(match[1]), int(match[2]), int(match[3])


def read_model(given: str) -> NamedModel:
    """``movie-gen-30b``, or a YAML file: fields of ``ModelConfig``, over those of a ``preset`` if it names one.

    A file's ``latent`` is the sample that it is usually run at; without one, the preset's where the model has positions
    for it. Raises CinemeshError for an unknown name or field, and for what is no model.
    """
    if not given.endswith(SUFFIXES):
        if given not in PRESETS:
            remedy = f"{did_you_mean(given, PRESETS)}. Or give a .yaml file of its fields"
            raise CinemeshError(f"unknown model {given!r}", remedy=remedy)
        return NamedModel(given, PRESETS[given], USUAL_LATENTS[given])
    where = f"model {given}"
    remedy = "write fields of a model, one 'key: value' a line, for example 'preset: movie-gen-5b' and 'layers: 24'"
    known = [PRESET, LATENT, *get_type_hints(ModelConfig)]
    values = {"name": Path(given).stem} | mapping(read_yaml(Path(given), "the model", remedy), where, known)
    base, usual = _preset(values.pop(PRESET, None), where), values.pop(LATENT, None)
    config = model_of(values, where) if base is None else replace(base, **_fields(values, where))
    if usual is None:
        return NamedModel(given, config, _inherited(base, config))
    latent = parse_latent(str(usual))
    config.grid(latent)
    return NamedModel(given, config, latent)


def model_of(values: object, where: str) -> ModelConfig:
    """The model whose fields a mapping holds, as JSON or YAML has them. Raises CinemeshError for what is no model."""
    required = [field.name for field in fields(ModelConfig) if field.default is MISSING]
    return ModelConfig(**_fields(mapping(values, where, [*get_type_hints(ModelConfig)], required=required), where))


def _fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(ModelConfig)
    return {name: read_value(hints[name], value, f"{where}: {name}") for name, value in values.items()}


def _preset(name: object, where: str) -> ModelConfig | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise CinemeshError(f"{where}: {PRESET} is {quoted(name)}", remedy=did_you_mean(name, PRESETS))
    return PRESETS[name]


def _inherited(base: ModelConfig | None, config: ModelConfig) -> tuple[int, int, int] | None:
    """The preset's usual latent, where the model has its positions."""
    latent = None if base is None else USUAL_LATENTS[base.name]
    try:
        return latent if latent is None or config.grid(latent) else None
    except CinemeshError:
        return None
