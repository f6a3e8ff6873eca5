"""``cinemesh kernels``: what would run for a model and plan, and why the others would not (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CinemeshError
from ...kernels.catalogue import OPTIONAL, PACKAGES, share
from ...kernels.counts import DTYPE_BYTES
from ...kernels.ops import OPS
from ...kernels.packages import missing
from ...kernels.rates import rate
from ...kernels.selection import Choice, override_of, overrides, select
from ...model.config import preset
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.passes.pipeline import prepare
from ..plans import read_plan
from . import compile_check
from .show import DTYPES, latent_of
from .tables import new_console, plain_table, quantity

DEFAULT_PLANS = {"movie-gen-30b": "tp=4,cp=2,dp_shard=768"}  # others: one GPU
SHAPE_LABELS = "tsblhkdfpn"  # labels shown of a call: tokens, keys, samples, text tokens, heads, head dim, width, ...


@dataclass(frozen=True)
class Line:
    """One op at one combination of dtype and sizes, how often a step calls it, and what runs it."""

    op: str
    dtype: str
    sizes: Mapping[str, int]
    calls: int
    bytes: int
    choice: Choice

    @property
    def shape(self) -> str:
        return " ".join(f"{label}={self.sizes[label]}" for label in SHAPE_LABELS if label in self.sizes)


def run(
    *,
    model: str,
    plan: str | None,
    latent: str | None,
    batch: int,
    device: str | None,
    target: str | None,
    tune: bool,
    as_json: bool,
) -> None:
    """Body of the command; one of: the table of choices, the compile check, the tuning of this GPU's tiles."""
    config = preset(model)
    shape = latent_of(model, latent)
    if target and tune:
        raise CinemeshError("--compile needs no GPU and --tune one", remedy="give one of the two")
    if target:
        given = read_plan(plan) if plan else None
        compile_check.run(config, given, BatchShape(batch, shape), target=target, as_json=as_json)
        return
    chosen = read_plan(DEFAULT_PLANS.get(model, "") if plan is None else plan)
    program = prepare(build_step(config, chosen, BatchShape(batch, shape)), backend="nccl")
    if tune:
        from .tune import run as measure

        measure(program)
        return
    where, origin = (device, "asked for") if device else _device_here()
    found = list(lines(program, where))
    if as_json:
        print(json.dumps(_as_json(found, where, origin, model, chosen), indent=1))
        return
    _print(found, where, origin, model, chosen)


# -- what would run ---------------------------------------------------------------------------------------------------


def lines(program: Program, device: str) -> Iterator[Line]:
    """Every distinct call of a step: optional packages as installed here, torch and Triton taken for granted."""
    absent = {package: reason for package, reason in missing().items() if package in OPTIONAL}
    wanted = overrides()
    calls: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[int]] = {}
    for op in program.ops:
        if op.kind not in OPS:
            continue
        floating = (program.buffers[name].dtype for name in (*op.inputs, *op.outputs))
        dtype = next((name for name in floating if name not in ("bool", "int64")), "bool")
        sizes = {label: size for label, size in program.label_sizes(op).items() if label in SHAPE_LABELS}
        key = (op.kind, dtype, tuple(sorted(sizes.items())))
        entry = calls.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += program.bytes_moved(op)
    for (kind, dtype, sizes), (count, moved) in calls.items():
        override = override_of(kind, wanted)
        choice = select(kind, device, dtype=dtype, sizes=dict(sizes), missing=absent, override=override)
        yield Line(kind, dtype, dict(sizes), count, moved, choice)


def _device_here() -> tuple[str, str]:
    """(``sm_90``, where that comes from): the first GPU of this machine, an H100 where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        return "sm_90", "an H100 is assumed: no GPU here; --device names another"
    return f"sm_{major}{minor}", f"{name} of this machine"


def _reasons(line: Line) -> dict[str, str]:
    """Package -> why it does not run; one reason a package, none for the chosen one."""
    found: dict[str, str] = {}
    for entry, reason in line.choice.others:
        if entry.package != line.choice.entry.package:
            found[entry.package] = reason  # of several devices' entries the usable one comes last
    return found


def _as_json(found: list[Line], device: str, origin: str, model: str, plan: Plan) -> dict[str, Any]:
    ops = []
    for line in found:
        entry = line.choice.entry
        known = rate(entry.rate_class)
        item = DTYPE_BYTES[line.dtype]
        ops.append(
            {
                "op": line.op,
                "dtype": line.dtype,
                "sizes": dict(line.sizes),
                "calls": line.calls,
                "bytes": line.bytes,
                "package": entry.package,
                "function": f"{entry.module}.{entry.function}",
                "rate_class": entry.rate_class,
                "share": share(entry),
                "limit": known.limit,
                "origin": known.origin,
                "workspace_bytes": entry.workspace(line.sizes, item),
                "others": _reasons(line),
            }
        )
    return {"model": model, "plan": plan.to_dict(), "device": device, "device_origin": origin, "ops": ops}


def _print(found: list[Line], device: str, origin: str, model: str, plan: Plan) -> None:
    out = new_console()
    out.print(f"{model}, {plan.equation()}, {plan.dtype}, on {device}: {origin}\n")
    table = plain_table("op", "calls", "local shape", "", "runs", "rate class", "share of", right=("calls",))
    of: dict[tuple[str, str], dict[str, None]] = {}
    first = {line.op: i for i, line in reversed(list(enumerate(found)))}
    for line in sorted(found, key=lambda line: first[line.op]):
        entry = line.choice.entry
        dtype = DTYPES.get(line.dtype, line.dtype)
        rated = f"{share(entry):.2f} {rate(entry.rate_class).limit}"
        table.add_row(line.op, f"{line.calls:,}", line.shape, dtype, entry.package, entry.rate_class, rated)
        for package, reason in _reasons(line).items():
            of.setdefault((package, reason), {})[line.op] = None
    out.print(table)
    out.print("\nwhy not the others", style="bold")
    table = plain_table("package", "does not run, since", "ops")
    for (package, reason), ops in sorted(of.items(), key=lambda item: PACKAGES.index(item[0][0])):
        table.add_row(package, reason, ", ".join(ops))
    out.print(table)
    total = sum(line.bytes for line in found)
    out.print(f"\n{sum(line.calls for line in found):,} calls a step, {quantity(total, 'B')} read and written at least")
