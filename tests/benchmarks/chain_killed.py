"""The small chain of stages, left alone and killed again and again: ``python tests/benchmarks/chain_killed.py``.

Runs ``configs/chain.yaml`` on two processes from nothing, caches too, and says how long it takes. Then once more in
another folder, where the command is killed (SIGKILL) so often at moments that a seed draws, and started again. Both
must end alike: hashes of every state of each stage's last checkpoint, and the clip's bytes. Writes
``results/chain_killed.json``; some 15 minutes on a quiet machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from cinemesh.launch.training.chain import read_chain
from cinemesh.launch.training.checkpoint.manifest import read_manifest

CHAIN, RANKS, SEED = Path("configs/chain.yaml"), 2, 11
RESULT = Path(__file__).parent / "results" / "chain_killed.json"
GONE_S = 60.0  # within which the ranks of a launcher that was killed end


def written(folder: Path) -> Path:
    """The chain, its caches in a folder of its own too."""
    chain = yaml.safe_load(CHAIN.read_text(encoding="utf-8"))
    chain["directory"] = str(folder)
    for stage in chain["stages"]:
        given = stage.get("set", {})
        if "data.cache" in given:
            given["data.cache"] = str(folder / "cache" / Path(given["data.cache"]).name)
    folder.mkdir()
    (path := folder / "chain.yaml").write_text(yaml.safe_dump(chain), encoding="utf-8")
    return path


def started(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cinemesh.launch", "stages", str(path), "--nproc", str(RANKS)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ranks_of(path: Path) -> list[int]:
    """Processes that still name the chain's folder: of a launcher that is gone, too."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(path.parent).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def ends(path: Path) -> dict[str, Any]:
    """By stage, what it ended with."""
    found: dict[str, Any] = {}
    for link in read_chain(path):
        if link.stage.is_run or link.stage.average:
            found[link.stage.name] = read_manifest(link.end()).digests
        else:
            found[link.stage.name] = hashlib.sha256(link.clip.read_bytes()).hexdigest()
    return found


def killed(path: Path, kills: int, lasts_s: float) -> list[float]:
    """Seconds after which the command was killed, of each start but the last, which is let be."""
    drawn, after = random.Random(SEED), list[float]()
    while len(after) < kills:
        process, begun = started(path), time.monotonic()
        # a start costs seconds of its own: what is drawn is longer than that, so that each goes on
        wait_s = drawn.uniform(4.0, 2.5 * lasts_s / kills)
        while process.poll() is None and time.monotonic() < begun + wait_s:
            time.sleep(0.05)
        if process.poll() is not None:
            break  # it is done
        process.send_signal(signal.SIGKILL)
        process.wait()
        after.append(round(time.monotonic() - begun, 1))
        gone = time.monotonic() + GONE_S
        while ranks_of(path) and time.monotonic() < gone:
            time.sleep(0.2)
        assert not ranks_of(path), "a rank outlived its launcher"
        print(f"kill {len(after)} of {kills} after {after[-1]} s", flush=True)
    assert started(path).wait() == 0
    return after


def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        alone, begun = written(Path(name) / "alone"), time.monotonic()
        assert started(alone).wait() == 0
        lasts_s = time.monotonic() - begun
        print(f"left alone: {lasts_s:.0f} s", flush=True)
        after = killed(path := written(Path(name) / "killed"), kills, lasts_s)
        left, other = ends(alone), ends(path)
    told: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python tests/benchmarks/chain_killed.py {kills}",
        "load_average": os.getloadavg(),
        "seconds_alone": round(lasts_s, 1),
        "seed": SEED,
        "killed_after_s": after,
        "ended_alike": {stage: left[stage] == other[stage] for stage in left},
        "clip": left["clip"],
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 12)
