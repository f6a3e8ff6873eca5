"""Checkpoints of an autoencoder's training: the files, manifest and digests of the transformer's (``checkpoint``).

The flat states of ``networks`` are one layout of two units that nothing splits; all ranks hold them, and each writes
a part. What was written under any number of ranks is read under any other.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CinemeshError
from ...kernels.dtypes import TORCH_DTYPES
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import gather_at_first
from ..cluster.processes import Joined
from ..storage.places import Location
from ..training.checkpoint.assembling import assembled
from ..training.checkpoint.choosing import none_whole, prune, published
from ..training.checkpoint.copies import part_of
from ..training.checkpoint.digests import digest, state_sums
from ..training.checkpoint.layout import SHARDING, Coordinates, FlatParameter, FlatUnit, Layout
from ..training.checkpoint.loading import newest_whole, read_states
from ..training.checkpoint.manifest import Damaged, Manifest, code_here, read_manifest, step_folder
from ..training.checkpoint.publishing import make_room, publish, remove, write_failed
from ..training.checkpoint.same_model import OTHER_MODEL, shown
from ..training.checkpoint.together import together
from ..training.checkpoint.writing import BLOCK_ELEMENTS, write_part
from .networks import FLAT_STATES, Networks

AT: Coordinates = dict.fromkeys(SHARDING, 0)  # coordinates of everything


def layout_of(networks: Networks) -> Layout:
    """Where every parameter lies in a flat state."""
    units: list[FlatUnit] = []
    position = 0
    for name, net in networks.nets.items():
        parameters, offset = [], 0
        for own, parameter in net.named_parameters():
            parameters.append(FlatParameter(f"{name}.{own}", tuple(parameter.shape), None, offset))
            offset += parameter.numel()
        units.append(FlatUnit(name, offset, SHARDING, position, tuple(parameters)))
        position += offset
    return Layout(dict.fromkeys(SHARDING, 1), tuple(units))


def tae_description(networks: Networks) -> dict[str, Any]:
    """What a checkpoint is of."""
    model = asdict(networks.autoencoder.config)
    return model | {"multipliers": list(model["multipliers"])}


def save_networks(networks: Networks, place: Joined, directory: Path, plan: Plan, note: dict[str, Any]) -> Path:
    """Write ``directory/step-NNNNNNNN``. Collective. Raises CinemeshError, on all ranks, where it cannot be written."""
    final = step_folder(directory, networks.steps)
    dtype = networks.recipe.state_dtype
    layout, states = layout_of(networks), dict.fromkeys(FLAT_STATES, dtype)

    def prepare() -> None:
        if place.rank == 0:
            make_room(directory, final, networks.elements, TORCH_DTYPES[dtype].itemsize * len(FLAT_STATES))

    def write() -> Any:
        start, stop = part_of(networks.elements, plan.world_size, place.rank)
        copies: dict[str, Tensor] = {name: state[start:stop].cpu() for name, state in networks.states.items()}
        return write_part(final / f"{place.rank:05d}.safetensors", layout, AT, start, copies)

    def finish() -> None:
        if parts is not None:
            about = {
                "step": networks.steps,
                "updates": networks.updates,
                "model": tae_description(networks),
                "plan": plan.to_dict(),
                "code": code_here(),
                "note": note,
                "states": states,
                "block_elements": BLOCK_ELEMENTS,
            }
            publish(assembled(about, layout, parts), final)
            prune(directory, networks.steps, networks.recipe.logging.kept)

    def told(work: Any) -> Any:
        try:
            return work()
        except OSError as error:
            raise write_failed(final, error, f"rank {place.rank}: ") from error

    try:
        together(place.mesh, lambda: told(prepare))
        mine = together(place.mesh, lambda: told(write))
        parts: list[Any] | None = gather_at_first(mine) if place.mesh else [mine]
        together(place.mesh, lambda: told(finish))
    except CinemeshError:
        if place.rank == 0:
            with suppress(OSError, CinemeshError):
                remove(final)
        raise
    return final


def resume_networks(
    networks: Networks, place: Joined, directory: Path
) -> tuple[Location, Manifest, list[Damaged]] | None:
    """Load the newest whole checkpoint, or None where there is none at all. Collective.

    Raises CinemeshError, on all ranks, where there are only damaged ones, and for one of another autoencoder.
    """
    found, damaged = newest_whole(
        published(directory), place.mesh, lambda path: together(place.mesh, lambda: load(path, networks))
    )
    if found is None:
        if damaged:
            raise none_whole(damaged)
        return None
    return *found, damaged


def load(path: Location, networks: Networks) -> Manifest:
    """Read a checkpoint into the states, bit by bit. Raises Damaged, and CinemeshError for another autoencoder's."""
    found, layout, dtype = read_manifest(path), layout_of(networks), networks.recipe.state_dtype
    here = tae_description(networks)
    for key in dict.fromkeys((*here, *found.model)):
        if key != "name" and here.get(key) != found.model.get(key):
            raise CinemeshError(
                f"checkpoint {path} is of another autoencoder: {key} is {shown(found.model.get(key))} there and "
                f"{shown(here.get(key))} here",
                remedy=OTHER_MODEL,
            )
    if found.states != dict.fromkeys(FLAT_STATES, dtype):
        raise CinemeshError(
            f"checkpoint {path} holds {', '.join(f'{name} as {of}' for name, of in found.states.items())}",
            remedy=f"go on with the dtype that wrote it; this recipe's states are {dtype}",
        )
    read_states(path, found, layout, AT, networks.states)
    sums = state_sums(layout.runs(AT), list(networks.states.values()))
    for state, of in zip(FLAT_STATES, sums, strict=True):
        if digest(of) != found.digests[state]:
            raise Damaged(path, f"{state} as it was put together has digest {digest(of)}, not {found.digests[state]}")
    networks.set_state(found.step, found.updates)
    return found
