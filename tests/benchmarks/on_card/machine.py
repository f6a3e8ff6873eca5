"""Stage 0: versions, driver, clocks and power; a copy of 2 GiB and a bf16 product of 8192^3."""

from __future__ import annotations

import csv
import platform
import shutil
import subprocess
from datetime import date
from typing import Any

import torch
import triton
from benchmarks.kernels_gpu import card_here, limits_of
from benchmarks.on_card.stage import Here
from torch.cuda import nccl

from cinemesh.kernels.packages import missing
from cinemesh.kernels.tuning import device_key
from cinemesh.perf_model.calibration.card import SIDE
from cinemesh.perf_model.clusters.cards import base_of
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.compute import Compute

ASKED = (
    *("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit"),
    *("temperature.gpu", "memory.total"),
)
# Of an H200: what a copy and a long bf16 product reach (published by others, 2024 and 2025). Outside, something is
# wrong with the card or with how it is timed, and no later number means much.
USUAL = {"h200": {"copy_bytes_per_s": (4.2e12, 4.4e12), "matmul_flops_per_s": (770e12, 800e12)}}


def run(here: Here) -> None:
    here.note(versions=versions(), card=driver())
    sizes = {"copied": 1 << 16, "side": 64} if here.smoke else {}
    limits = limits_of(card_here(here.place), **sizes)
    here.note(behind=driver())  # clocks and power, right behind the product
    name = device_key(torch.cuda.get_device_name())
    cluster = load(base_of(name))
    product_s = Compute(cluster, clock="isolated").matmul_s(SIDE, SIDE, SIDE, "bfloat16")
    predicted = {
        "copy_bytes_per_s": cluster.gpu.memory_bytes_per_s * cluster.stream.fraction,
        "matmul_flops_per_s": 2.0 * SIDE**3 / product_s,
    }
    here.beside("limits", predicted, limits)
    usual = USUAL.get(name, {})
    here.note(usual=usual, as_usual={key: low <= limits[key] <= high for key, (low, high) in usual.items()})


def versions() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if torch.version.cuda else None,
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "free_bytes": torch.cuda.mem_get_info()[0],
        "missing": dict(missing()),
    }


def driver() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return told(done.stdout) if done.returncode == 0 else {"failed": done.stdout.strip() or done.stderr.strip()}


def told(line: str) -> dict[str, str]:
    """A line of nvidia-smi, by what was asked."""
    (values,) = csv.reader([line.strip()], skipinitialspace=True)
    return dict(zip(ASKED, values, strict=True))
