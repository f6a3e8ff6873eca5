"""Whether a checkpoint can be trusted, what 6,144 ranks must say of one, and for how long a save stops training.

    python tests/benchmarks/checkpoints_30b.py [--corruptions 200] [--json results.json]

Corruptions: of each kind in turn, of a run of the tiny model (``tests/damages.py``): none may be loaded, each must be
named, and the older checkpoint taken. Metadata: of the 30B's real layout; no state is there. Pause: of a process with
100 million parameters, and priced from its copy rate for a rank of the 30B.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import dry_manifest, plan_of, runner_of
from damages import KINDS, damages, knock, write_runs

from cinemesh.launch.training.checkpoint.choosing import Keep
from cinemesh.launch.training.checkpoint.copies import copy_bytes
from cinemesh.launch.training.checkpoint.layout import Layout
from cinemesh.launch.training.checkpoint.loading import _needed, read_states
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, SAVED_STATES, read_manifest
from cinemesh.launch.training.checkpoint.saving import Saver
from cinemesh.model.config import ModelConfig, parameters, preset
from cinemesh.model.step import unit_layout
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import coordinates

PLANS = ("tp=2,cp=4,dp_shard=96,dp_replicate=8", "tp=8,dp_shard=768")


def corrupted(cases: int, folder: Path) -> dict[str, Any]:
    """How many of the kinds were met as promised."""
    write_runs(folder)
    runner, wrong, kinds = runner_of(plan_of("")), list[str](), Counter[int]()
    for case in range(cases):
        run = Path(shutil.copytree(folder / "run", folder / "case"))
        listed = damages(random.Random(case), run, folder / "other")
        kinds[case % KINDS] += 1
        if (told := knock(*listed[case % KINDS], run, runner)) is not None:
            wrong.append(told)
        shutil.rmtree(run)
    return {"cases": cases, "kinds": len(kinds), "not_as_promised": wrong}


def metadata(text: str, folder: Path) -> dict[str, Any]:
    """Of the 30B under a plan of 6,144 ranks: bytes, and CPU seconds to write and read it (the least of five)."""
    plan, config = Plan.parse(text), preset("movie-gen-30b")
    manifest, path = dry_manifest(plan, config), folder / "step-00000001"
    path.mkdir(exist_ok=True)
    write_s, read_s, found = list[float](), list[float](), manifest
    for _ in range(5):
        begun = time.process_time()
        with (path / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.text())
            file.flush()
            os.fsync(file.fileno())
        written = time.process_time()
        found = read_manifest(path)
        read_s.append(time.process_time() - written)
        write_s.append(written - begun)
    other = Plan.parse(PLANS[text == PLANS[0]])
    here = Layout.of(unit_layout(config, other))
    started = time.process_time()
    blocks = _needed(found, list(here.runs(coordinates(other, 5))))
    return {
        "plan": plan.equation(),
        "bytes": (path / MANIFEST).stat().st_size,
        "layout_bytes": len(json.dumps(json.loads((path / MANIFEST).read_text())["body"]["layout"])),
        "file_bytes": found.files[0].size_bytes,
        "write_cpu_s": min(write_s),
        "read_cpu_s": min(read_s),
        "blocks_of_a_rank_of_the_other_plan": len(blocks),
        "plan_reads_cpu_s": time.process_time() - started,
    }


def paused(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Of one process: seconds that training stops, against those of the whole save; a second save, as most are."""
    plan = Plan(dtype="float32")
    units = unit_layout(config, plan)
    buffers = {state: torch.randn(1, units.flat_elements) for state in SAVED_STATES}
    runner: Any = SimpleNamespace(
        **{"buffers": buffers, "units": units, "mesh": None, "coordinates": coordinates(plan, 0), "plan": plan},
        **{"config": config, "steps_done": 1, "updates_done": 1, "executor": SimpleNamespace(device="cpu")},
    )
    saver, rows = Saver(folder, runner, Keep(1)), list[dict[str, float]]()
    for step in (1, 2, 3):
        runner.steps_done = step
        begun = time.perf_counter()
        saver.begin({})
        copied = time.perf_counter()
        assert saver.begun is not None
        saver.begun.written.result()
        written = time.perf_counter()
        path = saver.end()
        ended = time.perf_counter()
        rows.append({"copy_s": copied - begun, "write_s": written - copied, "publish_s": ended - written})
    saver.close()
    saver.copies.states.clear()
    begun = time.perf_counter()
    flats = {state: torch.empty_like(buffer).view(-1) for state, buffer in buffers.items()}
    read_states(path, read_manifest(path), Layout.of(units), coordinates(plan, 0), flats)
    read_s = time.perf_counter() - begun
    assert all(torch.equal(flats[state], buffers[state].view(-1)) for state in flats)
    best = min(rows[1:], key=lambda row: row["copy_s"])
    pause = best["copy_s"] + best["publish_s"]
    rate = copy_bytes(units) / best["copy_s"]
    thirty = {text: copy_bytes(unit_layout(preset("movie-gen-30b"), Plan.parse(text))) for text in PLANS}
    return {
        "parameters": sum(row.elements for row in parameters(config)),
        "bytes": copy_bytes(units),
        "saves": rows,
        "pause_s": pause,
        "pause_of_write": pause / best["write_s"],
        "read_s": read_s,
        "copy_bytes_per_s": rate,
        "predicted_copy_s_of_a_30b_rank": {text: size / rate for text, size in thirty.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    config = ModelConfig("100m", 12, 768, 12, 2048, preset("tiny-video").encoders)
    with tempfile.TemporaryDirectory() as folder:
        told = {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
            "torch": torch.__version__,
            "corruptions": corrupted(asked.corruptions, Path(folder)),
            "metadata_30b_6144_ranks": [metadata(text, Path(folder)) for text in PLANS],
            "pause": paused(config, Path(folder) / "100m"),
        }
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
