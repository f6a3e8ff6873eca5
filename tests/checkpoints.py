"""Checkpoints for tests: read without the package, and rewritten as nothing in it would."""

from __future__ import annotations

import json
import math
import secrets
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cinemesh.launch.training.checkpoint import writing
from cinemesh.launch.training.checkpoint.assembling import assembled
from cinemesh.launch.training.checkpoint.copies import part_of
from cinemesh.launch.training.checkpoint.layout import Layout
from cinemesh.launch.training.checkpoint.loading import read_states
from cinemesh.launch.training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    SAVED_STATES,
    Manifest,
    ShardFile,
    ShardPart,
    read_manifest,
    sealed,
)
from cinemesh.launch.training.checkpoint.writing import Written, write_part
from cinemesh.model.config import ModelConfig, parameters, preset
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer, unit_layout
from cinemesh.model.weights import BLOCK, Values, collect, fill_shard, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.units import Parameter
from cinemesh.parallel.runtime.comm import gather_objects
from cinemesh.parallel.runtime.mesh import Mesh, coordinates


def body_of(path: Path) -> dict[str, Any]:
    """The manifest's body, as JSON has it."""
    return json.loads((path / MANIFEST).read_text())["body"]


def rewrite(path: Path, body: object) -> None:
    """Another body, sealed as if it had been written so."""
    (path / MANIFEST).write_text(sealed(FORMAT, body if isinstance(body, str) else json.dumps(body)))


def plain_states(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every state's whole tensors by parameter: shards put behind one another, tp ranks' parts side by side."""
    body = body_of(path)
    layout, files = body["layout"], [*parts_of(path, body)]
    degrees: dict[str, int] = layout["degrees"]
    found: dict[str, dict[str, Tensor]] = {state: {} for state in body["states"]}
    for state, tensors in found.items():
        shards = {
            at: torch.cat([of[before + state] for part, before, of in sorted(files, key=start_of) if at_of(part) == at])
            for at in {at_of(part) for part, _, _ in files}
        }
        for unit in layout["units"]:
            axes, size = unit["axes"], unit["elements"] // math.prod(degrees[axis] for axis in unit["axes"])
            parts: list[Tensor] = []
            for tp in range(1 if "tp" in axes else degrees["tp"]):
                over = [{"tp": tp} | dict(zip(axes, index, strict=True)) for index in each_of(degrees, axes)]
                flats = [shards[at_of({"at": dict.fromkeys(degrees, 0) | at})] for at in over]
                parts.append(torch.cat([flat[unit["position"] : unit["position"] + size] for flat in flats]))
            for place in unit["parameters"]:
                shape, dim = list(place["shape"]), place["tp_dim"]
                if dim is not None:
                    shape[dim] //= len(parts)
                end = place["offset"] + math.prod(shape)
                pieces = [part[place["offset"] : end].view(shape) for part in parts]
                tensors[place["name"]] = pieces[0] if dim is None else torch.cat(pieces, dim)
    return found


def each_of(degrees: dict[str, int], axes: list[str]) -> list[tuple[int, ...]]:
    return list(product(*(range(degrees[axis]) for axis in axes)))


def at_of(part: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(part["at"].items()))


def start_of(item: tuple[dict[str, Any], object, object]) -> int:
    return item[0]["start"]


def parts_of(path: Path, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Tensor]]]:
    """Every part, what the names of its tensors begin with, and all tensors of its file."""
    for file in body["files"]:
        for number, part in enumerate(file["parts"]):
            yield part, "" if len(file["parts"]) == 1 else f"{number}.", load_file(path / file["name"])


# -- written and read without processes -------------------------------------------------------------------------------

TINY = preset("tiny")
TRACED = ("master", "ema")  # enough to tell states apart


def numbered(state: int) -> Values:
    """Every element a value of its own, exact in float32."""

    def values(parameter: Parameter, block: Tensor) -> Tensor:
        element = block[..., None] * BLOCK + torch.arange(BLOCK)
        return (element * 64 + zlib.crc32(parameter.name.encode()) % 61 + state).double()

    return values


def held_under(plan: Plan, rank: int, config: ModelConfig = TINY) -> dict[str, Tensor]:
    """What a rank of a plan holds of the traced states."""
    units = unit_layout(config, plan)
    flats = {state: torch.empty(units.flat_elements) for state in TRACED}
    for number, flat in enumerate(flats.values()):
        fill_shard(flat, units, coordinates(plan, rank), numbered(number))
    return flats


def write_under(plan: Plan, folder: Path, config: ModelConfig = TINY) -> Manifest:
    """A checkpoint of the traced states, as the ranks of a plan write it."""
    folder.mkdir()
    layout, written = Layout.of(unit_layout(config, plan)), list[Written]()
    for rank in range(plan.world_size):
        at = coordinates(plan, rank)
        start, stop = part_of(layout.flat_elements, plan.dp_replicate, at.pop("dp_replicate"))
        states = {state: flat[start:stop] for state, flat in held_under(plan, rank, config).items()}
        written.append(write_part(folder / f"{rank:05d}.safetensors", layout, at, start, states))
    about: dict[str, Any] = {"step": 7, "updates": 6, "model": asdict(config), "plan": plan.to_dict(), "code": {}}
    about |= {"note": {}, "states": dict.fromkeys(TRACED, "float32"), "block_elements": writing.BLOCK_ELEMENTS}
    manifest = assembled(about, layout, written)
    (folder / MANIFEST).write_text(manifest.text())
    return manifest


def assert_read_under(plan: Plan, folder: Path, config: ModelConfig = TINY) -> None:
    """Every rank of a plan gets what it would hold, bit by bit, padding too."""
    found, units = read_manifest(folder), unit_layout(config, plan)
    for rank in range(plan.world_size):
        flats = {state: torch.full((units.flat_elements,), torch.nan) for state in TRACED}
        read_states(folder, found, Layout.of(units), coordinates(plan, rank), flats)
        for state, want in held_under(plan, rank, config).items():
            assert torch.equal(flats[state], want), (plan, rank, state)


# -- runners ----------------------------------------------------------------------------------------------------------

BATCH = BatchShape(1, (3, 4, 12))
COUNTED = [7, 6]  # one update was skipped


def plan_of(text: str, dtype: str = "float64") -> Plan:
    return Plan.parse(text, dtype=dtype)


def runner_of(plan: Plan, mesh: Mesh | None = None, config: ModelConfig = TINY) -> StepRunner:
    return StepRunner(config, plan, BATCH, Optimizer(), mesh)


def filled(runner: StepRunner) -> StepRunner:
    """Every state has values of its own: one read into another's place shows."""
    for seed, state in enumerate(SAVED_STATES):
        fill_shard(runner.buffers[state], runner.units, runner.coordinates, probe_values(seed))
    runner.buffers["counters"].copy_(torch.tensor(COUNTED))
    return runner


def batch_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((1, TINY.channels, *BATCH.latent), generator=generator, dtype=torch.float64)
    text = {text_input(e.name): torch.ones(e.tokens, 1, e.width, dtype=torch.float64) for e in TINY.encoders}
    mask = torch.ones(1, TINY.text_tokens, dtype=torch.bool)
    return {LATENTS: latents, IDS: torch.tensor([3]), PLACES: torch.tensor([0]), MASK: mask, **text}


def whole_states(runner: StepRunner) -> dict[str, dict[str, Tensor]]:
    """Full tensors of every state, from the shards of replica 0."""
    mine = (runner.coordinates, {state: runner.buffers[state].clone() for state in SAVED_STATES})
    shards: list[Any] = gather_objects(mine) if runner.mesh else [mine]
    return {
        state: collect([(c, s[state]) for c, s in shards if c["dp_replicate"] == 0], runner.units)
        for state in SAVED_STATES
    }


def assert_same(got: dict[str, dict[str, Tensor]]) -> None:
    """The states of a runner that was filled, whatever plan it had."""
    for seed, state in enumerate(SAVED_STATES):
        for name, want in full(parameters(TINY), probe_values(seed), torch.float64).items():
            assert torch.equal(got[state][name], want), (state, name)


def dry_manifest(plan: Plan, config: ModelConfig) -> Manifest:
    """As the ranks of a plan would write it, from the layout of the real program; digests of nothing."""
    layout, files = Layout.of(unit_layout(config, plan)), list[ShardFile]()
    for rank in range(plan.world_size):
        at = coordinates(plan, rank)
        start, stop = part_of(layout.flat_elements, plan.dp_replicate, at.pop("dp_replicate"))
        count = -(-(stop - start) // writing.BLOCK_ELEMENTS)
        blocks = {state: [secrets.token_hex(32) for _ in range(count)] for state in SAVED_STATES}
        size = 400 + 4 * len(SAVED_STATES) * (stop - start)
        part = ShardPart(400, at, start, stop, blocks)
        files.append(ShardFile(f"{rank:05d}.safetensors", size, secrets.token_hex(32), (part,)))
    about: dict[str, Any] = {"step": 1, "updates": 1, "model": asdict(config), "plan": plan.to_dict(), "code": {}}
    about |= {"states": dict.fromkeys(SAVED_STATES, "float32"), "block_elements": writing.BLOCK_ELEMENTS}
    return Manifest(**about, note={}, digests=dict.fromkeys(SAVED_STATES, "0"), layout=layout, files=tuple(files))
