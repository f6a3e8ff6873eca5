"""Samples read back: damage by file and offset, blocks of neighbours, captions drawn, weights, elastic ranks."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import fsspec
import pytest
import torch
from latent_caches import CLIPS, ENCODING, built, data_of, small_units
from safetensors.torch import load

from cinemesh.data.batches import BatchHistory
from cinemesh.data.cache import index as indexing
from cinemesh.data.cache.ahead import ReadAhead
from cinemesh.data.cache.drawn import Drawn, RunOrder
from cinemesh.data.cache.held import Block, HeldBlocks, member_arrays
from cinemesh.data.cache.history import History
from cinemesh.data.cache.samples import Cache, CaptionDraw, Samples, collate
from cinemesh.data.cache.storage import Storage
from cinemesh.data.cache.version import VersionChange
from cinemesh.data.order import Stream
from cinemesh.data.tars import members
from cinemesh.errors import CinemeshError
from cinemesh.model.inputs import IDS, LATENTS, PLACES


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_units(monkeypatch)
    return tmp_path / "cache"


def tars(root: Path) -> list[Path]:
    return sorted((root / "latents").glob("*/*.tar"))


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_what_is_read_is_what_was_encoded(root: Path, tmp_path: Path, block: int) -> None:
    """By another reader: the members of the tars, in order, read by safetensors."""
    cache = built(data_of(tmp_path), root)
    train = cache.buckets[0].train.in_blocks(block)
    expected: dict[tuple[str, int], torch.Tensor] = {}
    for unit in (root / "latents").iterdir():
        rows = indexing.pq.read_table(unit / "rows.parquet").to_pylist()
        (tar,) = unit.glob("*.tar")
        for row, member in zip(rows, members(tar), strict=True):
            data = tar.read_bytes()[member.offset :][: member.size]
            assert (member.offset, member.size, member.extension) == (row["offset"], row["bytes"], "safetensors")
            expected[row["clip"], row["first_frame"]] = load(data)["latent"]
    assert len(train) == len(expected)
    for sample in train:
        assert torch.equal(sample.latent, expected[sample.scene, sample.first_frame])
        text, mask = ENCODING.encoders[0].encode(sample.caption)
        assert torch.equal(sample.text["letters"], text) and torch.equal(sample.mask["letters"], mask)
        assert sample.frame_rate == Fraction(15)


def test_a_cache_is_read_at_an_address(root: Path, tmp_path: Path) -> None:
    cache = built(data_of(tmp_path), root)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/there", recursive=True)
    far = Cache.open("memory://there", cache.name)
    for block in (1, 8):
        for near, other in zip(cache.buckets[0].train, far.buckets[0].train.in_blocks(block), strict=True):
            assert near.id == other.id and torch.equal(near.latent, other.latent)
    with pytest.raises(CinemeshError, match=r"memory://there/latents/x\.tar is missing"):
        Storage("memory://there").read("latents/x.tar", 0, 10)
    with pytest.raises(CinemeshError, match=r"nonsense://x cannot be read"):
        Storage("nonsense://x")


def damaged(root: Path, cache: Cache, block: int) -> str:
    with pytest.raises(CinemeshError) as found:
        list(Cache.open(str(root), cache.name).buckets[0].train.in_blocks(block))
    return str(found.value)


@pytest.mark.parametrize("block", [1, 64])
def test_damage_is_named_with_file_and_offset(root: Path, tmp_path: Path, block: int) -> None:
    cache = built(data_of(tmp_path), root)
    tar = tars(root)[1]
    whole = tar.read_bytes()
    at = list(members(tar))[3]
    tar.write_bytes(whole[: at.offset + 90] + bytes([whole[at.offset + 90] ^ 16]) + whole[at.offset + 91 :])
    assert f"{tar} is damaged at offset {at.offset:,}: its {at.size:,} bytes there have crc32 " in damaged(
        root, cache, block
    )
    tar.write_bytes(whole[: at.offset + 10])
    assert f"{tar} is cut short: " in damaged(root, cache, block)
    if block == 1:
        assert f"{at.size:,} bytes at offset {at.offset:,} are wanted, and there are 10" in damaged(root, cache, block)
    tar.unlink()
    assert f"{tar} is missing" in damaged(root, cache, block)
    tar.write_bytes(whole)
    (part,) = (root / "index").glob("8x16x16.train.*")
    good = part.read_bytes()
    for place in (
        60,
        len(good) // 3,
        good.index(b"first_frame"),
    ):  # pages have checksums; a footer that is changed does not parse
        part.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) * 2 + good[place + 2 :])
        assert f"{part} is damaged: " in damaged(root, cache, block)
    part.write_bytes(good)
    row = cache.buckets[0].train._index.rows(0, 1)[0]
    with pytest.raises(CinemeshError, match=r"have crc32 .* and the index says 0000000c"):
        Block(cache.storage, cache.version.shards, [row | {"crc": 12}]).arrays(row | {"crc": 12})


def test_a_block_is_read_once_and_the_least_used_goes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = built(data_of(tmp_path), root)
    reads: list[tuple[str, int]] = []
    read = Storage.read

    def counted(self: Storage, name: str, offset: int, size: int) -> object:
        reads.append((name, size))
        return read(self, name, offset, size)

    monkeypatch.setattr(Storage, "read", counted)
    train = cache.buckets[0].train.in_blocks(16)
    for _ in range(3):
        list(train)
    # 60 rows in blocks of 16, units of 12, 20 and 28: the first block is of two tars.
    assert len([name for name, _ in reads if name.startswith("latents")]) == 5
    held = HeldBlocks(most_bytes=1)
    made: list[int] = []
    block = Block(cache.storage, cache.version.shards, cache.buckets[0].train._index.rows(0, 2))
    for key in (0, 0, 1, 0):
        held.get(key, lambda key=key: (made.append(key), block)[1])
    assert made == [0, 1, 0]
    with pytest.raises(ZeroDivisionError):
        held.get(7, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert held.get(7, lambda: block) is block  # it is tried again


def test_blocks_that_an_epoch_has_taken_make_room(root: Path, tmp_path: Path) -> None:
    """Of more samples than memory holds: each lane's block goes with its last sample, of fewer all stay."""
    cache = built(data_of(tmp_path), root)
    for latent_bytes, left in ((512, 10), (2**30, 0)):
        held = HeldBlocks()
        train = Cache.open(str(root), cache.name, held).buckets[0].train
        stream, most = Stream(0, 0, len(train), 6, 4), 0
        blocks = Samples(train._files, replace(train._bucket, latent_bytes=latent_bytes), "train", block=6)
        for step in range(15):
            list(blocks.select(stream.take(4 * step, 4)))
            most = max(most, len(held._blocks))
        assert (len(held._blocks), most) == (left, 10 if left else 8), held._bytes  # those of two turns
        assert held._bytes == sum(of.block.size for of in held._blocks.values() if of.block)


def test_blocks_of_later_steps_are_read_ahead(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lanes come to their next blocks at once: they are there by then. Who takes what cannot be read tells it."""
    cache = built(data_of(tmp_path), root)
    readers: list[str] = []
    read = Storage.read

    def noted(self: Storage, name: str, offset: int, size: int) -> object:
        readers.append(threading.current_thread().name)
        return read(self, name, offset, size)

    monkeypatch.setattr(Storage, "read", noted)
    stream = Stream(0, 0, 60, 5, 4)

    def opened() -> Callable[[int], Samples]:
        blocks = Cache.open(str(root), cache.name).buckets[0].train.in_blocks(5)
        return lambda step: blocks.select(stream.take(4 * step, 4))

    def taken(ahead: ReadAhead, samples: Callable[[int], Samples], step: int) -> list[int]:
        ahead.take(step)
        ahead._pool.submit(int).result()  # all that was asked for is done
        before = readers.count(main)
        ids = [sample.id for sample in samples(step)]
        assert readers.count(main) == before or step == 0, step
        return ids

    main = threading.current_thread().name
    samples = opened()
    ahead = ReadAhead(lambda step: [samples(step)], 5, 40)
    order = [taken(ahead, samples, step) for step in (*range(12), *range(4, 40))]  # it goes back once
    assert order == [[s.id for s in opened()(step)] for step in (*range(12), *range(4, 40))]
    ahead.close()
    samples = opened()
    tars(root)[1].unlink()
    ahead = ReadAhead(lambda step: [samples(step)], 5, 40)
    with pytest.raises(CinemeshError, match=r"\.tar is missing"):
        for step in range(15):
            ahead.take(step)
            ahead._pool.submit(int).result()
            list(samples(step))
    ahead.close()


def test_one_of_several_captions_is_drawn_by_its_weight(root: Path, tmp_path: Path) -> None:
    """The paper's captioners: 70 and 30 percent. A function of seed, step, id and place, whatever else is read."""
    settings = data_of(tmp_path, 2)
    told = "captions: [{text: Long grey., weight: 0.7}, {text: Short., weight: 0.3}]"
    rows = [f"{{name: c{n}, file: {n}.mp4, first_frame: 0, last_frame: 15, {told}}}" for n in range(2)]
    settings.captions.write_text(f"[{', '.join(rows)}]")
    cache = built(settings, root)
    drawn = Counter[str]()
    for block in (1, 8):
        train = cache.buckets[0].train.in_blocks(block)
        for step in range(60):
            drawn.update(s.caption for s in train.select(list(range(10)), CaptionDraw(5, step, 0)))
    assert drawn.keys() == {"FPS-15 Long grey.", "FPS-15 Short."}
    assert abs(drawn["FPS-15 Short."] - 360) < 2 * 5 * (600 * 0.3 * 0.7) ** 0.5  # both blocks draw alike
    alone = [s.caption for s in train.select([3, 7], CaptionDraw(5, 9, 4))]
    assert alone == [train.select([i], CaptionDraw(5, 9, 4 + k))[0].caption for k, i in enumerate((3, 7))]
    ten = train.select(range(10), CaptionDraw(5, 9, 4))
    whole = [s.caption for s in ten]
    assert len(set(whole)) == 2 and [s.caption for s in [*ten[:3], *ten[3:][::-1]]] == whole[:3] + whole[:2:-1]
    assert [ten[5:].text(n) for n in range(5)] == whole[5:]
    shares = torch.cat([collate(ten, rank, 5)["text.letters"] for rank in range(5)], 1)
    assert torch.equal(shares, torch.stack([s.text["letters"] for s in ten], 1))  # each rank's are those of the batch
    assert {s.caption for s in cache.buckets[0].train} == {"FPS-15 Long grey."}  # undrawn, the first
    assert all(torch.equal(s.text["letters"], ENCODING.encoders[0].encode(s.caption)[0]) for s in train)


def test_weights_act_when_the_index_is_made(root: Path, tmp_path: Path) -> None:
    settings = data_of(tmp_path)
    weights = [1, 2, 0.5, 0, 3.5, 1]
    text = settings.captions.read_text()
    for n, weight in enumerate(weights):
        text = text.replace(f"Grey {n}.", f"Grey {n}., weight: {weight}")
    settings.captions.write_text(text)
    cache = built(settings, root)
    train = cache.buckets[0].train
    counted = Counter(train.scenes)
    for n, weight in enumerate(weights):
        assert abs(counted[f"c{n}"] - weight * (5 + 2 * n)) < 1, (n, counted)
    assert counted["c3"] == 0 and counted["c0"] == 5 and counted["c5"] == 15
    times = Counter(train.ids(range(len(train))))
    assert {times[i] for i in range(5, 12)} == {2} and set(times.values()) <= {1, 2, 3, 4}


def test_many_clips_of_one_window_are_kept_in_proportion(tmp_path: Path) -> None:
    """Each is kept or not by its own name's digest: of 4,000 with weight 0.3, 1,200 within five standard deviations."""
    from cinemesh.data.cache.listing import _drawn

    kept = sum(int(0.3 + _drawn(f"1x16x16 clip-{n}")) for n in range(4000))
    assert abs(kept - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_repeats_the_windows_of_short_scenes_evenly(root: Path, tmp_path: Path, balance: float) -> None:
    train = built(data_of(tmp_path), root, balance=balance).buckets[0].train
    n = [5 + 2 * k for k in range(CLIPS)]
    counted = Counter(train.scenes)
    assert counted == {f"c{k}": round(15 * (n[k] / 15) ** (1 - balance)) for k in range(CLIPS)}
    times = Counter(train.ids(range(len(train))))
    assert set(times) == set(range(sum(n)))  # no window is left out
    for k in range(CLIPS):
        own = {times[i] for i in range(sum(n[:k]), sum(n[: k + 1]))}
        assert max(own) - min(own) <= 1


@pytest.mark.parametrize("ranks", [(1, 2, 4, 3), (4, 3, 2, 1)])
def test_a_run_goes_on_with_other_ranks_and_meets_the_same_batches(
    root: Path, tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    """Killed at any step: what all ranks load together is a function of the seed and the step."""
    cache = built(data_of(tmp_path), root)
    order = RunOrder(2, 24, (1.0,), BatchHistory.always((12,)))
    drawn = Drawn(order, History.open(str(root), [VersionChange(0, cache.name)]))
    for step in range(24):
        train = drawn.at(step).train.in_blocks(8)
        alone = collate(train.select(drawn.indices(step), CaptionDraw(2, step, 0)), 0, 1)
        count = ranks[step // 6]
        shares = [collate(train.select(drawn.indices(step), CaptionDraw(2, step, 0)), r, count) for r in range(count)]
        for name, dim in {IDS: 0, PLACES: 0, LATENTS: 0}.items():
            assert torch.equal(torch.cat([share[name] for share in shares], dim), alone[name])


def test_a_header_is_read_as_safetensors_reads_it(root: Path, tmp_path: Path) -> None:
    built(data_of(tmp_path, 1), root)
    for tar in [*tars(root), *(root / "captions").glob("*/*.tar")]:
        for member in members(tar):
            data = tar.read_bytes()[member.offset :][: member.size]
            expected = load(data)
            found = member_arrays(Storage(str(root)).read(str(tar.relative_to(root)), member.offset, member.size))
            assert found.keys() == expected.keys() and all(
                torch.equal(torch.from_numpy(found[k]), expected[k]) for k in found
            )


def test_rows_of_many_groups_and_parts_are_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "PART_ROWS", 14)
    monkeypatch.setattr(indexing, "GROUP_ROWS", 4)
    monkeypatch.setattr(indexing, "OPEN_PARTS", 2)
    monkeypatch.setattr(indexing, "HELD_GROUPS", 3)
    cache = built(data_of(tmp_path), root)
    index = cache.buckets[0].train._index
    assert [part.rows for part in cache.version.buckets[0].train] == [14, 14, 14, 14, 4]
    for first, count in ((0, 60), (13, 2), (27, 16), (59, 1)):
        assert [row["id"] for row in index.rows(first, count)] == list(range(first, first + count))
    assert len(index._groups) <= 3 and len(index._open) <= 2
    withdrawn = replace(cache.version.buckets[0].train[0], rows=15)
    with pytest.raises(CinemeshError, match="it holds 14 rows of 15"):
        indexing.Index(cache.storage, [withdrawn]).rows(0, 1)
