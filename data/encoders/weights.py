"""The weights of a model that transformers saved: safetensors alone, read where they are wanted.

A rank that holds a shard reads the rows of its shard and no more, so a job reads a large encoder once for every group
of ranks that shares it, whatever transformers makes of a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...documents import read_json
from ...errors import CinemeshError, in_a_line

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"  # as save_pretrained calls them
REMEDY = "save the model with save_pretrained(safe_serialization=True): no pickle is read"
ROW_BYTES = 2**26  # of a tensor that are read at once: the rest of a shard waits for them


@dataclass(frozen=True)
class WeightFiles:
    """By tensor name, the file that holds it, and its shape."""

    directory: Path
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, directory: Path) -> WeightFiles:
        """Reads headers alone. Raises CinemeshError where there are none, or where they are damaged."""
        if (directory / INDEX).is_file():
            told = read_json(directory / INDEX, "the list of an encoder's weights", REMEDY)
            found = told.get("weight_map") if isinstance(told, dict) else None
            if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
                raise CinemeshError(f"{directory / INDEX} lists no weights", remedy=REMEDY)
            names = sorted({Path(name).name for name in found.values()})  # in this directory, whatever it says
        elif (directory / ONE_FILE).is_file():
            names = [ONE_FILE]
        else:
            raise CinemeshError(f"{directory} holds no {ONE_FILE} and no {INDEX}", remedy=REMEDY)
        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with _opened(directory / name) as file:
                for key in file.keys():  # noqa: SIM118  no mapping
                    files[key], shapes[key] = name, tuple(file.get_slice(key).get_shape())
        return cls(directory, files, shapes)

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` - 1 of a tensor, along its dim 0; of a scalar, all."""
        with _opened(self.directory / self.files[key]) as file:
            return file.get_slice(key)[first:last] if self.shapes[key] else file.get_tensor(key)

    def elements(self, key: str, first: int, target: Tensor) -> None:
        """Copy a tensor's elements from the ``first`` on, in C order, to a flat ``target``, cast to its dtype."""
        shape = self.shapes[key]
        width = math.prod(shape[1:])
        at, last = first, first + len(target)
        while at < last:
            row = at // width
            rows = self.rows(key, row, min(-(-last // width), row + max(1, ROW_BYTES // (4 * width)))).reshape(-1)
            taken = rows[at - row * width : last - row * width]
            target[at - first : at - first + len(taken)].copy_(taken)
            at += len(taken)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(str(path), "pt") as file:  # mapped into memory, not read
            yield file
    except (OSError, SafetensorError) as error:
        raise CinemeshError(
            f"{path} cannot be read: {in_a_line(error)}", remedy="restore it: an encoder's directory must be whole"
        ) from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """What is built inside has its buffers, and parameters of shapes alone."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    setattr(nn.Module, "register_parameter", on_meta)  # noqa: B010
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010


def keys_of(names: Sequence[Sequence[str]], files: WeightFiles) -> list[str]:
    """The key of each parameter, which has one name or several, among the files': the same prefix before every name.

    A file of a whole model holds more: other towers, a decoder. Raises CinemeshError where some is missing.
    """
    found = {key[: -len(name)] for name in names[0] for key in files.files if key == name or key.endswith(f".{name}")}
    best: list[str] = []
    for prefix in sorted(found, key=len):
        keys = [next((prefix + name for name in several if prefix + name in files.files), "") for several in names]
        if all(keys):
            return keys
        best = max(best, keys, key=lambda one: sum(map(bool, one)))
    missing = next((several[0] for several, key in zip(names, best, strict=False) if not key), names[0][0])
    raise CinemeshError(
        f"{files.directory}: its weights have no {missing}, which the model of its config.json has",
        remedy="make sure that config.json and weights are of one model",
    )


def named_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, by its identity: tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def set_parameter(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """``value`` in place of a parameter, under all of its names."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        where, _, last = name.rpartition(".")
        setattr(model.get_submodule(where), last, parameter)


PartReader = Callable[[int, Tensor], None]  # elements of a parameter from the first on, to a flat target


def read_span(parts: Sequence[tuple[int, int, PartReader]], first: int, target: Tensor) -> None:
    """A run of a unit's elements: of ``parts`` (offset in the unit, elements, reader) those that lie in it."""
    for offset, count, read in parts:
        begin, end = max(first, offset), min(first + len(target), offset + count)
        if begin < end:
            read(begin - offset, target[begin - first : end - first])


def check_weight_shapes(shapes: Mapping[str, tuple[int, ...]], files: WeightFiles) -> None:
    """By key, the shape that a parameter has. Raises CinemeshError for one of another shape in the files."""
    for key, shape in shapes.items():
        if files.shapes[key] != shape:
            raise CinemeshError(
                f"{files.directory}: {key} is {list(files.shapes[key])} in the files and {list(shape)} in the model",
                remedy="make sure that config.json and weights are of one model",
            )
