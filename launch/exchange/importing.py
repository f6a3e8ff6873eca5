"""From a folder as an export lies there to a checkpoint, from which runs start and clips are sampled."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...documents import exactly, mapping, quoted, read_json
from ...errors import CinemeshError, in_a_line
from ...files import file_name
from ...model.config import ModelConfig
from ..models import model_of
from ..storage.places import Location
from ..training.checkpoint.alone import write_alone
from ..training.checkpoint.layout import Coordinates, Layout
from ..training.checkpoint.manifest import Manifest
from ..training.sample import FRAME_RATE
from .exporting import CLASS, ORIGIN, Origin
from .movie_gen import INDEX, MODEL_CONFIG
from .names import Exported, exported

REMEDY = "name a folder that cinemesh export wrote, or one laid out as docs/checkpoints.md says"
DEFAULT_WEIGHTS = "ema"  # where a folder does not say what its weights are: what is sampled
_FLOATS = {"F64", "F32", "BF16", "F16"}  # as safetensors calls them


def import_weights(folder: Path, out: Location) -> ModelConfig:
    """Write the checkpoint ``out``, a new folder, with one state: the weights of ``folder``, bit by bit.

    Weights of 16 bits become float32. Returns the model. Raises CinemeshError for what is damaged, incomplete or no
    Movie Gen transformer; nothing is then left of ``out``.
    """
    values = dict(mapping(read_json(folder / MODEL_CONFIG, "the configuration", REMEDY), str(folder), _known()))
    values.pop(CLASS, None)
    origin = _origin(values.pop(ORIGIN, None), folder / MODEL_CONFIG)
    config = model_of(values, f"the model of {folder}")
    weights = _Weights(folder)
    rows = exported(config)
    weights.check(rows)
    held: dict[str, Tensor] = {}  # the parameter that was read last: the next file may hold the rest of it

    def fill(layout: Layout, at: Coordinates, flats: dict[str, Tensor]) -> None:
        for run in layout.runs(at):
            name = run.parameter.name
            if name not in held:
                held.clear()
                held[name] = rows[name].join([weights.read(each) for each in rows[name].names]).reshape(-1)
            flats[which][run.position : run.position + run.stop - run.start].copy_(held[name][run.start : run.stop])

    which, dtype = origin.weights if origin else DEFAULT_WEIGHTS, weights.state_dtype
    step, updates = (origin.step, origin.updates) if origin else (0, 0)

    def check(written: Manifest) -> None:
        digest = written.digests[which]
        if origin and origin.digest and origin.dtype == dtype and digest != origin.digest:
            raise CinemeshError(
                f"{folder} has been changed: its weights have digest {digest}, written with {origin.digest}",
                remedy=f"export them again; where that was meant, let digest be null in {MODEL_CONFIG}",
            )

    note = {FRAME_RATE: origin.frame_rate} if origin and origin.frame_rate else {}
    write_alone(out, config, {which: dtype}, fill, step=step, updates=updates, note=note, check=check)
    return config


def _known() -> list[str]:
    return [CLASS, ORIGIN, *(field.name for field in fields(ModelConfig))]


def _origin(value: object, where: Path) -> Origin | None:
    if value is None:
        return None
    kinds: dict[str, Any] = {"weights": str, "step": int, "updates": int, "dtype": str, "digest": str | None}
    kinds["frame_rate"] = str | None
    return Origin(**exactly(value, f"{where}: {ORIGIN}", kinds, remedy=REMEDY))


class _Weights:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        index = mapping(read_json(folder / INDEX, "the index", REMEDY), str(folder / INDEX), ("metadata", "weight_map"))
        found = index.get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CinemeshError(f"{folder / INDEX}: weight_map is {quoted(found)}", remedy=REMEDY)
        self.folder = folder
        self.files = {name: file_name(file, f"{folder / INDEX}: the file of {name}") for name, file in found.items()}
        self.dtypes: set[str] = set()

    def check(self, rows: dict[str, Exported]) -> None:
        """That every weight is there, in its shape, and no other. Raises CinemeshError."""
        wanted = {
            to: tuple(part.shape)
            for row in rows.values()
            for to, part in zip(row.names, row.split(torch.empty(row.shape, device="meta")), strict=True)
        }
        there: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no mapping
                    part = tensors.get_slice(name)
                    if self.files.get(name) == file:
                        there[name] = tuple(part.get_shape())
                        self.dtypes.add(part.get_dtype())
        for name in dict.fromkeys((*wanted, *self.files)):
            if wanted.get(name) != there.get(name):
                raise CinemeshError(
                    f"{self.folder}: weight {name} is {_shown(there.get(name))}, and {_shown(wanted.get(name))} in the "
                    f"model of its {MODEL_CONFIG}",
                    remedy=REMEDY,
                )
        if unknown := self.dtypes - _FLOATS:
            raise CinemeshError(f"{self.folder}: weights of {', '.join(sorted(unknown))}", remedy="convert to float32")

    @property
    def state_dtype(self) -> str:
        """What keeps all of them as they are: float64 where one is."""
        return "float64" if "F64" in self.dtypes else "float32"

    def read(self, name: str) -> Tensor:
        """One weight."""
        with self._open(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, "pt")
        except (OSError, SafetensorError) as error:
            raise CinemeshError(f"cannot read {self.folder / file}: {in_a_line(error)}", remedy=REMEDY) from error


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
