"""Encoders in shards over 2 and 4 ranks: what the whole ones give, in the order of gathers that is told beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from frozen_gathers import expected_gathers
from harness import Pool
from text_models import minilm, random_clip, random_t5
from torch import Tensor

from cinemesh.data.encoders.directory import HuggingFaceEncoder
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import Communicator
from cinemesh.parallel.runtime.frozen_layers import GatheredLayers
from cinemesh.parallel.runtime.ledger import Entry
from cinemesh.parallel.runtime.mesh import Mesh

CAPTIONS = ["FPS-24 A big grey rabbit stretches.", "", "A bus in a city, and another one behind it.", "Rain."]
PLANS = ["dp_shard=2", "cp=2", "tp=2,dp_shard=2", "dp_shard=2,cp=2", "dp_replicate=2,dp_shard=2", "dp_shard=4"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with real weights, two with random ones: of T5, whose layers hand a bias on, and of CLIP, which is causal."""
    found = {"t5": tmp_path_factory.mktemp("t5"), "clip": tmp_path_factory.mktemp("clip")}
    random_t5(found["t5"])
    random_clip(found["clip"])
    return {**found, "minilm": minilm()}


def encoded(directory: Path, plan: str) -> tuple[list[tuple[Tensor, Tensor]], list[Entry], list[Entry], int]:
    """On one rank: two turns, what was gathered, what was to be, and bytes of this rank's shards and buffers."""
    mesh = Mesh(Plan.parse(plan))
    comm = Communicator(mesh)
    encoder = HuggingFaceEncoder(directory, 40, sharded=True)
    encoder.place("cpu", comm)
    comm.record = True
    made = [encoder.encode_all(CAPTIONS), encoder.encode_all(CAPTIONS[:1])]
    tower = encoder._tower
    assert tower is not None and tower.gathered is not None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tower.model.parameters()}
    storages |= {t.data_ptr(): t.untyped_storage().nbytes() for t in (*tower.gathered.shards, *tower.gathered.values)}
    mesh.close()
    return made, comm.ledger, 2 * expected_gathers(encoder.layers, mesh.plan), sum(storages.values())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the pool's processes: sums of two threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "plan"), [("minilm", plan) for plan in PLANS] + [(n, plan) for n in ("t5", "clip") for plan in PLANS[2:]]
)
def test_shards_give_what_the_whole_gives(name: str, plan: str, directories: dict[str, Path], pool: Pool) -> None:
    """To 1e-6 in float32, on every rank, captions together or alone; gathers, and bytes, are those that are counted."""
    alone = HuggingFaceEncoder(directories[name], 40)
    whole, mask = alone.encode_all(CAPTIONS)
    parsed = Plan.parse(plan)
    for made, ran, planned, held in pool.run(parsed.world_size, encoded, directories[name], plan):
        for got, valid in made:
            count = got.shape[1]
            assert (got - whole[:, :count]).abs().max() <= 1e-6 and torch.equal(valid, mask[:count])
        assert ran == planned and len(ran) == 2 * len(alone.layers.units) > 8
        ranks = parsed.dp_shard * parsed.cp
        assert held <= alone.layers.held_bytes(ranks) <= held + 512  # norms whose storages are told apart by address
    assert whole.abs().max() > 0.5 and (whole[:, 0] - whole[:, 3]).abs().max() > 0.1


def late(self: GatheredLayers) -> Iterator[int]:
    """Planted: a unit is given out before its gather has been waited for, and before it has begun."""
    for unit, gather in enumerate(self._gathers):
        yield unit
        gather.issue()
        gather.wait()


def from_others(self: GatheredLayers) -> Iterator[int]:
    """Planted: the next gather goes to the buffer that is still read."""
    self._gathers[0].issue()
    self._gathers[0].wait()
    for unit in range(len(self._gathers)):
        if unit + 2 < len(self._gathers):
            self._gathers[unit + 2].issue()
            self._gathers[unit + 2].wait()
        if unit == 0:
            self._gathers[1].issue()
            self._gathers[1].wait()
        yield unit


def turned(self: GatheredLayers) -> Iterator[int]:
    """Planted: each rank has the shard of another."""
    self.shards[1].copy_(self.shards[1].flip(0))
    for unit, gather in enumerate(self._gathers):
        gather.issue()
        gather.wait()
        yield unit


FAULTS = {"late": late, "from_others": from_others, "turned": turned}


def faulty(directory: Path, fault: str) -> Tensor:
    turn = GatheredLayers.turn
    setattr(GatheredLayers, "turn", FAULTS[fault])  # noqa: B010
    try:
        return encoded(directory, "dp_shard=2")[0][0][0]
    finally:
        setattr(GatheredLayers, "turn", turn)  # noqa: B010


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_is_gathered_wrongly_is_seen(fault: str, directories: dict[str, Path], pool: Pool) -> None:
    whole, _ = HuggingFaceEncoder(directories["t5"], 40).encode_all(CAPTIONS)
    for made in pool.run(2, faulty, directories["t5"], fault):
        assert not (made - whole).abs().max() <= 1e-3


def swapped(directory: Path) -> Sequence[bool]:
    """Planted: the second rank encodes its captions in another order."""
    mesh = Mesh(Plan.parse("dp_shard=2"))
    encoder = HuggingFaceEncoder(directory, 40, sharded=True)
    encoder.place("cpu", Communicator(mesh))
    order = CAPTIONS[::-1] if mesh.rank else CAPTIONS
    made, _ = encoder.encode_all(order)
    whole, _ = HuggingFaceEncoder(directory, 40).encode_all(CAPTIONS)
    mesh.close()
    return [bool((made[:, row] - whole[:, row]).abs().max() <= 1e-6) for row in range(len(CAPTIONS))]


def test_captions_of_a_wrong_order_are_seen_and_harm_no_other_rank(directories: dict[str, Path], pool: Pool) -> None:
    assert pool.run(2, swapped, directories["t5"]) == [[True] * 4, [False] * 4]
