"""What the software of a row did: that of its source as documented, or a default by its date and its chip (torch-free).

All of it stands in ``published/stacks.yaml``. What a row says of itself changes either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...documents import read_yaml
from .peers import Stack

PATH = Path(__file__).parent / "stacks.yaml"
NOT_TOLD = "9999-12-31"  # a row without a date ran what is newest


@dataclass(frozen=True)
class Vintage:
    """From ``since`` on, runs on ``devices`` (all, where none is named) of plans that shard parameters, or do not."""

    since: str
    sharded: bool
    devices: tuple[str, ...]
    stack: Stack


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    return read_yaml(PATH, "the stacks", "restore the file")


_FIELDS = {f.name for f in fields(Stack)}


def _stack(entry: dict[str, Any]) -> Stack:
    values = {key: value for key, value in entry.items() if key in _FIELDS}
    return Stack(**{**values, "fused": frozenset(entry["fused"])})


@lru_cache(maxsize=1)
def _described() -> list[dict[str, Any]]:
    """Entries of sources, each whole."""
    by_name = {entry["name"]: entry for entry in _read()["stacks"]}

    def whole(entry: dict[str, Any]) -> dict[str, Any]:
        return {**whole(by_name[entry["like"]]), **entry} if "like" in entry else entry

    own = ("title", "framework", "dtype")  # what a row must match is never taken from another
    return [
        {key: value for key, value in whole(entry).items() if key not in own or key in entry}
        for entry in by_name.values()
    ]


@lru_cache(maxsize=1)
def vintages() -> tuple[Vintage, ...]:
    """The defaults, as the file has them: of those that hold for a row, the last is its."""
    common = _read()["default"]
    return tuple(
        Vintage(entry.get("since", ""), entry["sharded"], tuple(entry.get("devices", ())), _stack({**common, **entry}))
        for entry in _read()["vintages"]
    )


def default_stack(*, since: str, sharded: bool, device: str) -> Stack:
    """The default of a day (``2024-06-13``), of plans that shard parameters (FSDP) or do not, on a chip (``sm_90``)."""
    fit = [v for v in vintages() if v.sharded == sharded and v.since <= since and device in (v.devices or (device,))]
    return fit[-1].stack


def chips() -> list[dict[str, Any]]:
    """The hardware that rows name, and the cluster file of each."""
    return _read()["hardware"]


def stack_of(row: dict[str, Any], device: Callable[[], str], *, described: bool = True) -> Stack:
    """The first stack whose title (and framework) are part of the row's, changed by what the row says of itself.

    The default of its day and its chip, changed so, where there is none, and where nothing is to be known of it
    (``described``). ``device``: the chip, asked for only then.
    """
    source, plan = row["source"], row["plan"]
    title, framework, dtype = str(source.get("title")), str(plan.get("framework")), str(plan.get("dtype"))
    for entry in _described() if described else ():
        if entry["title"] in title and entry.get("framework", "") in framework and entry.get("dtype", "") in dtype:
            return _overridden(_stack(entry), row)
    since = source.get("date") or NOT_TOLD
    return _overridden(default_stack(since=since, sharded=bool(plan.get("fsdp")), device=device()), row)


def _overridden(stack: Stack, row: dict[str, Any]) -> Stack:
    plan = row["plan"]
    fused = set(stack.fused)
    if plan.get("compile") is True:
        stack = replace(stack, eager=False)
        fused |= {"norm", "rope", "activation", "residual"}
    if "RMS kernel" in str(plan.get("attention")):
        fused.add("norm")
    dtype, fsdp = str(plan.get("dtype")), plan.get("fsdp")
    if "PURE" in dtype:
        stack = replace(stack, reduce_bytes=2)
    elif "fp32 reduce" in dtype:
        stack = replace(stack, reduce_bytes=4)
    if fsdp and fsdp is not True:
        stack = replace(stack, shard="grad_op" if "ZeRO-2" in str(fsdp) else "fsdp")
    elif "ZeRO-1" in str(plan.get("optimizer")):
        stack = replace(stack, shard="zero1")
    return replace(stack, fused=frozenset(fused))
