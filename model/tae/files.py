"""A trained autoencoder as a directory: its weights, and a description with the statistics of its latents.

    DIRECTORY/autoencoder.safetensors   DIRECTORY/autoencoder.json

The description is written last and holds the digest of the weights: one without the other is no autoencoder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...documents import exactly, file_text, parse_json, quoted
from ...errors import CinemeshError, in_a_line
from ...files import atomic_file
from .autoencoder import Autoencoder
from .building import build
from .config import Body, TAEConfig, Time
from .tiles import Tiling

DESCRIPTION, WEIGHTS = "autoencoder.json", "autoencoder.safetensors"
FORMAT = 2
BEFORE_IMAGES = 1  # the format without their statistics
REMEDY = "name a directory that cinemesh tae train wrote, or train it again"


Statistics = tuple[Tensor, Tensor]  # mean and std of each channel, float32 [C]


@dataclass(frozen=True)
class Trained:
    """An autoencoder, and mean and std of each channel of its latents, float32 [C], over the clips of its training.

    ``digest``: of its weights. ``images``: mean and std of single frames, each a clip of its own; None where they were
    not measured, or a channel is the same in all of them.
    """

    net: Autoencoder
    mean: Tensor
    std: Tensor
    tiling: Tiling
    digest: str
    images: Statistics | None = None


def is_autoencoder(path: Path) -> bool:
    """Whether a directory says that it is one of ours."""
    return (path / DESCRIPTION).is_file()


def write(
    path: Path, net: Autoencoder, mean: Tensor, std: Tensor, about: dict[str, Any], images: Statistics | None = None
) -> None:
    """Write the directory, in float32. ``about``: JSON values for people. Raises CinemeshError where it cannot be."""
    weights = {name: value.detach().float().cpu().contiguous() for name, value in net.state_dict().items()}
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / WEIGHTS) as part:
        save_file(weights, part)
    config = net.config
    description = {
        "format": FORMAT,
        "config": asdict(config),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "images": None if images is None else [of.tolist() for of in images],
        "tiling": asdict(Tiling.of(config.temporal_stride)),
        "weights": _digest(path / WEIGHTS),
        "about": about,
    }
    with atomic_file(path / DESCRIPTION) as part:
        part.write_text(json.dumps(description, indent=1), encoding="utf-8")


def read_trained(path: Path, where: str) -> Trained:
    """What ``write`` wrote, frozen. ``where`` names the path to the user.

    Raises CinemeshError for anything else, for weights that are not the description's, and for values not finite.
    """
    said = f"{where}: {path}"
    kinds: dict[str, type | UnionType] = {"format": int, "config": dict, "mean": list, "std": list, "tiling": dict}
    kinds |= {"images": list | NoneType, "weights": str, "about": dict}
    text = file_text(path / DESCRIPTION, f"{where}: the description", REMEDY)
    stated = parse_json(text, said, REMEDY)
    if isinstance(stated, dict) and stated.get("format") == BEFORE_IMAGES:
        stated = stated | {"format": FORMAT, "images": None}
    found = exactly(stated, said, kinds, remedy=REMEDY)
    if found["format"] != FORMAT:
        raise CinemeshError(f"{said} has format {found['format']}, this version reads {FORMAT}", remedy=REMEDY)
    config = _config(found["config"], said)
    tiling = Tiling(**exactly(found["tiling"], said, {f.name: int for f in fields(Tiling)}, remedy=REMEDY))
    mean, std = (_statistics(found[name], config, f"{said}: {name}") for name in ("mean", "std"))
    images = None if found["images"] is None else _of_images(found["images"], config, f"{said}: images")
    try:
        digest = _digest(path / WEIGHTS)
        weights = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CinemeshError(f"{said} has no weights ({in_a_line(error)})", remedy=REMEDY) from error
    if digest != found["weights"]:
        raise CinemeshError(f"{said}: {WEIGHTS} is not what {DESCRIPTION} was written with", remedy=REMEDY)
    with torch.device("meta"):
        net = build(config)
    _check_weights(weights, net, said)
    net.load_state_dict(weights, assign=True)
    return Trained(net.eval().requires_grad_(False), mean, std, tiling, digest, images)


def _config(values: dict[str, Any], said: str) -> TAEConfig:
    names = {f.name: object for f in fields(TAEConfig)}
    values = exactly(values, f"{said}: config", names, remedy=REMEDY)
    for name, known in (("body", get_args(Body)), ("time", get_args(Time))):
        if values[name] not in known:
            raise CinemeshError(f"{said}: config.{name} is {quoted(values[name])}", remedy=REMEDY)
    if not isinstance(values["name"], str) or not isinstance(values["multipliers"], list):
        raise CinemeshError(f"{said}: config is {quoted(values)}", remedy=REMEDY)
    values["multipliers"] = tuple(values["multipliers"])
    return TAEConfig(**values)


def _of_images(values: list[Any], config: TAEConfig, what: str) -> Statistics:
    if len(values) != 2 or not all(isinstance(of, list) for of in values):
        raise CinemeshError(f"{what} is {quoted(values)}, no mean and std", remedy=REMEDY)
    mean, std = (_statistics(of, config, what) for of in values)
    return mean, std


def _statistics(values: list[Any], config: TAEConfig, what: str) -> Tensor:
    if len(values) != config.channels or not all(type(value) in (int, float) for value in values):
        raise CinemeshError(f"{what} is {quoted(values)}, of {config.channels} channels", remedy=REMEDY)
    return torch.tensor(values, dtype=torch.float32)


def _check_weights(weights: dict[str, Tensor], net: Autoencoder, said: str) -> None:
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    for name in dict.fromkeys((*wanted, *there)):
        if wanted.get(name) != there.get(name):
            raise CinemeshError(
                f"{said}: {name} is {list(there.get(name, ())) or 'absent'} in the weights and "
                f"{list(wanted.get(name, ())) or 'absent'} in autoencoder {net.config.name}",
                remedy=REMEDY,
            )
        if not torch.isfinite(weights[name]).all():
            raise CinemeshError(f"{said}: {name} holds values that are not finite", remedy=REMEDY)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
