"""Any layout's files give any other layout's shards, bit by bit, and one digest a state; no process is started."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, assert_read_under, body_of, dry_manifest, numbered, plain_states, rewrite, write_under
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cinemesh.launch.training.checkpoint import writing
from cinemesh.launch.training.checkpoint.digests import block_digest, state_sums
from cinemesh.launch.training.checkpoint.layout import FlatParameter, Piece
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, read_manifest
from cinemesh.model.config import parameters, preset
from cinemesh.model.weights import full
from cinemesh.parallel.ir.plan import Plan

SMALL = replace(TINY, layers=1)


@given(st.data())
def test_boxes_tile_a_run_and_point_at_its_elements(data: st.DataObject) -> None:
    """Every element of the run once, at its place in the buffer; no more than three."""
    rows, columns, tp = (data.draw(st.integers(1, 5)) for _ in range(3))
    start = data.draw(st.integers(0, rows * columns - 1))
    stop = data.draw(st.integers(start + 1, rows * columns))
    index, position = data.draw(st.integers(0, tp - 1)), data.draw(st.integers(0, 9))
    run = Piece(FlatParameter("a", (rows, columns * tp), 1, 0), index, columns, start, stop, position)
    boxes = list(run.boxes())
    found = {
        (row, column): box.origin + row * box.stride + column
        for box in boxes
        for row in range(box.top, box.bottom)
        for column in range(box.left, box.right)
    }
    want = {(i // columns, index * columns + i % columns): position + i - start for i in range(start, stop)}
    assert found == want and len(boxes) <= 3
    assert sum((b.bottom - b.top) * (b.right - b.left) for b in boxes) == stop - start


def random_plan(draw: random.Random) -> Plan:
    while True:
        degrees = {axis: draw.choice(sizes) for axis, sizes in {"tp": (1, 2, 3), "cp": (1, 2)}.items()}
        degrees |= {axis: draw.choice((1, 2, 3)) for axis in ("dp_shard", "dp_replicate")}
        if math.prod(degrees.values()) <= 6:
            order = draw.sample(["tp", "cp", "dp_shard", "dp_replicate"], 4)
            return Plan(**degrees, order=tuple(order), dtype="float32")


def test_40_random_pairs_of_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Degrees, order and replicas of all kinds, and blocks that end anywhere; the digests know no plan."""
    draw, digests = random.Random(14), set[str]()
    for number in range(40):
        monkeypatch.setattr(writing, "BLOCK_ELEMENTS", draw.choice((999, 4096, 1 << 24)))
        wrote = write_under(random_plan(draw), tmp_path / str(number), SMALL)
        digests.add(str(wrote.digests))
        assert_read_under(random_plan(draw), tmp_path / str(number), SMALL)
    assert len(digests) == 1


def test_what_lies_in_the_files_is_what_the_manifest_says(tmp_path: Path) -> None:
    """Read without the package: where writing and reading err alike."""
    write_under(Plan.parse("tp=2,cp=2,dp_shard=2,dp_replicate=2"), tmp_path / "a")
    for number, tensors in enumerate(plain_states(tmp_path / "a").values()):
        want = full(parameters(TINY), numbered(number), torch.float32)
        assert tensors.keys() == want.keys()
        assert all(torch.equal(tensors[name], want[name]) for name in want)


def test_a_file_of_another_order_and_alignment_is_read(tmp_path: Path) -> None:
    """A later version may lay units out otherwise: the manifest's table is believed, not this version's own."""
    path = tmp_path / "a"
    write_under(Plan.parse("tp=2"), path, SMALL)
    body, units = body_of(path), body_of(path)["layout"]["units"]
    moved = list(reversed(units))
    flats = [load_file(path / file["name"]) for file in body["files"]]
    places: list[tuple[int, int, int]] = []  # from, to, elements
    position = 40
    for unit in moved:
        size = unit["elements"] // (2 if "tp" in unit["axes"] else 1)
        places.append((unit["position"], position, size))
        unit["position"], position = position, position + size + 24
    end = position - 24
    for file, flat in zip(body["files"], flats, strict=True):
        for state, values in flat.items():
            flat[state] = torch.full((end,), torch.nan)
            for source, target, size in places:
                flat[state][target : target + size] = values[source : source + size]
        save_file(flat, path / file["name"])
        data = (path / file["name"]).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        order = sorted(flat, key=lambda state, data=data: data.index(f'"{state}"'.encode()))
        blocks = {state: [block_digest(flat[state].numpy().tobytes())] for state in order}
        part = file["parts"][0] | {"begin": len(header), "stop": end, "blocks": blocks}
        file |= {"size_bytes": len(data), "header": block_digest(header), "parts": [part]}
        body["states"] = dict.fromkeys(order, "float32")
    rewrite(path, body | {"layout": body["layout"] | {"units": moved}})
    assert_read_under(Plan.parse("cp=2,dp_shard=2,dtype=float32"), path, SMALL)


def test_a_digest_tells_values_places_and_names_apart() -> None:
    """Of one element that differs by a bit, two that changed places, and the same numbers under another name."""
    values = torch.randn(1000)
    swapped, signs = values.clone(), values.clone()
    swapped[[3, 900]] = swapped[[900, 3]]
    signs[[3, 900]] *= -1
    flipped = values.clone()
    flipped.view(torch.int32)[17] ^= 1
    run = Piece(FlatParameter("a", (1000,), None, 0), 0, 1000, 0, 1000, 0)
    sums = state_sums([run], [values, swapped, flipped, signs])
    sums += state_sums([replace(run, parameter=replace(run.parameter, name="b"))], [values])
    wide = [each.double() for each in (values, swapped, flipped, signs)]
    assert len({*sums, *state_sums([run], wide)}) == 9
    assert torch.equal(wide[0], values.double())  # and nothing is changed by it


@pytest.mark.parametrize("plan", ["tp=2,cp=4,dp_shard=96,dp_replicate=8", "tp=8,dp_shard=768"])
def test_what_6144_ranks_say_of_the_30b_is_small(tmp_path: Path, plan: str) -> None:
    """Bytes of the manifest and of its unit table; seconds are in ``tests/benchmarks/checkpoints_30b.py``."""
    manifest = dry_manifest(Plan.parse(plan), preset("movie-gen-30b"))
    text = manifest.text()
    units = json.dumps(json.loads(text)["body"]["layout"], separators=(",", ":"))
    assert len(manifest.files) == 6144 and len(text) < 5e6 and len(units) < 100e3
    path = tmp_path / "step-00000001"
    path.mkdir()
    (path / MANIFEST).write_text(text)
    assert read_manifest(path) == replace(manifest, model=json.loads(json.dumps(manifest.model)))
