"""Stage 1: what every rank is: versions, device, driver, NCCL, host, free memory and disk, clocks.

No rank needs another for it: each writes what it is to the store, so that ranks that could not make one group, as of
two versions of torch, are told apart and named.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...documents import parse_json
from ...memory import available_bytes
from ...parallel.runtime.comm import nccl_stack
from ...perf_model.acceptance import DEVICE
from ..cluster.environment import device_here, number_of
from ..health.facts import machine_host, software
from ..health.groups import by_value
from ..training.measured_rows import clock_mhz
from .here import SAID, Here
from .steps import device_kind

OCCUPIED = 0.1  # of a GPU's memory, that other processes may hold before it is named
# What may differ from rank to rank; of numbers the least and the most are told.
OWN = ("host", "gpu", "free_bytes", "host_free_bytes", "disk_free_bytes", "clock_mhz", "temperature_c", "power_w")
FACTS = "facts"  # of each rank, in the store


def run(here: Here) -> None:
    """What every rank is, compared."""
    here.at("looking at this rank")
    here.store.set(f"{FACTS}/{here.rank}", json.dumps(facts(here)))
    if here.rank > 0:
        return
    here.at("reading what the ranks are")
    said = [here.store.get(f"{FACTS}/{rank}") for rank in range(here.world)]  # waits for each
    everyones = [parse_json(text.decode(), "what a rank said of itself", "") for text in said]
    agreed, differing = compared(everyones)
    hosts = {rank: of["host"] for rank, of in enumerate(everyones)}
    here.note(
        **{DEVICE: device_kind(device_here(here.asked.device, here.local))},
        agreed=agreed,
        differences=differing,
        hosts=by_value(hosts),
        spread=spread(everyones),
        **{SAID: f"{here.world} ranks on {len({*hosts.values()})} hosts, {agreed.get('device')}"},
    )
    for name, values in differing.items():
        here.fault(f"{name} differs: " + "; ".join(f"{value} on ranks {ranks}" for value, ranks in values.items()))
    occupied = {
        rank: "occupied"
        for rank, of in enumerate(everyones)
        if of["total_bytes"] and of["free_bytes"] < (1 - OCCUPIED) * of["total_bytes"]
    }
    if occupied:
        here.fault(f"other processes hold memory of the GPUs of ranks {by_value(occupied)['occupied']}")
    if not agreed.get("sees_out", True):
        here.fault(f"no rank sees {here.asked.out}")
    if loss := agreed.get("nccl_loss"):
        here.note(nccl_loss=loss)


def facts(here: Here) -> dict[str, Any]:
    """Of this rank."""
    device = device_here(here.asked.device, here.local)
    found: dict[str, Any] = {
        "host": machine_host(),
        "machine": platform.machine(),
        "cuda": None,
        **software(),
        "cores": os.cpu_count(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "ranks_a_host": here.local,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
        "sees_out": here.asked.out.is_dir(),
        "host_free_bytes": available_bytes(),
        "disk_free_bytes": shutil.disk_usage(here.asked.out).free if here.asked.out.is_dir() else 0,
        "device": "CPU",
        "total_bytes": 0,
        "free_bytes": 0,
    }
    return found | (_gpu(device) if device_kind(device) == "cuda" else {})


def _gpu(device: str) -> dict[str, Any]:
    stack = nccl_stack()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "gpu": number_of(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(stack.nccl),
        "driver": list(stack.driver),
        "nccl_loss": stack.told(),
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
        "clock_mhz": clock_mhz(device),
        "temperature_c": _told(torch.cuda.temperature, device),
        "power_w": _told(torch.cuda.power_draw, device, scale=1e-3),  # told in mW
    }


def _told(ask: Any, device: str, scale: float = 1.0) -> float | None:
    """What NVML says; None where it does not."""
    import pynvml

    try:
        return scale * ask(device)
    except (RuntimeError, pynvml.NVMLError):
        return None


def compared(everyones: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """What all ranks have alike; and of all else that should be alike, the ranks by value."""
    agreed: dict[str, Any] = {}
    differing: dict[str, dict[str, str]] = {}
    names = dict.fromkeys(name for of in everyones for name in of)
    for name in (name for name in names if name not in OWN):
        ranks = {rank: json.dumps(of.get(name)) for rank, of in enumerate(everyones)}
        if len({*ranks.values()}) == 1:
            agreed[name] = everyones[0][name]
        else:
            differing[name] = by_value(ranks)
    return agreed, differing


def spread(everyones: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Least and most of what ranks have of their own."""
    found: dict[str, list[float]] = {}
    for name in OWN:
        numbers = [of[name] for of in everyones if isinstance(of.get(name), int | float)]
        if numbers:
            found[name] = [min(numbers), max(numbers)]
    return found
