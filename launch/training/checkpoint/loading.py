"""Loading: each rank reads, from whatever files hold it, what it needs, and believes no block whose digest differs.

By the manifest alone: no rank asks another what to read, and nothing of a file but its bytes is looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ....errors import CinemeshError, in_a_line
from ....kernels.dtypes import TORCH_DTYPES
from ....model.runner import StepRunner
from ....parallel.ir.units import Units
from ....parallel.runtime.comm import first_of, sum_over_ranks
from ....parallel.runtime.mesh import Mesh
from ...storage.places import Location, read_range, size_of
from .choosing import none_whole, published
from .digests import block_digest, digest, state_sums
from .layout import SHARDING, Coordinates, Copy, Layout, Piece
from .manifest import COUNTERS, SAVED_STATES, Damaged, Manifest, ShardFile, ShardPart, check_size, read_manifest
from .same_model import check_model, check_shapes
from .together import together
from .writing import MOST_THREADS

T = TypeVar("T")


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that was loaded, and those newer ones that are damaged."""

    path: Location
    manifest: Manifest
    damaged: list[Damaged]


def resume(directory: Location, runner: StepRunner) -> Resumed | None:
    """Load the newest whole checkpoint, or None where there is none at all. Collective.

    Raises CinemeshError, on all ranks, where there are only damaged ones: that is no reason to begin from step 0; and
    as :func:`load` does for one that is whole and cannot be gone on from.
    """
    found, damaged = newest_whole(published(directory), runner.mesh, lambda path: load(path, runner))
    if found is not None:
        return Resumed(*found, damaged)
    if damaged:
        raise none_whole(damaged)
    return None


def newest_whole(
    paths: Sequence[Location] | None, mesh: Mesh | None, read: Callable[[Location], T]
) -> tuple[tuple[Location, T] | None, list[Damaged]]:
    """The first of ``paths``, the newest first, of which ``read`` finds no damage, with its answer; those before it.

    Collective, as ``read`` is.
    """
    damaged: list[Damaged] = []
    if mesh is not None:
        paths = first_of(paths)  # rank 0's: another may still see what is gone
    for path in paths or ():
        try:
            return (path, read(path)), damaged
        except Damaged as error:
            damaged.append(error)
    return None, damaged


def load(path: Location, runner: StepRunner) -> Manifest:
    """Read a checkpoint, written under any plan, into the states and counters of ``runner``, bit by bit. Collective.

    Raises, on all ranks, Damaged when it is not as it was written, and CinemeshError when it is of another model or
    dtype, or holds not all states; those of ``runner`` are then undefined.
    """
    targets = {state: runner.buffers[state].view(-1) for state in SAVED_STATES}
    here, at = Layout.of(runner.units), runner.coordinates

    def check() -> Manifest:
        found = read_manifest(path)
        check_model(path, found, runner.config)
        if missing := [state for state in SAVED_STATES if state not in found.states]:
            raise CinemeshError(
                f"checkpoint {path} holds {', '.join(found.states)} and no {', '.join(missing)}",
                remedy="go on from one that a run wrote; cinemesh sample takes weights alone",
            )
        for state, target in targets.items():
            there = TORCH_DTYPES[found.states[state]]
            if there != target.dtype:
                raise CinemeshError(
                    f"checkpoint {path} holds {state} as {there}, this plan as {target.dtype}",
                    remedy="resume with the dtype policy that wrote it (plan.dtype)",
                )
        return found

    found = together(runner.mesh, check)
    together(runner.mesh, lambda: read_states(path, found, here, at, targets))
    runner.buffers[COUNTERS].copy_(torch.tensor([found.step, found.updates]))
    sums = [0] * len(targets) if at["dp_replicate"] else state_sums(here.runs(at), list(targets.values()))
    if runner.mesh is not None:
        sums = sum_over_ranks(torch.tensor(sums)).tolist()
    for state, of in zip(targets, sums, strict=True):
        if digest(of) != found.digests[state]:
            raise Damaged(path, f"{state} as it was put together has digest {digest(of)}, not {found.digests[state]}")
    return found


def load_weights(path: Location, which: str, flat: Tensor, units: Units, coordinates: Coordinates) -> None:
    """Read the ``master`` or ``ema`` weights into one rank's flat shard, cast to its dtype. Each rank for itself.

    Raises CinemeshError as :func:`load` does.
    """
    found = read_manifest(path)
    if which not in found.states:
        raise CinemeshError(
            f"checkpoint {path} holds {', '.join(found.states)} and no {which}", remedy="take others with weights: NAME"
        )
    read_states(path, found, Layout.of(units), coordinates, {which: flat.view(-1)})


@dataclass(frozen=True)
class _Block:
    """Elements ``first`` to ``last`` of a part, in a file."""

    file: ShardFile
    part: ShardPart
    number: int
    first: int
    last: int


def read_states(path: Location, found: Manifest, here: Layout, at: Coordinates, targets: dict[str, Tensor]) -> None:
    """What lies at these coordinates ``here``, of every state into its flat target; padding becomes zero.

    Targets lie on any one device, and may have other dtypes. Raises Damaged for what is not as it was written, and
    CinemeshError for another model.
    """
    check_shapes(path, found, here)
    for target in targets.values():
        target.zero_()
    _read(path, found, list(here.runs(at)), targets)


def read_parameter(path: Location, found: Manifest, state: str, name: str) -> Tensor:
    """All of one parameter, in its global shape and the dtype of its state, on the host.

    Raises Damaged for what is not as it was written.
    """
    whole = found.layout.whole(name)
    flat = torch.empty(whole.stop, dtype=TORCH_DTYPES[found.states[state]])
    _read(path, found, [whole], {state: flat})
    return flat.view(whole.parameter.shape)


def _read(path: Location, found: Manifest, wanted: list[Piece], targets: dict[str, Tensor]) -> None:
    """These pieces of every state, to their positions of its target."""
    blocks = _needed(found, wanted)

    def check(file: ShardFile) -> None:
        check_size(path, file, size_of(path / file.name))
        header = _bytes(path, file, 0, file.header_bytes)
        if block_digest(header) != file.header:
            raise Damaged(path, f"the header of {file.name} is not what was written")

    def read(item: tuple[_Block, list[Copy]]) -> None:
        block, copies = item
        for state, target in targets.items():
            values = _values(path, found, block, state)
            for copy in copies:
                _copy(values, target, copy)

    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        for _ in threads.map(check, {block.file.name: block.file for block, _ in blocks}.values()):
            pass
        for _ in threads.map(read, blocks):
            pass


def _needed(found: Manifest, wanted: list[Piece]) -> list[tuple[_Block, list[Copy]]]:
    """Blocks that hold what is wanted, and what is to be copied out of each."""
    parts: dict[tuple[int, ...], list[tuple[ShardFile, ShardPart]]] = defaultdict(list)
    for file in found.files:
        for part in file.parts:
            parts[_key(part.at)].append((file, part))
    needed: dict[tuple[str, int, int], tuple[_Block, list[Copy]]] = {}
    for run in wanted:
        for at, held in found.layout.holders(run):
            for file, part in parts[_key(at)]:
                if (inside := held.within(part.start, part.stop)) is None:
                    continue
                end = inside.position + inside.stop - inside.start
                for number in range(inside.position // found.block_elements, -(-end // found.block_elements)):
                    first = number * found.block_elements
                    last = min(first + found.block_elements, part.stop - part.start)
                    piece = inside.within(first, last)
                    assert piece is not None
                    if copies := list(piece.copies_to(run)):
                        block = _Block(file, part, number, first, last)
                        needed.setdefault((file.name, part.begin, number), (block, []))[1].extend(copies)
    return list(needed.values())


def _key(at: Coordinates) -> tuple[int, ...]:
    return tuple(at[axis] for axis in SHARDING)


def _values(path: Location, found: Manifest, block: _Block, state: str) -> Tensor:
    """A block of a state. Raises Damaged when it is not what was written."""
    item = found.item_bytes(state)
    begin = found.data_begin(block.part, state)
    data = _bytes(path, block.file, begin + block.first * item, begin + block.last * item)
    if block_digest(data) != block.part.blocks[state][block.number]:
        raise Damaged(path, f"{block.file.name} is not what was written, in block {block.number} of {state}")
    return torch.frombuffer(data, dtype=TORCH_DTYPES[found.states[state]])


def _bytes(path: Location, file: ShardFile, start: int, stop: int) -> bytearray:
    try:
        return read_range(path / file.name, start, stop)
    except OSError as error:
        raise Damaged(path, f"{file.name}: {in_a_line(error)}") from error


def _copy(values: Tensor, target: Tensor, copy: Copy) -> None:
    source = values.as_strided((copy.rows, copy.columns), (copy.source_stride, 1), copy.source)
    begin = target.storage_offset() + copy.target
    target.as_strided((copy.rows, copy.columns), (copy.target_stride, 1), begin).copy_(source)
