"""How fast a rank reads samples, beside what the disk gives; and what a step waits for them.

    python tests/benchmarks/read_rate.py

Two caches of random latents, of 32 KB (an image of 256 pixels) and of 2 MB, are read in the order of a run, by the
threads that a run has, to batches; in turns with their tars, read from end to end in pieces of as many bytes by as many
threads. Before each the disk's cache in memory is dropped. An epoch is timed from its third turn of all lanes to other
blocks on, when memory serves a second time, as in all of a run but its first minute; what counts are the bytes that
come from the disk meanwhile. Then the quick start's steps, in turns with samples that the loader reads
ahead and with a batch that lies in memory. Writes ``results/read_rate.json``. Needs Linux and root; some 6 minutes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from cinemesh.data.batches import BatchHistory
from cinemesh.data.cache.ahead import ReadAhead
from cinemesh.data.cache.index import CAPTION_ROWS, LATENT_ROWS, IndexPart, write_index_rows
from cinemesh.data.cache.samples import LATENT, TEXT, TEXT_MASK, Cache, CaptionDraw, Samples, collate
from cinemesh.data.cache.version import BucketRows, EncoderTold, Version
from cinemesh.data.order import READ_BYTES, Stream, samples_of_a_read
from cinemesh.data.tars import TarWriter
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.training.feed import AHEAD, READERS, Feed
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.weights import initial_values

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "read_rate.json"
SHAPES = {"32 KB": (16, 1, 16, 32), "2 MB": (16, 8, 64, 64)}  # of latents, float32
CACHE_BYTES, SHARD_BYTES = 6 * 2**30, 2**28
LANES = 64  # samples of a step, all of one rank
PAIRS, STEPS, WARM_UP = 5, 24, 4


def write_cache(root: Path, shape: tuple[int, ...]) -> str:
    """A version of random latents in tars of SHARD_BYTES, each with one caption that all share."""
    draw = torch.Generator().manual_seed(0)
    data = [save({LATENT: torch.randn(shape, generator=draw)}) for _ in range(16)]
    (root / "latents").mkdir(parents=True)
    (root / "index").mkdir()
    count = CACHE_BYTES // len(data[0])
    rows: list[dict[str, Any]] = []
    tars: list[str] = []
    tar: TarWriter | None = None
    for n in range(count):
        if tar is None or n * len(data[0]) // SHARD_BYTES == len(tars):
            if tar is not None:
                tar.close()
            tars.append(f"latents/{len(tars):04d}.tar")
            tar = TarWriter(root / tars[-1])
        offset, crc = tar.add(data[n % len(data)])
        rows.append({
            "id": n, "bucket": "x", "clip": f"c{n}", "first_frame": 0, "fps_num": 24, "fps_den": 1,
            "shard": len(tars) - 1, "offset": offset, "bytes": len(data[0]), "crc": crc, "weight": 1.0, "caption": 0,
            "captions": 1,
        })  # fmt: skip
    assert tar is not None
    tar.close()
    texts = {TEXT + "e": torch.zeros(4, 4), TEXT_MASK + "e": torch.ones(4, dtype=torch.bool)}
    told = TarWriter(root / "captions.tar")
    offset, crc = told.add(text := save(texts))
    told.close()
    caption = {
        "clip": "c",
        "text": "x",
        "weight": 1.0,
        "shard": len(tars),
        "offset": offset,
        "bytes": len(text),
        "crc": crc,
    }
    write_index_rows(pa.Table.from_pylist(rows).cast(LATENT_ROWS), root / "index" / "latents.parquet")
    write_index_rows(pa.Table.from_pylist([caption]).cast(CAPTION_ROWS), root / "index" / "captions.parquet")
    made = Version(
        1, None, "random", (EncoderTold("e", 4, 4, "e"),), (*tars, "captions.tar"),
        (BucketRows("x", (IndexPart("index/latents.parquet", count),), (), {"24": count}, len(data[0])),),
        (IndexPart("index/captions.parquet", 1),), {}, count, (), count, 0,
    )  # fmt: skip
    return made.write(root)


def drop_memory() -> None:
    """What the kernel holds of files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def plain_rate(root: Path) -> float:
    """Bytes/s of all tars, from end to end."""
    pieces = [
        (path, at, min(READ_BYTES, path.stat().st_size - at))
        for path in sorted((root / "latents").iterdir())
        for at in range(0, path.stat().st_size, READ_BYTES)
    ]

    def read(path: Path, at: int, size: int) -> int:
        file, data = os.open(path, os.O_RDONLY), np.empty(size, np.uint8)
        got = os.preadv(file, [data.data], at)
        os.close(file)
        return got

    drop_memory()
    begun = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        total = sum(threads.map(lambda piece: read(*piece), pieces))
    return total / (time.perf_counter() - begun)


def sample_rate(root: Path, name: str) -> float:
    """Bytes/s of latents from the disk, of an epoch in a run's order, as batches: what ``Feed`` does."""
    drop_memory()
    cache = Cache.open(str(root), name)
    train = cache.buckets[0].train
    stream = Stream(0, 0, len(train), samples_of_a_read(train.latent_bytes), LANES)
    blocks, steps, sizes = train.in_blocks(stream.block), len(train) // LANES, list[int]()
    read = cache.storage.read

    def counted(name: str, offset: int, size: int) -> Any:
        sizes.append(size)
        return read(name, offset, size)

    def samples(step: int) -> Samples:
        return blocks.select(stream.take(step * LANES, LANES), CaptionDraw(0, step, 0))

    cache.storage.read = counted
    ahead, begun, before = ReadAhead(lambda step: [samples(step)], stream.block, steps), 0.0, 0
    taken: dict[int, Future[Any]] = {}
    with ThreadPoolExecutor(READERS) as threads:
        for step in range(steps):
            if step == 2 * stream.block:
                begun, before = time.perf_counter(), sum(sizes)
            ahead.take(step)
            for at in range(step, min(step + AHEAD + 1, steps)):
                if at not in taken:
                    taken[at] = threads.submit(lambda at: collate(samples(at), 0, 1), at)
            taken.pop(step).result()
    ahead.close()
    return (sum(sizes) - before) / (time.perf_counter() - begun)


def rates(shape: tuple[int, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        name = write_cache(Path(folder), shape)
        pairs = [(sample_rate(Path(folder), name), plain_rate(Path(folder))) for _ in range(PAIRS)]
    ratios = sorted(mine / plain for mine, plain in pairs)
    return {
        "bytes_per_s": [round(mine) for mine, _ in pairs],
        "plain_bytes_per_s": [round(plain) for _, plain in pairs],
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "least": round(ratios[0], 3),
            "most": round(ratios[-1], 3),
        },
    }


def steps() -> dict[str, Any]:
    """Seconds of the quick start's steps with the loader, over those of a batch in memory, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            ROOT / "configs" / "quickstart.yaml",
            ["plan.dp_shard=1", f"data.cache={folder}/cache", f"logging.directory={folder}/run"],
        )
        setting, place = Setting.of(config), Joined(0, "cpu", None)
        runners = setting.runners(place)
        runners.first.initialise(initial_values(config.seed))
        runners.capture(config.capture)
        batches = BatchHistory.always(setting.global_batches)
        feed = Feed(config, open_history(setting, place), 0, batches, setting.encoding)
        held = feed.take(0)
        times: dict[bool, list[float]] = {False: [], True: []}
        step = AHEAD
        for turn in range(2 * (STEPS + WARM_UP)):
            loads = turn % 2 == 0
            begun = time.perf_counter()
            if loads:
                feed.load(step, runners)
                step += 1
            else:
                list(starmap(runners.load, enumerate(held)))
            runners.step(1e-4)
            if turn >= 2 * WARM_UP:
                times[loads].append(time.perf_counter() - begun)
        feed.close()
    ratios = sorted(a / b for a, b in zip(times[True], times[False], strict=True))
    low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
    return {
        "steps": STEPS,
        "loaded_s": round(statistics.median(times[True]), 4),
        "in_memory_s": round(statistics.median(times[False]), 4),
        "ratio": {"median": round(statistics.median(ratios), 4), "nine of ten": [round(low, 4), round(high, 4)]},
    }


def main() -> None:
    told: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {name: version(name) for name in ("torch", "pyarrow", "numpy")},
        "command": "python tests/benchmarks/read_rate.py",
        "load_average": os.getloadavg()[0],
    }
    for name, shape in SHAPES.items():
        told[name] = rates(shape)
        print(name, told[name], flush=True)
    told["step"] = steps()
    print(told["step"])
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
