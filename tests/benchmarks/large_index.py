"""An index of 1.1e9 rows, opened by one rank that reads the rows of its own samples: time and memory.

The rows are synthetic: one part of PART_ROWS different rows, copied to as many files as make the number. What opening
and reading cost is that of as many files of as many rows; that they are alike changes nothing of it but what the disk's
cache holds.

python tests/benchmarks/large_index.py --json tests/benchmarks/results/large_index.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cinemesh.data.cache.index import LATENT_ROWS, PART_ROWS, IndexPart, write_index_rows
from cinemesh.data.cache.version import BucketRows, EncoderTold, Version

ROWS = 1_100_000_000
LATENT = 32 * 2**10
STEPS, LANES, RANKS = 200, 1536, 768  # two samples of a rank a step


def part(path: Path) -> None:
    n = np.arange(PART_ROWS)
    members = (LATENT + 512 + 511) // 512 * 512
    columns: dict[str, Any] = {
        "id": pa.array(n, pa.uint32()),
        "bucket": pa.DictionaryArray.from_arrays(pa.array(np.zeros(PART_ROWS), pa.int32()), pa.array(["1x256x256"])),
        "clip": pa.array([f"clip-{i:010d}" for i in range(PART_ROWS)]),
        "first_frame": pa.array(np.zeros(PART_ROWS), pa.int64()),
        "fps_num": pa.array(np.full(PART_ROWS, 24), pa.int32()),
        "fps_den": pa.array(np.ones(PART_ROWS), pa.int32()),
        "shard": pa.array(n // 30_000, pa.int32()),
        "offset": pa.array(n % 30_000 * members + 512, pa.int64()),
        "bytes": pa.array(np.full(PART_ROWS, LATENT), pa.int64()),
        "crc": pa.array(np.random.default_rng(0).integers(0, 2**32, PART_ROWS), pa.uint32()),
        "weight": pa.array(np.ones(PART_ROWS), pa.float32()),
        "caption": pa.array(n, pa.int64()),
        "captions": pa.array(np.ones(PART_ROWS), pa.int16()),
    }
    write_index_rows(pa.table(columns).cast(LATENT_ROWS), path)


def rank(root: str, name: str, send: Any) -> None:
    """One rank, 1 of RANKS, in a process of its own."""
    from cinemesh.data.cache.samples import Cache
    from cinemesh.data.order import Stream, samples_of_a_read

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here: what imports took is not counted
    before = peak_bytes()
    begun = time.perf_counter()
    cache = Cache.open(root, name)
    train = cache.buckets[0].train
    (first,) = train.ids([len(train) - 1])
    opened_s, opened = time.perf_counter() - begun, peak_bytes() - before
    block = samples_of_a_read(train.latent_bytes)
    stream = Stream(0, 0, len(train), block, LANES)
    spent: list[float] = []
    for step in range(STEPS):
        begun = time.perf_counter()
        indices = stream.take(step * LANES, LANES)
        mine = indices[: LANES // RANKS]
        for index in mine:
            at = index // block * block
            train._index.rows(at, min(block, len(train) - at))  # of the block that is read
        spent.append(time.perf_counter() - begun)
    send.send({
        "rows": len(train), "last_id": first, "open_s": opened_s, "open_bytes": opened,
        "steps": STEPS, "first_step_s": spent[0], "median_step_s": float(np.median(spent)),
        "peak_bytes": peak_bytes() - before,
    })  # fmt: skip


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "index").mkdir()
        part(root / "index" / "0.parquet")
        count = -(-given.rows // PART_ROWS)
        for n in range(1, count):
            shutil.copy(root / "index" / "0.parquet", root / "index" / f"{n}.parquet")
        parts = tuple(IndexPart(f"index/{n}.parquet", PART_ROWS) for n in range(count))
        shards = tuple(f"latents/{n:016x}/1x256x256.train.tar" for n in range(count * 140))
        version = Version(
            1, None, "synthetic", (EncoderTold("x", 4, 4, "x"),), shards,
            (BucketRows("1x256x256", parts, (), {"24": count * PART_ROWS}, LATENT),), (), {}, 0, (), 0, 0,
        )  # fmt: skip
        version.write(root)
        take, send = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(target=rank, args=(name, version.name, send))
        child.start()
        found = take.recv()
        child.join()
        size = (root / "index" / "0.parquet").stat().st_size
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "pyarrow": pa.__version__},
        "parts": count, "part_bytes": size, "shards": len(shards), "blocks_of_a_rank": LANES // RANKS, **found,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
