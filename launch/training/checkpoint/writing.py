"""Writing one file of a checkpoint: what a rank holds of every state, with digests of what is written.

A safetensors file of a tensor a state, which any reader of that format opens; ours goes by the manifest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digests import block_digest, state_sums
from .layout import Coordinates, Layout
from .manifest import MANIFEST, ShardFile

BLOCK_ELEMENTS = 1 << 24  # 64 MiB in float32: what a thread writes at once, and the least that a reader must read
TRIES = 2  # at a file
RETRY_AFTER_S = 1.0
MOST_THREADS = 8  # of a rank: SHA-256 and sums take about 1.4 s a GB and core (2 cores, 2026-11), a disk seldom less

_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}

Written = tuple[ShardFile, list[int]]  # a file, and its sums of every state


def write_part(path: Path, layout: Layout, at: Coordinates, start: int, states: Mapping[str, Tensor]) -> Written:
    """Write a part of the flat shard at coordinates ``at``, its elements from ``start`` on, from CPU tensors [n].

    Tried again once. Raises OSError.
    """
    for left in reversed(range(TRIES)):
        try:
            return _write_part(path, layout, at, start, states)
        except OSError:
            if not left:
                raise
            time.sleep(RETRY_AFTER_S)
    raise AssertionError


def _write_part(path: Path, layout: Layout, at: Coordinates, start: int, states: Mapping[str, Tensor]) -> Written:
    elements = next(iter(states.values())).numel()
    whole = [run.within(start, start + elements) for run in layout.runs(at)]
    runs = [run for run in whole if run is not None]
    header = _header(states)
    begins: dict[str, int] = {}
    end = len(header)
    for state, values in states.items():
        begins[state], end = end, end + values.numel() * values.element_size()

    def write(first: int) -> tuple[list[str], list[int]]:
        last = min(first + BLOCK_ELEMENTS, elements)
        block = {state: values[first:last] for state, values in states.items()}
        digests: list[str] = []
        for state, values in block.items():
            data = values.view(torch.uint8).numpy().data
            digests.append(block_digest(data))
            _write_all(file, data, begins[state] + first * values.element_size())
        inside = (run.within(first, last) for run in runs)
        return digests, state_sums((run for run in inside if run is not None), list(block.values()))

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(file, memoryview(header), 0)
        with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
            done = list(threads.map(write, range(0, elements, BLOCK_ELEMENTS)))
        os.fsync(file)
    finally:
        os.close(file)
    blocks = {state: [digests[i] for digests, _ in done] for i, state in enumerate(states)}
    sums = [sum(of[i] for _, of in done) for i in range(len(states))]
    return ShardFile(path.name, end, at, start, start + elements, block_digest(header), blocks), sums


def _header(states: Mapping[str, Tensor]) -> bytes:
    """What a safetensors file begins with: one tensor a state, one behind the other."""
    rows: dict[str, Any] = {"__metadata__": {"layout": MANIFEST}}
    end = 0
    for state, values in states.items():
        begin, end = end, end + values.numel() * values.element_size()
        rows[state] = {"dtype": _SAFETENSORS[values.dtype], "shape": [values.numel()], "data_offsets": [begin, end]}
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
