"""From a checkpoint to a folder that other programs read: one parameter in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...errors import CinemeshError, did_you_mean
from ...kernels.dtypes import TORCH_DTYPES
from ...model.config import ModelConfig, trained
from ...model.sampler import GUIDANCE
from ...model.solvers import EMULATED_STEPS, PAPER_STEPS
from ..models import model_of
from ..progress import progress
from ..storage.places import NO_ROOM, Location, check_room, location_of
from ..training.checkpoint.choosing import FOLDER, check_files, latest
from ..training.checkpoint.loading import read_parameter
from ..training.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from ..training.sample import FRAME_RATE
from . import movie_gen
from .factors import write_factors
from .movie_gen import INDEX, MODEL_CONFIG, SCHEDULER_CONFIG
from .names import Exported, exported

ORIGIN = "cinemesh"  # of config.json: where the weights are from; all other keys are the model's and the class's
CLASS = "_class_name"  # as Hugging Face's configurations tell which class reads them


@dataclass(frozen=True)
class Origin:
    """Which state of a checkpoint of ``step`` steps and ``updates`` was written, as ``dtype``.

    ``digest``: of its values, as the manifest has it; None where another dtype changed them. ``frame_rate``: of the
    clips that it was trained on, frames/s as a fraction; None where the checkpoint does not say.
    """

    weights: str
    step: int
    updates: int
    dtype: str
    digest: str | None
    frame_rate: str | None


def found_checkpoint(named: str | Location) -> Location:
    """A checkpoint, or the newest of the run, or of the folder of checkpoints, that is given. Raises CinemeshError."""
    given = location_of(named)
    if (given / MANIFEST).is_file():
        return given
    kept = given / FOLDER if (given / FOLDER).is_dir() else given
    if (newest := latest(kept)) is not None:
        return newest
    if kept is given:
        return given  # whoever reads it says what is wrong
    raise CinemeshError(f"no checkpoint in {kept}", remedy="train first, or name a step-* folder")


def export(checkpoint: Location, folder: Path, *, which: str, dtype: str | None, file_bytes: int) -> ModelConfig:
    """Write the weights ``which`` into ``folder``, which is not there yet, in files of ``file_bytes`` at most.

    ``dtype``: None keeps that of the checkpoint. A weight that is larger has a file of its own. Low-rank factors are
    written as PEFT has them. Returns the model.
    Raises CinemeshError; nothing is then left of the folder.
    """
    found = read_manifest(checkpoint)
    check_files(checkpoint, found)
    if which not in found.states:
        raise CinemeshError(f"checkpoint {checkpoint} has no {which}", remedy=did_you_mean(which, found.states))
    if folder.exists():
        raise CinemeshError(f"{folder} exists", remedy="name a new folder, or move that one away")
    config = model_of(found.model, f"the model of checkpoint {checkpoint}")
    if (config.block, config.objective) != ("llama3", "flow-matching"):
        raise CinemeshError(
            f"checkpoint {checkpoint} is of a block {config.block} and of {config.objective}: an export has its own "
            "code, of block llama3 and flow-matching",
            remedy="sample from the checkpoint here: cinemesh sample",
        )
    told = dtype or found.states[which]
    item = TORCH_DTYPES[told].itemsize
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        elements = sum(row.elements for row in trained(config))
        check_room(folder.parent, "the export", elements, item, f"{NO_ROOM}, or export --dtype bfloat16")
        partial.mkdir()
        if config.lora is not None:
            write_factors(checkpoint, found, config, which, TORCH_DTYPES[told], partial)
        else:
            files = list(_files(config, item, file_bytes))
            _write_weights(checkpoint, found, which, TORCH_DTYPES[told], files, partial, elements * item)
            digest = found.digests[which] if told == found.states[which] else None
            origin = Origin(which, found.step, found.updates, told, digest, found.note.get(FRAME_RATE))
            _write_rest(config, origin, partial)
        partial.rename(folder)
    except OSError as error:
        raise CinemeshError(
            f"cannot write {folder}: {error.strerror or error}", remedy="see to its folder and the free space there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _elements(row: Exported) -> int:
    return torch.Size(row.shape).numel()


def _files(config: ModelConfig, item: int, file_bytes: int) -> Iterator[dict[str, Exported]]:
    """Parameters of each file, in the order of the model."""
    file, held = dict[str, Exported](), 0
    for name, row in exported(config).items():
        size = item * _elements(row)
        if file and held + size > file_bytes:
            yield file
            file, held = {}, 0
        file[name] = row
        held += size
    yield file


def _write_weights(
    checkpoint: Location,
    found: Manifest,
    which: str,
    dtype: torch.dtype,
    files: list[dict[str, Exported]],
    partial: Path,
    total_bytes: int,
) -> None:
    weight_map: dict[str, str] = {}
    with progress("exporting", sum(map(len, files))) as begin:
        for number, rows in enumerate(files, 1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weights: dict[str, torch.Tensor] = {}
            for name, row in rows.items():
                begin(name)
                parts = row.split(read_parameter(checkpoint, found, which, name).to(dtype))
                weights |= {to: part.contiguous() for to, part in zip(row.names, parts, strict=True)}
            save_file(weights, partial / file, {"format": "pt"})
            weight_map |= dict.fromkeys(weights, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_rest(config: ModelConfig, origin: Origin, partial: Path) -> None:
    model = {CLASS: movie_gen.MovieGenTransformer.__name__} | asdict(config) | {ORIGIN: asdict(origin)}
    scheduler = {"steps": PAPER_STEPS, "emulated_steps": EMULATED_STEPS, "guidance": GUIDANCE}
    for name, values in ((MODEL_CONFIG, model), (SCHEDULER_CONFIG, scheduler)):
        (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    code = Path(movie_gen.__file__)
    (partial / code.name).write_bytes(code.read_bytes())
